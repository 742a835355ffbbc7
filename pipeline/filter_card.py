"""The calibrated filter card as a readable page; what stands in it is put together in jobs/stage_card.py."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.markdown import NOTHING, exact, percent, short_percent, write_table

BAR_WIDTH = 40
Card = Mapping[str, Any]


def render_card(card: Card) -> str:
    """Return the card as Markdown; every number in it is the JSON's."""
    parts = [
        f"# Filter card: {card['filter']['column']}",
        *_tell_threshold(card["calibration"]),
        *_tell_network(card),
        *_tell_heldout(card["heldout"]),
        *_tell_scores(card),
        "## What is not known",
        "\n".join(f"- {line}" for line in card["unknown"]) or "Nothing that this card should hold.",
    ]
    return "\n\n".join(parts) + "\n"


def _tell_threshold(found: Card) -> Iterator[str]:
    yield "## Threshold"
    rows = [
        ["threshold", exact(found["threshold"])],
        ["wanted", f"{found['wanted']:,} of {found['pool']:,} rows ({percent(found['wanted'] / found['pool'], 2)} %)"],
        [
            "kept at or above it" + ("" if found["method"] == "exact" else ", estimated"),
            f"{found['kept_at_or_above']:,} rows ({percent(found['kept_fraction'], 2)} % of the pool)",
        ],
    ]
    if found["method"] == "exact":
        rows.append(["found", "exactly, from every stored score"])
    else:
        sample, level = found["sample"], f"{short_percent(found['confidence'])} %"
        low, high = found["threshold_interval"]
        kept = " to ".join(percent(end, 2) for end in found["kept_fraction_interval"])
        rows += [
            ["found", f"from a sample of {sample['rows']:,} of {sample['of']:,} scored rows, seed {sample['seed']}"],
            [f"{level} interval of the threshold", f"{exact(low)} to {exact(high)}"],
            [f"{level} interval of what it keeps", f"{kept} % of the pool"],
        ]
    yield write_table(["", ""], rows, left=2)
    yield "As a step of a subset:"
    yield f"```yaml\n- {json.dumps(found['step'], ensure_ascii=False)}\n```"


def _tell_network(card: Card) -> Iterator[str]:
    yield "## Network"
    network, made_by = card["network"], card["filter"]
    rows = [["filter", f"{made_by['name']} (version {made_by.get('version', NOTHING)})"]]
    if made_by["target_aware"]:
        rows.append(["target-aware", "yes: it reads train data of evaluation tasks"])
    for name in ("architecture", "sha256", "trained_by", "hub", "licence", "about"):
        if network.get(name):
            rows.append([name.replace("_", " "), str(network[name])])
    yield write_table(["", ""], rows, left=2)
    if "manifest" not in network:
        return
    made = network["manifest"]
    yield "Trained on (rows of each set: read, kept, dropped, failed):"
    yield write_table(
        ["set", "read", "kept", "dropped", "failed"],
        [
            [name, *(f"{n:,}" for n in (c["read"], c["kept"])), *(_list_reasons(c[what]) for what in REASONS)]
            for name, c in made["counts"].items()
        ],
    )
    yield "Choices, and what came out:"
    yield f"```json\n{json.dumps({k: made[k] for k in ('config', 'parents', 'facts')}, indent=1)}\n```"


REASONS = ("dropped", "failed")


def _list_reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {number:,}" for reason, number in counts.items()) or NOTHING


def _tell_heldout(heldout: Card | None) -> Iterator[str]:
    yield "## Held-out retrieval (recall@1, %)"
    if heldout is None:
        yield "Not measured."
        return
    yield f"On {heldout['on']}."
    columns = ["image to text", "text to image", "pairs", "different captions"]
    recall = heldout["recall"]
    shares = [percent(recall["image_to_text"], 2), percent(recall["text_to_image"], 2)]
    yield write_table(columns, [[*shares, f"{recall['pairs']:,}", f"{recall['captions']:,}"]], left=0)


def _tell_scores(card: Card) -> Iterator[str]:
    scores, found = card["scores"], card["distribution"]
    yield "## Scores"
    rows = [
        ["scores", scores["identity"]],
        ["pool", scores["pool"]],
        ["rows of the pool", f"{scores['rows_of_pool']:,}"],
        ["rows in the score files", f"{found['num_rows']:,}"],
        ["without a score (null or NaN)", f"{found['num_null']:,}"],
        ["infinite", f"{found['num_infinite']:,}"],
        ["smallest and largest finite", f"{exact(found['minimum'])}, {exact(found['maximum'])}"],
    ]
    yield write_table(["", ""], rows, left=2)
    if not found["counts"]:
        return
    quantiles = [[short_percent(float(share)), exact(value)] for share, value in found["quantiles"].items()]
    yield write_table(["quantile, %", "score"], quantiles, left=0)
    yield f"```text\n{draw_histogram(found['edges'], found['counts'], card['calibration']['threshold'])}\n```"


def draw_histogram(edges: list[float], counts: list[int], threshold: float) -> str:
    """Return one line per bin: lower edge, rows, a bar; the bin with the threshold in it is marked."""
    most, last, lines = max(counts), len(counts) - 1, []
    for n, count in enumerate(counts):
        is_here = edges[n] <= threshold and (threshold < edges[n + 1] or n == last)
        bar = "#" * -(-BAR_WIDTH * count // most)
        lines.append(f"{edges[n]:>12.5g} {count:>14,} {'>' if is_here else ' '} {bar}".rstrip())
    return "\n".join(lines)
