"""Score files as `winnow score` leaves them, of rows made by hand; and select written the obvious way."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from made_joint import choose_jointly, draw_copies, read_ranking, shuffle

from pipeline.manifest import Counts, Manifest, write_manifest
from pipeline.select import AtLeast, Sample, Step, Top

Row = dict[str, Any]
SCORE = "__score__"
"""What a step orders rows by, None or NaN where a row has none."""
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


class Expected(NamedTuple):
    """What a subset must be."""

    rows: int
    lines: list[str]
    """Uids in order, each as often as its row with most copies has it."""
    counts: dict[str, Counts]
    thresholds: dict[str, float | None]
    found: dict[str, dict[str, Any]]


Copies = dict[int, int]
"""Number of a row -> its copies; a row that is not there was dropped."""


def expect(
    rows: Sequence[Row],
    steps: Sequence[Step],
    num_pool: int,
    where: Mapping[str, Where] | None = None,
    types: Mapping[str, str] | None = None,
) -> Expected:
    """Return what the steps keep; `where` says what each SQL means, `types` the Arrow types of the columns."""
    found = Expected(0, [], {}, {}, {})

    def run(steps: Sequence[Step], kept: Copies, within: str) -> Copies:
        for step in steps:
            path, read = within + step.name, len(kept)
            found.counts[path] = Counts(read=read, kept=read)
            number = len(step.branches) > 1
            ends = [run(b, kept, f"{path}/{n}/" if number else f"{path}/") for n, b in enumerate(step.branches, 1)]
            if step.branches:
                kept, missing = combine(step.kind, kept, ends), 0
            elif step.repeat:
                kept, missing = {n: copies * step.repeat for n, copies in kept.items()}, 0
            elif rule := step.soft_cap or step.hard_cap:
                draws, missing = draw_copies({n: rows[n] for n in kept}, rule, num_pool)
                found.found[path] = {"draws": sum({rows[n]["uid"]: d for n, d in draws.items()}.values())}
                found.found[path]["most"] = max(draws.values(), default=0)
                kept = {n: copies * draws[n] for n, copies in kept.items() if draws.get(n)}
            else:
                some = {n: rows[n] for n in kept}
                chosen, missing = choose(step, some, path)
                kept = {n: kept[n] for n in chosen}
            dropped = {path: read - len(kept) - missing, "no_score": missing}
            dropped = {reason: number for reason, number in dropped.items() if number}
            found.counts[path] = Counts(read=read, kept=len(kept), dropped=dropped)
        return kept

    def choose(step: Step, some: Mapping[int, Row], path: str) -> tuple[Sequence[int], int]:
        if step.quota or step.balance:
            chosen, missing, found.found[path] = choose_jointly(some, step, num_pool)
            return chosen, missing
        if ranking := step.top or step.at_least:
            scores, kind = read_ranking(some, ranking), (types or {}).get(ranking.by or "", "double")
            some = {n: row | {SCORE: scores[n]} for n, row in some.items()}
            if step.at_least:
                return _compare(some, step.at_least, kind, found.thresholds, path)
            chosen, missing, found.thresholds[path] = _cut(some, step.top, num_pool)
            return chosen, missing
        if step.sample:
            return _draw(some, step.sample, num_pool), 0
        answers = {n: (where or {})[step.where or ""](row) for n, row in some.items()}
        return [n for n, answer in answers.items() if answer], list(answers.values()).count(None)

    kept = run(steps, dict.fromkeys(range(len(rows)), 1), "")
    most: dict[str, int] = {}
    for n, copies in kept.items():
        most[rows[n]["uid"]] = max(copies, most.get(rows[n]["uid"], 0))
    lines = [uid for uid in sorted(most) for _ in range(most[uid])]
    return found._replace(rows=len(kept), lines=lines)


def combine(kind: str, kept: Copies, ends: Sequence[Copies]) -> Copies:
    """Return what branches that kept `ends` of `kept` come to."""
    if kind == "cascade":
        return ends[0]
    if kind == "minus":
        return {n: copies for n, copies in kept.items() if n not in ends[0]}
    if kind == "intersect":
        return {n: min(end[n] for end in ends) for n in kept if all(n in end for end in ends)}
    rule = {"union": max, "add": sum}[kind]
    return {n: rule([end.get(n, 0) for end in ends]) for n in kept if any(n in end for end in ends)}


def _cut(rows: Mapping[int, Row], top: Top, num_pool: int) -> tuple[list[int], int, float | None]:
    scored = [n for n, row in rows.items() if row[SCORE] is not None and not math.isnan(row[SCORE])]
    missing, sign = len(rows) - len(scored), 1 if top.lowest else -1
    best = sorted(scored, key=lambda n: (sign * rows[n][SCORE], rows[n]["uid"]))
    wanted = top.count_wanted(num_pool=num_pool, num_input=len(scored))
    if top.ties == "datacomp" and len(scored) < wanted <= len(rows):
        return [], missing, None
    if not best or wanted <= 0:
        return [], missing, None
    last = rows[best[min(wanted, len(best)) - 1]]
    bound = sign * last[SCORE]
    if top.ties == "datacomp":
        return [n for n in best if sign * rows[n][SCORE] <= bound], missing, last[SCORE]
    chosen = [n for n in best if (sign * rows[n][SCORE], rows[n]["uid"]) <= (bound, last["uid"])]
    return chosen, missing, last[SCORE]


def _compare(
    rows: Mapping[int, Row], rule: AtLeast, kind: str, thresholds: dict[str, float | None], path: str
) -> tuple[list[int], int]:
    """A column of its own type against a Python number, as numpy and so DataComp compare them."""
    dtype = {"float": np.float32, "halffloat": np.float16}.get(kind, np.float64)
    thresholds[path] = float(dtype(rule.value))
    with np.errstate(over="ignore"):
        values = {n: np.array([math.nan if row[SCORE] is None else row[SCORE]], dtype) for n, row in rows.items()}
    missing = sum(bool(np.isnan(value[0])) for value in values.values())
    return [n for n, value in values.items() if (value >= rule.value)[0]], missing


def _draw(rows: Mapping[int, Row], sample: Sample, num_pool: int) -> list[int]:
    order = sorted(rows, key=lambda n: shuffle(rows[n]["uid"], sample.seed))
    wanted = min(sample.count_wanted(num_pool=num_pool, num_input=len(rows)), len(rows))
    last = shuffle(rows[order[wanted - 1]]["uid"], sample.seed) if wanted else -1
    return [n for n in order if shuffle(rows[n]["uid"], sample.seed) <= last]
