import multiprocessing
import threading

import pytest
import torch

from pipeline.clip_model import open_model
from pipeline.errors import StageError
from training.data import open_batches, prefetch
from training.images import read_crop
from training.index import list_tars, read_index


@pytest.fixture(scope="module")
def opened():
    return open_model("winnow-vit-tiny")


def load(opened, folder, *, steps=range(6), **settings):
    index = read_index(list_tars(str(folder)), tokenize=opened.tokenize, quiet=True)
    settings = {"batch_size": 32, "seed": 1} | settings
    return index, list(open_batches(index, crop=read_crop(opened.train_transform), steps=steps, **settings))


def assert_equal(first, second):
    assert len(first) == len(second)
    assert all(torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_give_the_same_batches(opened, squares):
    assert_equal(load(opened, squares)[1], load(opened, squares, num_workers=2)[1])


def test_a_later_start_gives_the_same_batches(opened, squares):
    assert_equal(load(opened, squares)[1][4:], load(opened, squares, steps=range(4, 6))[1])


def test_another_seed_gives_other_rows(opened, squares):
    _, first = load(opened, squares)
    _, second = load(opened, squares, seed=2)
    assert not torch.equal(first[0].row_B, second[0].row_B)


def test_image_and_caption_belong_together(opened, squares, square_rows):
    _, batches = load(opened, squares)
    captions = opened.tokenize([caption for caption, _ in square_rows(256)])
    batch = batches[0]
    assert torch.equal(batch.token_BL.long(), captions[batch.row_B])
    assert batch.pixel_BHWC.shape == (32, 32, 32, 3) and batch.pixel_BHWC.dtype == torch.uint8


def test_one_epoch_has_every_row_once(opened, squares):
    _, batches = load(opened, squares, steps=range(8))
    assert torch.equal(torch.cat([b.row_B for b in batches]).sort().values, torch.arange(256))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_unreadable_images_are_replaced_alike_and_reported(opened, tmp_path, write_shards, square_rows):
    rows = square_rows(40)
    rows[3], rows[17] = (rows[3][0], b"broken"), (rows[17][0], rows[17][1][:50])
    _, batches = load(opened, write_shards(tmp_path, rows), batch_size=20, steps=range(4))
    assert_equal(batches, load(opened, tmp_path, batch_size=20, steps=range(4), num_workers=2)[1])
    used, unreadable = (torch.cat([getattr(b, name) for b in batches]) for name in ("row_B", "unreadable"))
    assert set(unreadable.tolist()) == {3, 17} and len(unreadable) >= 4
    assert len(used) == 80 and not {3, 17} & set(used.tolist())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_only_unreadable_images_is_an_error(opened, tmp_path, write_shards, num_workers):
    with pytest.raises(StageError, match=r"^train: 100 rows .* no readable image") as caught:
        load(opened, write_shards(tmp_path, [("a", b"x"), ("b", b"y")]), batch_size=2, num_workers=num_workers)
    assert "Traceback" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_loader_process_that_is_killed_is_named(opened, squares):
    index = read_index(list_tars(str(squares)), tokenize=opened.tokenize, quiet=True)
    settings = {"crop": read_crop(opened.train_transform), "batch_size": 32, "seed": 0, "num_workers": 1}
    batches = open_batches(index, steps=range(1000), **settings)
    next(batches)
    (process,) = multiprocessing.active_children()
    process.kill()
    with pytest.raises(StageError, match=r"^train: a process that reads ahead was lost: .* lower num_workers"):
        list(batches)


def test_prefetch_passes_items_and_errors_and_stops_its_thread():
    def fail():
        yield 1
        raise ValueError("bad item")

    assert list(prefetch(range(9), depth=2)) == list(range(9))
    with pytest.raises(ValueError, match="bad item"):
        list(prefetch(fail(), depth=2))
    items = prefetch(iter(range(10**9)), depth=2)
    assert [next(items), next(items)] == [0, 1]
    items.close()
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]
