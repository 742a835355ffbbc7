"""Two processes against one, with gloo on this machine's CPU."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.manifest import read_manifest
from training.config import TrainConfig
from training.loss import contrastive_loss, sigmoid_loss
from training.run import train

ROOT = Path(__file__).parents[2]
SETTINGS = {"model": "winnow-vit-tiny", "batch_size": 32, "warmup_steps": 4, "log_every_steps": 1}
PROGRAM = """
import sys
from training.config import TrainConfig
from training.run import train
train(TrainConfig(**eval(sys.argv[1])), data=sys.argv[2], out=sys.argv[3], quiet=True)
"""


LOSSES = """
import sys, torch
from training.config import TrainConfig
from training.loss import contrastive_loss, sigmoid_loss
from training.world import join_world
with join_world(TrainConfig(model="none", samples=6, batch_size=6), torch.device("cpu")) as world:
    image_GD, text_GD, scale, bias = torch.load(sys.argv[1])
    own_B = slice(3 * world.rank, 3 * world.rank + 3)
    given = [image_GD[own_B], text_GD[own_B], scale, bias]
    found = []
    for measure, number in ((contrastive_loss, 3), (sigmoid_loss, 4)):
        leaves = [value.clone().requires_grad_() for value in given[:number]]
        loss = measure(*leaves, world)
        loss.backward()
        found.append((loss.detach(), [leaf.grad for leaf in leaves]))
    torch.save(found, sys.argv[2] + str(world.rank))
"""


def start_two(program, *arguments):
    """Start a program in two processes, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]


def train_in_two(values, data, out):
    processes = start_two(PROGRAM, SETTINGS | values, data, out)
    assert [process.wait(600) for process in processes] == [0, 0]


def train_in_one(values, data, out):
    return train(TrainConfig(**SETTINGS | values), data=str(data), out=str(out), quiet=True)


@pytest.fixture(scope="module")
def rows_with_a_broken_one(square_rows, write_shards, tmp_path_factory):
    rows = square_rows(100)
    rows[7] = (rows[7][0], b"broken")
    return write_shards(tmp_path_factory.mktemp("data"), rows)


def read_lines(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [[line[name] for name in ("step", "samples", "loss", "grad_norm", "logit_scale")] for line in lines]


def read_weights(out):
    """Return the trained weights but for the biases of attention keys, which change no output.

    Their gradients are zero but for rounding, and AdamW makes steps of that.
    """
    state = torch.load(out / "checkpoint.pt", weights_only=True)["state_dict"]
    for name, tensor in state.items():
        if name.endswith("attn.in_proj_bias"):
            tensor[len(tensor) // 3 : len(tensor) // 3 * 2] = 0
    return state


def assert_same(two, one):
    """Losses, gradient norms and weights to 1e-5, accounts exactly."""
    assert read_lines(two) == [pytest.approx(line, abs=1e-5, rel=1e-5) for line in read_lines(one)]
    first, second = read_weights(two), read_weights(one)
    assert all(torch.allclose(first[name], second[name], rtol=0, atol=1e-5) for name in first)
    found, wanted = read_manifest(str(two)), read_manifest(str(one))
    assert (found.counts, found.config, found.parents) == (wanted.counts, wanted.config, wanted.parents)
    loss = wanted.facts["final_loss"]
    assert found.facts == wanted.facts | {"final_loss": pytest.approx(loss, abs=1e-5)}
    assert sorted(p.name for p in two.iterdir()) == sorted(p.name for p in one.iterdir())


def test_the_mean_of_two_losses_and_gradients_is_that_of_the_whole(tmp_path):
    """DistributedDataParallel takes the mean of parameter gradients, to which each row adds in its process alone."""
    torch.manual_seed(0)
    rows = [torch.nn.functional.normalize(torch.randn(6, 5), dim=1) for _ in range(2)]
    given = [*rows, torch.tensor(10.0), torch.tensor(-3.0)]
    torch.save(given, tmp_path / "given.pt")
    processes = start_two(LOSSES, tmp_path / "given.pt", tmp_path / "found")
    assert [process.wait(600) for process in processes] == [0, 0]
    found = [torch.load(tmp_path / f"found{rank}") for rank in (0, 1)]
    for measure, number, parts in ((contrastive_loss, 3, 0), (sigmoid_loss, 4, 1)):
        leaves = [value.clone().requires_grad_() for value in given[:number]]
        loss = measure(*leaves)
        loss.backward()
        (first, first_grads), (second, second_grads) = found[0][parts], found[1][parts]
        torch.testing.assert_close((first + second) / 2, loss.detach())
        for leaf, a, b in zip(leaves, first_grads, second_grads, strict=True):
            torch.testing.assert_close(torch.cat([a, b]) / 2 if a.ndim else (a + b) / 2, leaf.grad)


@pytest.mark.slow
def test_two_processes_train_what_one_does(rows_with_a_broken_one, tmp_path):
    values = {"samples": 32 * 8}
    train_in_two(values, rows_with_a_broken_one, tmp_path / "two")
    manifest = train_in_one(values, rows_with_a_broken_one, tmp_path / "one")
    assert manifest.facts["unreadable_draws"] > 1
    assert_same(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("two", "one"),
    [
        ({"loss": "siglip"}, {"loss": "siglip"}),
        ({"cut_text": True, "grad_clip_norm": 0.5, "sampler": "datacomp"},) * 2,
        ({"accum_freq": 2, "patch_dropout": 0.5}, {"accum_freq": 4, "patch_dropout": 0.5}),
        ({"accum_freq": 2, "loss": "siglip"}, {"accum_freq": 4, "loss": "siglip"}),
    ],
    ids=["siglip", "cut", "parts", "siglip parts"],
)
def test_two_processes_train_every_way(rows_with_a_broken_one, tmp_path, two, one):
    train_in_two({"samples": 32 * 6} | two, rows_with_a_broken_one, tmp_path / "two")
    train_in_one({"samples": 32 * 6} | one, rows_with_a_broken_one, tmp_path / "one")
    path = tmp_path / "one" / "manifest.json"
    path.write_text(path.read_text().replace('"accum_freq": 4', '"accum_freq": 2'))
    assert_same(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_killed_in_two_processes_a_run_goes_on_in_one(rows_with_a_broken_one, tmp_path):
    """kill -9 of a process ends the other with an error, and torchrun; what was saved is gone on from."""
    values = {"samples": 32 * 16, "checkpoint_every_steps": 3}
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    process = subprocess.Popen(
        [*command, repr(SETTINGS | values), str(rows_with_a_broken_one), str(killed)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    while process.poll() is None and not list(killed.glob("resume-*.pt")):
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert process.wait(600) == 1 and not (killed / "manifest.json").exists()
    train_in_one(values, rows_with_a_broken_one, killed)
    train_in_one(values, rows_with_a_broken_one, tmp_path / "one")
    assert_same(killed, tmp_path / "one")


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_after_the_same_step(rows_with_a_broken_one, tmp_path):
    values, out = {"samples": 32 * 400, "checkpoint_every_steps": 5}, tmp_path / "out"
    processes = start_two(PROGRAM, SETTINGS | values, rows_with_a_broken_one, out)
    while not list(out.glob("resume-*.pt")):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    assert [process.wait(600) for process in processes] == [1, 1]  # Stopped, which the command line makes 143
    (save,) = out.glob("resume-*.pt")
    assert read_lines(out)[-1][0] == torch.load(save, weights_only=True)["step"] < 400


@pytest.mark.parametrize(
    ("world_size", "values", "message"),
    [("3", {}, "over 3 processes: take 30 or 33"), ("4", {"accum_freq": 16}, "of accum_freq 16: take 64")],
)
def test_a_batch_that_processes_cannot_share_is_an_error(monkeypatch, tmp_path, world_size, values, message):
    monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(ConfigError, match=message):
        train_in_one({"samples": 64} | values, tmp_path, tmp_path / "out")
