import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import PoolError
from pipeline.npz import list_arrays, read_array_rows

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
    np.savez(url, a=np.asfortranarray(make_matrix()), b=np.zeros((2, 2), int), c=np.zeros((2, 2, 2)), d=make_matrix())
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


def test_a_header_that_promises_more_than_there_is_is_an_error(tmp_path: Path) -> None:
    content = io.BytesIO()
    np.lib.format.write_array(content, make_matrix())
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", content.getvalue()[:-100])
    with pytest.raises(PoolError, match="shorter than its header says"):
        list_arrays(str(tmp_path / "a.npz"))
