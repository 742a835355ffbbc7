"""train.zeroshot from the command line: the numbers of `winnow eval`, errors before anything is made, one process."""

import json
import re
from pathlib import Path

import pytest
from made_evalsets import make_labelled

from eval38.config import EvalConfig
from eval38.evaluate import evaluate
from eval38.results import read_results
from eval38.tasks import own_task
from jobs import VERBS
from jobs.__main__ import main
from jobs.recipes import Network
from jobs.stage_networks import run_network
from jobs.zeroshot import open_zeroshot
from pipeline.clip_model import open_model
from pipeline.config import read_config
from training.config import TrainConfig

TRAIN = {"model": "winnow-vit-tiny", "samples": 48, "batch_size": 16, "warmup_steps": 1}
ZEROSHOT = {"own": ["things"], "every_samples": 20}
WORDS = [f"train.{name}={value}" for name, value in TRAIN.items()]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    make_labelled(folder / "wds_things_test", own_task("things", classes=4), [n % 4 for n in range(12)])
    (folder / "wds_mnist_test").mkdir()  # nobody asks for it
    return folder


def read_points(out: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (out / "zeroshot.jsonl").read_text().splitlines()]
    return [(line["step"], line["tasks"]["things"]) for line in lines]


def test_the_last_point_is_what_eval_says(make_pool, sets: Path, tmp_path: Path, capsys) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    zeroshot = ["train.zeroshot.own=[things]", "train.zeroshot.every_samples=20"]
    places = ["--data", str(make_pool()), "--out", str(out), "--eval-data", str(sets), "--device", "cpu"]
    assert main(["train", *WORDS, *zeroshot, *places]) == 0
    assert [step for step, _ in read_points(out)] == [2, 3]
    plain = tmp_path / "plain"
    assert main(["train", *WORDS, *places[:2], "--out", str(plain), "--device", "cpu"]) == 0
    assert (plain / "checkpoint.pt").read_bytes() == (out / "checkpoint.pt").read_bytes()
    said = capsys.readouterr().err
    assert "zero-shot after 32 samples: things" in said
    results = tmp_path / "results"
    evaluate(EvalConfig(own=("things",)), model=str(out), data=str(sets), out=str(results), device="cpu", quiet=True)
    assert read_points(out)[-1][1] == read_results(str(results))["things"]["metrics"]["acc1"]
    shown = EventAccumulator(str(out / "tensorboard")).Reload().Scalars("zeroshot/things")
    assert [(event.step, event.value) for event in shown] == [(s, pytest.approx(v)) for s, v in read_points(out)]


def test_both_phases_of_a_network_are_watched(make_pool, sets: Path, tmp_path: Path) -> None:
    finetune = {"sets": [{"pairs": str(make_pool(name="more"))}], "train": {"samples": 32}}
    network = read_config(
        Network, {"data": "clean", "train": TRAIN | {"zeroshot": ZEROSHOT}, "finetune": finetune}, where="network"
    )
    run_network(network, data=str(make_pool()), out=str(tmp_path / "out"), eval_data=str(sets), quiet=True)
    assert [step for step, _ in read_points(tmp_path / "out" / "pretrained")] == [2, 3]
    assert [step for step, _ in read_points(tmp_path / "out" / "finetuned")] == [2]


@pytest.mark.parametrize(
    ("zeroshot", "place", "code", "message"),
    [
        ("{tasks: [cifar11], every_samples: 5}", True, 2, "did you mean 'cifar10'"),
        ("{tasks: [cifar10], every_samples: 5}", True, 1, "has no data: .*winnow eval download"),
        ("{tasks: [fairness/fairface], every_samples: 5}", True, 2, "no main metric"),
        ("{own: [things], every_samples: 5}", False, 2, "say where the sets are with --eval-data"),
        (
            "{own: [broken], every_samples: 5}",
            True,
            1,
            "task 'broken' cannot be evaluated: .*classnames.txt is missing",
        ),
    ],
)
@pytest.mark.parametrize("verb", ["train", "run"])
def test_what_cannot_be_measured_is_said_first(
    verb: str, zeroshot: str, place: bool, code: int, message: str, sets: Path, tmp_path: Path, capsys
) -> None:
    (sets / "wds_broken_test").mkdir(exist_ok=True)
    data = "--data" if verb == "train" else "--pool"
    words = [*WORDS, f"train.zeroshot={zeroshot}", data, str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    assert main([verb, *words, *(["--eval-data", str(sets)] if place else [])]) == code
    said = capsys.readouterr().err.replace("\n", " ")
    assert re.search(message, said) and not (tmp_path / "out").exists()


def test_a_set_that_breaks_later_is_said_and_training_goes_on(make_pool, sets: Path, tmp_path: Path, caplog) -> None:
    make_labelled(tmp_path / "wds_gone_test", own_task("gone", classes=4), [0, 7])
    out = tmp_path / "out"
    zeroshot = ["train.zeroshot.own=[gone]", "train.zeroshot.every_samples=100"]
    places = ["--data", str(make_pool()), "--out", str(out), "--eval-data", str(tmp_path), "--device", "cpu"]
    assert main(["train", *WORDS, *zeroshot, *places]) == 0
    assert "gone failed" in caplog.text and "label '7'" in caplog.text
    assert json.loads((out / "zeroshot.jsonl").read_text())["tasks"] == {"gone": None}


def test_a_model_that_cannot_be_measured_is_said_and_training_goes_on(sets: Path, caplog) -> None:
    config = read_config(TrainConfig, TRAIN | {"zeroshot": ZEROSHOT}, where="train")
    measure, opened = open_zeroshot(config, str(sets)), open_model("winnow-vit-tiny")
    opened.model.visual.proj.data.fill_(float("nan"))
    assert measure and measure(opened) == {"things": None}
    assert "things failed: the model gives vectors that are not finite" in caplog.text


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("train", "eval")])
def test_several_processes_are_refused(verb: str, monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(verb.split()) == 2
    said = capsys.readouterr().err
    assert f"WORLD_SIZE is 2, as torchrun sets it, but `winnow {verb}` is for one process" in said
