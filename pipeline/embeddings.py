"""Stored embeddings -> numpy matrices: columns of a batch, and whole sets in parquet, npz, npy and pt files.

A .pt file is one of torch.save: DataComp's ImageNet embeddings (a dict whose key is image_features) and its centroids
(a bare numpy array, baselines/image_based_clustering.py:214).  Neither can run code here: tensors load with
weights_only, and the array through an unpickler that knows nothing else.
"""

import codecs
import io
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ConfigError, PoolError, check_name
from pipeline.manifest import hash_json, read_manifest
from pipeline.npz import list_arrays, read_array_rows, unpack_array
from pipeline.schemas import ARRAYS_SUFFIX, PARQUET_SUFFIX
from pipeline.storage import expand, is_folder, is_local, join, name_of, open_file, read_bytes, sha256_of_file

NPY_SUFFIX, TORCH_SUFFIX = ".npy", ".pt"
IMAGE_FEATURES = "image_features"
"""Key of the matrix in DataComp's files of ImageNet embeddings (baselines/apply_filter.py:537)."""
BLOCK_ROWS = 1 << 14
MAX_ABS = 1e6
"""Embeddings have unit length, so a number beyond this is damage: its products overflow float32, and faiss aborts."""

DAMAGE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    LookupError,
    ValueError,
    TypeError,
    AssertionError,
    RuntimeError,
    EOFError,
)
"""What torch, zipfile and pickle raise on bytes that torch.save did not write."""


def to_matrix(values: pa.Array) -> np.ndarray:
    """Return float16 or float32 (rows, D) for a column of lists of floats; NaN in the rows that have no vector.

    Null and empty lists have none; D is 0 when no row of a column of free length has one.
    Raises PoolError for a column that is no list of floats, or whose vectors differ in length.
    """
    kind = values.type
    if not _is_list(kind) or not pa.types.is_floating(kind.value_type):
        raise PoolError(f"a column of type {kind} holds no embeddings: they are lists of floats.")
    if pa.types.is_fixed_size_list(kind):
        dim = kind.list_size
        flat = values.values.slice(values.offset * dim, len(values) * dim)
        matrix_ND = _as_float(flat.to_numpy(zero_copy_only=False)).reshape(len(values), dim)
        return _blank(matrix_ND, values.is_null().to_numpy(zero_copy_only=False)) if values.null_count else matrix_ND
    lengths = values.value_lengths().fill_null(0).to_numpy()
    dims = np.unique(lengths[lengths > 0])
    if len(dims) > 1:
        raise PoolError(f"embeddings of one column have {dims[0]} and {dims[1]} numbers; a column holds one model's.")
    flat = _as_float(values.flatten().to_numpy(zero_copy_only=False))
    matrix_ND = np.full((len(values), dims[0] if len(dims) else 0), np.nan, flat.dtype)
    matrix_ND[lengths > 0] = flat.reshape(-1, matrix_ND.shape[1]) if len(dims) else 0
    return matrix_ND


def _is_list(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in (pa.types.is_fixed_size_list, pa.types.is_list, pa.types.is_large_list))


def _as_float(values: np.ndarray) -> np.ndarray:
    return values if values.dtype in (np.float16, np.float32) else values.astype(np.float32)


def _blank(matrix_ND: np.ndarray, rows: np.ndarray) -> np.ndarray:
    blanked = matrix_ND.copy()
    blanked[rows] = np.nan
    return blanked


def find_whole(matrix_ND: np.ndarray) -> np.ndarray:
    """Return bool (rows,): which rows are vectors of finite numbers, none beyond MAX_ABS, where float16 never comes."""
    sane_ND = np.isfinite(matrix_ND) if matrix_ND.dtype == np.float16 else np.abs(matrix_ND) <= MAX_ABS
    whole: np.ndarray = sane_ND.all(axis=1) & (matrix_ND.shape[1] > 0)
    return whole


def read_embedding_set(url: str, column: str | None = None) -> Iterator[np.ndarray]:
    """Yield float16 or float32 (rows, D) blocks of a set of embeddings, in order; NaN in rows that have no vector.

    `url` is a scores folder of winnow (`column`: an embedding column of it), or a file, folder, glob or `a::b` list of
    .parquet (`column`: a list column), .npz (`column`: a key), .npy (a matrix) or .pt (a matrix, or a dict; `column`
    is image_features when not said).  Raises ConfigError for what is none of these, PoolError for what is broken.
    """
    for file in list_embedding_files(url, column):
        for matrix_ND in READERS[_suffix_of(file)](file, column):
            if matrix_ND.ndim != 2 or matrix_ND.dtype.kind != "f":
                shape = " x ".join(map(str, matrix_ND.shape)) or "one number"
                raise ConfigError(f"{file!r} holds {shape} of {matrix_ND.dtype}, not a matrix of embeddings.")
            yield _as_float(matrix_ND)


def list_embedding_files(url: str, column: str | None = None) -> list[str]:
    """Return the files of a set of embeddings, in order.  Raises ConfigError unless all are of one kind."""
    made = read_manifest(url) if is_folder(url) else None
    if made and made.stage == "score":
        lists = [name for name, kind in made.facts["types"].items() if "list" in kind]
        check_name(column or "", lists, kind=f"embedding column of {url}")
        folder = join(url, made.facts["columns"][column])
        return [join(folder, part + PARQUET_SUFFIX) for part in made.facts["parts"]]
    files = [file for file in expand(url) if not is_folder(url) or _suffix_of(file) in READERS]
    suffixes = sorted({_suffix_of(file) for file in files})
    if len(suffixes) != 1 or suffixes[0] not in READERS:
        found = ", ".join(suffixes) or "nothing that can hold embeddings"
        raise ConfigError(f"{url!r} holds {found}. Name a scores folder, or files of one of {', '.join(READERS)}.")
    return files


def hash_embedding_set(url: str, column: str | None = None) -> str:
    """Return a hash of the bytes of a set's files and the column; their names do not matter."""
    return hash_json([column, [sha256_of_file(file) for file in list_embedding_files(url, column)]])


def _suffix_of(url: str) -> str:
    return "." + name_of(url).rpartition(".")[2]


def _read_parquet(url: str, column: str | None) -> Iterator[np.ndarray]:
    with open_file(url) as file:
        try:
            parquet = pq.ParquetFile(file)
        except pa.ArrowException as error:
            raise PoolError(f"{url} cannot be read as parquet: {error}") from None
        lists = [field.name for field in parquet.schema_arrow if _is_list(field.type)]
        check_name(column or "", lists, kind=f"embedding column of {url}")
        for batch in parquet.iter_batches(BLOCK_ROWS, columns=[column]):
            yield to_matrix(batch.column(0))


def _read_npz(url: str, column: str | None) -> Iterator[np.ndarray]:
    arrays = list_arrays(url)
    check_name(column or "", arrays, kind=f"matrix of {url}")
    array = unpack_array(arrays[column or ""])
    for start in range(0, array.num_rows, BLOCK_ROWS):
        yield read_array_rows(array, np.arange(start, min(start + BLOCK_ROWS, array.num_rows)))


def _read_npy(url: str, column: str | None) -> Iterator[np.ndarray]:
    whole = read_npy(url)
    yield from (whole[start : start + BLOCK_ROWS] for start in range(0, len(whole) if whole.ndim else 0, BLOCK_ROWS))
    if not whole.size:
        yield whole


def _read_torch(url: str, column: str | None) -> Iterator[np.ndarray]:
    found = read_torch(url)
    if isinstance(found, Mapping):
        name = column or IMAGE_FEATURES
        check_name(name, [str(key) for key in found], kind=f"matrix of {url}")
        found = found[name]
    yield from_torch(url, found)


def from_torch(url: str, found: Any) -> np.ndarray:
    """Return what read_torch found as an array, bfloat16 as float32.  Raises ConfigError unless it is one."""
    if not hasattr(found, "__array__"):
        raise ConfigError(f"{url!r} holds a {type(found).__name__}, not a matrix of numbers. Save the matrix as .npy.")
    if hasattr(found, "detach"):  # a tensor, or a network's parameter
        found = found.detach().float() if str(found.dtype) == "torch.bfloat16" else found.detach()
    return np.asarray(found)


READERS: dict[str, Callable[[str, str | None], Iterator[np.ndarray]]] = {
    PARQUET_SUFFIX: _read_parquet,
    ARRAYS_SUFFIX: _read_npz,
    NPY_SUFFIX: _read_npy,
    TORCH_SUFFIX: _read_torch,
}


def read_npy(url: str) -> np.ndarray:
    """Return the array of an .npy file; a local one is mapped, so that the processes of a machine share its memory.

    Raises PoolError when it is none, or holds objects.
    """
    try:
        found: np.ndarray = (
            np.load(url, mmap_mode="c", allow_pickle=False)  # c: torch takes no read-only array
            if is_local(url)
            else np.load(io.BytesIO(read_bytes(url)), allow_pickle=False)
        )
        return found
    except (ValueError, EOFError) as error:
        raise PoolError(f"{url} cannot be read as npy: {error}") from None


def read_torch(url: str) -> Any:
    """Return what torch.save wrote: tensors in dicts and lists, or one numpy array.  Raises PoolError otherwise."""
    import torch

    with open_file(url) as file:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about pickle protocol 4, which DataComp's centroids have
                return torch.load(file, map_location="cpu", weights_only=True)
        except DAMAGE:
            return _read_pickled_array(url, file)


def _read_pickled_array(url: str, file: IO[bytes]) -> np.ndarray:
    try:
        with zipfile.ZipFile(file) as archive:
            (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            array: np.ndarray = _ArrayUnpickler(archive.open(pickled)).load()
            return array
    except DAMAGE as error:
        raise PoolError(
            f"{url} holds neither tensors that load with weights_only nor one numpy array ({error}). "
            "Save the matrix as .npy."
        ) from None


class _ArrayUnpickler(pickle.Unpickler):
    """Reads a pickle of one numpy array of numbers and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        reconstruct = np.empty(0).__reduce__()[0]
        known = {
            ("numpy.core.multiarray", "_reconstruct"): reconstruct,
            ("numpy._core.multiarray", "_reconstruct"): reconstruct,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): codecs.encode,  # how protocol 2 spells bytes
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return known[module, name]
