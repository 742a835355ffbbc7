import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval38.results import write_results
from eval38.submission import write_submission
from eval38.summary import average_of, mean_of_group
from eval38.tasks import TASKS
from jobs.submit_eval import main
from pipeline.errors import ConfigError, EvalError
from pipeline.subset import write_subset

NUMBERS = np.random.default_rng(0).random(len(TASKS))


def make_rows(**changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return results of all 40 tasks; `changes` are merged into the line of the task with that name."""
    rows = {}
    for task, number in zip(TASKS, NUMBERS, strict=True):
        main_metric = float(number) if task.counted else None
        rows[task.key] = {
            "key": task.key,
            "dataset": task.name,
            "metrics": {"acc1": float(number), "acc5": None, "main_metric": main_metric},
            "corrected": {"main_metric": 0.0},
            "incomplete": False,
            "provenance": {"model_sha256": "a", "precision": "fp32"},
        } | changes.get(task.key, {})
    return rows


@pytest.fixture
def results(tmp_path: Path) -> str:
    write_results(str(tmp_path / "results"), make_rows().values())
    return str(tmp_path / "results")


def test_the_folder_is_datacomps(results: str, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"weights")
    uids = np.array([(1, 2), (1, 3)], dtype=[("f0", "<u8"), ("f1", "<u8")])
    write_subset(str(tmp_path / "dfn.npy"), uids)
    out = tmp_path / "entry"
    written = write_submission(
        results, str(out), scale="small", checkpoint=str(tmp_path / "model.pt"), samples=[str(tmp_path / "dfn.npy")]
    )
    found = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    assert found == {f"small_scale/{name}" for name in ("results.jsonl", "checkpoint.pt", "samples/dfn.npy")}
    assert {f"small_scale/{name}" for name in written.files} == found
    assert (out / "small_scale/checkpoint.pt").read_bytes() == b"weights"
    assert (out / "small_scale/samples/dfn.npy").read_bytes() == (tmp_path / "dfn.npy").read_bytes()
    lines = [json.loads(line) for line in (out / "small_scale/results.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [task.key for task in TASKS]
    assert {tuple(line) for line in lines} == {("key", "dataset", "metrics")}
    assert sum(line["metrics"]["main_metric"] is not None for line in lines) == 38


def test_the_scores_are_those_of_the_results(results: str, tmp_path: Path) -> None:
    scores = write_submission(results, str(tmp_path), scale="xlarge").scores
    counted = [number for task, number in zip(TASKS, NUMBERS, strict=True) if task.counted]
    assert scores["Average"] == pytest.approx(np.mean(counted)) == average_of(make_rows())["value"]
    assert list(scores) == ["ImageNet", "ImageNet dist. shifts", "VTAB", "Retrieval", "Average"]
    assert scores["VTAB"] == mean_of_group("vtab", make_rows())["value"]
    assert scores["ImageNet"] == NUMBERS[[task.key for task in TASKS].index("imagenet1k")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": {"main_metric": None}}, "37 of the 38 tasks .* Without: MNIST"),
        ({"metrics": {"acc1": 0.5}}, "37 of the 38"),
        ({"incomplete": True}, "not every image was evaluated of MNIST"),
        ({"provenance": {"model_sha256": "b", "precision": "fp32"}}, "mixes results of 2 values of model_sha256: a, b"),
        ({"provenance": {"model_sha256": "a", "precision": "bf16"}}, "mixes results of 2 values of precision"),
        ({"provenance": None}, "mixes results of 2"),
    ],
)
def test_results_that_are_no_entry(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_results(str(tmp_path), make_rows(mnist=changes).values())
    with pytest.raises(EvalError, match=message):
        write_submission(str(tmp_path), str(tmp_path / "out"), scale="small")
    assert not (tmp_path / "out").exists()
    if "incomplete" in changes:
        write_submission(str(tmp_path), str(tmp_path / "out"), scale="small", allow_incomplete=True)


def test_a_result_of_datacomp_with_nan(tmp_path: Path) -> None:
    rows = [{name: row[name] for name in ("key", "dataset", "metrics")} for row in make_rows().values()]
    rows[0]["metrics"]["acc5"] = float("nan")
    (tmp_path / "eval_results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_submission(str(tmp_path), str(tmp_path / "out"), scale="small")
    assert "NaN" not in (tmp_path / "out/small_scale/results.jsonl").read_text()


def test_wrong_words(results: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(ConfigError, match="unknown scale 'smal': did you mean 'small'"):
        write_submission(results, out, scale="smal")
    with pytest.raises(ConfigError, match=r"none.pt' does not exist"):
        write_submission(results, out, scale="small", checkpoint=str(tmp_path / "none.pt"))
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write_subset(str(tmp_path / folder / "a.npy"), np.zeros(0, dtype=[("f0", "<u8"), ("f1", "<u8")]))
    with pytest.raises(ConfigError, match=r"two samples files are called 'a.npy'"):
        write_submission(results, out, scale="small", samples=[str(tmp_path / "x/a.npy"), str(tmp_path / "y/a.npy")])
    assert not Path(out).exists()


def test_the_verb(results: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--results", results, "--scale", "small", "--out", str(tmp_path / "o")]) == 0
    shown = capsys.readouterr().out
    assert f"Average: {average_of(make_rows())['value']:.3f}" in shown and "Nothing was sent" in shown
    assert main(["--results", str(tmp_path), "--scale", "small", "--out", str(tmp_path / "o")]) == 1
