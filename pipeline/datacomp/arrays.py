"""The npz files of a metadata folder: embeddings that belong to the parquet of the same stem, row by row.

DataComp's code joins the two by position and does not look whether they are as long (apply_filter.py:165-169).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from pipeline.datacomp.findings import BROKEN, METADATA, WARNING, Finding, say_files
from pipeline.errors import PoolError
from pipeline.npz import list_arrays
from pipeline.schemas import ARRAYS_SUFFIX, PARQUET_SUFFIX, image_embedding_column, text_embedding_column
from pipeline.storage import join

MODELS = ("b32", "l14")
ARRAYS = (*(name(m) for m in MODELS for name in (image_embedding_column, text_embedding_column)), "dedup")


@dataclass(slots=True)
class _Looked:
    """What the npz files of a folder turned out to be; file -> value or reason."""

    kinds: dict[str, Counter[str]] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    uneven: dict[str, str] = field(default_factory=dict)
    lacking: dict[str, str] = field(default_factory=dict)
    orphans: list[str] = field(default_factory=list)


def check_arrays(
    folder: str, names: Iterable[str], num_rows: Mapping[str, int | None]
) -> tuple[dict[str, dict[str, int]], list[Finding]]:
    """Return array -> `dtype x dim` -> number of npz that have it so, and what is wrong with the npz among `names`.

    `num_rows` says how many rows each parquet has, None for one that cannot be read.  Only headers are read.
    """
    looked = _Looked()
    found = [name for name in names if name.endswith(ARRAYS_SUFFIX)]
    for name in found:
        _look(folder, name, num_rows, looked)
    have = {_table_of(name) for name in found}
    without = [name for name in num_rows if name not in have] if found else []
    kinds = {name: dict(sorted(count.items())) for name, count in sorted(looked.kinds.items())}
    return kinds, [*_judge(looked, len(found)), *_judge_absent(without, len(num_rows))]


def _table_of(name: str) -> str:
    return name.removesuffix(ARRAYS_SUFFIX) + PARQUET_SUFFIX


def _look(folder: str, name: str, num_rows: Mapping[str, int | None], looked: _Looked) -> None:
    url, table = join(folder, name), _table_of(name)
    try:
        arrays = list_arrays(url)
    except (PoolError, OSError) as error:
        looked.broken[name] = str(error).removeprefix(url).lstrip(": ")
        return
    for array in arrays.values():
        looked.kinds.setdefault(array.name, Counter())[f"{array.dtype} x {array.dim}"] += 1
    if missing := [key for key in ARRAYS if key not in arrays]:
        looked.lacking[name] = "no " + ", ".join(missing)
    wanted = num_rows.get(table)
    lengths = sorted({array.num_rows for array in arrays.values()} - {wanted})
    if table not in num_rows:
        looked.orphans.append(name)
    elif lengths and wanted is not None:
        looked.uneven[name] = f"{lengths[0]:,} rows, {wanted:,} in the parquet"


def _judge(looked: _Looked, total: int) -> Iterator[Finding]:
    if looked.broken:
        message = f"{say_files(looked.broken, total, 'npz')} cannot be read"
        yield Finding(BROKEN, METADATA, f"{message}. Delete and download again.")
    if looked.uneven:
        message = f"{say_files(looked.uneven, total, 'npz')} have other rows than the parquet, so"
        remedy = "DataComp's filters give rows the embeddings of others. Download both again."
        yield Finding(BROKEN, METADATA, f"{message} {remedy}")
    if looked.lacking:
        message = f"{say_files(looked.lacking, total, 'npz')} lack arrays"
        yield Finding(WARNING, METADATA, f"{message}: what needs them does not work there.")
    if looked.orphans:
        message = f"{say_files(looked.orphans, total, 'npz')} have no parquet, so their rows have no name"
        yield Finding(WARNING, METADATA, f"{message}. Download it.")


def _judge_absent(without: list[str], total: int) -> Iterator[Finding]:
    if without:
        message = f"{say_files(without, total)} have no npz, where DataComp's image_based stops"
        remedy = "winnow's embeddings are null there. With --overwrite_metadata --download_npz they come."
        yield Finding(WARNING, METADATA, f"{message}; {remedy}")
