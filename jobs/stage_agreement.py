"""Filters from their scores alone: precision and recall where the truth is known, and how far filters agree.

Exact over all stored scores, on one machine: a column takes 16 bytes a row of memory, and the uids 16 more.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from jobs.stage_select import require_scores, scalar_types
from pipeline.agreement import (
    Ranking,
    compare_kept,
    count_wanted,
    judge_fractions,
    measure_auroc,
    measure_average_precision,
    rank_rows,
    spearman,
)
from pipeline.errors import ConfigError, check_name
from pipeline.manifest import Manifest
from pipeline.report.truth import read_truth
from pipeline.schemas import POOL, UID
from pipeline.select import TEXT_TYPES
from pipeline.select_scores import to_floats
from pipeline.select_table import ScoreTable
from pipeline.storage import join, sha256_of_file
from pipeline.subset import search_subset
from pipeline.target_aware import find_target_aware
from pipeline.uid import UID_DTYPE, parse_uids

FRACTIONS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)


def measure_scores(
    scores: str,
    columns: Sequence[str],
    *,
    truth: str | None = None,
    right_kinds: Sequence[str] = (),
    fractions: Sequence[float] = FRACTIONS,
) -> dict[str, Any]:
    """Return what score columns say of the truth and of each other, as JSON values (docs/DFN.md names them).

    Raises StageError without scores, ConfigError for a column that is unknown, named twice or text, for a truth
    without right kinds or a fraction out of [0, 1]; PoolError for a truth that cannot be read.
    """
    scored = require_scores(scores)
    check_columns(scored, columns)
    for fraction in fractions:
        count_wanted(fraction, 1)  # raises for one out of [0, 1]
    uids, values = read_columns(scores, scored, columns)
    rankings = {name: rank_rows(value_N, uids) for name, value_N in values.items()}
    known = read_rows_truth(truth, right_kinds, uids) if truth else None
    num_pool, aware = scored.counts[POOL].read, find_target_aware(scored)
    judged = {
        name: {
            "filter": scored.facts["columns"][name],
            "target_aware": name in aware,
            "rows": len(uids),
            "null": ranking.num_null,
            "truth": judge(ranking, known, fractions, num_pool=num_pool) if known else None,
        }
        for name, ranking in rankings.items()
    }
    return {
        "scores": {"identity": scored.identity, "pool": scored.parents["pool"], "rows_of_pool": num_pool},
        "truth": known.about if known else None,
        "fractions": list(fractions),
        "columns": judged,
        "pairs": [compare(a, b, rankings, fractions, num_pool=num_pool) for a, b in combinations(columns, 2)],
    }


def check_columns(scored: Manifest, columns: Sequence[str]) -> None:
    """Raise ConfigError for a score column that is unknown (did you mean), named twice, or holds text."""
    types = scalar_types(scored)
    for name in columns:
        check_name(name, types, kind="score column")
        if types[name] in TEXT_TYPES or columns.count(name) > 1:
            why = "holds text" if types[name] in TEXT_TYPES else "is named twice"
            raise ConfigError(f"score column {name!r} {why}.")


def read_columns(scores: str, scored: Manifest, columns: Sequence[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the uids of all score rows, and each column as float64 with NaN for null, in pool order."""
    owners = {name: scored.facts["columns"][name] for name in columns}
    table = ScoreTable({owner: join(scores, owner) for owner in sorted(set(owners.values()))}, owners)
    uids, values = [np.empty(0, UID_DTYPE)], {name: [np.empty(0)] for name in columns}
    for part in table.measure(scored.facts["parts"]):
        for batch in table.read(part.name, columns, uids=True):
            uids.append(parse_uids(batch.column(UID)))
            for name in columns:
                values[name].append(to_floats(batch.column(name)).astype(np.float64))
    return np.concatenate(uids), {name: np.concatenate(pieces) for name, pieces in values.items()}


@dataclass(frozen=True, slots=True)
class RowsTruth:
    """What the truth says of each score row."""

    is_right_N: np.ndarray
    is_known_N: np.ndarray
    about: dict[str, Any]
    """What the truth is, and how many rows it names."""


def read_rows_truth(url: str, right_kinds: Sequence[str], uids: np.ndarray) -> RowsTruth:
    """Return the truth of the rows with these uids; where a truth file names a uid twice, its first line counts."""
    truth = read_truth(url, right_kinds)
    if not right_kinds:
        raise ConfigError(f"name the kinds that are right with --right-kinds; the truth has {list(truth.kinds)}.")
    order = np.lexsort((truth.uids["f1"], truth.uids["f0"]))
    ordered = truth.uids[order]
    place_N = np.minimum(search_subset(ordered, uids, or_equal=False), len(ordered) - 1)
    is_known_N = (ordered["f0"][place_N] == uids["f0"]) & (ordered["f1"][place_N] == uids["f1"])
    is_right_N = is_known_N & truth.is_right[order[place_N]]
    counts = {"rows_named": int(is_known_N.sum()), "rows_right": int(is_right_N.sum())}
    about = {"sha256": sha256_of_file(url), "right_kinds": list(right_kinds), **counts}
    return RowsTruth(is_right_N, is_known_N, about)


def judge(ranking: Ranking, truth: RowsTruth, fractions: Sequence[float], *, num_pool: int) -> dict[str, Any]:
    """Return AUROC and average precision over the rows with score and kind, and precision and recall per fraction."""
    right_N, both_N = truth.is_right_N, truth.is_known_N & ~np.isnan(ranking.value_N)
    kept = judge_fractions(ranking, right_N, truth.is_known_N, fractions, num_pool=num_pool)
    return {
        "auroc": measure_auroc(ranking.value_N[both_N], right_N[both_N]),
        "average_precision": measure_average_precision(ranking.value_N[both_N], right_N[both_N]),
        "right_without_score": int((right_N & ~both_N).sum()),
        "kept": [dataclasses.asdict(one) for one in kept],
    }


def compare(
    first: str, second: str, rankings: Mapping[str, Ranking], fractions: Sequence[float], *, num_pool: int
) -> dict[str, Any]:
    """Return how far two columns agree: rank correlation over common rows, overlap of what each fraction keeps."""
    a, b = rankings[first], rankings[second]
    return {
        "first": first,
        "second": second,
        "common_rows": int((~np.isnan(a.value_N) & ~np.isnan(b.value_N)).sum()),
        "spearman": spearman(a.value_N, b.value_N),
        "overlap": [dataclasses.asdict(one) for one in compare_kept(a, b, fractions, num_pool=num_pool)],
    }
