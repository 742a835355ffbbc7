import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch

from pipeline.clip_model import open_model
from pipeline.errors import StageError
from pipeline.lock import hold_lock
from pipeline.schemas import LOCK
from training.checkpoint import RunState, Saver, list_saves, load_resume, snapshot, write_save
from training.config import TrainConfig, Zeroshot
from training.metrics import MetricsLog, append_lines, cut_lines
from training.run import _save_gathered, train
from training.stopping import find_collapse

ROOT = Path(__file__).parents[2]
SETTINGS = {"model": "winnow-vit-tiny", "samples": 32 * 24, "batch_size": 32, "warmup_steps": 4}
HOW = {"log_every_steps": 2, "checkpoint_every_steps": 5}
PROGRAM = """
import sys
from training.config import TrainConfig
from training.run import train
train(TrainConfig(**eval(sys.argv[1])), data=sys.argv[2], out=sys.argv[3], quiet=True)
"""


def run_and_kill(config, data, out):
    """Start the run in another process and kill -9 it as soon as its first save is there."""
    command = [sys.executable, "-c", PROGRAM, repr(config), str(data), str(out)]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        while process.poll() is None and not list(out.glob("resume-*.pt")):
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL and not (out / "manifest.json").exists()


def read_losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"], line["logit_scale"]) for line in lines]


def test_a_killed_run_ends_with_the_same_bytes(squares, square_rows, write_shards, tmp_path, caplog):
    rows = square_rows(100)
    rows[7] = (rows[7][0], b"broken")
    data, whole, killed = write_shards(tmp_path / "data", rows), tmp_path / "whole", tmp_path / "killed"
    config = TrainConfig(**SETTINGS, **HOW)
    wanted = train(config, data=str(data), out=str(whole), quiet=True)
    run_and_kill(SETTINGS | HOW, data, killed)
    (killed / ".tmp-00000000000000000000000000000000-resume-00000009.pt").write_bytes(b"half a file")
    with caplog.at_level(logging.INFO, logger="winnow"):
        assert train(config, data=str(data), out=str(killed), quiet=True) == wanted
    assert "going on from step" in caplog.text
    assert read_losses(killed) == read_losses(whole) and len(read_losses(whole)) == 12
    first, second = (torch.load(p / "checkpoint.pt", weights_only=True)["state_dict"] for p in (whole, killed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("checkpoint.pt", "manifest.json", "model.json"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    assert sorted(p.name for p in killed.iterdir()) == sorted(p.name for p in whole.iterdir())


def test_lines_after_the_resumed_step_are_cut(tmp_path):
    url = str(tmp_path / "metrics.jsonl")
    log = MetricsLog(url, step=0, batch_size=2)
    for step in (1, 2, 3):
        log.write(step=step, loss=1.0, learning_rate=0.1, logit_scale=14.0, grad_norm=1.0)
    with Path(url).open("ab") as file:
        file.write(b'{"step": 4, "lo')
    cut_lines(url, step=2)
    assert [json.loads(line)["step"] for line in Path(url).read_text().splitlines()] == [1, 2]
    cut_lines(str(tmp_path / "absent.jsonl"), step=0)


def test_a_last_line_that_lost_its_end_is_not_run_into_the_next(tmp_path):
    url = str(tmp_path / "metrics.jsonl")
    Path(url).write_bytes(b'{"step": 1}\n{"step": 2}')
    cut_lines(url, step=2)
    append_lines(url, [{"step": 3}])
    assert [json.loads(line)["step"] for line in Path(url).read_text().splitlines()] == [1, 2, 3]


def test_on_an_object_store_lines_are_written_at_times_and_before_each_save(squares):
    store, found = fsspec.filesystem("memory"), []

    def count_lines(_):
        found.append(len(store.cat_file("/watched/metrics.jsonl").splitlines()))
        return {}

    choices = SETTINGS | {"samples": 32 * 7, "log_every_steps": 1, "checkpoint_every_steps": 3, "report_to": ()}
    config = TrainConfig(**choices, zeroshot=Zeroshot(tasks=("any",), every_samples=32))
    train(config, data=str(squares), out="memory://watched", measure=count_lines, quiet=True)
    assert found == [1, 1, 3, 3, 3, 6, 6]
    lines = store.cat_file("/watched/metrics.jsonl").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    store.rm("/watched", recursive=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [({"identity": "0" * 64, "step": 3}, "another config or data"), (b"no checkpoint", "is damaged")],
)
def test_a_leftover_that_cannot_be_used_is_named(squares, tmp_path, caplog, content, message):
    if isinstance(content, bytes):
        (tmp_path / "resume-00000003.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "resume-00000003.pt")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n')
    config = TrainConfig(**SETTINGS | {"samples": 64}, log_every_steps=1)
    manifest = train(config, data=str(squares), out=str(tmp_path), quiet=True)
    assert message in caplog.text and "resume-00000003.pt" in caplog.text
    assert manifest.facts["samples_seen"] == 64 and [s for s, *_ in read_losses(tmp_path)] == [1, 2]
    assert not (tmp_path / "resume-00000003.pt").exists()


def test_sigterm_saves_and_the_same_command_goes_on(squares, tmp_path):
    """Sent to the process before its first save is due, so that only the signal can have made one."""
    choices = [f"train.{name}={value}" for name, value in (SETTINGS | {"log_every_steps": 1}).items()]
    words = [sys.executable, "-m", "jobs", "train", "--data", str(squares), "--out", str(tmp_path / "out"), *choices]
    metrics = tmp_path / "out" / "metrics.jsonl"
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 143 and "Run the same command again" in said and "Traceback" not in said
    (step,) = list_saves(str(tmp_path / "out"))
    assert 1 <= step < 24
    config = TrainConfig(**SETTINGS, log_every_steps=1)
    train(config, data=str(squares), out=str(tmp_path / "whole"), quiet=True)
    train(config, data=str(squares), out=str(tmp_path / "out"), quiet=True)
    assert read_losses(tmp_path / "out") == read_losses(tmp_path / "whole")
    assert (tmp_path / "out/checkpoint.pt").read_bytes() == (tmp_path / "whole/checkpoint.pt").read_bytes()
    assert not list_saves(str(tmp_path / "out"))


def test_the_newest_saves_are_kept_and_open_as_models(squares, tmp_path):
    config = TrainConfig(**SETTINGS, checkpoint_every_steps=5, keep_checkpoints=3)
    train(config, data=str(squares), out=str(tmp_path), quiet=True)
    assert list_saves(str(tmp_path)) == [10, 15, 20]
    train(replace(config, keep_checkpoints=1), data=str(squares), out=str(tmp_path), quiet=True)
    assert list_saves(str(tmp_path)) == [10, 15, 20], "a finished run was found, and lost its saves"
    early, late = (open_model(f"winnow-vit-tiny@{tmp_path}/resume-{step:08d}.pt").model for step in (10, 20))
    assert not torch.equal(early.logit_scale, late.logit_scale)


def make_state(step):
    model = torch.nn.Linear(2, 2)
    return RunState(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.zeros(1), torch.zeros(1), step=step)


def test_a_newest_save_that_is_broken_gives_way_to_the_one_before(tmp_path, caplog):
    states = {step: make_state(step) for step in (5, 10)}
    for state in states.values():
        write_save(str(tmp_path), snapshot(state, identity="x"), keep=2)
    (tmp_path / "resume-00000010.pt").write_bytes(b"rotten")
    state = make_state(0)
    assert load_resume(str(tmp_path), state, identity="x")
    assert state.step == 5 and torch.equal(state.model.weight, states[5].model.weight)
    assert "resume-00000010.pt" in caplog.text


def test_a_save_that_cannot_be_read_now_ends_the_run_and_stays(tmp_path):
    """The kernel gives EIO for the start of a process's memory, as a failing disk does."""
    write_save(str(tmp_path), snapshot(make_state(5), identity="x"), keep=2)
    (tmp_path / "resume-00000010.pt").symlink_to("/proc/self/mem")
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n')
    (tmp_path / "manifest.json").write_text("{}")
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(
        StageError, match=r"resume-00000010\.pt cannot be read now \(.*Input/output error.*may be whole"
    ):
        load_resume(str(tmp_path), make_state(0), identity="x")
    assert sorted(p.name for p in tmp_path.iterdir()) == before and list_saves(str(tmp_path)) == [5, 10]


def test_too_little_memory_is_no_damage(tmp_path, monkeypatch):
    write_save(str(tmp_path), snapshot(make_state(5), identity="x"), keep=2)
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**55)

    def load(*_, **__):
        raise refused.value

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(RuntimeError, match="allocate memory"):
        load_resume(str(tmp_path), make_state(0), identity="x")


def test_who_lost_the_lock_saves_nothing(tmp_path):
    with pytest.raises(StageError, match=r"took .* over"), hold_lock(str(tmp_path), "train") as check_lock:
        saver = Saver(str(tmp_path), identity="x", keep=1, check_lock=check_lock)
        (tmp_path / LOCK).write_text("another's")
        saver.save(make_state(5))
    assert list_saves(str(tmp_path)) == []


def test_saves_of_another_run_give_way_to_the_first_save_of_this(tmp_path):
    """Whatever their steps: they would count as kept ones, and stay after the end."""
    for step in (3, 20):
        write_save(str(tmp_path), snapshot(make_state(step), identity="other"), keep=9)
    saver = Saver(str(tmp_path), identity="x", keep=2)
    assert saver.list_saves_before(9) == []
    for step in (4, 8, 20):
        saver.save(make_state(step))
        saver.finish()
        assert list_saves(str(tmp_path)) == [s for s in (4, 8, 20) if s <= step][-2:]
    going_on = Saver(str(tmp_path), identity="x", keep=2, step=8)
    going_on.remove_strange()
    assert list_saves(str(tmp_path)) == [8]


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    saver, state = Saver(str(tmp_path), identity="x", keep=1), make_state(5)
    _save_gathered(TrainConfig(**SETTINGS), state, saver)
    state.step = 10
    state.model.bias.data[0] = torch.inf
    with pytest.raises(StageError, match=r"a weight became .* by step 10\. The last good save is .*resume-00000005"):
        _save_gathered(TrainConfig(**SETTINGS), state, saver)
    assert list_saves(str(tmp_path)) == [5]


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_a_model_that_guesses_again_is_warned_of(tmp_path, caplog, loss):
    """The means of 50 steps go straight from 0.5 to 1.01 of guessing, and pass 0.75 in the 25th step of the worse."""
    config = TrainConfig(**SETTINGS, loss=loss)
    guess = math.log(32) if loss == "clip" else -math.log(1 / 32) - 31 * math.log(31 / 32)
    saver, state = Saver(str(tmp_path), identity="x", keep=1), make_state(168)
    state.losses = [guess] * 20 + [0.5 * guess] * 100 + [1.01 * guess] * 48
    _save_gathered(config, state, saver)
    assert not caplog.text
    state.losses += [1.01 * guess]
    _save_gathered(config, state, saver)
    assert f"by step 169 the loss is back at that of guessing, {guess:.3f}; until step 144 it" in caplog.text


def test_a_model_that_never_learned_goes_on():
    config = TrainConfig(**SETTINGS)
    assert find_collapse([math.log(32)] * 300, config) is None


def test_a_snapshot_is_of_its_step_whatever_comes_after():
    state = make_state(5)
    before = state.model.weight.detach().clone()
    content = snapshot(state, identity="x")
    state.model.weight.data.add_(1)
    assert torch.equal(content["state_dict"]["weight"], before)


def test_a_save_that_fails_is_an_error_at_the_next_step(tmp_path):
    (tmp_path / "file").write_text("no folder")
    saver = Saver(str(tmp_path / "file"), identity="x", keep=1)
    saver.save(make_state(5))
    saver.close()
    with pytest.raises(StageError, match="could not be saved"):
        saver.check()
    saver.check()
