import numpy as np
import pytest
import torch

from pipeline.clip_model import open_model
from pipeline.errors import ConfigError, PoolError
from training.captioned import Classes, TrainSet, as_sets, divide_epoch, identify_sets, read_sets, split_heldout
from training.data import open_batches
from training.images import read_crop
from training.index import TarReader, list_tars
from training.order import order_epoch, rows_at

CAPTIONS = (("a cat", "one cat", "the cat"), ("a dog", "one dog", "the dog"))


@pytest.fixture(scope="module")
def opened():
    return open_model("winnow-vit-tiny")


@pytest.fixture(scope="module")
def sets(tmp_path_factory, write_tar, write_shards, square_rows):
    """Pairs, a classification set in tars, and one in files: 40, 10 and 6 rows, all different images."""
    folder, rows = tmp_path_factory.mktemp("sets"), square_rows(56)
    pairs = write_shards(folder / "pairs", rows[:40])
    labelled = enumerate(rows[40:50])
    tar = write_tar(
        folder / "0.tar",
        [m for n, (_, image) in labelled for m in ((f"{n}.png", image), (f"{n}.cls", str(n % 2).encode()))],
    )
    files = [folder / f"{n}.png" for n in range(6)]
    for file, (_, image) in zip(files, rows[50:], strict=True):
        file.write_bytes(image)
    return (
        TrainSet("pairs", tuple(list_tars(str(pairs)))),
        TrainSet("tars", (str(tar),), classes=Classes(CAPTIONS)),
        TrainSet("files", tuple(map(str, files)), classes=Classes(CAPTIONS, (2, 4))),
    )


def test_every_image_has_its_captions(opened, sets, square_rows):
    index, rows = read_sets(sets, tokenize=opened.tokenize, quiet=True), square_rows(56)
    reader = TarReader(index.urls)
    places = zip(index.tar_N.tolist(), index.offset_N.tolist(), index.size_N.tolist(), strict=True)
    assert [reader.read(*place) for place in places] == [image for _, image in rows]
    reader.close()
    labels = [n % 2 for n in range(10)] + [0, 0, 1, 1, 1, 1]
    wanted = [(caption,) for caption, _ in rows[:40]] + [CAPTIONS[label] for label in labels]
    for first, num, captions in zip(index.caption_N, index.num_captions_N, wanted, strict=True):
        assert np.array_equal(index.token_UL[first : first + num], opened.tokenize(list(captions)).numpy())
    assert [(part.name, part.num_rows, part.per_epoch) for part in index.sets] == [
        ("pairs", 40, 40),
        ("tars", 10, 10),
        ("files", 6, 6),
    ]


def test_a_caption_is_drawn_anew_each_epoch_and_evenly(opened, sets):
    index = read_sets(sets[1:2], tokenize=opened.tokenize, quiet=True)
    crop = read_crop(opened.train_transform)
    batches = list(open_batches(index, crop=crop, batch_size=10, seed=0, steps=range(90)))
    texts = opened.tokenize([caption for captions in CAPTIONS for caption in captions])
    drawn = torch.stack([batch.token_BL for batch in batches])
    number_SB = (drawn[:, :, None] == texts).all(dim=-1).int().argmax(dim=-1)
    label_SB = torch.stack([batch.row_B for batch in batches]) % 2
    assert torch.equal(number_SB // 3, label_SB)
    times = torch.bincount(number_SB.flatten(), minlength=6)
    assert times.sum() == 900 and times.min() > 100
    again = list(open_batches(index, crop=crop, batch_size=10, seed=0, steps=range(40, 42)))
    assert torch.equal(again[0].token_BL, batches[40].token_BL) and torch.equal(again[1].token_BL, batches[41].token_BL)


@pytest.mark.parametrize("sizes", [[(7, 5), (4, 6)], [(1, 3), (50, 20), (9, 37)], [(6, 1), (6, 11)]])
def test_shares_are_exact_in_every_epoch(sizes):
    length, starts = sum(quota for _, quota in sizes), np.cumsum([0] + [num for num, _ in sizes])
    rows = np.concatenate([order_epoch(5, epoch, tuple(sizes)) for epoch in range(8)])
    sets = np.searchsorted(starts, rows, side="right") - 1
    for epoch in sets.reshape(8, length):
        assert [int((epoch == n).sum()) for n in range(len(sizes))] == [quota for _, quota in sizes]
    for number, (num_rows, quota) in enumerate(sizes):
        times = np.bincount(rows[sets == number] - starts[number], minlength=num_rows)
        assert set(times) <= {8 * quota // num_rows, -(-8 * quota // num_rows)}
    assert any((np.diff(epoch) < 0).any() for epoch in sets.reshape(8, length)), "the sets stand in blocks"


def test_without_shares_a_union_is_one_big_set():
    union = np.concatenate([order_epoch(2, epoch, ((7, 7), (4, 4))) for epoch in range(5)])
    assert np.array_equal(union, rows_at(range(55), num_rows=11, seed=2))


def test_epochs_are_divided_by_largest_remainders():
    def divide(shares, num_rows):
        return divide_epoch([TrainSet(str(n), (), share) for n, share in enumerate(shares)], num_rows)

    assert divide([None, None], [5, 6]) == [5, 6]
    assert divide([1, 1], [90, 10]) == [50, 50]
    assert divide([1, 1, 1], [80, 10, 10]) == [34, 33, 33]
    assert divide([0.7, 0.2], [3, 6]) == [7, 2]
    with pytest.raises(ConfigError, match="give every set a share, or none"):
        divide([1, None], [5, 6])
    with pytest.raises(ConfigError, match="leave a set without one"):
        divide([1, 1e-9], [5, 6])


def test_an_unreadable_image_is_replaced_from_its_own_set(opened, tmp_path, write_shards, square_rows):
    rows = square_rows(30)
    write_shards(tmp_path / "good", rows[:20])
    write_shards(tmp_path / "half", [(c, b"broken" if n % 2 else i) for n, (c, i) in enumerate(rows[20:])])
    sets = [TrainSet(name, tuple(list_tars(str(tmp_path / name))), 1) for name in ("good", "half")]
    index = read_sets(sets, tokenize=opened.tokenize, quiet=True)
    batches = open_batches(index, crop=read_crop(opened.train_transform), batch_size=30, seed=0, steps=range(2))
    assert [int((batch.row_B >= 20).sum()) for batch in batches] == [15, 15]


@pytest.mark.parametrize("label", ["2", "-1", "cat", ""])
def test_a_label_that_is_no_class_is_an_error(opened, tmp_path, write_tar, square_rows, label):
    tar = write_tar(tmp_path / "0.tar", [("0.png", square_rows(1)[0][1]), ("0.cls", label.encode())])
    with pytest.raises(PoolError, match=r"label .*2 classes"):
        read_sets([TrainSet("x", (str(tar),), classes=Classes(CAPTIONS))], tokenize=opened.tokenize, quiet=True)


def test_an_image_without_a_label_is_counted(opened, tmp_path, write_tar, square_rows):
    image = square_rows(1)[0][1]
    tar = write_tar(tmp_path / "0.tar", [("0.png", image), ("0.cls", b"1\n"), ("1.png", image)])
    index = read_sets([TrainSet("x", (str(tar),), classes=Classes(CAPTIONS))], tokenize=opened.tokenize, quiet=True)
    assert index.counts.failed == {"missing_label": 1} and index.num_rows == 1


def test_held_out_rows_are_apart_and_accounted(opened, sets):
    index = read_sets(sets[:1], tokenize=opened.tokenize, quiet=True)
    train, heldout = split_heldout(index, 7, seed=1)
    assert train.sets[0].counts.dropped == {"heldout": 7} and train.num_rows == 33
    train.counts.check("test")
    assert sorted([*train.offset_N, *heldout.offset_N]) == sorted(index.offset_N)
    assert not np.array_equal(split_heldout(index, 7, seed=2)[1].offset_N, heldout.offset_N)
    with pytest.raises(ConfigError, match="heldout is 40, but there are 40"):
        split_heldout(index, 40, seed=1)


def test_copies_of_held_out_rows_are_not_trained_on(opened, tmp_path, write_shards, square_rows):
    rows = square_rows(20)
    index = read_sets(as_sets(str(write_shards(tmp_path, rows + rows[:10]))), tokenize=opened.tokenize, quiet=True)
    train, heldout = split_heldout(index, 6, seed=0)
    copies = train.sets[0].counts.dropped["heldout_copy"]
    assert 0 < copies < 6 and not np.isin(train.twin_N, heldout.twin_N).any()
    assert (train.num_rows, train.sets[0].per_epoch, heldout.num_rows) == (24 - copies, 24 - copies, 6)
    train.counts.check("test")
    again = read_sets(as_sets(str(write_shards(tmp_path / "b", rows[:1] * 3))), tokenize=opened.tokenize, quiet=True)
    with pytest.raises(ConfigError, match="heldout is 1, and the other 2 usable rows are copies"):
        split_heldout(again, 1, seed=0)


def test_sets_are_told_apart(sets):
    hashes = identify_sets(sets)
    assert list(hashes) == ["pairs", "tars", "files"] and len(set(hashes.values())) == 3
    renamed = TrainSet("tars", sets[1].urls, classes=Classes((CAPTIONS[0], ("a wolf",))))
    assert identify_sets([renamed])["tars"] != hashes["tars"]
    with pytest.raises(ConfigError, match="two sets are called 'tars'"):
        as_sets([sets[1], renamed])
