import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from training.config import TrainConfig
from training.metrics import MetricsLog, cut_metrics
from training.run import train

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
        while process.poll() is None and not (out / "resume.pt").exists():
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
    (killed / ".tmp-00000000000000000000000000000000-resume.pt").write_bytes(b"half a file")
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
    cut_metrics(url, step=2)
    assert [json.loads(line)["step"] for line in Path(url).read_text().splitlines()] == [1, 2]
    cut_metrics(str(tmp_path / "absent.jsonl"), step=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [({"identity": "0" * 64, "step": 3}, "another config or data"), (b"no checkpoint", "cannot be read")],
)
def test_a_leftover_that_cannot_be_used_is_named(squares, tmp_path, caplog, content, message):
    if isinstance(content, bytes):
        (tmp_path / "resume.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "resume.pt")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n')
    config = TrainConfig(**SETTINGS | {"samples": 64}, log_every_steps=1)
    manifest = train(config, data=str(squares), out=str(tmp_path), quiet=True)
    assert message in caplog.text and "resume.pt" in caplog.text
    assert manifest.facts["samples_seen"] == 64 and [s for s, *_ in read_losses(tmp_path)] == [1, 2]
    assert not (tmp_path / "resume.pt").exists()
