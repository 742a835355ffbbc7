"""The select stage: stored scores -> SUBSETS/<name>.npy and <name>.json; and exact thresholds without a subset."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.stages import Start
from pipeline.config import as_mapping
from pipeline.errors import ConfigError, StageError, check_name
from pipeline.manifest import Manifest, find_done, read_manifest, write_manifest
from pipeline.pool import Part
from pipeline.schemas import UID
from pipeline.score import POOL, read_scores
from pipeline.select import (
    RADIX_BITS,
    Step,
    Top,
    check_steps,
    clean_batch,
    count_radix,
    find_columns,
    find_threshold,
    order_keys,
    select_rows,
)
from pipeline.spark import open_table
from pipeline.storage import exists, join, sha256_of_file
from pipeline.subset import SUBSET_SUFFIX, write_subset


def run_select(start: Start, scores: str, name: str, steps: Sequence[Step], out: str) -> Manifest:
    """Write OUT/<name>.npy with the uids that pass the steps, and OUT/<name>.json as its manifest.

    No step keeps every scored row.  Raises StageError without scores, ConfigError for an unknown column.
    """
    scored = _require_scores(scores)
    wanted = Manifest(stage="select", config=as_mapping({"steps": steps}), parents={"scores": scored.identity})
    url, manifest_name = join(out, name + SUBSET_SUFFIX), f"{name}.json"

    def is_whole(done: Manifest) -> bool:
        return exists(url) and sha256_of_file(url) == done.facts["sha256"]

    if done := find_done(out, wanted, name=manifest_name, is_whole=is_whole):
        return done
    columns = find_columns(steps, _scalar_columns(scored))
    check_steps(steps, scored.facts["types"])
    owners = {c: scored.facts["columns"][c] for c in columns} or dict(scored.facts["columns"])
    schema = pa.schema([(UID, pa.string())] + [(c, _type_of(scored.facts["types"][c])) for c in columns])
    parts = [Part(part, None, None) for part in scored.facts["parts"]]
    table = open_table(start(), partial(_read_clean, scores, columns, owners), parts, schema)
    kept = select_rows(table, steps, num_rows=scored.counts[POOL].read)
    write_subset(url, np.unique(kept.uids))  # rows that share a uid are one entry; the shards stage finds them all
    facts = {"rows": len(kept.uids), "sha256": sha256_of_file(url), "thresholds": kept.thresholds}
    manifest = Manifest(stage="select", config=wanted.config, parents=wanted.parents, counts=kept.counts, facts=facts)
    write_manifest(out, manifest, name=manifest_name)
    return manifest


def _require_scores(scores: str) -> Manifest:
    found = read_manifest(scores)
    if found is None:
        raise StageError(f"{scores!r} holds no finished scores. Run `winnow score --pool POOL --out {scores}` first.")
    return found


def _scalar_columns(scored: Manifest) -> list[str]:
    return [column for column, kind in scored.facts["types"].items() if "list" not in kind]


def _type_of(name: str) -> pa.DataType:
    return {"int32": pa.int32(), "float": pa.float32(), "double": pa.float64(), "string": pa.string()}[name]


def _read_clean(scores: str, columns: Sequence[str], owners: Mapping[str, str], part: Part) -> Iterator[pa.RecordBatch]:
    yield from map(clean_batch, read_scores(scores, part, columns, dict(owners)))


def calibrate(scores: str, by: str, *, fraction: float | None, count: int | None) -> dict[str, Any]:
    """Return the exact threshold of a score column for a fraction of the pool or a count, and the rows it keeps.

    Streams over the stored scores without Spark.  Raises ConfigError for a column that cannot be cut, or an empty wish.
    """
    scored = _require_scores(scores)
    check_name(by, _scalar_columns(scored), kind="score column")
    top = Top(by=by, fraction=fraction, count=count)
    check_steps([Step(name="calibrate", top=top)], scored.facts["types"])
    num_pool = scored.counts[POOL].read
    wanted = top.count_wanted(num_pool=num_pool, num_input=num_pool)
    owners = {by: scored.facts["columns"][by]}
    bits = 32 if scored.facts["types"][by] == "float" else 64
    floating = np.float32 if bits == 32 else np.float64

    def read_keys() -> Iterator[np.ndarray]:
        for part in scored.facts["parts"]:
            for batch in _read_clean(scores, [by], owners, Part(part, None, None)):
                yield order_keys(batch.column(by).drop_null().to_numpy(zero_copy_only=False).astype(floating))

    def count_pass(prefix: int, depth: int) -> np.ndarray:
        counts = (count_radix(keys, prefix=prefix, depth=depth, bits=bits) for keys in read_keys())
        return sum(counts, np.zeros(1 << RADIX_BITS, np.int64))

    found = find_threshold(count_pass, lambda available: wanted, bits=bits)
    if found is None or found.num_above + found.num_taken < wanted:
        raise ConfigError(
            f"cannot keep {wanted:,} rows of a pool of {num_pool:,}: not that many have a {by!r}, or none."
        )
    kept = found.num_above + found.num_tied
    return {"by": by, "threshold": found.value, "wanted": wanted, "kept_at_or_above": kept, "pool": num_pool}
