"""Shards written as the stage writes them, without Spark, and what is in them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from toy import toy_row

from pipeline.pool import list_parts, read_part
from pipeline.shard_folder import (
    drop_plan,
    finish_folder,
    prepare_folder,
)
from pipeline.shard_plan import plan_part, plan_shards
from pipeline.shards import write_shard
from pipeline.spans import write_spans
from pipeline.subset import write_subset
from pipeline.tars import read_rows
from pipeline.uid import parse_uids


def write_all(
    pool: Path,
    uids: list[str],
    out: Path,
    *,
    rows_per_shard: int,
    keys: str = "source",
    seed: int | None = None,
    scores: Path | None = None,
    backwards: bool = False,
) -> dict[str, Any]:
    """What the shards stage does, without Spark; tasks run in either order."""
    subset = str(out.parent / "subset.npy")
    write_subset(subset, parse_uids(pa.array(uids)))
    parts = list_parts(str(pool))
    prepare_folder(str(out), "identity")
    plan = partial(plan_part, subset_url=subset, out=str(out), scores=str(scores) if scores else None)
    planned = run(plan, parts, backwards)
    plans, not_in_pool = plan_shards(parts, planned, rows_per_shard, out=str(out), num_uids=len(uids))
    written = run(partial(write_shard, parts=parts, out=str(out), keys=keys, shuffle_seed=seed), plans, backwards)
    facts = finish_folder(str(out), written)
    drop_plan(str(out))
    facts["not_in_pool"] = not_in_pool
    return facts | {name: [p[name] for p in planned] for name in ("counts", "broken", "spans")}


def run(work: Callable[[Any], Any], items: list[Any], backwards: bool) -> list[Any]:
    return [work(item) for item in reversed(items)][::-1] if backwards else [work(item) for item in items]


def spans_of(pool: Path, scores: Path) -> None:
    """What the scoring pass leaves."""
    for part in list_parts(str(pool)):
        found = {row.key: row.span for row in read_rows(part.tar or "") if row.find(["jpg"]) is not None}
        keys = read_part(part).table["key"].to_pylist()
        rows = [row for row, key in enumerate(keys) if key in found]
        edges = [pa.array([found[keys[row]][side] for row in rows], pa.int64()) for side in range(2)]
        write_spans(str(scores), part, pa.array(rows, pa.int32()), *edges)


def contents_of(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir()}


def uid(number: int) -> str:
    return str(toy_row(number)["uid"])


def keys_of(out: Path) -> list[list[str]]:
    return [[row.key for row in read_rows(str(tar))] for tar in sorted(out.glob("*.tar"))]
