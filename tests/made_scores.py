"""Score files as `winnow score` leaves them, of rows made by hand; and select written the obvious way."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.manifest import Counts, Manifest, write_manifest
from pipeline.select import Step

Row = dict[str, Any]
Where = Callable[[Row], bool | None]


def write_scores(
    folder: Path, parts: Mapping[str, pa.Table], owners: Mapping[str, str], *, num_pool: int | None = None
) -> Path:
    """Write one file per filter and part, and the manifest.  Tables have `uid` and every column of `owners`."""
    for name in sorted(set(owners.values())):
        columns = ["uid", *(c for c in owners if owners[c] == name)]
        (folder / name).mkdir(parents=True)
        for part, table in parts.items():
            row_group_size = 1000 + 77 * len(name)  # the files of two filters need not be cut alike
            pq.write_table(table.select(columns), folder / name / f"{part}.parquet", row_group_size=row_group_size)
    num_rows = sum(table.num_rows for table in parts.values())
    first = next(iter(parts.values())).schema
    facts = {
        "columns": dict(owners),
        "types": {c: str(first.field(c).type) for c in owners},
        "parts": list(parts),
        "broken": {},
    }
    num_pool = num_rows if num_pool is None else num_pool
    pool = Counts(read=num_pool, kept=num_rows, failed={"not_downloaded": num_pool - num_rows})
    manifest = Manifest(stage="score", config={}, parents={"pool": "hand-made"}, counts={"pool": pool}, facts=facts)
    write_manifest(str(folder), manifest)
    return folder


def expect(
    rows: Sequence[Row], steps: Sequence[Step], num_pool: int, where: Mapping[str, Where] | None = None
) -> tuple[list[str], dict[str, Counts], dict[str, float | None]]:
    """Return the uids that pass (repeats kept), the accounts and the thresholds; `where` says what each SQL means."""
    counts: dict[str, Counts] = {}
    thresholds: dict[str, float | None] = {}
    for step in steps:
        if step.top:
            kept, missing, thresholds[step.name] = _cut(rows, step, num_pool)
        else:
            answers = [(where or {})[step.where or ""](row) for row in rows]
            kept = [row for row, answer in zip(rows, answers, strict=True) if answer]
            missing = answers.count(None)
        dropped = {step.name: len(rows) - len(kept) - missing, "no_score": missing}
        dropped = {reason: number for reason, number in dropped.items() if number}
        counts[step.name] = Counts(read=len(rows), kept=len(kept), dropped=dropped)
        rows = kept
    return sorted(row["uid"] for row in rows), counts, thresholds


def _cut(rows: Sequence[Row], step: Step, num_pool: int) -> tuple[list[Row], int, float | None]:
    top = step.top
    assert top
    scored = [row for row in rows if row[top.by] is not None and not math.isnan(row[top.by])]
    missing = len(rows) - len(scored)
    best = sorted(scored, key=lambda row: (-row[top.by], row["uid"]))
    wanted = top.count_wanted(num_pool=num_pool, num_input=len(scored))
    if not best or wanted <= 0:
        return [], missing, None
    last = best[min(wanted, len(best)) - 1]
    if top.ties == "datacomp":
        return [row for row in best if row[top.by] >= last[top.by]], missing, last[top.by]
    bound = (-last[top.by], last["uid"])
    return [row for row in best if (-row[top.by], row["uid"]) <= bound], missing, last[top.by]
