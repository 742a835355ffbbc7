"""Two processes against one, with gloo on this machine's CPU."""

import copy
import inspect
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
from training import loss, sharding
from training.config import TrainConfig
from training.optim import build_optimizer
from training.run import train
from training.step import check_batch_norms
from training.world import ALONE, World

ROOT = Path(__file__).parents[2]
SETTINGS = {"model": "winnow-vit-tiny", "batch_size": 32, "warmup_steps": 4, "log_every_steps": 1}
PROGRAM = """
import sys
from training.config import TrainConfig
from training.run import train
train(TrainConfig(**eval(sys.argv[1])), data=sys.argv[2], out=sys.argv[3], quiet=True)
"""


def measure_losses(given, world):
    """Return both losses of this process's rows and their gradients, with all logits at once and in pieces of a row."""
    own_B = slice(3 * world.rank, 3 * world.rank + 6 // world.size)
    own = [rows_GD[own_B] for rows_GD in given[:2]] + given[2:]
    found = []
    for limit in (loss.MOST_LOGITS, 6):
        loss.MOST_LOGITS, before = limit, loss.MOST_LOGITS
        for measure, number in ((loss.contrastive_loss, 3), (loss.sigmoid_loss, 4)):
            leaves = [value.clone().requires_grad_() for value in own[:number]]
            value = measure(*leaves, world)
            value.backward()
            found.append((value.detach(), [leaf.grad for leaf in leaves]))
        loss.MOST_LOGITS = before
    return found


def step_three_times(values, world):
    """Return weights after three steps, the optimiser's whole state after two, and how many parameters it is of."""
    config = TrainConfig(model="none", samples=6, batch_size=6, shard_optimizer=True, **values)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 4))
    optimizer = build_optimizer(model, config)
    owners = sharding.assign_owners(config, optimizer, world)
    for step in range(3):
        torch.manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        if owners:
            sharding.drop_gradients_of_others(optimizer, owners, world.rank)
        optimizer.step()
        if owners:
            sharding.share_weights(optimizer, owners)
        if step == 1:
            hand_over = sharding.receive_state if world.is_first else sharding.send_state
            whole = world.share(hand_over(optimizer.state_dict(), owners, world))
            kept = copy.deepcopy(sharding.keep_own(whole, owners, world.rank))
            whole = copy.deepcopy(whole)
            optimizer = build_optimizer(model, config)
            optimizer.load_state_dict(kept)
    return model.state_dict(), whole, len(optimizer.state)


OPTIMIZERS = [
    {"optimizer": "adamw"},
    {"optimizer": "lamb"},
    {"optimizer": "lion"},
    {"optimizer": "muon"},
    {"optimizer": "adan", "beta1": 0.98, "beta2": 0.92, "beta3": 0.99},
]
TOGETHER = f"""
import copy, sys, torch
from pipeline.errors import ConfigError
from training import loss, sharding
from training.config import TrainConfig
from training.optim import build_optimizer
from training.world import join_world
{inspect.getsource(measure_losses)}
{inspect.getsource(step_three_times)}
with join_world(TrainConfig(model="none", samples=6, batch_size=6), torch.device("cpu")) as world:
    losses = measure_losses(torch.load(sys.argv[1]), world)
    stepped = [step_three_times(values, world) for values in {OPTIMIZERS}]
    world.check_same({{"model": "a", "augment": None}})
    try:
        world.check_same({{"model": "a", "log_every_steps": 10 + world.rank}})
    except ConfigError as error:
        torch.save((losses, stepped, str(error)), sys.argv[2] + str(world.rank))
"""


def start_two(program, *arguments):
    """Start a program in two processes, as torchrun does, each with a process group of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    own = [os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    return [subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True) for environment in own]


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
    final = wanted.facts["final_loss"]
    assert found.facts == wanted.facts | {"final_loss": pytest.approx(final, abs=1e-5)}
    assert sorted(p.name for p in two.iterdir()) == sorted(p.name for p in one.iterdir())


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The rows given, and what each of two processes found: losses, steps, the error of unlike choices."""
    folder = tmp_path_factory.mktemp("together")
    torch.manual_seed(0)
    rows = [torch.nn.functional.normalize(torch.randn(6, 5), dim=1) for _ in range(2)]
    given = [*rows, torch.tensor(10.0), torch.tensor(-3.0)]
    torch.save(given, folder / "given.pt")
    processes = start_two(TOGETHER, folder / "given.pt", folder / "found")
    assert [process.wait(600) for process in processes] == [0, 0]
    return given, [torch.load(folder / f"found{rank}") for rank in (0, 1)]


def test_the_mean_of_two_losses_and_gradients_is_that_of_the_whole(together):
    """DistributedDataParallel takes the mean of parameter gradients, to which each row adds in its process alone."""
    given, ((first, *_), (second, *_)) = together
    alone = measure_losses(given, ALONE)[:2] * 2
    for (wanted, leaf_grads), (a, a_grads), (b, b_grads) in zip(alone, first, second, strict=True):
        torch.testing.assert_close((a + b) / 2, wanted)
        for leaf, x, y in zip(leaf_grads, a_grads, b_grads, strict=True):
            torch.testing.assert_close(torch.cat([x, y]) / 2 if x.ndim else (x + y) / 2, leaf)


def test_a_sharded_optimizer_steps_as_a_whole_one_and_its_state_can_be_saved_whole(together):
    """Bit for bit, every optimiser; each process holds a part of the state."""
    _, ((_, first, _), (_, second, _)) = together
    for values, (a, a_state, num_a), (b, b_state, num_b) in zip(OPTIMIZERS, first, second, strict=True):
        wanted, state, num = step_three_times(values, ALONE)
        for found, whole in ((a, a_state), (b, b_state)):
            torch.testing.assert_close((found, whole["state"]), (wanted, state["state"]), rtol=0, atol=0)
            assert repr(whole["param_groups"]) == repr(state["param_groups"])
        assert num_a + num_b == num == 6 and num_a and num_b


def test_processes_of_unlike_choices_are_told_so(together):
    told = "process 1 was started with log_every_steps 11, the first with 10. Start all with the same command."
    assert [message for *_, message in together[1]] == [told, told]


def test_batch_norms_are_not_shared_between_cpus():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    model.logit_scale = torch.nn.Parameter(torch.zeros(()))
    check_batch_norms(model, ALONE)
    with pytest.raises(ConfigError, match="the model has 1 batch norms"):
        check_batch_norms(model, World(size=2))


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
        ({"shard_optimizer": True, "grad_clip_norm": 0.5, "grad_checkpointing": "all"}, {"grad_clip_norm": 0.5}),
        ({"shard_optimizer": True, "optimizer": "lamb", "accum_freq": 2}, {"optimizer": "lamb", "accum_freq": 4}),
    ],
    ids=["siglip", "cut", "parts", "siglip parts", "sharded", "sharded parts"],
)
def test_two_processes_train_every_way(rows_with_a_broken_one, tmp_path, two, one):
    train_in_two({"samples": 32 * 6} | two, rows_with_a_broken_one, tmp_path / "two")
    train_in_one({"samples": 32 * 6} | one, rows_with_a_broken_one, tmp_path / "one")
    path = tmp_path / "one" / "manifest.json"
    path.write_text(path.read_text().replace('"accum_freq": 4', '"accum_freq": 2'))
    assert_same(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_killed_in_two_processes_a_run_goes_on_in_one(rows_with_a_broken_one, tmp_path):
    """kill -9 of a process ends the other with an error, and torchrun; what was saved is gone on from, unsharded."""
    values = {"samples": 32 * 16, "checkpoint_every_steps": 3, "shard_optimizer": True}
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
    """Its loader gets the signal too, as schedulers send it."""
    values, out = {"samples": 32 * 400, "checkpoint_every_steps": 5, "num_workers": 1}, tmp_path / "out"
    processes = start_two(PROGRAM, SETTINGS | values, rows_with_a_broken_one, out)
    while not list(out.glob("resume-*.pt")):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    os.killpg(processes[1].pid, signal.SIGTERM)
    assert [process.wait(600) for process in processes] == [1, 1]  # Stopped, which the command line makes 143
    (save,) = out.glob("resume-*.pt")
    assert read_lines(out)[-1][0] == torch.load(save, weights_only=True)["step"] < 400


@pytest.mark.parametrize(
    ("world_size", "values", "message"),
    [("3", {}, "over 3 processes: take 30 or 33"), ("4", {"accum_freq": 16}, "of accum_freq 16: take 64")],
)
def test_a_batch_that_processes_cannot_share_is_an_error(monkeypatch, tmp_path, world_size, values, message):
    for name, value in {"RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "WORLD_SIZE": world_size}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        train_in_one({"samples": 64} | values, tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE is many and RANK 0"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0 and RANK 0"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 and RANK 0, and RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "here"}, "and MASTER_PORT is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}, "WORLD_SIZE is 2 and RANK 2:"),
    ],
)
def test_an_environment_in_which_processes_cannot_meet_is_an_error(monkeypatch, tmp_path, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        train_in_one({"samples": 64}, tmp_path, tmp_path / "out")
