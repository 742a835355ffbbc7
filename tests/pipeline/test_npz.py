import io
import zipfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from pipeline.errors import PoolError
from pipeline.npz import HEADER_AHEAD_BYTES, list_arrays, read_array_rows, unpack_array

SHAPE = (40, 6)


def make_matrix(kind: str = "<f2") -> np.ndarray:
    return np.random.default_rng(0).normal(size=SHAPE).astype(kind)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("kind", ["<f2", "<f4", ">f4", "<f8"])
@pytest.mark.parametrize("rows", [[], [0], [39], [3, 4, 5], [0, 1, 20, 38, 39], list(range(40)), [7, 7, 9]])
def test_rows_are_those_that_numpy_reads(tmp_path: Path, save, kind: str, rows: list[int]) -> None:
    matrix, url = make_matrix(kind), str(tmp_path / "a.npz")
    save(url, l14_txt=matrix + 1, l14_img=matrix, dedup=np.arange(5))
    arrays = list_arrays(url)
    assert sorted(arrays) == ["l14_img", "l14_txt"]
    found = read_array_rows(arrays["l14_img"], np.array(rows, np.int64))
    assert found.dtype == matrix.dtype and np.array_equal(found, matrix[rows])


def test_matrices_by_column_and_of_other_types_are_passed_over(tmp_path: Path) -> None:
    url = str(tmp_path / "a.npz")
    others = {"c": np.zeros((2, 2, 2)), "e": np.zeros((2, 2), np.longdouble), "f": np.zeros((2, 0))}
    np.savez(url, a=np.asfortranarray(make_matrix()), b=np.zeros((2, 2), int), d=make_matrix(), **others)
    assert list(list_arrays(url)) == ["d"]


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    url = str(tmp_path / "a.npz")
    np.savez(url, a=np.array([{"x": 1}], object))
    assert list_arrays(url) == {}


@pytest.mark.parametrize("keep", [0, 30, 200, 700])
def test_a_file_cut_short_is_an_error(tmp_path: Path, keep: int) -> None:
    url = tmp_path / "a.npz"
    np.savez(url, a=make_matrix())
    url.write_bytes(url.read_bytes()[:keep])
    with pytest.raises(PoolError, match=r"a\.npz cannot be read as npz"):
        list_arrays(str(url))


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_header_that_promises_more_than_there_is_is_an_error(tmp_path: Path, packing: int) -> None:
    content = io.BytesIO()
    np.lib.format.write_array(content, make_matrix())
    with zipfile.ZipFile(tmp_path / "a.npz", "w", packing) as archive:
        archive.writestr("a.npy", content.getvalue()[:-100])
        archive.writestr("b.npy", content.getvalue())
    with pytest.raises(PoolError, match=r"a\.npy has 508 bytes, which is not what its header says"):
        list_arrays(str(tmp_path / "a.npz"))
    assert list(list_arrays(str(tmp_path / "a.npz"), ["b"])) == ["b"]


def test_a_header_may_promise_anything(tmp_path: Path) -> None:
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": "<f2", "fortran_order": False, "shape": (6, 10**13)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", content.getvalue())
    with pytest.raises(PoolError, match="not what its header says"):
        list_arrays(str(tmp_path / "a.npz"))


def spoil_deflate(raw: bytearray) -> None:
    raw[raw.index(b"a.npy") + len(b"a.npy") + ZIP64_EXTRA_BYTES] = 0b111  # no kind of block


def spoil_header(raw: bytearray) -> None:
    raw[:] = raw.replace(b"(4000, 6), }", b"(4000, 6),  ")


def encrypt(raw: bytearray) -> None:
    raw[6] |= 1
    raw[raw.index(b"PK\1\2") + 8] |= 1


def move_directory(raw: bytearray) -> None:
    raw[-6 - 3] = 0x7F  # of the directory's offset: what zipfile then looks for is before the file


ZIP64_EXTRA_BYTES = 20


@pytest.mark.parametrize(
    ("save", "spoil"),
    [
        (np.savez_compressed, spoil_deflate),
        (np.savez, spoil_header),
        (np.savez, encrypt),
        (np.savez, move_directory),
    ],
)
def test_damage_of_any_kind_is_an_error(tmp_path: Path, save, spoil) -> None:
    url = tmp_path / "a.npz"
    save(url, a=np.tile(make_matrix(), (100, 1)))
    raw = bytearray(url.read_bytes())
    spoil(raw)
    assert raw != url.read_bytes()
    url.write_bytes(raw)
    with pytest.raises(PoolError, match=r"a\.npz cannot be read as npz"):
        list_arrays(str(url))


def test_a_file_that_cannot_be_read_now_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        list_arrays(str(tmp_path))


def test_other_compressions_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a.npy", b"x")
    with pytest.raises(PoolError, match=r"compressed in a way that numpy is not. Save it with np\.savez"):
        list_arrays(str(tmp_path / "a.npz"))


def test_a_compressed_array_is_unpacked_once(tmp_path: Path) -> None:
    url, matrix = tmp_path / "a.npz", make_matrix()
    np.savez_compressed(url, a=matrix, none=matrix[:0])
    array, none = map(unpack_array, list_arrays(str(url)).values())
    url.unlink()
    assert np.array_equal(read_array_rows(array, np.array([5, 5, 39])), matrix[[5, 5, 39]])
    assert read_array_rows(none, np.array([], np.int64)).shape == (0, 6)


@pytest.mark.parametrize(("save", "place"), [(np.savez_compressed, 16), (np.savez, 16), (np.savez, -1000)])
def test_a_wrong_checksum_and_a_flipped_bit_show_before_rows_are_read(tmp_path: Path, save, place: int) -> None:
    url = tmp_path / "a.npz"
    save(url, a=np.random.default_rng(0).normal(size=(400, 60)))
    raw = bytearray(url.read_bytes())
    raw[raw.index(b"PK\1\2") + place] ^= 1
    url.write_bytes(raw)
    array = list_arrays(str(url))["a"]
    with pytest.raises(PoolError, match="Bad CRC-32"):
        unpack_array(array)


class Counted(fsspec.AbstractFileSystem):
    """Files of this machine as a remote store has them; `asked` are the numbers of bytes that were read."""

    protocol = "counted"
    asked: list[int] = []  # noqa: RUF012

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        return {"name": path, "size": Path(path).stat().st_size, "type": "file"}

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **kwargs: Any) -> Any:
        return CountedFile(self, path, mode, block_size=block_size, cache_type="readahead")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        found = Path(path).read_bytes()[start:end]
        self.asked.append(len(found))
        return found


class CountedFile(fsspec.spec.AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        return self.fs.cat_file(self.path, start, end)


def test_of_a_remote_file_only_what_is_wanted_is_read(tmp_path: Path) -> None:
    fsspec.register_implementation("counted", Counted, clobber=True)
    matrix, Counted.asked = np.zeros((1000, 600), np.float16), []
    np.savez(tmp_path / "a.npz", a=matrix, b=matrix)
    array = list_arrays(f"counted://{tmp_path}/a.npz", ["b"])["b"]
    assert sum(Counted.asked) < 6 * HEADER_AHEAD_BYTES
    Counted.asked.clear()
    for start in range(0, 1000, 250):
        read_array_rows(array, np.arange(start, start + 250))
    assert Counted.asked == [250 * 600 * 2] * 4
