import tarfile
from functools import partial

import fsspec
import numpy as np
import pytest
import torch

from pipeline.clip_model import open_model
from pipeline.errors import PoolError, WinnowError
from training.index import TOKENIZE_AT_ONCE, TarReader, list_tars, read_index, tokenize_all


@pytest.fixture(scope="module")
def tokenize():
    return open_model("winnow-vit-tiny").tokenize


def members(rows):
    named = [(f"{n:04d}", caption, image) for n, (caption, image) in enumerate(rows)]
    return [pair for key, caption, image in named for pair in ((f"{key}.png", image), (f"{key}.txt", caption.encode()))]


def test_images_lie_where_the_index_says(tmp_path, squares, square_rows, tokenize):
    index = read_index(list_tars(str(squares)), tokenize=tokenize, quiet=True)
    reader = TarReader(index.urls)
    places = zip(index.tar_N.tolist(), index.offset_N.tolist(), index.size_N.tolist(), strict=True)
    assert [reader.read(*place) for place in places] == [image for _, image in square_rows(256)]
    reader.close()
    wanted = tokenize([caption for caption, _ in square_rows(256)]).numpy()
    assert np.array_equal(index.token_UL[index.caption_N], wanted)


@pytest.mark.parametrize("caption", ["", "ein gelbes Quadrat auf Grün", "一个红色的方块 " * 40, "word " * 200])
def test_odd_captions_are_kept(tmp_path, write_shards, square_rows, tokenize, caption):
    write_shards(tmp_path, [(caption, square_rows(1)[0][1])] * 3)
    index = read_index(list_tars(str(tmp_path)), tokenize=tokenize, quiet=True)
    assert index.num_rows == 3 and index.token_UL.shape == (1, 16)


def test_an_image_too_large_for_an_index_is_counted(tmp_path, write_tar, square_rows, tokenize):
    """The tar is written with a hole, which takes no room."""
    big, head = tarfile.TarInfo("a.png"), tarfile.TarInfo("a.txt")
    big.size, head.size = 2**31, 3
    with (tmp_path / "0.tar").open("wb") as file:
        file.write(big.tobuf())
        file.seek(big.size, 1)
        file.write(head.tobuf() + b"abc".ljust(512, b"\0") + bytes(1024))
    write_tar(tmp_path / "1.tar", members(square_rows(3)))
    index = read_index(list_tars(str(tmp_path)), tokenize=tokenize, quiet=True)
    assert (index.counts.kept, index.counts.failed) == (3, {"oversized_image": 1})


def test_rows_without_image_or_caption_are_counted(tmp_path, write_tar, square_rows, tokenize):
    rows = members(square_rows(6))
    left_out = {"0001.png", "0003.txt", "0004.txt"}
    write_tar(tmp_path / "0.tar", [("notes.md", b"x"), *(m for m in rows if m[0] not in left_out)])
    index = read_index(list_tars(str(tmp_path)), tokenize=tokenize, quiet=True)
    assert index.num_rows == 3
    assert index.counts.failed == {"missing_image": 2, "null_caption": 2}
    index.counts.check("test")


@pytest.mark.parametrize("protocol", ["", "memory://"])
def test_a_tar_cut_short_gives_the_rows_before_the_cut(tmp_path, write_tar, square_rows, tokenize, caplog, protocol):
    whole = write_tar(tmp_path / "0.tar", members(square_rows(10))).read_bytes()
    url = f"{protocol}{tmp_path}/cut.tar"
    with fsspec.open(url, "wb") as file:
        file.write(whole[: 512 * 4 * 6 + 700])
    index = read_index([url], tokenize=tokenize, quiet=True)
    assert 4 <= index.num_rows <= 6
    assert index.counts.failed == {"truncated_tar": 1}
    assert "cut.tar" in caplog.text


def test_remote_tars_give_the_same_rows(tmp_path, write_tar, square_rows, tokenize):
    path = write_tar(tmp_path / "0.tar", members(square_rows(5)))
    with fsspec.open("memory://remote/0.tar", "wb") as file:
        file.write(path.read_bytes())
    local = read_index([str(path)], tokenize=tokenize, quiet=True)
    remote = read_index(list_tars("memory://remote"), tokenize=tokenize, quiet=True)
    for name in ("tar_N", "offset_N", "size_N", "caption_N", "token_UL"):
        assert np.array_equal(getattr(local, name), getattr(remote, name))
    place = (0, int(remote.offset_N[3]), int(remote.size_N[3]))
    assert TarReader(remote.urls).read(*place) == TarReader(local.urls).read(*place) == square_rows(5)[3][1]


def test_any_number_of_processes_gives_the_same_index(tmp_path, write_tar, square_rows, tokenize):
    rows = members(square_rows(60))
    for n in range(4):
        write_tar(tmp_path / f"{n}.tar", rows[n * 30 : n * 30 + 27])  # every tar ends without an image's caption
    cut = (tmp_path / "3.tar").read_bytes()[: 512 * 4 * 6 + 700]
    (tmp_path / "3.tar").write_bytes(cut)
    alone, together = (
        read_index(list_tars(str(tmp_path)), tokenize=tokenize, quiet=True, num_processes=n) for n in (1, 2)
    )
    assert alone.counts == together.counts and alone.counts.failed == {"null_caption": 3, "truncated_tar": 1}
    for name in ("tar_N", "offset_N", "size_N", "caption_N", "twin_N", "token_UL"):
        one, other = getattr(alone, name), getattr(together, name)
        assert one.dtype == other.dtype and np.array_equal(one, other)
    with pytest.raises(WinnowError, match=r"no\.tar"):
        read_index([str(tmp_path / "0.tar"), str(tmp_path / "no.tar")], tokenize=tokenize, num_processes=2)


def test_tokens_take_two_bytes_where_they_fit():
    captions = [str(n) for n in range(TOKENIZE_AT_ONCE + 10)]

    def count(texts: list[str], most: int = 65_535) -> torch.Tensor:
        return torch.tensor([[min(int(text) * 16, most)] for text in texts])

    small, large = (tokenize_all(captions, partial(count, most=most)) for most in (65_535, 65_536))
    assert small.dtype == np.uint16 and large.dtype == np.int32
    assert large.max() == 65_536 and np.array_equal(np.minimum(large, 65_535), small)


def test_no_usable_row_says_why(tmp_path, write_tar, tokenize):
    write_tar(tmp_path / "0.tar", [("0.txt", b"a"), ("1.txt", b"b")])
    with pytest.raises(PoolError, match="missing_image: 2"):
        read_index(list_tars(str(tmp_path)), tokenize=tokenize, quiet=True)
    write_tar(tmp_path / "0.tar", [])
    with pytest.raises(PoolError, match="empty"):
        read_index(list_tars(str(tmp_path)), tokenize=tokenize, quiet=True)


def test_no_tar_says_so(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(PoolError, match=r"no \.tar file"):
        list_tars(str(tmp_path))
