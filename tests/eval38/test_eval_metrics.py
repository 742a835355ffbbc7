import warnings

import pytest
import torch

from eval38.metrics import (
    measure_accuracy,
    measure_class_f1,
    measure_class_recall,
    measure_classification,
    measure_groups,
)
from pipeline.errors import EvalError


@pytest.mark.parametrize("num_classes", [2, 5, 37])
@pytest.mark.parametrize("num_images", [1, 7, 400])
def test_against_a_plain_loop_and_scikit_learn(num_classes: int, num_images: int) -> None:
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    random = torch.Generator().manual_seed(num_classes * 1000 + num_images)
    cosine_NC = torch.rand(num_images, num_classes, generator=random)
    label_N = torch.randint(num_classes, (num_images,), generator=random)
    top_NK = cosine_NC.topk(min(5, num_classes), dim=1).indices
    found = measure_classification(top_NK, top_NK[:, 0], label_N, num_classes=num_classes)
    ranks = [int((cosine_NC[n] > cosine_NC[n, label]).sum()) for n, label in enumerate(label_N.tolist())]
    recalls = []
    for c in set(label_N.tolist()):
        of_class = [rank for rank, label in zip(ranks, label_N.tolist(), strict=True) if label == c]
        recalls.append(sum(rank == 0 for rank in of_class) / len(of_class))
    assert found["acc1"] == sum(rank < 1 for rank in ranks) / num_images
    assert found["acc5"] == (sum(rank < 5 for rank in ranks) / num_images if num_classes >= 5 else None)
    assert found["mean_per_class_recall"] == pytest.approx(sum(recalls) / len(recalls), abs=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes that are predicted and never true
        oracle = sklearn_metrics.balanced_accuracy_score(label_N.numpy(), top_NK[:, 0].numpy())
        labels = label_N.unique().numpy()
        f1 = sklearn_metrics.f1_score(label_N.numpy(), top_NK[:, 0].numpy(), average="macro", labels=labels)
    assert found["mean_per_class_recall"] == pytest.approx(oracle, abs=1e-12)
    assert measure_class_f1(top_NK[:, 0], label_N) == pytest.approx(f1, abs=1e-12)


@pytest.mark.parametrize(
    ("best", "label", "recall"),
    [
        ([0, 0, 0, 1], [0, 0, 0, 1], 1.0),
        ([0, 0, 0, 0], [0, 0, 0, 1], 0.5),
        ([1, 1], [0, 0], 0.0),
        ([2, 2, 0], [2, 2, 2], 2 / 3),
    ],
)
def test_class_recall_leaves_absent_classes_out(best: list[int], label: list[int], recall: float) -> None:
    assert measure_class_recall(torch.tensor(best), torch.tensor(label)) == pytest.approx(recall)


@pytest.mark.parametrize(("k", "share"), [(1, 1 / 3), (2, 2 / 3), (3, 1.0)])
def test_accuracy_looks_at_the_first_k(k: int, share: float) -> None:
    top_NK = torch.tensor([[0, 1, 2], [1, 0, 2], [1, 2, 0]])
    assert measure_accuracy(top_NK, torch.tensor([0, 0, 0]), k=k) == share


def test_groups_of_one_field() -> None:
    right_N, group_N = torch.tensor([True, False, True, True]), torch.tensor([0, 0, 2, 2])
    assert measure_groups(right_N, [("slide", group_N)], name="acc", worst="acc_wg") == {
        "acc_avg": 0.75,
        "acc_slide:0": 0.5,
        "count_slide:0": 2.0,
        "acc_slide:1": None,
        "count_slide:1": 0.0,
        "acc_slide:2": 1.0,
        "count_slide:2": 2.0,
        "acc_wg": 0.5,
    }


def test_groups_of_two_fields_are_named_last_first() -> None:
    fields = [("gender", torch.tensor([0, 1, 1])), ("race", torch.tensor([1, 0, 1]))]
    found = measure_groups(torch.tensor([True, True, False]), fields, name="x", worst="high", highest_is_worst=True)
    assert [name for name in found if name.startswith("x_race")] == [
        "x_race:0_gender:0",
        "x_race:0_gender:1",
        "x_race:1_gender:0",
        "x_race:1_gender:1",
    ]
    assert (found["x_race:0_gender:0"], found["x_race:1_gender:1"], found["high"]) == (None, 0.0, 1.0)


def test_a_group_number_out_of_all_proportion() -> None:
    with pytest.raises(EvalError, match="5,000,000,001 groups of slide"):
        measure_groups(torch.tensor([True]), [("slide", torch.tensor([5_000_000_000]))], name="acc", worst="w")


def test_a_group_beyond_belief() -> None:
    """One wrong number would make as many metrics."""
    right_N = torch.tensor([True])
    metrics = measure_groups(right_N, [("region", torch.tensor([9_999]))], name="acc", worst="acc_wg")
    assert metrics["acc_wg"] == 1.0 and len(metrics) == 20_002
    with pytest.raises(EvalError, match="10,001 groups of region: more than 10,000"):
        measure_groups(right_N, [("region", torch.tensor([10_000]))], name="acc", worst="acc_wg")
