"""Whole training runs on a CPU, from shards to steps: open_clip_train 3.3.0's own main against winnow's train.

Prints; asserts nothing.  Both read the same tars with one loader process, train the same architecture in fp32 with the
same batch and schedule, and are given the same number of threads.  A clock is read after every step of the optimiser in
either process; the first steps are not counted, so models, indexes and shuffle buffers are made before the clock.
They run in turn, and the median of the pairwise ratios of samples a second counts (above 1: we are faster).  `cpu` is
the same ratio in processor time, loader process included, which a busy machine distorts less.

`same` has winnow's defaults: the pixels of Pillow, all text tokens.  `fast` has pixels=fast and cut_text, whose gain
goes by the captions' lengths, which are printed.

The peer is the Python of an environment that has open_clip_torch==3.3.0 and webdataset==0.2.86 (newer ones break it):
    python tests/bench/train_steps.py --pool POOL --peer peer-venv/bin/python --model ViT-B-32 --batch 16 --steps 8
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from loader import print_lengths, read_pool, write_data

from training.index import list_tars

ROOT = Path(__file__).resolve().parents[2]
CLOCK = """
import json, os, sys, time
from pathlib import Path
from torch.optim.optimizer import register_optimizer_step_post_hook
asked = json.loads(sys.argv[1])
ticks = []
def processor_seconds():
    total = sum(os.times()[:2])
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total
def tick(*_):
    ticks.append([time.perf_counter(), processor_seconds()])
register_optimizer_step_post_hook(tick)
"""
PEER = """
import open_clip, torch
torch.set_num_threads(asked["threads"])
open_clip.add_model_config(asked["configs"])
import open_clip_train.main
open_clip_train.main.main([
    "--train-data", asked["tars"], "--train-num-samples", str(asked["samples"]), "--dataset-type", "webdataset",
    "--dataset-resampled", "--model", asked["model"], "--batch-size", str(asked["batch"]), "--epochs", "1",
    "--workers", "1", "--precision", "fp32", "--device", "cpu", "--lr", "5e-4", "--warmup", "2", "--wd", "0.2",
    "--save-frequency", "0", "--log-every-n-steps", "1000000", "--logs", asked["out"], "--seed", "0",
])
"""
OURS = """
import torch
torch.set_num_threads(asked["threads"])
from training.config import TrainConfig
from training.run import train
config = TrainConfig(model=asked["model"], samples=asked["samples"], batch_size=asked["batch"], learning_rate=5e-4,
    warmup_steps=2, weight_decay=0.2, num_workers=1, log_every_steps=1000000, **asked["choices"])
train(config, data=asked["data"], out=asked["out"], device="cpu", quiet=True)
"""
TELL = """
print(json.dumps(ticks))
"""
WAYS = {"same": {}, "fast": {"pixels": "fast", "cut_text": True}}
Rate = tuple[float, float]
"""Samples a second of wall clock and of processor time."""


def measure(python: str, program: str, asked: dict[str, object], *, warm: int) -> Rate:
    with tempfile.TemporaryDirectory() as out:
        command = [python, "-c", CLOCK + program + TELL, json.dumps(asked | {"out": out})]
        threads = {"OMP_NUM_THREADS": str(asked["threads"]), "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=dict(os.environ) | threads)
    ticks = json.loads(done.stdout.splitlines()[-1])
    samples = (len(ticks) - warm) * int(str(asked["batch"]))
    (wall, cpu), (wall_end, cpu_end) = ticks[warm - 1], ticks[-1]
    return samples / (wall_end - wall), samples / (cpu_end - cpu)


def compare(data: Path, args: argparse.Namespace) -> None:
    asked: dict[str, object] = {
        "model": args.model,
        "batch": args.batch,
        "samples": args.batch * args.steps,
        "threads": args.threads,
        "tars": "::".join(list_tars(str(data))),
        "data": str(data),
        "configs": str(ROOT / "pipeline" / "clip_models"),
    }
    theirs: list[Rate] = []
    ours: dict[str, list[Rate]] = {name: [] for name in WAYS}
    for _ in range(args.pairs):
        theirs.append(measure(args.peer, PEER, asked, warm=args.warm))
        for name, choices in WAYS.items():
            ours[name].append(measure(sys.executable, OURS, asked | {"choices": choices}, warm=args.warm))
        print(f"  load {os.getloadavg()[0]:.0f}: {theirs[-1]} {[rates[-1] for rates in ours.values()]}", flush=True)
    print(f"  {'open_clip':10} {statistics.median(wall for wall, _ in theirs):8.1f} samples/s")
    for name, rates in ours.items():
        ratios = [statistics.median(o[c] / t[c] for t, o in zip(theirs, rates, strict=True)) for c in (0, 1)]
        rate = statistics.median(wall for wall, _ in rates)
        print(f"  {name:10} {rate:8.1f} samples/s   {ratios[0]:.2f} x   cpu {ratios[1]:.2f} x", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", required=True, help="a pool of JPEGs of about 128 px or more")
    parser.add_argument("--peer", required=True, help="python of open_clip's environment")
    parser.add_argument("--model", default="winnow-vit-tiny")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warm", type=int, default=5, help="first steps, which are not counted")
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--side", type=int, default=256, help="px of the images' shorter side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args(argv)
    pairs = read_pool(args.pool, args.rows)
    print_lengths(pairs)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "shards"
        num_bytes = write_data(data, pairs, kind="tiled", side_px=args.side)
        print(f"{args.model}, batch {args.batch}, {args.side} px, {num_bytes / 1000:.0f} kB an image", flush=True)
        compare(data, args)


if __name__ == "__main__":
    sys.exit(main())
