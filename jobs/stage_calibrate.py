"""Calibration: the threshold of a score column that keeps a wanted part of a pool, exact or from a sample of the rows.

Streams over the stored scores, on threads and without Spark.  docs/DFN.md says what the intervals promise.
"""

import math
from typing import Any

from jobs.stage_select import require_scores, scalar_types
from pipeline.distribution import Column, count_scored, draw_rows, find_ranked
from pipeline.errors import ConfigError, check_name
from pipeline.intervals import check_confidence, rank_interval, share_interval
from pipeline.manifest import Manifest
from pipeline.schemas import POOL
from pipeline.select import TEXT_TYPES, Top
from pipeline.select_radix import Threshold
from pipeline.select_table import ScoreTable
from pipeline.storage import join

TOO_FEW = "cannot keep {wanted:,} rows of a pool of {pool:,}: only {scored:,} have a {by!r}. Ask for fewer."


def open_column(scores: str, by: str) -> tuple[Manifest, Column]:
    """Return the score manifest and a column of its numbers.

    Raises StageError without finished scores, ConfigError for a column that is unknown (did you mean) or holds text.
    """
    scored = require_scores(scores)
    types, owners = scalar_types(scored), scored.facts["columns"]
    check_name(by, types, kind="score column")
    if types[by] in TEXT_TYPES:
        raise ConfigError(f"{by!r} holds text, and a threshold needs numbers: name another column.")
    table = ScoreTable({owners[by]: join(scores, owners[by])}, {by: owners[by]})
    return scored, Column(table, table.measure(scored.facts["parts"]), by, types[by])


def calibrate(
    scores: str,
    by: str,
    *,
    fraction: float | None = None,
    count: int | None = None,
    sample: float | int | None = None,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Return the threshold that keeps a fraction of the pool, or a count of its rows, with what it keeps.

    `sample` looks at a share (a float) or a number (an int) of the scored rows only, drawn by `seed`, and adds
    intervals.  Raises what open_column does, and ConfigError for a wish that the scores or the sample cannot fulfil.
    """
    scored, column = open_column(scores, by)
    num_pool = scored.counts[POOL].read
    wanted = Top(by=by, fraction=fraction, count=count).count_wanted(num_pool=num_pool, num_input=num_pool)
    asked = {"by": by, "pool": num_pool, "wanted": wanted}
    if not wanted:
        raise ConfigError(f"cannot keep 0 rows of a pool of {num_pool:,}: ask for a larger fraction or count.")
    if sample is None:
        found = _find_exact(column, asked)
    else:
        check_confidence(confidence)
        found = _find_sampled(column, asked, _count_sample(column, sample), seed, confidence)
    if math.isinf(found["threshold"]):
        ask = "more" if found["threshold"] > 0 else "fewer"
        raise ConfigError(
            f"the threshold of {by!r} is {found['threshold']}: too many scores are infinite. Ask for {ask} rows."
        )
    step = {"name": f"calibrated {by}", "at_least": {"by": by, "value": found["threshold"]}}
    return {**asked, **found, "step": step}


def _find_exact(column: Column, asked: dict[str, Any]) -> dict[str, Any]:
    num_scored = count_scored(column)[0]
    if num_scored < asked["wanted"]:
        raise ConfigError(TOO_FEW.format(**asked, scored=num_scored))
    (found,) = find_ranked(column, [asked["wanted"]])
    kept = found.num_above + found.num_tied
    return {
        "method": "exact",
        "threshold": found.value,
        "kept_at_or_above": kept,
        "kept_fraction": kept / asked["pool"],
    }


def _count_sample(column: Column, sample: float | int) -> int:
    is_share = isinstance(sample, float) and math.isfinite(sample)
    num_drawn = int(round(sample * column.num_rows, 6)) if is_share else sample
    if not 0 < num_drawn <= column.num_rows:
        raise ConfigError(
            f"a sample of {sample} of {column.num_rows:,} scored rows cannot be drawn. Give a share above 0 and at "
            "most 1.0, or a number of rows."
        )
    return int(num_drawn)


def _find_sampled(
    column: Column, asked: dict[str, Any], num_wanted: int, seed: int, confidence: float
) -> dict[str, Any]:
    """Return what _find_exact does, estimated, with intervals and what the sample was."""
    if asked["wanted"] > column.num_rows:
        raise ConfigError(TOO_FEW.format(**asked, scored=column.num_rows))
    drawn, num_drawn = draw_rows(column, num_wanted, seed)
    share = asked["wanted"] / column.num_rows
    rank, num_scored = round(share * num_drawn), count_scored(drawn)[0]
    if not 0 < rank <= num_scored:
        raise ConfigError(
            f"a sample of {num_drawn:,} rows, {num_scored:,} of them with a {drawn.by!r}, cannot tell what keeps "
            f"{asked['wanted']:,} of {column.num_rows:,}. Draw more rows."
        )
    upper, lower = rank_interval(num_drawn, share, confidence)
    within = [r if r and r <= num_scored else None for r in (lower, upper)]
    (found, *ends) = find_ranked(drawn, [rank, *(r for r in within if r)])
    bounds = iter(ends)
    interval = [_bound(next(bounds)) if r else None for r in within]
    num_kept = found.num_above + found.num_tied
    kept = share_interval(rank, num_drawn, confidence, most_hits=num_kept)
    of_pool = column.num_rows / asked["pool"]
    return {
        "method": "sample",
        "threshold": found.value,
        "threshold_interval": interval,
        "kept_at_or_above": round(num_kept / num_drawn * column.num_rows),
        "kept_fraction": num_kept / num_drawn * of_pool,
        "kept_fraction_interval": [end * of_pool for end in kept],
        "confidence": confidence,
        "sample": {"rows": num_drawn, "of": column.num_rows, "seed": seed, "scored": num_scored, "kept": num_kept},
    }


def _bound(found: Threshold) -> float | None:
    """Return an end of the interval; an infinite score bounds nothing."""
    return None if math.isinf(found.value) else found.value
