"""Accuracies -> the tables of docs/FINDINGS.md: mean over seeds and a 95 % interval by Student's t."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tests.findings.plan import BUDGETS, FRACTIONS, NETS, SAMPLES, Subset, name_fraction
from tests.findings.work import describe


def format_tables(found: Mapping[str, Any], subsets: Mapping[str, Subset]) -> str:
    """Return the tables as Markdown."""
    own, induced = found["own"], found["induced"]
    pairs = [(own[name], statistics.mean(induced[name][SAMPLES])) for name in NETS]
    lines = _compare("a. Filters", "a", found, subsets)
    lines += _compare("b. Purity of the filter's training set", "b", found, subsets)
    lines += _compare("c. Own and induced accuracy", "c", found, subsets)
    lines.append(f"\nPearson {correlate(pairs):.2f}, Spearman {correlate(rank(pairs)):.2f} over {len(pairs)} filters.")
    lines += ["\n## d. Fraction\n", "| kept | " + " | ".join(f"{n:,} samples" for n in BUDGETS) + " |", "|---|---|---|"]
    for name, label in [(name_fraction(f), f"{f:.0%}") for f in FRACTIONS] + [("none", "all")]:
        lines.append(f"| {label} | " + " | ".join(describe(induced[name][n]) for n in BUDGETS) + " |")
    lines += _compare("e. Later filters", "e", found, subsets)
    return "\n".join(lines) + "\n"


def _compare(title: str, letter: str, found: Mapping[str, Any], subsets: Mapping[str, Subset]) -> list[str]:
    """Return the table of the subsets that stand in finding `letter`."""
    lines = [f"\n## {title}\n", "| filter | own accuracy | rows | right | induced |", "|---|---|---|---|---|"]
    for name, subset in subsets.items():
        if letter in subset.findings:
            own = f"{100 * found['own'][name]:.1f}" if name in found["own"] else "-"
            rows, right = f"{found['rows'][name]:,}", f"{100 * found['right'][name]:.1f}"
            lines.append(f"| {name} | {own} | {rows} | {right} | {describe(found['induced'][name][SAMPLES])} |")
    return lines


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
