"""Sections about where every row went: the funnel and its accounts, and what failed."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from markupsafe import Markup

from pipeline.manifest import Counts, Manifest
from pipeline.report.blocks import Absent, Cell, Figure, Note, Panel, Section, Table
from pipeline.report.charts import Bar, draw_bars
from pipeline.report.formats import NOTHING, format_count, format_percent, format_tally
from pipeline.report.read import SCORES, SHARDS, SUBSETS, RunFolder, Subset
from pipeline.schemas import FAILURES_FOLDER, POOL, REASON_MISSING_IMAGE, REASON_TRUNCATED_TAR
from pipeline.select import Step, place_branches, walk
from pipeline.select_explain import describe_step
from pipeline.storage import join, list_folder, open_file

NUM_EXAMPLES = 3
"""Messages shown of each reason for a failure."""
LOST_IMAGES = (REASON_MISSING_IMAGE, REASON_TRUNCATED_TAR)
NOT_IN_POOL = "not_in_pool"
READ_POOL, WRITE_SHARDS = "read\N{NO-BREAK SPACE}pool", "write\N{NO-BREAK SPACE}shards"
KEPT_LEGEND = (("kept", "kept"), ("dropped", "dropped"))
NO_SUBSETS = Absent("The run folder holds no subset: nothing was selected.")


def build_funnel(run: RunFolder) -> Section:
    """Return how the rows get fewer, from the pool to the shards, with every account."""
    if not run.subsets:
        return Section("Funnel", [NO_SUBSETS])
    panels = [Panel(f"Subset {subset.name}", _draw_funnel(run, subset)) for subset in run.subsets]
    figure = Figure(
        caption="Rows that pass each step, and at the right their number and share of the pool. A step's light stretch "
        "is what it dropped.",
        source=f"{SCORES}/manifest.json, {SUBSETS}/*.json, {SHARDS}/*/manifest.json",
        panels=panels,
        legend=explain_colours(panels, [*KEPT_LEGEND, ("failed", "failed")]),
    )
    return Section("Funnel", [figure, _list_accounts(run)])


def explain_colours(panels: Sequence[Panel], known: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return those of the known (colour, label) pairs that the drawings have, for a legend."""
    return [(colour, label) for colour, label in known if any(f"var(--{colour})" in p.drawing for p in panels)]


def count_pool(run: RunFolder) -> int | None:
    """Return the rows that the pool lists, or None when nothing says so."""
    if run.scores and POOL in run.scores.counts:
        return run.scores.counts[POOL].read
    reads = [next(iter(s.manifest.counts.values())).read for s in run.subsets if s.manifest.counts]
    return max([*reads, *(s.num_rows for s in run.subsets)], default=None)


class _Account(NamedTuple):
    name: str
    """A step's path."""
    label: str
    """What a bar of it is called."""
    rule: str
    counts: Counts
    expected: int | None
    """Rows that it should have read; None when nothing says so."""


def _list_steps(run: RunFolder, subset: Subset) -> list[_Account]:
    """Return the accounts from reading the pool to writing the shards, those of branches after their step's."""
    accounts, counts, reached = [], subset.manifest.counts, None
    if run.scores and POOL in run.scores.counts:
        accounts.append(_Account(READ_POOL, READ_POOL, "", run.scores.counts[POOL], None))
        reached = accounts[0].counts.kept
    steps, whole = dict(walk(subset.steps)), {step.name for step in subset.steps}
    expected = dict(_expect_reads(subset.steps, counts, reached, ""))
    thresholds, notes = (subset.manifest.facts.get(name, {}) for name in ("thresholds", "found"))
    for path, found in counts.items():
        label, rule = path, ""
        if path in steps:
            label = path if path in whole else f"↳ {steps[path].name}"
            rule = describe_step(steps[path], thresholds.get(path), notes.get(path))
        accounts.append(_Account(path, label, rule, found, expected.get(path)))
    if subset.name in run.shards:
        ends = [found.kept for path, found in counts.items() if path in whole or path not in steps]
        accounts.append(_read_shards(run.shards[subset.name], subset, ends[-1] if ends else reached))
    return accounts


def _expect_reads(
    steps: Sequence[Step], counts: Mapping[str, Counts], reached: int | None, within: str
) -> Iterator[tuple[str, int | None]]:
    """Yield (path, rows that the step should read): what the one before kept, or what entered the branch's step."""
    for step in steps:
        path = within + step.name
        yield path, reached
        for start, branch in place_branches(step, path):
            yield from _expect_reads(branch, counts, reached, start)
        reached = counts[path].kept if path in counts else None


def _read_shards(made: Manifest, subset: Subset, kept: int | None) -> _Account:
    written = made.counts["rows"]
    lost = {reason: n for reason, n in written.failed.items() if reason in LOST_IMAGES}
    if not_in_pool := made.facts.get(NOT_IN_POOL):
        lost[NOT_IN_POOL] = not_in_pool
    counts = Counts(read=subset.num_copies, kept=written.kept, failed=lost)
    expected = None if kept is None else kept + subset.num_copies - subset.num_rows
    return _Account(WRITE_SHARDS, WRITE_SHARDS, "", counts, expected)


def _draw_funnel(run: RunFolder, subset: Subset) -> Markup:
    total = count_pool(run) or 1
    steps = _list_steps(run, subset)
    bars = []
    for _, label, _, counts, _ in steps:
        lost = [("dropped", sum(counts.dropped.values())), ("failed", sum(counts.failed.values()))]
        bars.append(Bar(label, [("kept", counts.kept), *lost], format_part(counts.kept, total)))
    if not subset.manifest.counts:
        bars.insert(1, Bar("no step", [("kept", subset.num_rows)], format_part(subset.num_rows, total)))
    return draw_bars(bars, total=total)


def format_part(number: int, total: int) -> str:
    """Return `1,234 · 5.6 %`."""
    return f"{format_count(number)} · {format_percent(number / total)}"


def _list_accounts(run: RunFolder) -> Table:
    rows: list[list[str | Cell]] = []
    starts = []
    for subset in run.subsets:
        starts.append(len(rows))
        for place, (name, _, rule, counts, expected) in enumerate(_list_steps(run, subset)):
            label = Cell(text=subset.name if place == 0 else "", strong=True)
            follows = expected is None or expected == counts.read
            rows.append([label, name, Cell(text=rule, code=True), *_format_account(name, counts, follows)])
    return Table(
        caption="Every account. Each row that enters a step is kept, dropped by its rule or failed for a reason, and "
        "what one step keeps enters the next; a branch starts from what entered its step (✓ both hold). Rows without "
        "the score that a step needs are no_score.",
        source=f"{SCORES}/manifest.json, {SUBSETS}/*.json, {SHARDS}/*/manifest.json",
        columns=(
            "Subset",
            "Step",
            "Rule",
            "In",
            "=\N{NO-BREAK SPACE}Kept",
            "+\N{NO-BREAK SPACE}Dropped",
            "+\N{NO-BREAK SPACE}Failed",
            "Holds",
        ),
        rows=rows,
        left=(0, 1, 2),
        starts=starts,
    )


def _format_account(name: str, counts: Counts, follows: bool) -> list[str | Cell]:
    dropped, failed = sum(counts.dropped.values()), sum(counts.failed.values())
    adds_up = counts.kept + dropped + failed == counts.read
    plain = set(counts.dropped) <= {name}
    return [
        format_count(counts.read),
        format_count(counts.kept),
        Cell(text=format_count(dropped), note="" if plain else f"({format_tally(counts.dropped)})"),
        Cell(text=format_count(failed), note=f"({format_tally(counts.failed)})" if failed else ""),
        "✓" if adds_up and follows else "✗",
    ]


def build_failures(run: RunFolder) -> Section:
    """Return every row that could not be worked on, by stage and reason, with examples of what was said."""
    rows = [*_list_failures(run)]
    if not rows:
        return Section("Failures", [Note("No row failed in any stage, and every part of the pool could be read.")])
    table = Table(
        caption=f"Rows that could not be worked on, with up to {NUM_EXAMPLES} messages for each reason.",
        source=f"manifests of all stages, {SCORES}/{FAILURES_FOLDER}/*.parquet",
        columns=("Stage", "Where", "Reason", "Rows", "Messages"),
        rows=rows,
        left=(0, 1, 2, 4),
    )
    return Section("Failures", [table])


def _list_failures(run: RunFolder) -> Iterator[list[str | Cell]]:
    stages: list[tuple[str, str, Mapping[str, Counts]]] = [("score", "", run.scores.counts if run.scores else {})]
    stages += [("select", subset.name, subset.manifest.counts) for subset in run.subsets]
    stages += [("shards", name, manifest.counts) for name, manifest in run.shards.items()]
    stages += [("train", r.label, r.manifest.counts) for r in run.runs if r.manifest]
    stages += [("eval", label, manifest.counts) for label, manifest in run.evals.items()]
    messages = read_messages(join(run.url, SCORES, FAILURES_FOLDER))
    for stage, name, accounts in stages:
        for what, counts in accounts.items():
            where = " ".join(word for word in (name, "" if name and what == "rows" else what) if word)
            for reason, number in counts.failed.items():
                said = messages.get((what, reason), []) if stage == "score" else []
                yield [stage, where, Cell(text=reason, code=True), format_count(number), " | ".join(said) or NOTHING]
    broken = [("score", run.scores)] if run.scores else []
    for stage, manifest in [*broken, *((f"shards {name}", m) for name, m in run.shards.items())]:
        for part, why in manifest.facts.get("broken", {}).items():
            yield [stage, f"part {part}", Cell(text="broken_part", code=True), NOTHING, str(why)]


def read_messages(folder: str) -> dict[tuple[str, str], list[str]]:
    """Return (filter, reason) -> the first few different messages, in the order of the parts."""
    messages: dict[tuple[str, str], list[str]] = {}
    for url in list_folder(folder):
        try:
            with open_file(url) as file:
                table = pq.read_table(file, columns=["filter", "reason", "message"])
        except (pa.ArrowException, OSError):
            continue
        for row in table.group_by(["filter", "reason", "message"], use_threads=False).aggregate([]).to_pylist():
            said = messages.setdefault((row["filter"], row["reason"]), [])
            if len(said) < NUM_EXAMPLES and row["message"] and row["message"] not in said:
                said.append(row["message"])
    return messages
