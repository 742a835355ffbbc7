"""A folder of shards: img2dataset's NNNNNNNN.tar, .parquet and _stats.json, or what DataComp's resharder wrote.

Tars are not read, but for their end mark.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from pipeline.datacomp.findings import SHARDS, WARNING, Finding, Section
from pipeline.datacomp.resharded import META, SAMPLE_IDS, judge_resharded
from pipeline.datacomp.shard_findings import Shard, judge_shards
from pipeline.datacomp.tables import read_table_file
from pipeline.datacomp.uid_sets import write_distinct
from pipeline.errors import PoolError
from pipeline.manifest import Counts, add_counts, hash_json
from pipeline.schemas import (
    PARQUET_SUFFIX,
    REASON_BAD_UID,
    REASON_BROKEN_PART,
    REASON_MISSING_IMAGE,
    REASON_NOT_DOWNLOADED,
    SIZES,
    STATS_SUFFIX,
    STATUS_SUCCESS,
    TAR_SUFFIX,
    UID,
)
from pipeline.storage import join, list_sizes, open_file, read_bytes
from pipeline.subset import SUBSET_SUFFIX
from pipeline.tars import BLOCK_BYTES, END_BLOCKS

READERS, SHARDS_AT_ONCE = 8, 64
SUFFIXES = (TAR_SUFFIX, PARQUET_SUFFIX, STATS_SUFFIX)


def check_shards(folder: str, scratch: str) -> Section:
    """Return what is in a folder of shards; the distinct uids of its images stand in SCRATCH/shards.npy, sorted.

    Reads the parquets' uids and status, the stats, and the last 1,024 bytes of each tar.  Where no shard has a parquet
    the uids cannot be known, and rows are counted by the stats.  Raises PoolError when there is no shard.
    """
    sizes = list_sizes(folder)
    names = dict.fromkeys(n.removesuffix(s) for n in sizes for s in SUFFIXES if n.endswith(s) and not n.startswith("."))
    if not names:
        raise PoolError(f"{folder!r} has no tar. --shards takes the folder `shards` in DataComp's --data_dir.")
    shards: list[Shard] = []
    url = join(scratch, f"{SHARDS}{SUBSET_SUFFIX}")
    merged = write_distinct(url, _inspect_all(folder, sizes, sorted(names), shards), join(scratch, SHARDS))
    accounts, statuses = [_count_rows(shard) for shard in shards], Counter[str]()
    counts = add_counts(accounts)
    for shard in shards:
        statuses.update(shard.table.statuses if shard.table else {})
    numbers = {"tars": sum(s.has_tar for s in shards), "stats": sum(s.has_stats for s in shards)}
    numbers |= {"parquets": sum(s.table is not None for s in shards), "rows": counts.read, **statuses}
    is_resharded = not numbers["parquets"] and (META in sizes or SAMPLE_IDS in sizes)
    findings = [*judge_shards(shards, _read_sizes(folder, sizes), is_resharded=is_resharded)]
    facts: dict[str, Any] = {"statuses": dict(sorted(statuses.items()))}
    if not numbers["parquets"]:
        if is_resharded:
            findings += judge_resharded(folder, numbers["tars"], counts.read)
        return Section(counts, numbers, facts, findings, None, hash_json(sizes))
    num_named = sum(account.kept for account, shard in zip(accounts, shards, strict=True) if shard.table)
    numbers |= {"uids": merged.num_uids, "repeated": num_named - merged.num_uids}
    if numbers["repeated"]:
        message = f"{numbers['repeated']:,} images have the uid of another one, so a subset gets them more than once"
        why = "img2dataset numbers all later shards anew when a parquet comes into the metadata"
        findings.append(Finding(WARNING, SHARDS, f"{message}. {why}: download into an empty folder."))
    return Section(counts, numbers, facts, findings, url, hash_json(sizes))


def _inspect_all(
    folder: str, sizes: Mapping[str, int], names: Sequence[str], shards: list[Shard]
) -> Iterator[np.ndarray]:
    """Yield the uids of each shard's images, and leave what else is known of it in `shards`."""
    with ThreadPoolExecutor(READERS) as readers:
        for start in range(0, len(names), SHARDS_AT_ONCE):
            for shard in readers.map(partial(_inspect, folder, sizes), names[start : start + SHARDS_AT_ONCE]):
                if shard.table:
                    if shard.has_tar:
                        yield shard.table.uids
                    shard.table.uids = shard.table.uids[:0].copy()
                shards.append(shard)


def _inspect(folder: str, sizes: Mapping[str, int], name: str) -> Shard:
    url = join(folder, name)
    shard = Shard(name, has_tar=name + TAR_SUFFIX in sizes, has_stats=name + STATS_SUFFIX in sizes)
    if shard.has_tar:
        shard.tar_error = _find_cut(url + TAR_SUFFIX, sizes[name + TAR_SUFFIX])
    if shard.has_stats:
        try:
            shard.successes = int(json.loads(read_bytes(url + STATS_SUFFIX))["successes"])
        except (ValueError, KeyError, TypeError, OverflowError):
            shard.stats_error = "no `successes` in it" if sizes[name + STATS_SUFFIX] else "empty"
    if name + PARQUET_SUFFIX in sizes:
        shard.table = read_table_file(url + PARQUET_SUFFIX, status=STATUS_SUCCESS)
    return shard


def _find_cut(url: str, num_bytes: int) -> str | None:
    """Return why a tar is not whole, None when it ends as one: in blocks, with two empty ones."""
    end_bytes = END_BLOCKS * BLOCK_BYTES
    if num_bytes < end_bytes or num_bytes % BLOCK_BYTES:
        return f"{num_bytes:,} bytes"
    with open_file(url, ahead=end_bytes) as file:
        file.seek(num_bytes - end_bytes)
        return None if file.read(end_bytes) == bytes(end_bytes) else "no end mark"


def _read_sizes(folder: str, sizes: Mapping[str, int]) -> dict[str, Any] | None:
    """Return the resharder's table of shard sizes, {} when it cannot be read: the resharder goes on without it."""
    if SIZES not in sizes:
        return None
    try:
        table = json.loads(read_bytes(join(folder, SIZES)))
    except ValueError:
        return {}
    return table if isinstance(table, dict) else {}


def _count_rows(shard: Shard) -> Counts:
    """Return the account of one shard: of its parquet's rows, or, where there is none, of what its stats say.

    Without a tar no row has an image, whatever these say.
    """
    table = shard.table
    if table is None:
        num_rows, failed = shard.successes or 0, {}
    elif table.error:
        num_rows, failed = table.num_rows, {REASON_BROKEN_PART: table.num_rows}
    else:
        num_rows = table.num_rows
        images = table.statuses.get(STATUS_SUCCESS, 0) if table.statuses else num_rows
        num_bad = table.num_bad if UID in table.types else images
        failed = {REASON_NOT_DOWNLOADED: num_rows - images, REASON_BAD_UID: num_bad}
    kept = num_rows - sum(failed.values())
    if not shard.has_tar:
        kept, failed = 0, failed | {REASON_MISSING_IMAGE: kept}
    return Counts(read=num_rows, kept=kept, failed=_positive(failed))


def _positive(failed: Mapping[str, int]) -> dict[str, int]:
    return {reason: number for reason, number in failed.items() if number}
