"""WILDS tasks: classification, then accuracy by camera trap class, slide, year or region.

Source: mlfoundations/datacomp at 4a8df19, eval_utils/wilds_eval.py; wilds 2.0.0 for the metrics and names.

FMoW's main metric is the accuracy in its worst region.  DataComp means to leave out the region "Other", as WILDS does,
but looks for that name among numbers, so a region of 4 of the 22,108 images counts: for many models the task's value is
0 or 25 % (datacomp#61).  The corrected column leaves it out.  The set holds no names of regions, so Other is known by
its size.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from eval38.classify import Outcome, judge
from eval38.embed import Embedder, Seen
from eval38.metadata import Tagged, read_tagged_images, take_column, take_labels
from eval38.metrics import (
    Metrics,
    measure_class_f1,
    measure_class_recall,
    measure_groups,
    single,
)
from eval38.rows import EvalSet, ImageRow, LostImage
from eval38.statistics import BEST, GROUP

FIELDS = {
    "wilds/iwildcam": ("location", "sequence", "year", "month", "day", "hour", "minute", "second", "y"),
    "wilds/camelyon17": ("hospital", "slide", "y"),
    "wilds/fmow": ("region", "year", "y"),
}
"""Columns of the metadata, by task."""
ACCURACY = "acc"
MAX_OTHER_IMAGES = 4
"""FMoW: a region of no more images than this is Other."""


def read_rows(eval_set: EvalSet) -> Iterator[ImageRow[Tagged] | LostImage]:
    """Yield the images with label and metadata."""
    return read_tagged_images(eval_set, FIELDS[eval_set.task.key])


def evaluate(eval_set: EvalSet, seen: Seen[Tagged], model: Embedder) -> Outcome:
    """Return the classification metrics and those of the task."""
    key, fields = eval_set.task.key, FIELDS[eval_set.task.key]
    label_N, class_CD = take_labels(seen.truths), model.embed_classes(eval_set.classes, eval_set.templates)
    metrics, per_image = judge(seen.image_ND, class_CD, label_N)
    metrics |= MEASURES[key](per_image[BEST], label_N, seen.truths)
    if key != "wilds/fmow":
        return Outcome(metrics, len(label_N), seen.lost, per_image=per_image)
    per_image[GROUP] = take_column(seen.truths, fields, "region")
    named = leave_out_other(per_image)
    return Outcome(metrics, len(label_N), seen.lost, correct_worst_region(metrics), per_image, named)


def measure_iwildcam(best_N: Tensor, label_N: Tensor, _: Sequence[Tagged]) -> Metrics:
    """Return accuracy, and macro recall and F1 over the classes that have an image."""
    return {
        "acc_avg": single(int((best_N == label_N).sum()) / len(label_N)),
        "recall-macro_all": measure_class_recall(best_N, label_N),
        "F1-macro_all": measure_class_f1(best_N, label_N),
    }


def measure_camelyon17(best_N: Tensor, label_N: Tensor, truths: Sequence[Tagged]) -> Metrics:
    """Return accuracy by slide and on the worst slide."""
    slide_N = take_column(truths, FIELDS["wilds/camelyon17"], "slide")
    return measure_groups(best_N == label_N, [("slide", slide_N)], name=ACCURACY, worst="acc_wg")


def measure_fmow(best_N: Tensor, label_N: Tensor, truths: Sequence[Tagged]) -> Metrics:
    """Return accuracy by year and by region and in the worst of each; regions of any size count."""
    metrics: Metrics = {}
    for field in ("year", "region"):
        value_N = take_column(truths, FIELDS["wilds/fmow"], field)
        metrics |= measure_groups(best_N == label_N, [(field, value_N)], name=ACCURACY, worst=f"acc_worst_{field}")
    return metrics


def correct_worst_region(metrics: Metrics) -> Metrics:
    """Return FMoW's worst region without Other; None where no other region has an image."""
    counts = {name.partition(":")[2]: count for name, count in metrics.items() if name.startswith("count_region:")}
    named = [metrics[f"acc_region:{region}"] for region, count in counts.items() if (count or 0) > MAX_OTHER_IMAGES]
    return {"acc_worst_region": min((share for share in named if share is not None), default=None)}


def leave_out_other(per_image: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return what is known of FMoW's images outside Other; None when no region is left."""
    region_N = per_image[GROUP]
    named_N = torch.bincount(region_N)[region_N] > MAX_OTHER_IMAGES
    return {name: of_image[named_N] for name, of_image in per_image.items()} if bool(named_N.any()) else None


MEASURES = {
    "wilds/iwildcam": measure_iwildcam,
    "wilds/camelyon17": measure_camelyon17,
    "wilds/fmow": measure_fmow,
}
