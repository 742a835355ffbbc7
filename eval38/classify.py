"""Plain zero-shot classification: an image's class is the one whose vector is nearest.

Shapes: N images, C classes, D dims, K best classes.

DataComp's number differs for a class list with a blank line (CLEVR Distance's fourth class): its pinned CLIP_benchmark
1.4.0 drops such lines, so every later label means the class after its own, and the last no class at all.  That is
repeated here as the DataComp column; the corrected one has all classes.  Fixed in CLIP_benchmark 832e17d.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from eval38.embed import Embedder, Seen, spell_prompts
from eval38.metrics import MIN_CLASSES_FOR_ACC5, Metrics, measure_classification
from eval38.rows import EvalSet, LostImage
from eval38.statistics import BEST, LABEL, TOP

RANKED_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one task gave."""

    metrics: Metrics
    """As DataComp computes them, in its spelling."""
    num_images: int
    """Images (WinoGAViL: instances) the metrics are over."""
    lost: tuple[LostImage, ...]
    corrected: Metrics | None = None
    """The metrics that are otherwise when computed rightly; None where DataComp's way is right."""
    per_image: Mapping[str, Tensor] | None = None
    """What the main metric is taken over (outcomes.py); None where there is no main metric."""
    per_image_corrected: Mapping[str, Tensor] | None = None
    """The same of the corrected main metric, where it is taken over something else."""


class Ranking(NamedTuple):
    """The nearest classes of each image."""

    top_NK: Tensor
    """int64, nearest first: five classes, or the nearest alone where there are fewer than five."""
    best_N: Tensor
    """int64: the nearest class, of equal ones the first."""


class Judged(NamedTuple):
    """How a ranking does."""

    metrics: Metrics
    per_image: dict[str, Tensor]
    """Label and predictions of each image, in the names of statistics.py."""


def list_prompts(eval_set: EvalSet) -> Iterator[str]:
    """Yield what will be read: the prompts of every class list that is tried."""
    yield from spell_prompts(eval_set.classes, eval_set.templates)


def rank_classes(image_ND: Tensor, class_CD: Tensor) -> Ranking:
    """Return the nearest classes of each image; both are unit vectors.

    Equal cosines come in torch.topk's and torch.argmax's order, as in CLIP_benchmark and DataComp.
    """
    k = MIN_CLASSES_FOR_ACC5 if len(class_CD) >= MIN_CLASSES_FOR_ACC5 else 1
    top_parts, best_parts = [], []
    for part in torch.split(image_ND, RANKED_AT_ONCE):
        cosine_NC = part @ class_CD.T
        top_parts.append(cosine_NC.topk(k, dim=1).indices)
        best_parts.append(cosine_NC.argmax(dim=1))
    return Ranking(torch.cat(top_parts), torch.cat(best_parts))


def evaluate(eval_set: EvalSet, seen: Seen[int], model: Embedder) -> Outcome:
    """Return the metrics of a classification set, and DataComp's beside them where it drops a blank class."""
    label_N = torch.tensor(seen.truths)
    classes = eval_set.classes
    metrics, per_image = judge(seen.image_ND, model.embed_classes(classes, eval_set.templates), label_N)
    if all(classes) or eval_set.task.group == "own":
        return Outcome(metrics, len(label_N), seen.lost, per_image=per_image)
    named = judge(seen.image_ND, model.embed_classes([name for name in classes if name], eval_set.templates), label_N)
    return Outcome(named.metrics, len(label_N), seen.lost, metrics, named.per_image, per_image)


def judge(image_ND: Tensor, class_CD: Tensor, label_N: Tensor) -> Judged:
    """Return acc1, acc5 and mean_per_class_recall of images against class vectors, with what they are taken over."""
    top_NK, best_N = rank_classes(image_ND, class_CD)
    metrics = measure_classification(top_NK, best_N, label_N, num_classes=len(class_CD))
    return Judged(metrics, {LABEL: label_N, TOP: top_NK, BEST: best_N})
