"""Sections about which rows were kept: scores, pictures, truth and overlap."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from markupsafe import Markup

from pipeline.report.accounts import KEPT_LEGEND, NO_SUBSETS, explain_colours, format_part
from pipeline.report.blocks import Absent, Block, Cell, Figure, Gallery, Note, Panel, Section, Table
from pipeline.report.charts import HALF_WIDTH, Bar, draw_bars, draw_histogram
from pipeline.report.distributions import Distributions, NumberColumn, TextColumn, list_thresholds
from pipeline.report.formats import NOTHING, count_nouns, format_count, format_percent, format_score
from pipeline.report.pictures import Choice, Found, build_gallery
from pipeline.report.read import SCORES, SUBSETS, RunFolder, Subset
from pipeline.report.truth import Agreement, Truth, compare_subset, cut_alike, measure_overlap

TOP_VALUES = 9
"""Values of a string column that get a bar of their own."""
COLOURS = (*KEPT_LEGEND, ("series-0", "not used by a subset"))
NO_SCORES = Absent("The run folder holds no finished scores.")


def build_scores(run: RunFolder, found: Distributions | None) -> Section:
    """Return the distribution of every score column, split by the subsets that use it."""
    if run.scores is None or found is None:
        return Section("Scores", [NO_SCORES])
    blocks: list[Block] = [_list_columns(run, found)]
    blocks += [Absent(f"Scores of part {part} could not be read: {why}") for part, why in found.unreadable.items()]
    thresholds = {s.name: s for s in run.subsets}
    panels = [
        p for name in found.columns for p in _draw_column(found, name, thresholds) if found.columns[name].num_rows
    ]
    numbers = [panel for is_text, panel in panels if not is_text]
    texts = [panel for is_text, panel in panels if is_text]
    if numbers:
        blocks.append(_show_histograms(numbers))
    if texts:
        blocks.append(_show_values(texts))
    return Section("Scores", blocks)


def _show_histograms(panels: Sequence[Panel]) -> Figure:
    return Figure(
        caption="Distribution of each numeric score, in rows per bin. A column that a subset's steps use is drawn once "
        "for each such subset, split into what that subset keeps and drops; the dashed line is the threshold of a top "
        "step. Far tails are left out where noted.",
        source=f"{SCORES}/*/*.parquet, {SUBSETS}/*.npy, {SUBSETS}/*.json",
        panels=panels,
        num_columns=2,
        legend=explain_colours(panels, COLOURS),
    )


def _show_values(panels: Sequence[Panel]) -> Figure:
    return Figure(
        caption="Most frequent values of each column of strings, with their rows and share of the scored rows.",
        source=f"{SCORES}/*/*.parquet, {SUBSETS}/*.npy",
        panels=panels,
        legend=explain_colours(panels, COLOURS),
    )


def _list_columns(run: RunFolder, found: Distributions) -> Table:
    assert run.scores
    rows: list[list[str | Cell]] = []
    for name, owner in run.scores.facts["columns"].items():
        kind = run.scores.facts["types"][name]
        column = found.columns.get(name)
        rows.append([Cell(text=name, code=True), owner, _shorten_type(kind), *_describe(column)])
    num_parts = len(run.scores.facts["parts"])
    read = "" if found.num_read == num_parts else f"{format_count(found.num_read)}, evenly spaced, of "
    return Table(
        caption=f"Score columns over {read}{count_nouns(num_parts, 'part')}. Null counts rows without a "
        "score, NaN included; a null passes no rule.",
        source=f"{SCORES}/manifest.json, {SCORES}/*/*.parquet",
        columns=("Column", "Filter", "Type", "Rows", "Null", "Minimum", "Mean", "Maximum", "Distinct"),
        rows=rows,
        left=(0, 1, 2),
    )


def _shorten_type(kind: str) -> str:
    return kind.replace("fixed_size_list<item: halffloat>", "float16 ×").replace("halffloat", "float16")


def _describe(column: NumberColumn | TextColumn | None) -> list[str]:
    if column is None:
        return [NOTHING] * 6
    rows = [format_count(column.num_rows), format_count(column.num_null)]
    if isinstance(column, TextColumn):
        return [*rows, *[NOTHING] * 3, "many" if column.is_many else format_count(len(column.counts))]
    num_finite = int(column.radix.sum())
    if not num_finite:
        return [*rows, *[NOTHING] * 4]
    mean = column.total / num_finite
    return [*rows, format_score(column.minimum), format_score(mean), format_score(column.maximum), NOTHING]


def _draw_column(found: Distributions, name: str, subsets: Mapping[str, Subset]) -> Iterator[tuple[bool, Panel]]:
    """Yield (whether it holds strings, drawing) once per subset that uses the column, or once if none does."""
    column = found.columns[name]
    users: Sequence[str | None] = found.users[name] or [None]
    for user in users:
        title = f"{name} · {user}" if user else name
        if isinstance(column, TextColumn):
            if not column.is_many:
                yield True, Panel(title, _draw_values(column, user))
        elif len(column.edges):
            beyond = int(column.counts[0] + column.counts[-1])
            note = f" · {count_nouns(beyond, 'row')} beyond the axis" if beyond else ""
            marks = [(v, format_score(v)) for v in (list_thresholds(subsets[user], name) if user else [])]
            kept = column.kept[user][1:-1] if user else None
            drawing = draw_histogram(column.edges, kept, column.counts[1:-1], marks=marks, width=HALF_WIDTH)
            yield False, Panel(title + note, drawing)


def _draw_values(column: TextColumn, user: str | None) -> Markup:
    ordered = sorted(column.counts.items(), key=lambda pair: (-pair[1], pair[0]))
    shown = ordered[:TOP_VALUES]
    rest = ordered[TOP_VALUES:]
    kept = column.kept[user] if user else None
    lines = [(value or "(empty)", number, kept[value] if kept else 0) for value, number in shown]
    if rest:
        other = sum(number for _, number in rest)
        lines.append((f"{len(rest)} others", other, sum(kept[v] for v, _ in rest) if kept else 0))
    if column.num_null:
        lines.append(("(null)", column.num_null, 0))
    bars = []
    for value, number, of_them in lines:
        split = [("kept", of_them), ("dropped", number - of_them)] if kept is not None else [("series-0", number)]
        bars.append(Bar(value, split, format_part(number, column.num_rows)))
    return draw_bars(bars, total=max(number for _, number, _ in lines) if lines else 1)


def build_pictures(
    run: RunFolder,
    strips: Mapping[str, Mapping[str, Sequence[Choice]]],
    found: Mapping[str, Found] | None,
    kinds: Mapping[str, str],
    ranked_by: Mapping[str, str | None],
) -> Section:
    """Return kept, borderline and dropped rows of each subset, to look at; `found` is None without a pool."""
    title = "Pictures"
    if not strips:
        return Section(title, [Absent("No subset of this run chooses among scored rows, so there is none to show.")])
    if found is None:
        return Section(title, [Absent("The pool was not given, so its pictures and captions cannot be shown.")])
    blocks: list[Block] = []
    for name, chosen in strips.items():
        by = ranked_by[name]
        order = (
            f"by {by}; “others” and the first by uid are an even draw, as uids are random"
            if by
            else "without a score to sort by; the first by uid are an even draw, as uids are random"
        )
        truth = " The truth file's kind of each row is below its caption." if kinds else ""
        blocks.append(
            Gallery(
                caption=f"Subset {name}, {order}. Dropped means by any step.{truth}",
                source=f"{SCORES}, {SUBSETS}/{name}.npy and the pool",
                strips=build_gallery(chosen, found, kinds, by=by),
            )
        )
    return Section(title, blocks)


def build_truth_section(run: RunFolder, uids: Mapping[str, np.ndarray], truth: Truth | None) -> Section:
    """Return precision and recall of each subset, the share it keeps of each kind, and how far subsets overlap."""
    blocks: list[Block] = []
    if not uids:
        return Section("Truth and overlap", [NO_SUBSETS])
    if truth is None:
        blocks.append(Absent("No truth file was given, so precision and recall are not known."))
    else:
        found = {name: compare_subset(truth, subset) for name, subset in uids.items()}
        blocks.append(_compare(truth, found) if truth.right_kinds else Note("No kind was named as right."))
        blocks.append(_list_kinds(truth, found))
    if len(uids) > 1:
        blocks.append(_list_overlaps(uids))
    return Section("Truth and overlap", blocks)


def _compare(truth: Truth, found: Mapping[str, Agreement]) -> Table:
    num_right, num_rows = int(truth.is_right.sum()), len(truth.uids)
    rows: list[list[str | Cell]] = []
    for name, one in found.items():
        p, r = one.precision, one.recall
        f1 = 2 * p * r / (p + r) if p and r else None
        bars = [Cell(text=format_percent(value), fraction=value) for value in (p, r)]
        rows.append([name, format_count(one.num_kept), *bars, format_percent(f1), format_count(one.num_unknown)])
    base = format_percent(num_right / num_rows if num_rows else None)
    rows.append(["(all rows of the truth file)", format_count(num_rows), base, *[NOTHING] * 3])
    kinds = ", ".join(kind.replace("_", " ") for kind in truth.right_kinds)
    return Table(
        caption=f"Precision (share of right rows among those kept) and recall (share of the {format_count(num_right)} "
        f"right rows that is kept). Right kinds: {kinds}. F1 is their harmonic mean.",
        source=f"truth file, {SUBSETS}/*.npy",
        columns=("Subset", "Rows kept", "Precision", "Recall", "F1", "Not in the truth"),
        rows=rows,
    )


def _list_kinds(truth: Truth, found: Mapping[str, Agreement]) -> Table:
    totals = np.bincount(truth.codes, minlength=len(truth.kinds)).tolist()
    rows: list[list[str | Cell]] = []
    for kind, total in zip(truth.kinds, totals, strict=True):
        shares = [
            Cell(text=format_percent(share), fraction=share)
            for share in (one.kept_fractions[kind] for one in found.values())
        ]
        mark = "right" if kind in truth.right_kinds else "wrong" if truth.right_kinds else NOTHING
        rows.append([kind.replace("_", " "), mark, format_count(total), *shares])
    return Table(
        caption="Share of the rows of each kind that a subset keeps.",
        source=f"truth file, {SUBSETS}/*.npy",
        columns=("Kind", "Counts as", "Rows", *found),
        rows=rows,
        left=(0, 1),
    )


def _list_overlaps(uids: Mapping[str, np.ndarray]) -> Table:
    rows: list[list[str | Cell]] = []
    looked_at = cut_alike(uids)
    for place, (name, subset) in enumerate(looked_at.items()):
        shares = [measure_overlap(subset, other) for other in list(looked_at.values())[: place + 1]]
        cells = [Cell(text=format_percent(share), fraction=share) for share in shares]
        rows.append([name, *cells, *[""] * (len(uids) - place - 1)])
    num_whole, num_looked_at = (max(map(len, each.values())) for each in (uids, looked_at))
    share = (
        f", estimated from the {format_count(num_looked_at)} lowest uids of the largest and those of the others below"
    )
    estimated = share if num_looked_at < num_whole else ""
    return Table(
        caption=f"Overlap of subsets: rows in both as a share of the rows in either (Jaccard index){estimated}.",
        source=f"{SUBSETS}/*.npy",
        columns=("", *uids),
        rows=rows,
    )
