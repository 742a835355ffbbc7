"""Sections about the run as a whole: the summary that leads the page, provenance and cost."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.manifest import Manifest
from pipeline.report.accounts import count_pool
from pipeline.report.blocks import Absent, Block, Cell, Fold, Note, Section, Table
from pipeline.report.formats import (
    NOTHING,
    count_nouns,
    format_count,
    format_duration,
    format_hash,
    format_percent,
    format_points,
)
from pipeline.report.read import (
    EVALS,
    NO_FILTER,
    RECIPE,
    SCORES,
    SHARDS,
    SUBSETS,
    RunFolder,
    is_network,
)
from pipeline.schemas import EVENTS
from pipeline.target_aware import LEGEND, is_target_aware, mark

MAX_HEADLINE_TASKS = 4
REPORT_STAGE = "report"
Facts = Mapping[str, Any]


def build_summary(run: RunFolder) -> Section:
    """Return what the run did, and one row per subset: rows kept, average and main tasks."""
    facts = {label: manifest.facts for label, manifest in run.evals.items()}
    names = list(dict.fromkeys([*(s.name for s in run.subsets), *run.shards, *(n for n in facts if not is_network(n))]))
    blocks: list[Block] = [Note(_tell(run))]
    if names:
        blocks.append(_list_subsets(run, names, facts))
    return Section("Summary", blocks)


def _tell(run: RunFolder) -> str:
    """Return the run in a few sentences, as far as it went."""
    name, num_rows = run.recipe.get("name"), count_pool(run)
    recipe = f"recipe {name}" if name else "the run"
    parts = [
        f"This page reports what {recipe} made" + (f" of a pool of {count_nouns(num_rows, 'row')}" if num_rows else "")
    ]
    if run.scores:
        num_filters, num_columns = len(run.scores.counts) - 1, len(run.scores.facts["columns"])
        parts.append(f"{count_nouns(num_filters, 'filter')} scored it in {count_nouns(num_columns, 'column')}")
    sizes = [s.num_rows for s in run.subsets]
    if len(sizes) > 1:
        ends = f"{format_count(min(sizes))} to {format_count(max(sizes))}"
        parts.append(f"{count_nouns(len(sizes), 'subset')} of {ends} rows were kept")
    elif sizes:
        parts.append(f"One subset of {count_nouns(sizes[0], 'row')} was kept")
    if run.runs or run.evals:
        parts.append(f"Models trained: {len(run.runs)}, evaluated: {len(run.evals)}")
    return ". ".join(parts) + "."


def _list_subsets(run: RunFolder, names: Sequence[str], facts: Mapping[str, Facts]) -> Table:
    total = count_pool(run)
    kept = {s.name: s.num_rows for s in run.subsets}
    tasks = choose_tasks({n: f for n, f in facts.items() if n in names})
    averages = {n: f["average"] for n, f in facts.items() if n in names}
    has_average = any(a["value"] is not None for a in averages.values())
    labels = list(dict.fromkeys(a["label"] for a in averages.values()))
    aware = {s.name for s in run.subsets if run.scores and is_target_aware(s.steps, run.scores)}
    rows: list[list[str | Cell]] = []
    for name in names:
        share = kept[name] / total if name in kept and total else None
        row: list[str | Cell] = [
            mark(name, name in aware),
            format_count(kept.get(name)),
            Cell(text=format_percent(share), fraction=share),
        ]
        if has_average:
            values = {n: a["value"] for n, a in averages.items()}
            row.append(_compare_value(name, values))
        row += [_compare_value(name, {n: _value(f, key) for n, f in facts.items() if n in names}) for key in tasks]
        rows.append(row)
    notes = [LEGEND] if aware else []
    if NO_FILTER in facts and len(averages) > 1:
        notes.append(f"In small print: difference from subset {NO_FILTER} in percentage points.")
    if has_average and len(labels) > 1:
        notes.append("The averages are over different tasks and do not compare: " + "; ".join(_label_each(averages)))
    if averages and not has_average:
        notes.append(f"No average is given: {labels[0]}; the tasks shown are not counted in it.")
    average = (
        [f"{labels[0][:1].upper()}{labels[0][1:]}, %" if len(labels) == 1 else "Average, %"] if has_average else []
    )
    return Table(
        caption="Rows kept by each subset"
        + (" and zero-shot results of the model trained on it." if averages else ".")
        + (" Best in bold." if len(averages) > 1 else ""),
        source=f"{SUBSETS}/*.json" + (f", {EVALS}/*/manifest.json" if averages else ""),
        columns=("Subset", "Rows kept", "Share of pool", *average, *(f"{name}, %" for name in tasks.values())),
        rows=rows,
        notes=notes,
    )


def _label_each(averages: Mapping[str, Facts]) -> list[str]:
    return [f"{name}: {average['label']}" for name, average in averages.items()]


def choose_tasks(facts: Mapping[str, Facts]) -> dict[str, str]:
    """Return key -> name of the few tasks in the summary: ImageNet first, then in the evaluation's order."""
    found = {key: task for one in facts.values() for key, task in one["tasks"].items() if task["value"] is not None}
    ordered = sorted(found.items(), key=lambda pair: pair[1]["group"] != "imagenet")
    return {key: task["name"] for key, task in ordered[:MAX_HEADLINE_TASKS]}


def _value(facts: Facts, key: str) -> float | None:
    value: float | None = facts["tasks"].get(key, {}).get("value")
    return value


def _compare_value(name: str, values: Mapping[str, float | None]) -> Cell:
    """Return the value of `name` in per cent, bold if it is the best, with its difference from no filter."""
    value, base = values.get(name), values.get(NO_FILTER)
    note = format_points(value - base) if value is not None and base is not None and name != NO_FILTER else ""
    return Cell(text=format_percent(value, unit=False), strong=_is_best(value, values.values()), note=note)


def _is_best(value: float | None, values: Any) -> bool:
    known = [v for v in values if v is not None]
    return value is not None and len(known) > 1 and value == max(known)


def build_provenance(run: RunFolder, version: int) -> Section:
    """Return identities, settings, shard facts, costs and the whole recipe."""
    blocks: list[Block] = [
        Note(
            f"Format version {version}. An identity is a sha256 over stage, format version, settings and parents, "
            "shown by its first twelve digits: equal identities mean equal bytes."
        )
    ]
    artifacts = _list_artifacts(run)
    if artifacts.rows:
        blocks.append(artifacts)
    if run.scores:
        blocks.append(_list_filters(run.scores))
    if run.shards:
        blocks.append(_list_shards(run.shards))
    blocks.append(_list_costs(run.events) if run.events else Absent(f"There is no {EVENTS}: times are not known."))
    if run.recipe:
        text = json.dumps(run.recipe, indent=2, ensure_ascii=False)
        blocks.append(Fold(f"The resolved recipe ({RECIPE})", text))
    else:
        blocks.append(Absent(f"There is no {RECIPE}."))
    return Section("Provenance and cost", blocks)


def _list_artifacts(run: RunFolder) -> Table:
    found: list[tuple[str, Manifest | None]] = [(SCORES, run.scores)]
    found += [(f"{SUBSETS}/{s.name}", s.manifest) for s in run.subsets]
    found += [(f"{SHARDS}/{name}", manifest) for name, manifest in run.shards.items()]
    found += [(r.folder, r.manifest) for r in run.runs]
    found += [(f"{EVALS}: {label}", manifest) for label, manifest in run.evals.items()]
    rows: list[list[str | Cell]] = []
    for name, manifest in found:
        if manifest:
            parents = ", ".join(f"{what} {format_hash(of)}" for what, of in manifest.parents.items())
            sha256 = manifest.facts.get("sha256") or manifest.facts.get("sizes_sha256")
            cells = [
                Cell(text=text, code=True) for text in (format_hash(manifest.identity), format_hash(sha256), parents)
            ]
            rows.append([name, *cells])
    return Table(
        caption="Artifacts, the sha256 of what they hold where one was taken, and what they were made from.",
        source="manifests of all stages",
        columns=("Artifact", "Identity", "Content", "Made from"),
        rows=rows,
        left=(0, 1, 2, 3),
    )


def _list_filters(scores: Manifest) -> Table:
    rows: list[list[str | Cell]] = []
    for name, settings in scores.config.get("filters", {}).items():
        rest = {k: v for k, v in settings.items() if k not in ("version", "sha256")}
        said = ", ".join(
            f"{key}: {value if isinstance(value, str) else json.dumps(value)}" for key, value in rest.items()
        )
        sha256 = Cell(text=format_hash(settings.get("sha256")), code=True)
        rows.append([name, str(settings.get("version", NOTHING)), sha256, Cell(text=said or NOTHING, code=True)])
    return Table(
        caption="Filters and all that decides their values.",
        source=f"{SCORES}/manifest.json",
        columns=("Filter", "Version", "Model sha256", "Settings"),
        rows=rows,
        left=(0, 2, 3),
    )


def _list_shards(shards: Mapping[str, Manifest]) -> Table:
    rows = [
        [
            name,
            format_count(made.facts.get("num_shards")),
            format_count(made.facts.get("rows")),
            format_count(made.config.get("rows_per_shard")),
            str(made.config.get("keys", NOTHING)),
            format_count(made.facts.get("not_in_pool")),
            format_count(len(made.facts.get("broken", {}))),
        ]
        for name, made in shards.items()
    ]
    return Table(
        caption="Shards. Not in pool counts rows of the subset that no part of the pool holds.",
        source=f"{SHARDS}/*/manifest.json",
        columns=("Subset", "Shards", "Rows", "Rows per shard, at most", "Keys", "Not in pool", "Broken parts"),
        rows=rows,
    )


def _list_costs(events: Sequence[Facts]) -> Table:
    """Return wall time by stage and name; a stage that was run again adds up.  The report itself is left out."""
    seconds: dict[tuple[str, str], list[float]] = {}
    failed: dict[tuple[str, str], int] = {}
    for event in events:
        unit = (str(event.get("stage", "")), str(event.get("name", "")))
        if unit[0] != REPORT_STAGE:
            seconds.setdefault(unit, []).append(float(event.get("seconds", 0)))
            failed[unit] = failed.get(unit, 0) + (event.get("outcome") != "done")
    total = sum(map(sum, seconds.values()))
    rows: list[list[str | Cell]] = []
    for (stage, name), times in seconds.items():
        share = sum(times) / total if total else 0.0
        counts = [format_count(len(times)), format_count(failed[stage, name])]
        rows.append(
            [stage, name, *counts, format_duration(sum(times)), Cell(text=format_percent(share), fraction=share)]
        )
    rows.append([Cell(text="all", strong=True), "", "", "", Cell(text=format_duration(total), strong=True), ""])
    return Table(
        caption="Wall time by stage, over all times it was begun; a stage that was already done takes next to none. "
        "These are the only numbers of the page that differ from one run to the next.",
        source=EVENTS,
        columns=("Stage", "Name", "Begun", "Failed", "Wall time", "Share"),
        rows=rows,
        left=(0, 1),
        starts=[len(rows) - 1],
    )
