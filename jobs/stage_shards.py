"""The shards stage: pool + subset -> webdataset shards; a plan per part, then one Spark task a shard."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from jobs.stages import Start, warn_broken
from pipeline.config import as_mapping
from pipeline.errors import PoolError
from pipeline.lock import hold_lock
from pipeline.manifest import Counts, Manifest, add_counts, find_done, read_manifest, write_manifest
from pipeline.packed import Packed
from pipeline.pool import Part, list_parts, pool_identity
from pipeline.schemas import PART_PATTERN
from pipeline.shard_folder import (
    claim_folder,
    discard_shards,
    drop_plan,
    finish_folder,
    has_every_shard,
    prepare_folder,
    remove_beyond,
)
from pipeline.shard_plan import find_gaps, plan_part, plan_shards
from pipeline.shards import ShardConfig, write_shard
from pipeline.spark import run_each
from pipeline.storage import sha256_of_file, sweep_temporaries
from pipeline.subset import read_subset

log = logging.getLogger("winnow")
MAX_NAMED = 8


def run_shards(
    start: Start,
    pool: str,
    subset: str,
    config: ShardConfig,
    out: str,
    *,
    scores: str | None = None,
    fresh: bool = False,
    quiet: bool = False,
) -> Manifest:
    """Write the subset's rows as webdataset shards into OUT.

    `scores` names the folder of a scoring pass over the pool's images, whose spans save reading the tars' headers; it
    changes no byte of the result.  `fresh` deletes first the shards that are there.
    Raises PoolError when no kept row is in the pool's tars or OUT holds tars of somebody else, StageError when another
    driver works on OUT.
    """
    parts = list_parts(pool)
    num_uids = len(read_subset(subset))
    parents = {"pool": pool_identity(parts), "subset": sha256_of_file(subset)}
    wanted = Manifest(stage="shards", config=as_mapping(config), parents=parents)
    claim_folder(out, parts)
    with hold_lock(out, "shards") as check_lock:
        before = read_manifest(out)
        if fresh:
            discard_shards(out)
        elif done := find_done(out, wanted, is_whole=partial(has_every_shard, out)):
            drop_plan(out)
            return done
        same = before is not None and before.identity == wanted.identity and not fresh
        prepare_folder(out, wanted.identity, keep=same)
        manifest = _write_shards(start, wanted, parts, subset, num_uids, config, out, scores=scores, quiet=quiet)
        sweep_temporaries(out)
        check_lock()
        write_manifest(out, manifest)
        drop_plan(out)
    return manifest


def _write_shards(
    start: Start,
    wanted: Manifest,
    parts: Sequence[Part],
    subset: str,
    num_uids: int,
    config: ShardConfig,
    out: str,
    *,
    scores: str | None,
    quiet: bool,
) -> Manifest:
    """Plan, write, and return the manifest with its accounts."""
    gaps = _warn_gaps(parts)
    plan = partial(plan_part, subset_url=subset, out=out, scores=scores)
    planned = run_each(start(), plan, parts, what="plan", quiet=quiet)
    broken = {part.name: r["broken"] for part, r in zip(parts, planned, strict=True) if r["broken"]}
    warn_broken("shards", broken)
    _say_spans(scores, parts, planned)
    plans, not_in_pool = plan_shards(parts, planned, config.rows_per_shard, out=out, num_uids=num_uids)
    if not plans:
        raise PoolError(f"none of the {num_uids:,} uids of {subset!r} has an image in the pool's {len(parts):,} parts.")
    remove_beyond(out, len(plans))
    work = partial(write_shard, parts=Packed(parts), out=out, keys=config.keys, shuffle_seed=config.shuffle_seed)
    written = run_each(start(), work, plans, what="shards", unit="shard", quiet=quiet)
    _say_replaced(written)
    facts = {"broken": broken, "missing_parts": sum(gaps.values()), "not_in_pool": not_in_pool}
    counts = {"rows": add_counts(Counts(**r["counts"]) for r in planned)}
    return replace(wanted, counts=counts, facts=finish_folder(out, written) | facts)


def _warn_gaps(parts: Sequence[Part]) -> Mapping[str, int]:
    """Return and name the numbers that are missing between the pool's parts."""
    if gaps := find_gaps(parts):
        named = ", ".join(list(gaps)[:MAX_NAMED]) + (", ..." if len(gaps) > MAX_NAMED else "")
        log.warning("shards: %d parts are missing in the pool's numbering: %s", sum(gaps.values()), named)
    return gaps


def _say_replaced(written: Sequence[Mapping[str, Any]]) -> None:
    """Name the shards that stood there unfinished or in another size than they were written in."""
    names = [PART_PATTERN.format(number) for number, shard in enumerate(written) if shard["replaced"]]
    if names:
        listed = ", ".join(names[:MAX_NAMED]) + (", ..." if len(names) > MAX_NAMED else "")
        log.warning("shards: %d that were unfinished or changed since are written again: %s", len(names), listed)


def _say_spans(scores: str | None, parts: Sequence[Part], planned: Sequence[Mapping[str, Any]]) -> None:
    """Say how many tars had to be read because SCORES does not know where their rows are."""
    unknown = sum(part.tar is not None and not r["spans"] for part, r in zip(parts, planned, strict=True))
    if scores and unknown:
        log.warning(
            "shards: %s has no spans of %d of %d parts (changed since, or scored without images); "
            "the headers of their tars were read",
            *(scores, unknown, len(parts)),
        )
