"""What `winnow dfn evaluate` found as tables to read; jobs/stage_agreement.py and jobs/stage_induced.py found it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.markdown import NOTHING, decimal, percent, short_percent, write_table
from pipeline.target_aware import LEGEND, MARK, mark

Found = Mapping[str, Any]


def render_evaluation(found: Found) -> str:
    """Return the page: what the scores say, what they induce, each where it was asked for."""
    parts = ["# How good the filters are"]
    if found["scores"]:
        parts += [*_tell_truth(found["scores"]), *_tell_agreement(found["scores"])]
    if found["induced"]:
        parts += _tell_induced(found["induced"])
    page = "\n\n".join(parts)
    return page + (f"\n\n{LEGEND}\n" if MARK in page else "\n")


def _head(fractions: Sequence[float]) -> list[str]:
    return [f"{short_percent(fraction)} %" for fraction in fractions]


def _tell_truth(scores: Found) -> Iterator[str]:
    truth, columns, fractions = scores["truth"], scores["columns"], _head(scores["fractions"])
    if truth is None:
        return
    yield "## Against the truth"
    yield (
        f"Right kinds: {', '.join(truth['right_kinds'])}: {truth['rows_right']:,} of the {truth['rows_named']:,} rows "
        "that the truth names. AUROC and average precision are over rows with a score."
    )
    names = {name: mark(name, one["target_aware"]) for name, one in columns.items()}
    rows = [
        [names[n], f"{one['null']:,}", decimal(one["truth"]["auroc"]), decimal(one["truth"]["average_precision"])]
        for n, one in columns.items()
    ]
    yield write_table(["score", "null", "AUROC", "average precision"], rows)
    for measure in ("precision", "recall"):
        yield f"{measure.capitalize()} in % where each score keeps its best part of the pool:"
        rows = [[names[n], *(percent(kept[measure]) for kept in one["truth"]["kept"])] for n, one in columns.items()]
        yield write_table(["score", *fractions], rows)


def _tell_agreement(scores: Found) -> Iterator[str]:
    if not scores["pairs"]:
        return
    columns = scores["columns"]
    yield "## Agreement"
    yield (
        "Spearman's rank correlation over the rows that both score; and the rows that both keep of the pool, as % of "
        "what the first keeps (in brackets: of what either keeps)."
    )
    rows = []
    for pair in scores["pairs"]:
        names = [mark(pair[which], columns[pair[which]]["target_aware"]) for which in ("first", "second")]
        shares = [f"{percent(one['of_first'])} ({percent(one['jaccard'])})" for one in pair["overlap"]]
        rows.append([*names, f"{pair['common_rows']:,}", decimal(pair["spearman"]), *shares])
    yield write_table(["first", "second", "common rows", "Spearman", *_head(scores["fractions"])], rows, left=2)


def _tell_induced(induced: Found) -> Iterator[str]:
    level, seeds = short_percent(induced["confidence"]), induced["seeds"]
    yield "## Induced models"
    yield (
        f"One {induced['model']} per subset and seed ({', '.join(map(str, seeds))}), each {induced['samples_seen']:,} "
        f"samples seen. Accuracy in %: mean over the seeds, ± half the {level} % interval by Student's t with "
        f"{len(seeds) - 1} degrees of freedom{'' if len(seeds) > 1 else ' (one seed gives none)'}. The difference to "
        f"`{induced['baseline']}` is paired by seed. Own: what the filter network of that name reaches itself."
    )
    for measure, name in induced["measures"].items():
        columns = ["subset", "rows", "epochs", "own", name, f"difference to {induced['baseline']}"]
        rows = []
        for one in induced["subsets"]:
            values = one["measures"][measure]
            rows.append(
                [
                    mark(one["subset"], one["target_aware"]),
                    f"{one['rows']:,}"
                    + (f" x{one['copies'] / one['rows']:.2f}" if one["copies"] > one["rows"] else ""),
                    decimal(one["epochs"], 2),
                    percent(one["own"][measure], 2) if one["own"] else NOTHING,
                    _spell(values["mean_and_half_width"]),
                    _spell(values["difference_and_half_width"], sign="+"),
                ]
            )
        yield write_table(columns, rows)


def _spell(found: tuple[float, float | None] | None, sign: str = "") -> str:
    """Return `44.10 ± 1.20`."""
    if found is None:
        return NOTHING
    value, half = found
    return f"{100 * value:{sign}.2f}" + ("" if half is None else f" ± {percent(half, 2)}")
