"""What a subset's steps did to the rows, as a tree for a terminal: `winnow select --explain`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from pipeline.manifest import Counts, Manifest
from pipeline.select import NO_SCORE, Step, place_branches
from pipeline.select_rules import Of

NUMBERS = ("read", "kept", "dropped", "no score")


class _Node(NamedTuple):
    """A step, or one of a step's branches."""

    label: str
    numbers: tuple[str, ...]
    rule: str
    inner: "list[_Node]"


def explain(name: str, steps: Sequence[Step], manifest: Manifest, *, samples_seen: int | None = None) -> str:
    """Return the subset's sizes and one line per step and branch: rows read, kept and dropped, and the rule.

    `samples_seen` of a training says how many epochs over the subset's copies it is.
    """
    lines = [("", NUMBERS, ""), *_draw(_list_nodes(steps, manifest, ""), "")] if steps else []
    label_width = max((len(label) for label, _, _ in lines), default=0)
    widths = [max((len(numbers[n]) for _, numbers, _ in lines), default=0) for n in range(len(NUMBERS))]
    rows = [f"subset {name}: {describe_size(manifest, samples_seen)}"]
    for label, numbers, rule in lines:
        cells = [f"{label:{label_width}}", *(f"{n:>{width}}" for n, width in zip(numbers, widths, strict=True)), rule]
        rows.append("  ".join(cells).rstrip())
    return "\n".join(rows)


def describe_size(manifest: Manifest, samples_seen: int | None = None) -> str:
    """Return `3 rows, 2 uids, 5 copies, 2.4 epochs of 12 samples`; subsets of older manifests have no copies."""
    facts = manifest.facts
    copies = int(facts.get("copies", facts["uids"]))
    sizes = f"{facts['rows']:,} rows, {facts['uids']:,} uids, {copies:,} copies"
    if not samples_seen or not copies:
        return sizes
    return f"{sizes}, {samples_seen / copies:,.2f} epochs of {samples_seen:,} samples"


def _list_nodes(steps: Sequence[Step], manifest: Manifest, within: str) -> list[_Node]:
    nodes = []
    for step in steps:
        path = within + step.name
        counts, facts = manifest.counts[path], manifest.facts
        rule = describe_step(step, facts["thresholds"].get(path), facts.get("found", {}).get(path))
        branches = [_list_nodes(branch, manifest, start) for start, branch in place_branches(step, path)]
        inner = branches[0] if len(branches) == 1 else []
        if len(branches) > 1:
            inner = [_join_branch(number, counts.read, branch) for number, branch in enumerate(branches, 1)]
        nodes.append(_Node(step.name, _format(counts), rule, inner))
    return nodes


def _join_branch(number: int, num_read: int, nodes: list[_Node]) -> _Node:
    read = f"{num_read:,}"
    return _Node(f"branch {number}", (read, nodes[-1].numbers[1] if nodes else read, "", ""), "", nodes)


def _format(counts: Counts) -> tuple[str, ...]:
    missing = counts.dropped.get(NO_SCORE, 0)
    dropped = sum(counts.dropped.values()) - missing
    return f"{counts.read:,}", f"{counts.kept:,}", f"{dropped:,}", f"{missing:,}" if missing else "-"


def _draw(nodes: Sequence[_Node], indent: str) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Yield (label with its place in the tree, numbers, rule) of each node and of what is in it."""
    for place, node in enumerate(nodes, 1):
        corner, rail = ("└─ ", "   ") if place == len(nodes) else ("├─ ", "│  ")
        yield indent + corner + node.label, node.numbers, node.rule
        yield from _draw(node.inner, indent + rail)


def describe_step(step: Step, threshold: float | None, found: Mapping[str, Any] | None = None) -> str:
    """Return a step's rule in words, with the threshold or what else it found."""
    if step.where is not None:
        return f"where {step.where}"
    if step.top:
        sign = "≤" if step.top.lowest else "≥"
        passed = "nothing passed" if threshold is None else f"{sign} {_spell(threshold)}"
        which = "lowest" if step.top.lowest else "top"
        ties = ", ties as DataComp" if step.top.ties == "datacomp" else ""
        return f"{which} {_describe_amount(step.top)} by {step.top.label}{ties}: {passed}"
    if step.at_least:
        return f"{step.at_least.label} ≥ {_spell(threshold or 0.0)}"
    if step.sample:
        return f"sample {_describe_amount(step.sample)}, seed {step.sample.seed}"
    if rule := _describe_joint(step):
        return f"{rule}: {_spell_found(found)}" if found else rule
    return f"repeat {step.repeat} times" if step.repeat else step.kind


def _spell(value: float) -> str:
    """Return the shortest number that means the same in the column's own precision."""
    single = np.float32(value)
    return str(single) if float(single) == value else repr(value)


def _spell_found(found: Mapping[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {number:,}" for name, number in found.items())


def _describe_joint(step: Step) -> str:
    """Return the rule of a step that looks at all rows together, or nothing."""
    if (soft := step.soft_cap) is not None:
        settings = f"alpha {soft.alpha:g}, batch {soft.batch:,}{_describe_heat(soft.temperature)}, seed {soft.seed}"
        return f"soft cap {_describe_amount(soft, 'draws')} by {soft.label}, {settings}"
    if (hard := step.hard_cap) is not None:
        settings = f"at most {hard.cap} each{_describe_heat(hard.temperature)}, seed {hard.seed}"
        return f"hard cap {_describe_amount(hard, 'draws')} by {hard.label}, {settings}"
    if (quota := step.quota) is not None:
        which = f"{quota.keep} by {quota.distance}, temperature {quota.temperature:g}"
        return f"quota {_describe_amount(quota)} over {quota.cluster}, {which}"
    if (balance := step.balance) is not None:
        return f"balance {balance.entries}, t {balance.t:,}, seed {balance.seed}"
    return ""


def _describe_heat(temperature: float) -> str:
    return "" if temperature == 1 else f", temperature {temperature:g}"


class _Amount(Protocol):
    """A rule that says how much it wants."""

    @property
    def fraction(self) -> float | None: ...
    @property
    def count(self) -> int | None: ...
    @property
    def of(self) -> Of: ...


def _describe_amount(rule: _Amount, what: str = "rows") -> str:
    return f"{100 * rule.fraction:g} % of {rule.of}" if rule.fraction is not None else f"{rule.count:,} {what}"
