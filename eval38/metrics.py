"""What the numbers are: pure functions of ranked classes and labels.

Shapes: N images, K best classes.  top_NK (int64) holds each image's classes, best first; label_N (int64) its class.
Source: LAION-AI/CLIP_benchmark at 48de38c, metrics/zeroshot_classification.py (acc1, acc5) and scikit-learn's
balanced_accuracy_score (mean_per_class_recall).
"""

import torch
from torch import Tensor

MIN_CLASSES_FOR_ACC5 = 5


def measure_classification(top_NK: Tensor, label_N: Tensor, *, num_classes: int) -> dict[str, float | None]:
    """Return acc1, acc5 and mean_per_class_recall in [0, 1]; acc5 is None below five classes.

    N is at least 1, and K at least 5 where there are so many classes.
    """
    has_acc5 = num_classes >= MIN_CLASSES_FOR_ACC5
    return {
        "acc1": measure_accuracy(top_NK, label_N, k=1),
        "acc5": measure_accuracy(top_NK, label_N, k=5) if has_acc5 else None,
        "mean_per_class_recall": measure_class_recall(top_NK[:, 0], label_N, num_classes=num_classes),
    }


def measure_accuracy(top_NK: Tensor, label_N: Tensor, *, k: int) -> float:
    """Return the share of images whose label is among their k best classes."""
    num_right = int((top_NK[:, :k] == label_N[:, None]).any(dim=1).sum())
    return num_right / len(label_N)


def measure_class_recall(best_N: Tensor, label_N: Tensor, *, num_classes: int) -> float:
    """Return the mean over classes of the share of their images whose best class is right.

    Classes without an image are left out, as scikit-learn leaves them out.
    """
    size_C = torch.bincount(label_N, minlength=num_classes).double()
    right_C = torch.bincount(label_N[best_N == label_N], minlength=num_classes).double()
    present_C = size_C > 0
    return float((right_C[present_C] / size_C[present_C]).mean())
