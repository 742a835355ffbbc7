"""The shards stage: pool + subset -> webdataset shards; a plan per part, then one Spark task a shard."""

from functools import partial

from jobs.stages import Start, warn_broken
from pipeline.config import as_mapping
from pipeline.errors import PoolError
from pipeline.manifest import Counts, Manifest, add_counts, find_done, write_manifest
from pipeline.pool import list_parts, pool_identity
from pipeline.shards import (
    ShardConfig,
    claim_folder,
    drop_plan,
    finish_folder,
    has_every_shard,
    plan_part,
    plan_shards,
    prepare_folder,
    write_shard,
)
from pipeline.spark import run_each
from pipeline.storage import sha256_of_file, sweep_temporaries
from pipeline.subset import read_subset


def run_shards(start: Start, pool: str, subset: str, config: ShardConfig, out: str, *, quiet: bool = False) -> Manifest:
    """Write the subset's rows as webdataset shards into OUT.

    Raises PoolError when no kept row is in the pool's tars, or OUT holds tars of somebody else.
    """
    parts = list_parts(pool)
    num_uids = len(read_subset(subset))
    parents = {"pool": pool_identity(parts), "subset": sha256_of_file(subset)}
    wanted = Manifest(stage="shards", config=as_mapping(config), parents=parents)
    claim_folder(out, parts)
    if done := find_done(out, wanted, is_whole=lambda _: has_every_shard(out)):
        drop_plan(out)
        return done
    prepare_folder(out, wanted.identity)
    planned = run_each(start(), partial(plan_part, subset_url=subset, out=out), parts, what="plan", quiet=quiet)
    broken = {part.name: r["broken"] for part, r in zip(parts, planned, strict=True) if r["broken"]}
    warn_broken("shards", broken)
    plans = plan_shards(parts, [r["lines"] for r in planned], config.rows_per_shard)
    if not plans:
        raise PoolError(f"none of the {num_uids:,} uids of {subset!r} has an image in pool {pool!r}.")
    work = partial(write_shard, out=out, keys=config.keys)
    written = run_each(start(), work, plans, what="shards", unit="shard", quiet=quiet)
    facts = finish_folder(out, [r["rows"] for r in written]) | {"broken": broken}
    counts = {"rows": add_counts(Counts(**r["counts"]) for r in planned)}
    facts["not_in_pool"] = max(0, num_uids - sum(r["found"] for r in planned))
    manifest = Manifest(stage="shards", config=wanted.config, parents=parents, counts=counts, facts=facts)
    sweep_temporaries(out)
    write_manifest(out, manifest)
    drop_plan(out)
    return manifest
