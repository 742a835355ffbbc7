import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval38.compare import compare, format_compared
from eval38.outcomes import write_outcomes
from eval38.results import write_results
from eval38.statistics import compare_mcnemar, measure
from eval38.tasks import TASKS, Task, find_task
from jobs.compare_evals import main
from pipeline.errors import ConfigError, EvalError

IMAGES = 300


def draw_outcomes(task: Task, share: float, seed: int) -> dict[str, np.ndarray]:
    """Return outcomes of the task's kind with the given share right; the truth depends on the task alone."""
    key = zlib.crc32(task.key.encode())
    truth, model = np.random.default_rng(key), np.random.default_rng([key, seed])
    right = model.random(IMAGES) < share
    if task.kind == "retrieve":
        return {"captions": np.full(IMAGES, 5), "captions_right": 5 * right, "image_right": right}
    if task.kind == "winogavil":
        union = np.full(IMAGES, 4)
        return {"candidates": truth.choice([5, 10, 12], IMAGES), "union": union, "shared": 4 * right}
    label = truth.integers(0, 8, IMAGES)
    best = np.where(right, label, (label + 1) % 8)
    columns = {"label": label, "best": best, "top": (best[:, None] + np.arange(5)) % 8}
    grouped = task.metric in ("acc_worst_region", "acc_wg", "acc_top5_wg")
    return columns | ({"group": truth.integers(0, 3, IMAGES)} if grouped else {})


def write_run(
    folder: Path, tasks: list[Task], share: float, *, seed: int = 0, data: str = "d", plain: bool = False
) -> None:
    """Write a results folder; a plain one is as DataComp's evaluate.py leaves it."""
    rows: list[dict[str, Any]] = []
    for task in tasks:
        columns = draw_outcomes(task, share, seed)
        value = measure(task.metric, columns) if task.metric else None
        row: dict[str, Any] = {"key": task.key, "dataset": task.name, "metrics": {"main_metric": value}}
        if not plain:
            sha256 = write_outcomes(str(folder), task, columns, value=value)
            row |= {"provenance": {"data_hash": data}, "outcomes": {"compat": sha256}}
        rows.append(row)
    folder.mkdir(exist_ok=True)
    write_results(str(folder), rows)


COUNTED = [task for task in TASKS if task.counted]
SOME = [find_task(key) for key in ("cifar10", "vtab/pets", "misc/winogavil", "wilds/iwildcam")]


def test_a_folder_may_have_an_equals_sign_in_its_name(tmp_path: Path) -> None:
    for name in ("lr=0.1", "lr=0.2"):
        write_run(tmp_path / name, SOME[:1], 0.5)
    assert compare([f"{tmp_path}/lr=0.1", f"b={tmp_path}/lr=0.2"], resamples=9)["models"] == ["lr=0.1", "b"]


def test_all_tasks_of_two_models(tmp_path: Path) -> None:
    write_run(tmp_path / "a", COUNTED, 0.5)
    write_run(tmp_path / "b", COUNTED, 0.7, seed=1)
    facts = compare([str(tmp_path / "a"), f"better={tmp_path / 'b'}"], resamples=2000)
    assert facts["models"] == ["a", "better"] and len(facts["tasks"]) == 38 and len(facts["means"]) == 5
    average = facts["means"][-1]
    assert average["name"] == "average over 38 tasks"
    for label in ("a", "better"):
        values = [line["values"][label] for line in facts["tasks"]]
        assert average["values"][label] == pytest.approx(np.mean(values), abs=1e-12)
        low, high = average["intervals"][label]
        assert low < average["values"][label] < high and high - low < 0.03
    difference = average["differences"]["better"]
    assert difference["p_adjusted"] < 0.01 and difference["interval"][0] > 0.1
    assert difference["value"] == pytest.approx(average["values"]["better"] - average["values"]["a"])
    shown = format_compared(facts)
    assert "average over 38 tasks" in shown and "**" in shown and "VTAB (13 of 13 tasks)" in shown


def test_the_tests_are_those_of_the_statistics(tmp_path: Path) -> None:
    write_run(tmp_path / "a", SOME, 0.5)
    write_run(tmp_path / "b", SOME, 0.55, seed=1)
    facts = compare([str(tmp_path / "a"), str(tmp_path / "b")], resamples=500)
    lines = {line["key"]: line["differences"]["b"] for line in facts["tasks"]}
    assert {key: line["test"] for key, line in lines.items()} == {
        "cifar10": "McNemar",
        "vtab/pets": "bootstrap",
        "misc/winogavil": "bootstrap",
        "wilds/iwildcam": "bootstrap",
    }
    right = [
        (of := draw_outcomes(SOME[0], share, seed))["best"] == of["label"] for share, seed in ((0.5, 0), (0.55, 1))
    ]
    assert lines["cifar10"]["p"] == compare_mcnemar(*(r.astype(int) for r in right))
    assert all(line["p"] <= line["p_adjusted"] <= 1 for line in lines.values())
    assert facts["means"][-1]["name"] == "partial average over 4 of 38 tasks"


def test_a_model_of_another_pool_of_tasks_and_one_of_datacomp(tmp_path: Path) -> None:
    write_run(tmp_path / "a", SOME, 0.5)
    write_run(tmp_path / "b", SOME[1:], 0.5)
    write_run(tmp_path / "dc", [*SOME, find_task("fairness/utkface")], 0.5, seed=2, plain=True)
    with (tmp_path / "dc" / "eval_results.jsonl").open("a") as file:
        file.write('{"key": "mnist", "dataset": "MNIST", "metrics": {"acc1": NaN, "main_metric": NaN}}\n')
    facts = compare([str(tmp_path / name) for name in ("a", "b", "dc")], resamples=50)
    assert facts["without_provenance"] == ["dc"]
    lines = {line["name"]: line for line in facts["tasks"]}
    assert lines["CIFAR-10"]["values"]["b"] is None and lines["CIFAR-10"]["differences"]["b"]["value"] is None
    assert lines["CIFAR-10"]["differences"]["dc"]["value"] is not None
    assert lines["CIFAR-10"]["differences"]["dc"]["p"] is None and lines["MNIST"]["values"]["dc"] is None
    assert lines["Oxford-IIIT Pet"]["differences"]["b"]["p"] == 1.0  # the same outcomes
    assert facts["means"][-1]["name"] == "partial average over 3 of 38 tasks"
    assert facts["means"][-1]["differences"]["dc"]["p"] is None
    json.dumps(facts, allow_nan=False)
    assert "dc: lines without provenance" in format_compared(facts)


def test_other_data_is_refused_and_other_images_are_no_pairs(tmp_path: Path) -> None:
    write_run(tmp_path / "a", SOME, 0.5)
    write_run(tmp_path / "b", SOME, 0.5, seed=1, data="other")
    texts = [str(tmp_path / "a"), str(tmp_path / "b")]
    with pytest.raises(
        EvalError, match=r"4 tasks were evaluated on other data: cifar10 \(a: d, b: other\).*--any-data"
    ):
        compare(texts)
    of = draw_outcomes(SOME[0], 0.5, 9)
    of["label"] = of["label"][::-1].copy()
    value = measure("acc1", of)
    sha256 = write_outcomes(str(tmp_path / "b"), SOME[0], of, value=value)
    lines = [json.loads(line) for line in (tmp_path / "b" / "eval_results.jsonl").read_text().splitlines()]
    lines[0] |= {"metrics": {"main_metric": value}, "outcomes": {"compat": sha256}}
    write_results(str(tmp_path / "b"), lines)
    found = compare(texts, any_data=True, resamples=50)["tasks"]
    assert [line["differences"]["b"]["p"] is None for line in found] == [True, False, False, False]


def test_models_that_were_made_otherwise_are_told(tmp_path: Path) -> None:
    for name, changes in (("a", {"precision": "fp32"}), ("b", {"precision": "bf16", "torch": "2"}), ("c", {})):
        write_run(tmp_path / name, SOME[:1], 0.5)
        row = json.loads((tmp_path / name / "eval_results.jsonl").read_text())
        row["provenance"] |= changes
        write_results(str(tmp_path / name), [row])
    facts = compare([str(tmp_path / name) for name in "abc"], resamples=9)
    assert facts["made_otherwise"] == {"precision": {"a": "fp32", "b": "bf16", "c": "not known"}}
    shown = format_compared(facts)
    assert "precision is not the same (a: fp32, b: bf16, c: not known): part of" in shown
    assert not compare([str(tmp_path / "a"), f"x={tmp_path / 'a'}"], resamples=9)["made_otherwise"]


def test_the_corrected_column(tmp_path: Path) -> None:
    task = find_task("wilds/fmow")
    write_run(tmp_path / "a", [task], 0.5)
    write_run(tmp_path / "b", [task], 0.6)
    of = draw_outcomes(task, 0.9, 3)
    value = measure("acc_worst_region", of)
    row = json.loads((tmp_path / "b" / "eval_results.jsonl").read_text())
    row["corrected"] = {"main_metric": value}
    row["outcomes"]["corrected"] = write_outcomes(str(tmp_path / "b"), task, of, value=value, column="corrected")
    write_results(str(tmp_path / "b"), [row])
    texts = [str(tmp_path / "a"), str(tmp_path / "b")]
    plain, corrected = (compare(texts, column=column, resamples=50)["tasks"][0] for column in ("compat", "corrected"))
    assert plain["values"]["b"] == row["metrics"]["main_metric"] and corrected["values"]["b"] == value
    assert corrected["values"]["a"] == plain["values"]["a"]
    low, high = corrected["intervals"]["b"]
    assert low <= value <= high and low > plain["intervals"]["b"][1]


@pytest.mark.parametrize(
    ("texts", "message"),
    [(["a"], "two or more"), (["a", "a"], "label of its own"), (["a", "none"], "holds no eval_results.jsonl")],
)
def test_what_cannot_be_compared(tmp_path: Path, texts: list[str], message: str) -> None:
    write_run(tmp_path / "a", SOME, 0.5)
    with pytest.raises(ConfigError, match=message):
        compare([str(tmp_path / text) for text in texts])


def test_an_incomplete_task_is_marked_and_so_are_its_means(tmp_path: Path) -> None:
    write_run(tmp_path / "a", SOME, 0.5)
    write_run(tmp_path / "b", SOME, 0.5, seed=1)
    lines = [json.loads(line) for line in (tmp_path / "b" / "eval_results.jsonl").read_text().splitlines()]
    lines[1]["incomplete"] = True
    write_results(str(tmp_path / "b"), lines)
    facts = compare([str(tmp_path / "a"), str(tmp_path / "b")], resamples=50)
    marked = {line["name"] for line in (*facts["tasks"], *facts["means"]) if line["incomplete"] == ["b"]}
    assert marked == {"Oxford-IIIT Pet", "VTAB (1 of 13 tasks)", "partial average over 4 of 38 tasks"}
    shown = format_compared(facts)
    assert shown.count("†") == 4 and "† Not every image" in shown


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a", SOME, 0.5)
    write_run(tmp_path / "b", SOME, 0.5, seed=1)
    words = [str(tmp_path / "a"), f"x={tmp_path / 'b'}", "--resamples", "50"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].split() == ["%", "a", "x", "x", "-", "a"] and "WinoGAViL" in shown
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"] == ["a", "x"]
    assert main([*words[:3], "0"]) == 2
