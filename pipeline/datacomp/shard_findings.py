"""What is wrong with shards, as far as DataComp's resharder and winnow would stumble over it.

The resharder finds the number of shards by doubling and bisecting on their existence, so a gap can end its input
(resharder.py:531-560); it passes over tars without stats (:563-572), and believes sizes.json before these (:592-641).
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.datacomp.findings import BROKEN, SHARDS, WARNING, Finding, say_files, say_some
from pipeline.datacomp.tables import TableFile
from pipeline.pool import Part
from pipeline.schemas import PARQUET_SUFFIX, PART_PATTERN, SIZES, STATS_SUFFIX, STATUS, STATUS_SUCCESS, TAR_SUFFIX, UID
from pipeline.shard_plan import find_gaps

AGAIN = "DataComp's downloader, run again, fetches shards without stats anew"


@dataclass(slots=True)
class Shard:
    """The files of one number."""

    name: str
    has_tar: bool = False
    tar_error: str | None = None
    """Why the tar is not whole, as far as its size and end say."""
    has_stats: bool = False
    stats_error: str | None = None
    successes: int | None = None
    """As the stats say."""
    table: TableFile | None = None


def judge_shards(
    shards: Sequence[Shard], sizes: Mapping[str, Any] | None, *, is_resharded: bool = False
) -> Iterator[Finding]:
    """Yield what is wrong with the shards of a folder; `sizes` is its sizes.json, None when there is none.

    Shards that DataComp's resharder wrote have no parquet.
    """
    tars = [shard for shard in shards if shard.has_tar]
    yield from _judge_tables([shard for shard in shards if shard.table], len(shards))
    yield from _judge_tars(tars, needs_tables=not is_resharded)
    yield from _judge_stats(tars)
    if alone := [shard.name for shard in shards if not shard.has_tar]:
        message = f"{say_files(alone, len(shards), 'shards')} have no tar, so their rows have no image"
        yield Finding(WARNING, SHARDS, f"{message}. Delete what is left of them; {AGAIN}.")
    yield from _judge_numbers([shard.name for shard in tars])
    if sizes is not None and (stale := _find_stale(tars, sizes)):
        message = f"{SIZES} is not true of {say_some(stale)}, and DataComp's resharder believes it before the stats"
        yield Finding(WARNING, SHARDS, f"{message}. Delete it.")


def _judge_tables(shards: Sequence[Shard], total: int) -> Iterator[Finding]:
    broken = {s.name + PARQUET_SUFFIX: s.table.error for s in shards if s.table and s.table.error}
    if broken:
        message = f"{say_files(broken, len(shards), 'parquet')} cannot be read"
        yield Finding(BROKEN, SHARDS, f"{message}. Delete it with its stats; {AGAIN}.")
    unnamed = [s.name + PARQUET_SUFFIX for s in shards if s.table and not s.table.error and UID not in s.table.types]
    if unnamed:
        message = (
            f"{say_files(unnamed, len(shards), 'parquet')} have no column {UID!r}, so no subset can name their rows"
        )
        yield Finding(BROKEN, SHARDS, f"{message}. `winnow import --tars` gives them uids.")


def _judge_tars(tars: Sequence[Shard], *, needs_tables: bool) -> Iterator[Finding]:
    cut = {s.name + TAR_SUFFIX: s.tar_error for s in tars if s.tar_error}
    if cut:
        message = f"{say_files(cut, len(tars), 'tars')} are not whole; rows that end before the cut can be read"
        yield Finding(WARNING, SHARDS, f"{message}. Delete their stats; {AGAIN}.")
    unlisted = [s.name + TAR_SUFFIX for s in tars if s.table is None]
    if unlisted and needs_tables:
        message = f"{say_files(unlisted, len(tars), 'tars')} have no parquet, as when a download was stopped"
        yield Finding(WARNING, SHARDS, f"{message}. winnow reads uids and captions from the tar; {AGAIN}.")


def _judge_stats(tars: Sequence[Shard]) -> Iterator[Finding]:
    lacking = [s.name for s in tars if not s.has_stats]
    if lacking:
        message = f"{say_files(lacking, len(tars), 'tars')} have no stats: DataComp's resharder passes over them"
        yield Finding(WARNING, SHARDS, f"{message}. {AGAIN}; winnow takes them as they are.")
    broken = {s.name + STATS_SUFFIX: s.stats_error for s in tars if s.stats_error}
    if broken:
        message = f"{say_files(broken, len(tars), 'stats')} cannot be read, and DataComp's resharder stops there"
        yield Finding(WARNING, SHARDS, f"{message}. Delete them; {AGAIN}.")
    other = {s.name: f"{s.successes:,} in the stats, {_count_images(s):,} in the parquet" for s in tars if _disagree(s)}
    if other:
        message = f"{say_files(other, len(tars), 'shards')} count their images in two ways"
        yield Finding(WARNING, SHARDS, f"{message}. Delete their stats; {AGAIN}.")


def _disagree(shard: Shard) -> bool:
    table = shard.table
    has_both = shard.successes is not None and table is not None and table.error is None and STATUS in table.types
    return has_both and shard.successes != _count_images(shard)


def _count_images(shard: Shard) -> int:
    return shard.table.statuses.get(STATUS_SUCCESS, 0) if shard.table else 0


def _judge_numbers(names: Sequence[str]) -> Iterator[Finding]:
    gaps = find_gaps([Part(name, name + TAR_SUFFIX, None) for name in names])
    if gaps:
        message = f"{sum(gaps.values()):,} numbers are missing between the tars: {say_some(list(gaps))}"
        yield Finding(WARNING, SHARDS, f"{message}. {AGAIN}.")
    numbers = [int(name) for name in names if name.isdecimal() and PART_PATTERN.format(int(name)) == name]
    seen = sum(number < count_seen(set(numbers)) for number in numbers)
    if seen < len(names):
        message = f"DataComp's resharder looks for tars by number and would find {seen:,} of {len(names):,}"
        remedy = f"Give it --num-shards {max(numbers) + 1}" if numbers else "Name them 00000000.tar and so on"
        yield Finding(WARNING, SHARDS, f"{message}. {remedy}; winnow takes what is there.")


def count_seen(numbers: Collection[int]) -> int:
    """Return the number of shards that DataComp's resharder believes to be there, given those that are.

    It doubles n while shard n - 1 exists, and bisects between the last two n.  Source: resharder.py:531-560.
    """
    above = 1
    while above - 1 in numbers:
        above *= 2
    if above == 1:
        return 0
    below = above // 2
    while below < above:
        middle = (below + above) // 2
        if middle - 1 in numbers:
            below = middle + 1
        else:
            above = middle
    return below - 1


def _find_stale(tars: Sequence[Shard], sizes: Mapping[str, Any]) -> dict[str, str]:
    """Return tar -> what sizes.json says of it, for those that are absent or have other successes."""
    known = {shard.name + TAR_SUFFIX: shard.successes for shard in tars}
    absent = {name: "which is not there" for name in sizes if name not in known}
    said = {name: (sizes[name], number) for name, number in known.items() if name in sizes and number is not None}
    return absent | {name: f"{a} for {b}" for name, (a, b) in said.items() if a != b}
