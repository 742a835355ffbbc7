"""Stored scores as one table: score files zipped by position, read batch by batch, and which rows still pass.

What select's passes read.  A row's state is a packed bit where a `where` step or a combination of branches has been,
and the cuts of the steps since, which are looked up in the scores again; and two bytes where branches gave it copies.
All of it lies in files: nothing per row is held between passes.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import PoolError
from pipeline.schemas import PARQUET_SUFFIX, UID
from pipeline.select_scores import Score, name_columns, read_score
from pipeline.storage import exists, join, open_file, read_bytes, write_bytes
from pipeline.uid import is_at_most, parse_uids

BATCH_ROWS = 1 << 16
GROUP_ROWS = 1 << 19
"""Rows of a task; a larger part is a task of its own, and is still read in batches."""
READERS = 8
"""Threads at most; what one holds is a few batches and, while a subset is written, the kept uids of its group."""
MASK_SUFFIX, COPIES_SUFFIX = ".bits", ".copies"
NO_COLUMN = "__none__"
SEEK_BYTES = 1 << 16
"""Read ahead on a remote store: a pass reads single columns, and embeddings stand between them."""


@dataclass(frozen=True, slots=True)
class ScorePart:
    """One part of the scored pool."""

    name: str
    num_rows: int


@dataclass(frozen=True, slots=True)
class PartGroup:
    """The parts of one task."""

    number: int
    parts: tuple[ScorePart, ...]

    @property
    def num_rows(self) -> int:
        """Rows of all its parts."""
        return sum(part.num_rows for part in self.parts)


Pass = Callable[[PartGroup], np.ndarray]
Spread = Callable[[Pass, Sequence[PartGroup], int], np.ndarray]
"""(work, groups, size) -> the sum of work(group), int64 (size,), over all groups: on threads here, or on Spark."""


def group_parts(parts: Iterable[ScorePart]) -> list[PartGroup]:
    """Return the parts in groups of about GROUP_ROWS, in order."""
    groups: list[list[ScorePart]] = []
    room = 0
    for part in parts:
        if part.num_rows > room:
            groups.append([])
            room = GROUP_ROWS
        groups[-1].append(part)
        room -= part.num_rows
    return [PartGroup(number, tuple(group)) for number, group in enumerate(groups)]


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """Score files of the same parts, in the same row order: FOLDER/<part>.parquet, one folder per filter."""

    folders: Mapping[str, str]
    """Filter -> folder."""
    owners: Mapping[str, str]
    """Column -> filter that made it."""
    keyless: frozenset[str] = frozenset()
    """Folders whose files have no uid column: winnow put their rows in order itself (join.py)."""

    def add_folder(self, name: str, folder: str, columns: Iterable[str]) -> "ScoreTable":
        """Return the table with the columns of a folder of files without uids."""
        folders, owners = {**self.folders, name: folder}, {**self.owners, **dict.fromkeys(columns, name)}
        return replace(self, folders=folders, owners=owners, keyless=self.keyless | {name})

    def measure(self, parts: Sequence[str]) -> list[ScorePart]:
        """Return each part that has rows, with their number.

        Raises PoolError when a file is absent or two files of a part differ.
        """
        with ThreadPoolExecutor(READERS) as readers:
            return [part for part in readers.map(self._measure_part, parts) if part.num_rows]

    def _measure_part(self, part: str) -> ScorePart:
        found = {name: _count_rows(join(folder, part + PARQUET_SUFFIX), name) for name, folder in self.folders.items()}
        if len(set(found.values())) > 1:
            raise PoolError(f"the score files of part {part!r} differ in rows: {found}. Score the pool again.")
        return ScorePart(part, next(iter(found.values())))

    def read(self, part: str, columns: Iterable[str], *, uids: bool) -> Iterator[pa.RecordBatch]:
        """Yield the columns, and UID if asked for, in pool order, BATCH_ROWS at a time.

        With uids every file is read and must name the same rows.  Raises PoolError when two disagree.
        """
        wanted = {name: [c for c in columns if self.owners[c] == name] for name in self.folders}
        keyed = [name for name in self.folders if uids and name not in self.keyless]
        columns_of = {n: [UID] * (n in keyed) + c for n, c in wanted.items() if c or n in keyed}
        streams = [_read_file(join(self.folders[name], part + PARQUET_SUFFIX), c) for name, c in columns_of.items()]
        for pieces in zip(*streams, strict=True):
            of_name = dict(zip(columns_of, pieces, strict=True))
            if any(not of_name[name].column(UID).equals(of_name[keyed[0]].column(UID)) for name in keyed[1:]):
                raise PoolError(f"the scores of {keyed} for part {part!r} name other rows. Score the pool again.")
            arrays = {UID: of_name[keyed[0]].column(UID)} if keyed else {}
            arrays |= {c: of_name[name].column(c) for name, some in wanted.items() for c in some}
            yield pa.RecordBatch.from_pydict(arrays)


def _count_rows(url: str, name: str) -> int:
    if not exists(url):
        raise PoolError(f"there are no scores of {name!r} at {url!r}. Run `winnow score` on the whole pool first.")
    with open_file(url, ahead=SEEK_BYTES) as file:
        num_rows: int = pq.ParquetFile(file).metadata.num_rows
    return num_rows


def _read_file(url: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    with open_file(url, ahead=SEEK_BYTES) as file:
        yield from pq.ParquetFile(file).iter_batches(BATCH_ROWS, columns=list(columns), use_threads=False)


def clean_batch(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return the batch with every NaN as null, so that no comparison passes it (to Spark NaN is the largest value).

    Half floats become single ones, which Spark knows.
    """
    columns = []
    for values in batch.columns:
        if pa.types.is_floating(values.type):
            values = values.cast(pa.float32()) if pa.types.is_float16(values.type) else values
            values = pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)
        columns.append(values)
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


class Passes(Protocol):
    """What a step that decides by a row's own scores and uid came down to."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Score columns that it reads."""

    @property
    def needs_uids(self) -> bool:
        """Whether it reads the uid."""

    def passes(self, batch: pa.RecordBatch) -> np.ndarray:
        """Return bool (rows,)."""


@dataclass(frozen=True, slots=True)
class Cut:
    """What a top step came down to: rows with a score of `value` or more, of those tied only uids up to `last`."""

    by: Score
    value: float | None
    """None lets no row pass."""
    last: int | None = None
    """128-bit number; None lets every tied row pass."""
    lowest: bool = False
    """Whether rows with a score of `value` or less pass instead."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Score columns that it reads."""
        return () if self.value is None else name_columns(self.by)

    @property
    def needs_uids(self) -> bool:
        """Whether it reads the uid."""
        return self.last is not None

    def passes(self, batch: pa.RecordBatch) -> np.ndarray:
        """Return bool (rows,); a null or NaN does not pass."""
        if self.value is None:
            return np.zeros(batch.num_rows, bool)
        values = read_score(self.by, batch)
        kept: np.ndarray = values <= self.value if self.lowest else values >= self.value
        if self.last is not None and (tied := np.flatnonzero(values == self.value)).size:
            kept[tied] = is_at_most(parse_uids(batch.column(UID).take(pa.array(tied))), self.last)
        return kept


@dataclass(frozen=True, slots=True)
class Passing:
    """Which rows have passed every step so far, and how many copies of each there are."""

    masks: str | None = None
    """Folder of one packed bit per row and part; a part without a file has no such row.  None: all rows."""
    cuts: tuple[Passes, ...] = ()
    """Steps since."""
    copies: str | None = None
    """Folder of one uint16 per row and part.  None: one copy each."""
    times: int = 1
    """What `repeat` multiplied the copies by since."""
    most: int = 1
    """Most copies that a row can have."""

    @property
    def has_copies(self) -> bool:
        """Whether a row may have more copies than one."""
        return self.copies is not None or self.times > 1

    def add(self, cut: Passes) -> "Passing":
        """Return the rows that also pass the cut."""
        return replace(self, cuts=(*self.cuts, cut))


def read_passing(
    table: ScoreTable, passing: Passing, part: ScorePart, columns: Iterable[str], *, uids: bool = False
) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
    """Yield (batch of the columns at least, bool (rows,) that pass) over one part, in pool order."""
    for batch, (kept,) in read_branches(table, [passing], part, columns, uids=uids):
        yield batch, kept


def read_branches(
    table: ScoreTable, branches: Sequence[Passing], part: ScorePart, columns: Iterable[str] = (), *, uids: bool = False
) -> Iterator[tuple[pa.RecordBatch, list[np.ndarray]]]:
    """Yield as read_passing does, of several branches at once: one bool (rows,) each."""
    cuts = [cut for branch in branches for cut in branch.cuts]
    needed = sorted({*columns, *(column for cut in cuts for column in cut.columns)})
    uids = uids or any(cut.needs_uids for cut in cuts)
    bits = [None if branch.masks is None else _read_bits(branch.masks, part) for branch in branches]
    start = 0
    for batch in table.read(part.name, needed, uids=uids) if needed or uids else _count_batches(part):
        passed = []
        for branch, mask in zip(branches, bits, strict=True):
            kept = np.ones(batch.num_rows, bool) if mask is None else _unpack(mask, start, batch.num_rows)
            for cut in branch.cuts:
                kept = kept & cut.passes(batch)
            passed.append(kept)
        yield batch, passed
        start += batch.num_rows


def _count_batches(part: ScorePart) -> Iterator[pa.RecordBatch]:
    """Yield batches that have a part's rows and nothing in them, where bits alone are asked for."""
    for start in range(0, part.num_rows, BATCH_ROWS):
        nothing = pa.nulls(min(BATCH_ROWS, part.num_rows - start))
        yield pa.RecordBatch.from_arrays([nothing], names=[NO_COLUMN])


def parse_kept_uids(batch: pa.RecordBatch, kept: np.ndarray, part: ScorePart) -> np.ndarray:
    """Return the uids of the kept rows; raises PoolError that names the part for one that is none."""
    uids = batch.column(UID)
    try:
        return parse_uids(uids if kept.all() else uids.filter(pa.array(kept)))
    except PoolError as error:
        raise PoolError(f"scores of part {part.name!r}: {error}") from None


def write_mask(folder: str, part: ScorePart, mask: np.ndarray) -> None:
    """Write bool (rows,) as a packed bit per row."""
    write_bytes(join(folder, part.name + MASK_SUFFIX), np.packbits(mask).tobytes())


def _read_bits(folder: str, part: ScorePart) -> np.ndarray:
    url = join(folder, part.name + MASK_SUFFIX)
    return np.frombuffer(read_bytes(url), np.uint8) if exists(url) else np.zeros(-(-part.num_rows // 8), np.uint8)


def write_copies(folder: str, part: ScorePart, copies: np.ndarray) -> None:
    """Write integers (rows,) of at most 65,535 as two bytes per row."""
    write_bytes(join(folder, part.name + COPIES_SUFFIX), copies.astype("<u2").tobytes())


def read_copies(passing: Passing, part: ScorePart) -> np.ndarray:
    """Return uint16 (rows,): the copies of each row of a part, whatever it says of rows that do not pass."""
    if passing.copies is None:
        return np.full(part.num_rows, passing.times, np.uint16)
    return np.frombuffer(read_bytes(join(passing.copies, part.name + COPIES_SUFFIX)), "<u2") * np.uint16(passing.times)


def _unpack(bits: np.ndarray, start: int, num_rows: int) -> np.ndarray:
    """Return bool (num_rows,) from row `start` on, a multiple of 8."""
    return np.unpackbits(bits[start // 8 :][: -(-num_rows // 8)], count=num_rows).view(bool)


def sum_in_threads(work: Pass, groups: Sequence[PartGroup], size: int) -> np.ndarray:
    """Return the sum of work(group), int64 (size,), on this process's threads (a Spread)."""
    total = np.zeros(size, np.int64)
    with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as workers:
        for found in workers.map(work, groups):
            total += found
    return total
