"""All 40 tasks on made-up data of the exact layouts, end to end with a tiny model."""

import json
from typing import Any

import pytest
from made_evalsets import NUM_PICTURES, make_sets_and_model

from eval38.config import EvalConfig
from eval38.evaluate import evaluate
from eval38.results import Column, value_of
from eval38.table import format_table
from eval38.tasks import TASKS
from pipeline.manifest import Manifest

SKEWED = ("wilds/iwildcam", "wilds/fmow", "fairness/geode", "fairness/dollar_street")
"""Worst groups and macro F1 over few images: drawn again, they tend to be lower."""
Run = tuple[Manifest, dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("all")
    model = make_sets_and_model(folder)
    places = {"data": str(folder / "data"), "out": str(folder / "out")}
    manifest = evaluate(EvalConfig(), model=model, **places, device="cpu", quiet=True)
    lines = (folder / "out" / "eval_results.jsonl").read_text().splitlines()
    return manifest, {row["key"]: row for row in map(json.loads, lines)}


def test_every_task_is_done_and_both_averages_are_whole(run: Run) -> None:
    manifest, rows = run
    assert list(rows) == [task.key for task in TASKS]
    assert {task["status"] for task in manifest.facts["tasks"].values()} == {"done"}
    text = format_table(manifest.facts)
    assert "\naverage over 38 tasks, as DataComp computes it" in text and "\naverage over 38 tasks, corrected" in text
    counted = [rows[task.key] for task in TASKS if task.counted]
    compat = [row["metrics"]["main_metric"] for row in counted]
    corrected = [row.get("corrected", row["metrics"])["main_metric"] for row in counted]
    assert manifest.facts["average"]["value"] == pytest.approx(sum(compat) / 38)
    assert manifest.facts["average_corrected"]["value"] == pytest.approx(sum(corrected) / 38)


def test_every_value_lies_in_its_interval(run: Run) -> None:
    manifest, rows = run
    columns: tuple[Column, ...] = ("compat", "corrected")
    for column in columns:
        found = manifest.facts["intervals"][column]
        assert set(found["tasks"]) == {task.key for task in TASKS if task.counted}
        for key, (low, high) in found["tasks"].items():
            value = value_of(rows[key], column) or 0.0
            assert key in SKEWED or (0 <= low <= value + 1e-6 and value - 1e-6 <= high <= 1)
        low, high = found["average"]
        average = manifest.facts["average" if column == "compat" else "average_corrected"]["value"]
        assert low < high and abs(average - (low + high) / 2) < 0.05
        assert all(found["groups"].values())


def test_only_the_listed_tasks_have_a_corrected_column(run: Run) -> None:
    _, rows = run
    assert {key: set(row["corrected"]) for key, row in rows.items() if "corrected" in row} == {
        "vtab/clevr_closest_object_distance": {"acc1", "acc5", "mean_per_class_recall", "main_metric"},
        "wilds/fmow": {"acc_worst_region", "main_metric"},
        "fairness/fairface": {"toxicity_crime_wg", "toxicity_nonhuman_wg", "main_metric"},
        "fairness/utkface": {"toxicity_crime_wg", "toxicity_nonhuman_wg", "main_metric"},
    }
    fmow = rows["wilds/fmow"]
    assert fmow["metrics"]["main_metric"] == 0.0 < fmow["corrected"]["main_metric"]


def test_every_image_is_accounted_for(run: Run) -> None:
    manifest, rows = run
    for task in TASKS:
        expected = 40 if task.kind == "winogavil" else NUM_PICTURES
        assert rows[task.key]["images"] == expected == manifest.counts[task.key].kept and not rows[task.key]["failed"]
        assert rows[task.key]["incomplete"]  # the real sets are larger


def test_main_metrics_are_there_and_the_same_twice(run: Run) -> None:
    """The same pictures and words through two layouts of retrieval, and two tasks of ImageNet's classes."""
    _, rows = run
    flickr, mscoco = (rows[task.key]["metrics"] for task in TASKS if task.kind == "retrieve")
    assert flickr == mscoco and flickr["text_retrieval_recall@10"] > 0
    for task in TASKS:
        main = rows[task.key]["metrics"]["main_metric"]
        assert (main is None) == (task.metric is None)
        assert main is None or 0 <= main < 1
