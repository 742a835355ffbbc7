"""What DataComp's resharder says of its own output: meta.json and sample_ids.npy, against the shards that are there.

It exits with 0 whatever it lost, `--overwrite` deletes nothing, and train.py reads up to the largest number it finds
(resharder.py:1094-1100, 1164-1214; train.py:87-92).
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.datacomp.findings import NOTE, SHARDS, WARNING, Finding
from pipeline.datacomp.subsets import open_multiset
from pipeline.datacomp.uid_sets import find_disorder
from pipeline.errors import PoolError
from pipeline.schemas import PART_PATTERN, TAR_SUFFIX
from pipeline.storage import exists, join, read_bytes

META, SAMPLE_IDS = "meta.json", "sample_ids.npy"


def judge_resharded(folder: str, num_tars: int, num_rows: int) -> Iterator[Finding]:
    """Yield what is wrong with the resharder's output: `num_tars` are there, whose stats count `num_rows`."""
    message = "DataComp's resharder wrote this: no parquet, and keys UID-N that repeat an image as the subset does"
    yield Finding(
        NOTE, SHARDS, f"{message}. `winnow import --tars` lists its rows, or `winnow shards` makes them anew."
    )
    account = _read_account(join(folder, META))
    if account is None:
        message = f"{SAMPLE_IDS} is here and no {META} that can be read: the resharder was stopped before its end"
        yield Finding(WARNING, SHARDS, f"{message}. Reshard again, into an empty folder.")
        account = {}
    made, rows = account.get("output_shard_count"), account.get("output_count")
    if isinstance(made, int) and num_tars != made:
        message = f"{num_tars:,} tars are here, and {META} speaks of {made:,}"
        stale = f"those from {PART_PATTERN.format(made)}{TAR_SUFFIX} on are of an earlier run, and training reads them"
        remedy = f"{stale}. Delete them." if num_tars > made else "the others are lost. Reshard again."
        yield Finding(WARNING, SHARDS, f"{message}: {remedy}")
    elif isinstance(rows, int) and num_rows != rows:
        message = f"the stats count {num_rows:,} rows, and {META} {rows:,}: a worker failed"
        yield Finding(WARNING, SHARDS, f"{message}. Reshard again.")
    yield from _judge_ids(join(folder, SAMPLE_IDS), rows)


def _judge_ids(url: str, rows: Any) -> Iterator[Finding]:
    try:
        uids, _ = open_multiset(url) if exists(url) else (None, False)
    except PoolError as error:
        yield Finding(WARNING, SHARDS, str(error))
        return
    if uids is None:
        return
    num_falls, _ = find_disorder(uids)
    if num_falls:
        message = f"{SAMPLE_IDS} is out of order in {num_falls:,} places, so rows were lost or written too often"
        yield Finding(WARNING, SHARDS, f"{message}. Import it with --subset, and reshard with what comes out.")
    if isinstance(rows, int) and rows != len(uids):
        message = f"{rows:,} rows were written of the {len(uids):,} that {SAMPLE_IDS} asks for"
        yield Finding(WARNING, SHARDS, f"{message}: the other images were not there.")


def _read_account(url: str) -> Mapping[str, Any] | None:
    try:
        account = json.loads(read_bytes(url)) if exists(url) else None
    except ValueError:
        return None
    return account if isinstance(account, dict) else None
