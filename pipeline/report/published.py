"""The models of a run among those that DataComp published: one table, where a run was evaluated on all 38 tasks.

Source: open_clip, docs/openclip_results.csv; group means by DataComp's grouping, which agree with its own averages.
The small "image" row of that file is left out: it repeats the one of image with CLIP score in every column.
"""

from collections.abc import Mapping
from typing import Any

from pipeline.report.blocks import Cell, Table
from pipeline.report.formats import NOTHING, format_percent
from pipeline.report.read import EVALS

GROUPS = {"imagenet": "ImageNet", "imagenet_shift": "Shifts", "vtab": "VTAB", "retrieval": "Retrieval"}
AVERAGE = "Average of 38"
DAGGER = "†"
"""Marks what was not evaluated on every image."""
NUM_COUNTED = 38
CLIP_SCORE = "CLIP score L/14, best 30 %"
BOTH = "image and CLIP score"
PUBLISHED = {
    "small, ViT-B/32": {
        "no filter": (0.027, 0.037, 0.158, 0.117, 0.142),
        "basic": (0.038, 0.043, 0.150, 0.118, 0.142),
        "text": (0.046, 0.052, 0.169, 0.125, 0.157),
        "LAION-2B": (0.030, 0.040, 0.136, 0.092, 0.133),
        CLIP_SCORE: (0.051, 0.055, 0.190, 0.119, 0.173),
        BOTH: (0.039, 0.045, 0.162, 0.094, 0.145),
    },
    "medium, ViT-B/32": {
        "no filter": (0.175, 0.152, 0.259, 0.219, 0.258),
        "basic": (0.226, 0.193, 0.284, 0.251, 0.285),
        "text": (0.255, 0.215, 0.328, 0.249, 0.307),
        "image": (0.268, 0.213, 0.319, 0.256, 0.312),
        "LAION-2B": (0.230, 0.198, 0.307, 0.233, 0.292),
        CLIP_SCORE: (0.273, 0.230, 0.338, 0.251, 0.328),
        BOTH: (0.297, 0.239, 0.346, 0.231, 0.328),
    },
    "large, ViT-B/16": {
        "no filter": (0.459, 0.378, 0.426, 0.419, 0.437),
        "basic": (0.515, 0.423, 0.446, 0.480, 0.458),
        "text": (0.560, 0.465, 0.465, 0.479, 0.476),
        "image": (0.572, 0.454, 0.483, 0.481, 0.481),
        "LAION-2B": (0.553, 0.453, 0.510, 0.495, 0.501),
        CLIP_SCORE: (0.578, 0.474, 0.538, 0.466, 0.529),
        BOTH: (0.631, 0.508, 0.546, 0.498, 0.537),
    },
    "xlarge, ViT-L/14": {
        "no filter": (0.723, 0.612, 0.611, 0.569, 0.621),
        "LAION-2B": (0.754, 0.637, 0.624, 0.620, 0.636),
        CLIP_SCORE: (0.764, 0.655, 0.643, 0.588, 0.650),
        BOTH: (0.792, 0.679, 0.652, 0.608, 0.663),
    },
}
"""Scale -> filter -> means of the groups and of all 38 tasks, in the order of the columns."""


def list_published(models: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Return a table of the models that have a value in all 38 tasks over the published ones; none if no model has."""
    whole = {label: facts for label, facts in models.items() if facts["average"]["num_tasks"] == NUM_COUNTED}
    if not whole:
        return []
    incomplete = [label for label, facts in whole.items() if _is_incomplete(facts)]
    told = [f"{DAGGER} Not every image of the sets was evaluated: no number of the whole sets."] if incomplete else []
    rows: list[list[str | Cell]] = []
    for label, facts in whole.items():
        means = [*(facts["groups"].get(group, {}).get("value") for group in GROUPS), facts["average"]["value"]]
        mark = DAGGER if label in incomplete else ""
        rows.append(
            [Cell(text="this run", strong=True), Cell(text=label, strong=True, note=mark), *map(_percent, means)]
        )
    starts = []
    for scale, filters in PUBLISHED.items():
        starts.append(len(rows))
        for place, (name, shares) in enumerate(filters.items()):
            rows.append([scale if place == 0 else "", name, *map(_percent, shares)])
    return [
        Table(
            caption="Beside what DataComp's filters gave at its four scales, in per cent, as DataComp computes it.",
            source=f"{EVALS}/*/manifest.json",
            columns=("Scale, model", "Filter", *GROUPS.values(), AVERAGE),
            rows=rows,
            left=(0, 1),
            starts=starts,
            notes=[
                "Published: open_clip's docs/openclip_results.csv, of models trained on DataComp's pools. Another "
                "training run of one recipe moves the average by up to 0.6 points.",
                *told,
            ],
        )
    ]


def _is_incomplete(facts: Mapping[str, Any]) -> bool:
    return any(task["counted"] and task["incomplete"] for task in facts["tasks"].values())


def _percent(share: float | None) -> str:
    return NOTHING if share is None else format_percent(share, unit=False)
