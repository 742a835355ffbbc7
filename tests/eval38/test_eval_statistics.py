import hashlib
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score

from eval38.metrics import measure_class_f1, measure_class_recall, measure_classification, measure_groups
from eval38.statistics import (
    MEASURES,
    adjust_holm,
    bootstrap,
    bootstrap_pair,
    compare_mcnemar,
    estimate_p,
    find_interval,
    find_right,
    measure,
)
from eval38.tasks import TASKS, Metric
from pipeline.errors import EvalError

Array = np.ndarray


def draw(
    seed: int, *, images: int = 400, classes: int = 7, share: float = 0.6, groups: int = 3, hard: float = 0.0
) -> dict[str, Array]:
    """Return columns of every kind; an image is right with probability `share`, less `hard` in the last group."""
    generator = np.random.default_rng(seed)
    label = np.minimum(generator.geometric(0.3, images) - 1, classes - 2)  # the last class has no image
    group = generator.integers(0, groups, images)
    right = generator.random(images) < share - hard * (group == groups - 1)
    best = np.where(right, label, (label + generator.integers(1, classes, images)) % classes)
    top = (best[:, None] + np.arange(min(5, classes))) % classes
    captions = generator.integers(1, 6, images)
    union = generator.integers(2, 7, images)
    return {
        "label": label,
        "top": top,
        "best": best,
        "group": group,
        "image_right": right.astype(int),
        "captions": captions,
        "captions_right": generator.binomial(captions, share),
        "candidates": generator.choice([5, 6, 10, 12], images),
        "union": union,
        "shared": generator.binomial(union, share),
    }


def reference(metric: Metric, of: dict[str, Array]) -> float:
    """The metric by the code that makes the results, or by scikit-learn."""
    tensors = {name: torch.tensor(column) for name, column in of.items()}
    top, best, label, group = (tensors[name] for name in ("top", "best", "label", "group"))
    plain = measure_classification(top, best, label, num_classes=top.shape[1])
    worst = {"acc_wg": best == label, "acc_worst_region": best == label, "acc_top5_wg": (top == label[:, None]).any(1)}
    found: float | None
    if metric in worst:
        found = measure_groups(worst[metric], [("g", group)], name="acc", worst="worst")["worst"]
    elif metric == "F1-macro_all":
        found = f1_score(of["label"], of["best"], average="macro", labels=np.unique(of["label"]), zero_division=0)
    elif metric == "mean_per_class_recall":
        found = balanced_accuracy_score(of["label"], of["best"]) if set(of["best"]) <= set(of["label"]) else None
        found = measure_class_recall(best, label) if found is None else found
    elif metric == "mean_recall@1":
        found = (of["image_right"].mean() + of["captions_right"].sum() / of["captions"].sum()) / 2
    elif metric == "jaccard_score_10-12":
        found = (of["shared"] / of["union"])[of["candidates"] >= 10].mean()
    else:
        found = plain[metric]
    assert found is not None
    return found


@pytest.mark.parametrize("metric", list(MEASURES))
@pytest.mark.parametrize("seed", range(4))
def test_a_metric_of_outcomes_is_the_metric_of_the_results(metric: Metric, seed: int) -> None:
    columns = draw(seed, images=(400, 30, 5, 1)[seed]) | (
        {"candidates": np.full((5, 1)[seed - 2], 12)} if seed > 1 else {}
    )
    assert measure(metric, columns) == pytest.approx(reference(metric, columns), abs=1e-7)
    if metric == "F1-macro_all":
        best, label = torch.tensor(columns["best"]), torch.tensor(columns["label"])
        assert measure(metric, columns) == pytest.approx(measure_class_f1(best, label), abs=1e-12)


def test_every_main_metric_has_a_measure() -> None:
    assert {task.metric for task in TASKS if task.metric} == set(MEASURES)


@pytest.mark.parametrize("metric", list(MEASURES))
def test_resamples_of_cells_are_resamples_of_images(metric: Metric) -> None:
    """Mean and spread agree with drawing images one by one and measuring by the results' code."""
    columns = draw(5, images=120)
    value_B = bootstrap(metric, columns, key="t", resamples=4000)
    generator, slow = np.random.default_rng(1), []
    for _ in range(400):
        place_N = generator.integers(0, 120, 120)
        slow.append(measure(metric, {name: column[place_N] for name, column in columns.items()}))
    assert value_B.mean() == pytest.approx(np.mean(slow), abs=4 * np.std(slow) / 20)
    assert value_B.std() == pytest.approx(np.std(slow), rel=0.15)


@pytest.mark.parametrize("classes", [7, 60])
def test_f1_of_resamples_is_scikit_learns_of_the_same_images(classes: int) -> None:
    """A set with so many pairs of classes is drawn image by image; here each image is counted by another library."""
    of = draw(6, classes=classes, share=0.3)
    order_N = np.lexsort((of["best"], of["label"]))
    label, best = of["label"][order_N], of["best"][order_N]
    generator, wanted = np.random.default_rng([0, int.from_bytes(hashlib.sha256(b"t").digest()[:8], "big")]), []
    for _ in range(20):
        place_N = generator.integers(400, size=400, dtype=np.uint32)
        truth, found = label[place_N], best[place_N]
        wanted.append(f1_score(truth, found, average="macro", labels=np.unique(truth), zero_division=0))
    assert bootstrap("F1-macro_all", of, key="t", resamples=20) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(
    ("metric", "truth"),
    [("acc1", 0.6), ("mean_per_class_recall", 0.6), ("mean_recall@1", 0.6), ("jaccard_score_10-12", 0.6)],
)
def test_intervals_cover_the_truth_as_often_as_they_say(metric: Metric, truth: float) -> None:
    inside = 0
    for seed in range(400):
        columns = draw(seed, classes=4)
        low, high = find_interval(bootstrap(metric, columns, key=str(seed), resamples=300))
        inside += low <= truth <= high
    assert 0.92 <= inside / 400 <= 0.98


def test_intervals_of_a_clear_worst_group_cover_it() -> None:
    inside = 0
    for seed in range(300):
        values = bootstrap("acc_wg", draw(seed, images=600, hard=0.2), key=str(seed), resamples=300)
        low, high = find_interval(values)
        inside += low <= 0.4 <= high
    assert 0.92 <= inside / 300 <= 0.98


def test_tests_of_equal_models_raise_false_alarms_as_rarely_as_they_say() -> None:
    boot, exact = [], []
    for seed in range(400):
        first, second = draw(seed), draw(seed)
        second["best"] = np.where(draw(seed + 10**6)["image_right"], second["label"], second["label"] + 1)
        second["top"] = second["best"][:, None]
        boot.append(estimate_p(bootstrap_pair("acc1", first, second, key=str(seed), resamples=400)))
        exact.append(compare_mcnemar(find_right(first), find_right(second)))
    assert 0.02 <= np.mean(np.array(boot) < 0.05) <= 0.08
    assert 0.01 <= np.mean(np.array(exact) < 0.05) <= 0.06  # exact: at most 5 %


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (1, 0), (3, 3), (2, 9), (40, 17), (0, 30)])
def test_mcnemar_is_the_binomial_tail(only_first: int, only_second: int) -> None:
    first = np.array([1] * only_first + [0] * only_second + [1] * 5 + [0] * 5)
    second = np.array([0] * only_first + [1] * only_second + [1] * 5 + [0] * 5)
    coins, fewest = only_first + only_second, min(only_first, only_second)
    tail = 2 * sum(math.comb(coins, heads) for heads in range(fewest + 1)) / 2**coins
    assert compare_mcnemar(first, second) == pytest.approx(min(1.0, tail), rel=1e-12)
    assert compare_mcnemar(second, first) == compare_mcnemar(first, second)


def test_mcnemar_of_many_images() -> None:
    first = np.arange(108_754) % 2
    assert compare_mcnemar(first, 1 - first) == 1.0
    few_better = np.where(np.arange(108_754) < 1000, 1, first)
    assert compare_mcnemar(first, few_better) == pytest.approx(2.0 * 0.5**500, rel=1e-9)


@pytest.mark.parametrize("metric", list(MEASURES))
@pytest.mark.parametrize("right", [0, 1])
def test_all_right_and_all_wrong(metric: Metric, right: int) -> None:
    of = draw(0) | {"image_right": np.full(400, right)}
    best = of["label"] if right else (of["label"] + 1) % 7
    of |= {"best": best, "top": best[:, None], "captions_right": right * of["captions"], "shared": right * of["union"]}
    assert find_interval(bootstrap(metric, of, key="x", resamples=50)) == (right, right)
    assert estimate_p(bootstrap_pair(metric, of, of, key="x", resamples=50)) == 1.0


def test_one_image_no_image_and_other_images() -> None:
    assert set(bootstrap("F1-macro_all", draw(0, images=1), key="x", resamples=9)) <= {0.0, 1.0}
    with pytest.raises(EvalError, match="no image"):
        measure("acc1", draw(0, images=0))
    with pytest.raises(EvalError, match="no image"):
        measure("jaccard_score_10-12", draw(0) | {"candidates": np.full(400, 5)})
    with pytest.raises(EvalError, match="400 and 399 images are no pairs"):
        bootstrap_pair("acc1", draw(0), draw(0, images=399), key="x")


def test_draws_depend_on_seed_and_key_alone() -> None:
    first = bootstrap("acc1", draw(0), key="a", resamples=20)
    assert (first == bootstrap("acc1", draw(0), key="a", resamples=20)).all()
    assert (first != bootstrap("acc1", draw(0), key="b", resamples=20)).any()
    assert (first != bootstrap("acc1", draw(0), key="a", resamples=20, seed=1)).any()


@pytest.mark.parametrize("metric", list(MEASURES))
def test_draws_depend_on_neither_the_order_of_images_nor_the_size_of_a_block(
    metric: Metric, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = draw(0)
    wanted = bootstrap(metric, columns, key="a", resamples=40)
    place_N = np.random.default_rng(1).permutation(400)
    assert (
        bootstrap(metric, {name: of[place_N] for name, of in columns.items()}, key="a", resamples=40) == wanted
    ).all()
    for numbers in (1, 300, 3000):
        monkeypatch.setattr("eval38.statistics.NUMBERS_AT_ONCE", numbers)
        assert (bootstrap(metric, columns, key="a", resamples=40) == wanted).all()


def test_a_pair_is_surer_than_two_alone() -> None:
    first = draw(0, images=2000)
    best = np.where(np.arange(2000) % 50 == 0, first["label"], first["best"])  # a little better on some images
    second = first | {"best": best, "top": best[:, None]}
    difference_B = bootstrap_pair("acc1", first, second, key="x")
    assert find_interval(difference_B)[0] > 0 and estimate_p(difference_B) == 2 / 10_001
    alone = [bootstrap("acc1", of, key=key, resamples=1000) for key, of in (("a", first), ("b", second))]
    assert find_interval(alone[1] - alone[0])[0] < 0


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        ([], []),
        ([0.5], [0.5]),
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.9, 0.8], [1.0, 1.0]),
        ([0.1] * 3, [0.3] * 3),
    ],
)
def test_holm(p_values: list[float], adjusted: list[float]) -> None:
    assert adjust_holm(p_values) == pytest.approx(adjusted)
