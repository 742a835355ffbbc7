"""Dollar Street and GeoDE: classification, then accuracy by income or region of the household.

Source: mlfoundations/datacomp at 4a8df19, eval_utils/fairness_eval.py.  Dollar Street is judged by whether the class is
among the five nearest, GeoDE by the nearest; the main metric is the worst group's share.
"""

from collections.abc import Iterator
from typing import NamedTuple

from eval38.classify import Outcome, judge
from eval38.embed import Embedder, Seen
from eval38.metadata import Tagged, read_tagged_images, take_column, take_labels
from eval38.metrics import find_hits, measure_groups
from eval38.rows import EvalSet, ImageRow, LostImage
from eval38.statistics import BEST, GROUP, TOP


class Rule(NamedTuple):
    """How one of the two tasks is judged."""

    fields: tuple[str, ...]
    """Columns of the metadata."""
    group: str
    """The field that makes the groups."""
    name: str
    """Of the share, in DataComp's spelling."""
    k: int
    """An image is right when its class is among so many."""


RULES = {
    "fairness/dollar_street": Rule(("income_ds", "income_meta", "region"), "income_ds", "acc_top5", 5),
    "fairness/geode": Rule(("region", "country"), "region", "acc", 1),
}


def read_rows(eval_set: EvalSet) -> Iterator[ImageRow[Tagged] | LostImage]:
    """Yield the images with label and metadata."""
    return read_tagged_images(eval_set, RULES[eval_set.task.key].fields)


def evaluate(eval_set: EvalSet, seen: Seen[Tagged], model: Embedder) -> Outcome:
    """Return the classification metrics and the shares by group."""
    rule = RULES[eval_set.task.key]
    label_N, class_CD = take_labels(seen.truths), model.embed_classes(eval_set.classes, eval_set.templates)
    metrics, per_image = judge(seen.image_ND, class_CD, label_N)
    right_N = per_image[BEST] == label_N if rule.k == 1 else find_hits(per_image[TOP][:, : rule.k], label_N)
    group_N = take_column(seen.truths, rule.fields, rule.group)
    metrics |= measure_groups(right_N, [(rule.group, group_N)], name=rule.name, worst=f"{rule.name}_wg")
    return Outcome(metrics, len(label_N), seen.lost, per_image={**per_image, GROUP: group_N})
