"""Whose results a folder holds: one driver at a time, one model; and what the command says of what failed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from eval38.config import EvalConfig
from eval38.evaluate import evaluate
from jobs.eval_tasks import main
from pipeline import lock
from pipeline.errors import ConfigError, EvalError, StageError
from pipeline.lock import hold_lock
from pipeline.manifest import Manifest
from pipeline.schemas import LOCK

MakeSet = Callable[..., Path]
DIGITS = "".join(f"{n}\n" for n in range(10))
STEALING = """
import os, pathlib, torch
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

class Stealing(torch.nn.Module):
    def encode_image(self, image):
        lock = pathlib.Path(os.environ["LOCK_TO_STEAL"])
        if lock.exists():
            lock.write_text("of another driver")
        return image.mean(dim=(2, 3))

    def encode_text(self, tokens):
        return tokens

def make(device):
    transform = Compose([Resize(8), CenterCrop(8), ToTensor(), Normalize((0.0,) * 3, (1.0,) * 3)])
    return Stealing(), transform, lambda texts: torch.ones(len(texts), 3)
"""


@pytest.fixture
def run(tmp_path: Path, checkpoint: str) -> Callable[..., Manifest]:
    """Return a function that evaluates the checkpoint on data/ into out/."""

    def evaluate_here(model: str = checkpoint, *, replace: bool = False, **choices: object) -> Manifest:
        config = EvalConfig(**choices)  # type: ignore[arg-type]
        places = {"data": str(tmp_path / "data"), "out": str(tmp_path / "out"), "device": "cpu"}
        return evaluate(config, model=model, **places, quiet=True, replace=replace)

    return evaluate_here


def _read_all(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("plain", [False, True])
def test_lines_of_another_model_are_not_overwritten(
    make_set: MakeSet, run: Callable[..., Manifest], tmp_path: Path, caplog: pytest.LogCaptureFixture, plain: bool
) -> None:
    make_set("mnist", classes=DIGITS)
    model = {"model": "winnow-vit-tiny"}  # fresh weights
    if plain:
        line = {"key": "cifar10", "dataset": "CIFAR-10", "metrics": {"main_metric": 0.5}}  # as DataComp writes it
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "eval_results.jsonl").write_text(json.dumps(line) + "\n")
    else:
        run()
    before = _read_all(tmp_path / "out")
    whose = "by a model that they do not name" if plain else r"by winnow-vit-tiny \("
    with pytest.raises(ConfigError, match=rf"eval_results.jsonl holds 1 lines .*{whose}.* Name another --out"):
        run(**model)
    assert _read_all(tmp_path / "out") == before
    assert run(**model, replace=True).facts["tasks"]["mnist"]["status"] == "done"
    lines = (tmp_path / "out" / "eval_results.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["mnist"] and "model_sha256 changed" in caplog.text


def test_a_second_driver_is_refused(
    make_set: MakeSet, run: Callable[..., Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    make_set("toy")
    with hold_lock(str(tmp_path / "out"), "eval"):
        with pytest.raises(StageError, match=r"is at work here \(eval; .*name another folder"):
            run(own=("toy",))
        assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK]
    run(own=("toy",))
    assert not (tmp_path / "out" / LOCK).exists()


def test_a_driver_whose_lock_was_taken_over_writes_no_line(
    make_set: MakeSet, run: Callable[..., Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_set("toy")
    url = tmp_path / "out" / LOCK
    monkeypatch.setenv("LOCK_TO_STEAL", str(url))
    (tmp_path / "stealing.py").write_text(STEALING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(StageError, match="another driver took"):
        run("stealing:make", own=("toy",))
    assert not (tmp_path / "out" / "eval_results.jsonl").exists()


def test_a_folder_that_cannot_be_written_is_told_before_work(make_set: MakeSet, checkpoint: str) -> None:
    places = {"data": str(make_set().parent), "out": "/proc/nowhere"}
    with pytest.raises(EvalError, match=r"results cannot be written to '/proc/nowhere' \(.*name another --out"):
        evaluate(EvalConfig(own=("toy",)), model=checkpoint, **places, device="cpu", quiet=True)


@pytest.mark.parametrize("device", ["banana", "cuda:77", "cpu:x"])
def test_a_device_that_is_not_there(make_set: MakeSet, checkpoint: str, tmp_path: Path, device: str) -> None:
    places = {"data": str(make_set().parent), "out": str(tmp_path / "out"), "device": device}
    with pytest.raises(ConfigError, match=rf"device '{device}' cannot be used: .*\. Say auto, cpu or"):
        evaluate(EvalConfig(own=("toy",)), model=checkpoint, **places, quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_set_that_was_named_and_failed_is_told_by_the_exit_code(
    make_set: MakeSet, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_set("mnist", classes=DIGITS)
    tar = make_set("cifar10", classes=DIGITS) / "test" / "1.tar"
    tar.unlink()
    words = ["--model", checkpoint, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(words) == 0  # nothing was named
    capsys.readouterr()
    assert main([*words, "eval.tasks=[mnist,cifar10]"]) == 1
    shown = capsys.readouterr()
    assert "MNIST" in shown.out and "1 of the sets asked for could not be evaluated:\ncifar10: " in shown.err
    assert main([*words, "eval.tasks=[mnist]"]) == 0
    assert main(["--model", f"a={checkpoint}", *words, "eval.tasks=[mnist,cifar10]"]) == 1
    assert capsys.readouterr().err.count("1.tar is not there") == 1
