"""Measuring while training: when, once for each point whatever kills the run, and without a trace in it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.errors import ConfigError
from training.config import TrainConfig
from training.run import train
from training.zeroshot import at_rest, is_due

ROOT = Path(__file__).parents[2]
SETTINGS = {"model": "winnow-vit-tiny", "samples": 32 * 12, "batch_size": 32, "warmup_steps": 4}
HOW = {"log_every_steps": 1, "checkpoint_every_steps": 5, "zeroshot": {"tasks": ["norm"], "every_samples": 64}}
POINTS = [2, 4, 6, 8, 10, 12]
PROGRAM = """
import os, pathlib, signal, sys, time
sys.path.insert(0, sys.argv[3])
from test_train_zeroshot import make_config, measure_norm
from training.run import train
asked = []
def measure(opened):
    asked.append(opened)
    while len(asked) == 5:  # the point after step 10, whose save is then there
        if (pathlib.Path(sys.argv[2]) / "resume-00000010.pt").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)
    return measure_norm(opened)
train(make_config(), data=sys.argv[1], out=sys.argv[2], measure=measure, quiet=True)
"""
SLOW_PROGRAM = """
import sys, time
from datetime import timedelta
import training.world
from training.run import train
training.world.STEP_TIMEOUT = timedelta(seconds=20)
sys.path.insert(0, sys.argv[3])
from test_train_zeroshot import make_config, measure_norm
def measure(opened):
    print("measured by", __import__("os").environ["RANK"])
    time.sleep(25)
    return measure_norm(opened)
config = make_config(zeroshot={"tasks": ["norm"], "every_samples": 200})
train(config, data=sys.argv[1], out=sys.argv[2], measure=measure, quiet=True)
"""


def make_config(**values):
    from pipeline.config import read_config

    return read_config(TrainConfig, SETTINGS | HOW | values, where="train")


def measure_norm(opened):
    """Return a number that depends on every weight of the image tower, and leave traces where some could be left."""
    assert not any(module.training for module in opened.model.modules())
    torch.rand(3)
    with torch.inference_mode():
        return {"norm": float(opened.model.encode_image(torch.ones(1, 3, 32, 32)).norm()), "broken": None}


def read_points(out):
    lines = [json.loads(line) for line in (out / "zeroshot.jsonl").read_text().splitlines()]
    return [(line["step"], line["samples"], line["tasks"]) for line in lines]


@pytest.fixture(scope="module")
def watched(squares, tmp_path_factory):
    out = tmp_path_factory.mktemp("watched")
    train(make_config(), data=str(squares), out=str(out), measure=measure_norm, quiet=True)
    return out


def test_points_are_the_first_steps_that_reach_a_multiple_and_the_last():
    config = make_config(zeroshot={"own": ["x"], "every_samples": 100})
    assert [step for step in range(13) if is_due(config, step)] == [4, 7, 10, 12]
    assert not any(is_due(make_config(zeroshot=None), step) for step in range(13))


def test_a_watched_run_ends_with_the_same_bytes(watched, squares, tmp_path):
    plain = make_config(zeroshot=None, report_to=[])
    train(plain, data=str(squares), out=str(tmp_path), quiet=True)
    assert not (tmp_path / "zeroshot.jsonl").exists() and not (tmp_path / "tensorboard").exists()
    for name in ("checkpoint.pt", "manifest.json", "model.json"):
        assert (tmp_path / name).read_bytes() == (watched / name).read_bytes()
    assert [step for step, *_ in read_points(watched)] == POINTS
    assert [samples for _, samples, _ in read_points(watched)] == [32 * step for step in POINTS]
    assert len({tasks["norm"] for *_, tasks in read_points(watched)}) == 6


def test_points_after_the_last_save_are_measured_again(watched, squares, tmp_path):
    asked = []

    def measure_four_times(opened):
        asked.append(opened)
        if len(asked) == 4:
            raise OSError("no more")
        return measure_norm(opened)

    with pytest.raises(OSError, match="no more"):
        train(make_config(), data=str(squares), out=str(tmp_path), measure=measure_four_times, quiet=True)
    assert [step for step, *_ in read_points(tmp_path)] == [2, 4, 6]
    train(make_config(), data=str(squares), out=str(tmp_path), measure=measure_norm, quiet=True)
    assert read_points(tmp_path) == read_points(watched)


def test_a_point_that_was_due_when_the_run_was_killed_is_measured_later(watched, squares, tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(squares), str(tmp_path), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, cwd=ROOT, env=environment).returncode == -signal.SIGKILL
    assert [step for step, *_ in read_points(tmp_path)] == [2, 4, 6, 8]
    asked = []
    train(
        make_config(),
        data=str(squares),
        out=str(tmp_path),
        measure=lambda opened: asked.append(opened) or measure_norm(opened),
        quiet=True,
    )
    assert len(asked) == 2 and read_points(tmp_path) == read_points(watched)
    assert (tmp_path / "checkpoint.pt").read_bytes() == (watched / "checkpoint.pt").read_bytes()


@pytest.mark.slow
def test_the_first_of_two_processes_measures_and_the_other_waits_longer_than_for_a_step(squares, tmp_path):
    (tmp_path / "program.py").write_text(SLOW_PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [str(tmp_path / "program.py"), str(squares), str(tmp_path / "out"), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    done = subprocess.run([*command, *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0 and done.stdout.splitlines() == ["measured by 0"] * 2
    assert [step for step, *_ in read_points(tmp_path / "out")] == [7, 12]


def test_points_and_curves_of_another_run_are_taken_away(squares, tmp_path):
    (tmp_path / "zeroshot.jsonl").write_text('{"step": 9, "samples": 9, "tasks": {}}\n')
    (tmp_path / "tensorboard").mkdir()
    plain = make_config(zeroshot=None, samples=32, report_to=[])
    train(plain, data=str(squares), out=str(tmp_path), quiet=True)
    assert not (tmp_path / "zeroshot.jsonl").exists() and not (tmp_path / "tensorboard").exists()


def test_each_module_is_in_its_own_mode_afterwards():
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout()), torch.nn.Dropout())
    model[0].eval()
    model[0][1].train()
    modes = [module.training for module in model.modules()]
    before = torch.random.get_rng_state()
    with pytest.raises(ValueError, match="stop"), at_rest(model):
        assert not any(module.training for module in model.modules())
        torch.rand(1)
        raise ValueError("stop")
    assert [module.training for module in model.modules()] == modes == [True, False, False, True, True]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_tasks_that_nobody_measures_are_an_error(tmp_path):
    with pytest.raises(ConfigError, match="nothing that evaluates"):
        train(make_config(), data=str(tmp_path), out=str(tmp_path / "out"), quiet=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"every_samples": 0, "own": ["x"]}, "every_samples is 0"), ({"every_samples": 5}, "names no task")],
)
def test_a_bad_plan_is_named(values, message):
    with pytest.raises(ConfigError, match=message):
        make_config(zeroshot=values)
