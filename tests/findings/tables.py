"""Accuracies -> the tables of docs/FINDINGS.md: mean over seeds and a 95 % interval by Student's t."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tests.findings.plan import BUDGETS, FRACTIONS, NETS, SAMPLES, Subset, name_fraction

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""97.5 % quantile of Student's t with n - 1 degrees of freedom, by n."""


def describe(values: Sequence[float]) -> str:
    """Return `mean +- half of the interval` in per cent."""
    half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{100 * statistics.mean(values):.1f} ± {100 * half:.1f}"


def format_tables(found: Mapping[str, Any], subsets: Mapping[str, Subset]) -> str:
    """Return the tables as Markdown."""
    own, rows, induced = found["own"], found["rows"], found["induced"]
    lines: list[str] = []
    for letter, title in (
        ("a", "Filters"),
        ("b", "Purity of the filter's training set"),
        ("c", "Own and induced"),
        ("e", "Later filters"),
    ):
        lines += [f"\n## {letter}. {title}\n", "| filter | own accuracy | rows | induced |", "|---|---|---|---|"]
        for name, subset in subsets.items():
            if letter in subset.findings:
                mine = f"{100 * own[name]:.1f}" if name in own else "-"
                lines.append(f"| {name} | {mine} | {rows[name]:,} | {describe(induced[name][SAMPLES])} |")
    pairs = [(own[name], statistics.mean(induced[name][SAMPLES])) for name in NETS]
    lines.append(f"\nPearson {correlate(pairs):.2f}, Spearman {correlate(rank(pairs)):.2f} over {len(pairs)} filters.")
    lines += ["\n## d. Fraction\n", "| kept | " + " | ".join(f"{n:,} samples" for n in BUDGETS) + " |", "|---|---|---|"]
    for name, label in [(name_fraction(f), f"{f:.0%}") for f in FRACTIONS] + [("none", "all")]:
        lines.append(f"| {label} | " + " | ".join(describe(induced[name][n]) for n in BUDGETS) + " |")
    return "\n".join(lines) + "\n"


def rank(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the pairs with each number replaced by its place in order, equal ones by their mean place."""
    columns = []
    for column in zip(*pairs, strict=True):
        ordered = sorted(column)
        columns.append([ordered.index(v) + (ordered.count(v) - 1) / 2 for v in column])
    return list(zip(*columns, strict=True))


def correlate(pairs: Sequence[tuple[float, float]]) -> float:
    """Return Pearson's correlation."""
    return statistics.correlation([a for a, _ in pairs], [b for _, b in pairs])
