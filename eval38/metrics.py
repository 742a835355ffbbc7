"""What the numbers are: pure functions of ranked classes, labels and groups.

Shapes: N images, K best classes, G groups.  top_NK (int64) holds each image's classes, best first; label_N (int64)
its class.
Sources: LAION-AI/CLIP_benchmark at 48de38c, metrics/zeroshot_classification.py (acc1, acc5); scikit-learn
(mean_per_class_recall is its balanced_accuracy_score, macro recall and F1 over the classes present); wilds 2.0.0,
common/metrics (accuracy by group), in the names that DataComp's results have.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import EvalError

MIN_CLASSES_FOR_ACC5 = 5
MAX_GROUPS = 10_000
"""More are not believed: each is two metrics in the results."""

Metrics = dict[str, float | None]
"""Name in DataComp's spelling -> value; None where DataComp has NaN or None."""


def single(value: float) -> float:
    """Return the value rounded to float32, in which WILDS and CLIP_benchmark's retrieval take their means."""
    return float(np.float32(value))


def measure_classification(top_NK: Tensor, best_N: Tensor, label_N: Tensor, *, num_classes: int) -> Metrics:
    """Return acc1, acc5 and mean_per_class_recall in [0, 1]; acc5 is None below five classes.

    N is at least 1, and K at least 5 where there are so many classes.  best_N is the best class, which is top_NK[:, 0]
    but for ties: DataComp takes accuracy from topk and recall from argmax.
    """
    has_acc5 = num_classes >= MIN_CLASSES_FOR_ACC5
    return {
        "acc1": measure_accuracy(top_NK, label_N, k=1),
        "acc5": measure_accuracy(top_NK, label_N, k=5) if has_acc5 else None,
        "mean_per_class_recall": measure_class_recall(best_N, label_N),
    }


def measure_accuracy(top_NK: Tensor, label_N: Tensor, *, k: int) -> float:
    """Return the share of images whose label is among their k best classes."""
    return int(find_hits(top_NK[:, :k], label_N).sum()) / len(label_N)


def find_hits(top_NK: Tensor, label_N: Tensor) -> Tensor:
    """Return for each image whether its label is among its K classes: bool (N,)."""
    return (top_NK == label_N[:, None]).any(dim=1)


def measure_class_recall(best_N: Tensor, label_N: Tensor) -> float:
    """Return the mean over classes of the share of their images whose best class is right.

    Classes without an image are left out, as scikit-learn leaves them out.
    """
    right_C, _, size_C = _count_classes(best_N, label_N)
    present_C = size_C > 0
    return float((right_C[present_C] / size_C[present_C]).mean())


def measure_class_f1(best_N: Tensor, label_N: Tensor) -> float:
    """Return the mean of the classes' F1 = 2 right / (predicted + present), over classes with an image."""
    right_C, predicted_C, size_C = _count_classes(best_N, label_N)
    present_C = size_C > 0
    return float((2 * right_C[present_C] / (predicted_C[present_C] + size_C[present_C])).mean())


def _count_classes(best_N: Tensor, label_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return how often each class is predicted rightly, predicted, and present: float64 (C,) each."""
    num_classes = 1 + int(torch.cat([best_N, label_N]).max())
    counted = (label_N[best_N == label_N], best_N, label_N)
    right_C, predicted_C, size_C = (torch.bincount(of, minlength=num_classes).double() for of in counted)
    return right_C, predicted_C, size_C


def measure_groups(
    right_N: Tensor, groups: Sequence[tuple[str, Tensor]], *, name: str, worst: str, highest_is_worst: bool = False
) -> Metrics:
    """Return the share of `right` over all images and in each group, the groups' sizes, and the worst share.

    groups: one or more (field, int64 (N,) of values from 0); with several, every combination is a group, the first
    field fastest.  Keys: NAME_avg; NAME_FIELD:g and count_FIELD:g (several fields: last_first, as in WILDS); `worst`.
    A group without images is None (WILDS's own code gives 0, DataComp's NaN) and never the worst.
    """
    sizes = [1 + int(value_N.max()) for _, value_N in groups]
    num_groups = int(np.prod(sizes, dtype=object))
    if num_groups > MAX_GROUPS:
        fields = " x ".join(field for field, _ in groups)
        raise EvalError(
            f"the metadata say {num_groups:,} groups of {fields}: more than {MAX_GROUPS:,} are not believed."
        )
    steps = [int(np.prod(sizes[:n], dtype=np.int64)) for n in range(len(sizes))]
    group_N = torch.stack([value_N * step for (_, value_N), step in zip(groups, steps, strict=True)]).sum(dim=0)
    size_G = torch.bincount(group_N, minlength=num_groups).tolist()
    right_G = torch.bincount(group_N[right_N], minlength=num_groups).tolist()
    metrics: Metrics = {f"{name}_avg": single(int(right_N.sum()) / len(right_N))}
    for g in range(num_groups):
        parts = [f"{field}:{g // step % size}" for (field, _), step, size in zip(groups, steps, sizes, strict=True)]
        of_group = "_".join(reversed(parts))
        metrics[f"{name}_{of_group}"] = single(right_G[g] / size_G[g]) if size_G[g] else None
        metrics[f"count_{of_group}"] = float(size_G[g])
    shares = [single(right / size) for right, size in zip(right_G, size_G, strict=True) if size]
    metrics[worst] = max(shares) if highest_is_worst else min(shares)
    return metrics
