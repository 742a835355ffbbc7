import hashlib
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

WEIGHTS = b"weights"
PROVENANCE = {
    "model": "ViT-B-32",
    "model_sha256": hashlib.sha256(WEIGHTS).hexdigest(),
    "precision": "fp32",
    "data_hash": "d",
}
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
            "provenance": PROVENANCE,
        } | changes.get(task.key, {})
    return rows


@pytest.fixture
def results(tmp_path: Path) -> str:
    write_results(str(tmp_path / "results"), make_rows().values())
    return str(tmp_path / "results")


def test_the_folder_is_datacomps(results: str, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(WEIGHTS)
    uids = np.array([(1, 2), (1, 3)], dtype=[("f0", "<u8"), ("f1", "<u8")])
    write_subset(str(tmp_path / "dfn.npy"), uids)
    out = tmp_path / "entry"
    written = write_submission(
        results, str(out), scale="small", checkpoint=str(tmp_path / "model.pt"), samples=[str(tmp_path / "dfn.npy")]
    )
    found = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    assert found == {f"small_scale/{name}" for name in ("results.jsonl", "checkpoint.pt", "samples/dfn.npy")}
    assert {f"small_scale/{name}" for name in written.files} == found
    assert (out / "small_scale/checkpoint.pt").read_bytes() == WEIGHTS
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
        ({"metrics": {"acc1": 0.5}}, "is no result .main_metric missing"),
        ({"incomplete": True}, "not every image was evaluated of MNIST"),
        ({"provenance": PROVENANCE | {"model_sha256": "b"}}, "mixes results of 2 values of model_sha256: .*, b"),
        ({"provenance": PROVENANCE | {"precision": "bf16"}}, "mixes results of 2 values of precision"),
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


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_result_of_datacomp_with_what_is_no_number(tmp_path: Path, number: float) -> None:
    rows = [{name: row[name] for name in ("key", "dataset", "metrics")} for row in make_rows().values()]
    rows[0]["metrics"]["acc5"] = number
    (tmp_path / "eval_results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_submission(str(tmp_path), str(tmp_path / "out"), scale="small")
    written = (tmp_path / "out/small_scale/results.jsonl").read_text()
    assert json.loads(written.splitlines()[0])["metrics"]["acc5"] is None
    assert "NaN" not in written and "Infinity" not in written
    rows[0]["metrics"]["main_metric"] = number
    (tmp_path / "eval_results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(EvalError, match="37 of the 38"):
        write_submission(str(tmp_path), str(tmp_path / "out"), scale="small")


@pytest.mark.parametrize(
    "line", ["{}", "[]", '{"key": "mnist"}', '{"key": "mnist", "dataset": "M", "metrics": []}', ""]
)
def test_lines_that_are_no_results_or_come_twice(results: str, tmp_path: Path, line: str) -> None:
    file = Path(results, "eval_results.jsonl")
    file.write_text(file.read_text() + (line or file.read_text().splitlines()[0]) + "\n")
    with pytest.raises(
        EvalError, match="line 41 is no result" if line else "line 41 .*a second line of vtab/caltech101"
    ):
        write_submission(results, str(tmp_path / "out"), scale="small")


def test_files_of_another_entry_are_not_taken_for_this_one(results: str, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(WEIGHTS)
    places = {"out": str(tmp_path / "out"), "scale": "small"}
    for _ in range(2):
        write_submission(results, **places, checkpoint=str(tmp_path / "model.pt"))
    with pytest.raises(ConfigError, match=r"holds checkpoint.pt of another entry"):
        write_submission(results, **places)


@pytest.mark.parametrize(
    ("changes", "is_taken"),
    [({}, False), ({"model": "mine:make"}, True), ({"model_sha256": None}, True)],  # what has no file's hash
)
def test_another_checkpoint_than_the_results_are_of(tmp_path: Path, changes: dict[str, Any], is_taken: bool) -> None:
    (tmp_path / "model.pt").write_bytes(b"not this model at all")
    provenance = {"provenance": PROVENANCE | changes}
    write_results(str(tmp_path), make_rows(**{task.key: provenance for task in TASKS}).values())
    places = {"out": str(tmp_path / "out"), "scale": "small", "checkpoint": str(tmp_path / "model.pt")}
    if is_taken:
        assert "checkpoint.pt" in write_submission(str(tmp_path), **places).files
        return
    with pytest.raises(ConfigError, match=r"model.pt' \(sha256 .*\) is not the one that .* is of"):
        write_submission(str(tmp_path), **places)
    assert not (tmp_path / "out").exists()


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
