"""Sections about where every row went: the funnel and its accounts, and what failed."""

from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from markupsafe import Markup

from pipeline.manifest import Counts
from pipeline.report.blocks import Absent, Cell, Figure, Note, Panel, Section, Table
from pipeline.report.charts import Bar, draw_bars
from pipeline.report.formats import NOTHING, count_nouns, format_count, format_percent, format_score, format_tally
from pipeline.report.read import SCORES, SHARDS, SUBSETS, RunFolder, Subset
from pipeline.schemas import FAILURES_FOLDER, POOL, REASON_MISSING_IMAGE, REASON_TRUNCATED_TAR
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


def _list_steps(run: RunFolder, subset: Subset) -> list[tuple[str, str, Counts]]:
    """Return (step, rule, account) from reading the pool to writing the shards."""
    steps: list[tuple[str, str, Counts]] = []
    if run.scores and POOL in run.scores.counts:
        steps.append((READ_POOL, "", run.scores.counts[POOL]))
    rules = {step.name: describe_step(subset, step.name) for step in subset.steps}
    steps += [(name, rules.get(name, ""), counts) for name, counts in subset.manifest.counts.items()]
    if subset.name in run.shards:
        written = run.shards[subset.name].counts["rows"]
        lost = {reason: n for reason, n in written.failed.items() if reason in LOST_IMAGES}
        if not_in_pool := run.shards[subset.name].facts.get(NOT_IN_POOL):
            lost[NOT_IN_POOL] = not_in_pool
        steps.append((WRITE_SHARDS, "", Counts(read=subset.num_rows, kept=written.kept, failed=lost)))
    return steps


def describe_step(subset: Subset, name: str) -> str:
    """Return a step's rule in words, with the threshold that a top step found."""
    step = next(s for s in subset.steps if s.name == name)
    if step.top is None:
        return str(step.where)
    top = step.top
    share = f"{format_percent(top.fraction)} of {top.of}" if top.count is None else count_nouns(top.count, "row")
    threshold = subset.manifest.facts.get("thresholds", {}).get(name)
    found = "nothing passed" if threshold is None else f"{top.by} ≥ {format_score(threshold)}"
    return f"top {share} by {top.by}: {found}"


def _draw_funnel(run: RunFolder, subset: Subset) -> Markup:
    total = count_pool(run) or 1
    steps = _list_steps(run, subset)
    bars = []
    for name, _, counts in steps:
        lost = [("dropped", sum(counts.dropped.values())), ("failed", sum(counts.failed.values()))]
        bars.append(Bar(name, [("kept", counts.kept), *lost], format_part(counts.kept, total)))
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
        reached = None
        for place, (name, rule, counts) in enumerate(_list_steps(run, subset)):
            label = Cell(text=subset.name if place == 0 else "", strong=True)
            follows = reached is None or reached == counts.read
            rows.append([label, name, Cell(text=rule, code=True), *_format_account(name, counts, follows)])
            reached = counts.kept
    return Table(
        caption="Every account. Each row that enters a step is kept, dropped by its rule or failed for a reason, and "
        "what one step keeps enters the next (✓ both hold). Rows without the score that a step needs are no_score.",
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
