"""Kill -9 at random instants over fit, score, select and shards, run again, compare all bytes with an undisturbed run.

    python tests/faults/kills.py --kills 50 --seed 0

A row of the table is one kind of victim on one kind of Spark:
  worker    a Python process that Spark started to run tasks
  executor  a JVM that runs tasks (in local[2] the only JVM there is, the driver's own)
  driver    the winnow command itself; what it had started may go on for a while beside its successor
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from made_embeddings import draw  # noqa: E402
from toy import COLORS, render, toy_row, write_part  # noqa: E402

from pipeline.clip_model import open_model  # noqa: E402

SCENES = [
    ("local[2]", "worker"),
    ("local[2]", "executor"),
    ("local[2]", "driver"),
    ("local-cluster[2,1,1024]", "worker"),
    ("local-cluster[2,1,1024]", "executor"),
    ("local-cluster[2,1,1024]", "driver"),
]
SIGNS = {"worker": ("pyspark.daemon", "pyspark/daemon"), "executor": ("CoarseGrainedExecutorBackend",)}
NOT_BYTES = {"events.jsonl", "report.html"}
"""Logs of wall times."""
PARTS, ROWS = 6, 30
TRIES = 4
HANG_S = 1800
TURNS = ("fits", "plain", "fits", "plain", "clip")
"""Which recipe runs, scene after scene."""


def make_commands(folder: Path) -> dict[str, list[str]]:
    """Write a pool, a tiny CLIP and three recipes; return the commands by recipe, without --out and --master.

    "clip" scores with the CLIP, whose import takes most of a run's time; "plain" does not; "fits" looks at the pool's
    embeddings.
    """
    for part in range(PARTS):
        rows = [toy_row(n) for n in range(part * ROWS, (part + 1) * ROWS)]
        images = {row["key"]: render(list(COLORS)[n % 4], n) for n, row in enumerate(rows)}
        write_part(folder / "pool", f"{part:08d}", rows, images | {rows[3]["key"]: b"no image"})
        np.savez(folder / "pool" / f"{part:08d}.npz", l14_img=draw(ROWS, seed=part))
    torch.manual_seed(0)
    torch.save(open_model("winnow-vit-tiny").model.state_dict(), folder / "clip.pt")
    commands = {}
    for name, recipe in _make_recipes(folder).items():
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(recipe))
        words = ["run", str(file), "--pool", str(folder / "pool"), "--until", "shards"]
        commands[name] = [sys.executable, "-m", "jobs", *words]
    return commands


def _make_recipes(folder: Path) -> dict[str, dict[str, Any]]:
    clip = {"filter": "clip_score", "name": "clip", "model": f"winnow-vit-tiny@{folder / 'clip.pt'}"}
    fits = {"near": {"kind": "semdedup", "embedding": "l14_img", "clusters": 6, "iterations": 5}}
    dedup = {"filter": "semdedup", "name": "dedup", "fit": "near"}
    return {
        "clip": _make_recipe(clip, "clip_similarity_score"),
        "plain": _make_recipe({"filter": "image_size"}, "image_min_side_px"),
        "fits": _make_recipe(dedup, "dedup_distance") | {"fit": fits},
    }


def _make_recipe(entry: dict[str, str], column: str) -> dict[str, Any]:
    steps = [
        {"name": "words", "where": "caption_words > 2"},
        {"name": "by Spark", "where": "caption_words % 100 <> 99"},
        {"name": "top half", "top": {"by": column, "fraction": 0.5}},
    ]
    return {
        "score": [{"filter": "caption_length"}, entry],
        "subsets": {"all": [], "best": steps},
        "shards": {"rows_per_shard": 20},
    }


def start(command: list[str], out: Path, master: str) -> subprocess.Popen[bytes]:
    """Start the command on `master`; every run has the same number of threads, for sums of floats depend on it."""
    log = out.with_suffix(".log").open("ab")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [*command, "--out", str(out), "--master", master]
    return subprocess.Popen(words, stdout=log, stderr=log, env=environment, cwd=out.parent, start_new_session=True)


def artifacts(out: Path) -> dict[str, bytes]:
    """Return every file; the run's own place, which some name, is cut out."""
    files = (p for p in sorted(out.rglob("*")) if p.is_file() and p.name not in NOT_BYTES)
    return {str(p.relative_to(out)): p.read_bytes().replace(bytes(out), b"OUT") for p in files}


def find_victims(driver: int, master: str, kind: str) -> list[int]:
    """Return the living processes of a kind that the driver started, directly or not."""
    if kind == "driver":
        return [driver]
    signs = ("java",) if kind == "executor" and master.startswith("local[") else SIGNS[kind]
    children: dict[int, list[int]] = {}
    commands: dict[int, str] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            pid, stat = int(entry.name), (entry / "stat").read_text()
            children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(pid)
            commands[pid] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
    family, found = [driver], []
    while family:
        for pid in children.get(family.pop(), []):
            family.append(pid)
            if any(sign in commands.get(pid, "") for sign in signs):
                found.append(pid)
    return found


def strike(process: subprocess.Popen[bytes], master: str, kind: str, at_s: float, chance: random.Random) -> bool:
    """Kill one process of a kind at an instant, or the first moment after it that there is one."""
    time.sleep(at_s)
    while process.poll() is None:
        if victims := find_victims(process.pid, master, kind):
            try:
                os.kill(chance.choice(victims), signal.SIGKILL)
                return True
            except ProcessLookupError:
                continue
        time.sleep(0.05)
    return False


def finish(command: list[str], out: Path, master: str, process: subprocess.Popen[bytes]) -> int:
    """Wait for a run and repeat it until it ends well; return how many more runs that took."""
    for reruns in range(TRIES):
        try:
            if process.wait(timeout=HANG_S) == 0:
                return reruns
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise SystemExit(f"hangs: {out.with_suffix('.log')}") from None
        process = start(command, out, master)
    raise SystemExit(f"does not end well: {out.with_suffix('.log')}")


def run_undisturbed(recipe: str, command: list[str], folder: Path, master: str) -> tuple[dict[str, bytes], float]:
    """Return the files of a run that nothing happened to, and its seconds."""
    begin, out = time.monotonic(), folder / f"undisturbed-{recipe}-{master.split('[')[0]}"
    assert finish(command, out, master, start(command, out, master)) == 0
    seconds = time.monotonic() - begin
    print(f"undisturbed {recipe} on {master}: {seconds:.1f} s", flush=True)
    return artifacts(out), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    tally: dict[tuple[str, str], Counter[str]] = {scene: Counter() for scene in SCENES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        commands = make_commands(folder)
        wanted: dict[str, dict[str, bytes]] = {}
        seconds: dict[tuple[str, str], float] = {}
        number = 0
        while sum(t["kills"] for t in tally.values()) < args.kills:
            master, kind = scene = SCENES[number % len(SCENES)]
            recipe = TURNS[number // len(SCENES) % len(TURNS)]
            number, command = number + 1, commands[recipe]
            out = folder / f"out{number}"
            if (recipe, master) not in seconds:
                undisturbed, seconds[recipe, master] = run_undisturbed(recipe, command, folder, master)
                assert undisturbed == wanted.setdefault(recipe, undisturbed), "the masters differ"
            at_s = chance.uniform(0, seconds[recipe, master])
            process = start(command, out, master)
            killed = strike(process, master, kind, at_s, chance)
            reruns = finish(command, out, master, process)
            same = artifacts(out) == wanted[recipe]
            seen = {"kills": killed, "ended well at once": killed and reruns == 0, "identical": killed and same}
            tally[scene].update({what: int(yes) for what, yes in seen.items()})
            tally[scene]["runs after the kill"] += reruns if killed else 0
            print(
                f"{number:4d} {master:24s} {kind:9s} {at_s:5.1f} s killed={killed} reruns={reruns} {same=}", flush=True
            )
            if not same:
                kept = Path(tempfile.mkdtemp(prefix="winnow-differs-"))
                shutil.copytree(folder, kept, dirs_exist_ok=True)
                raise SystemExit(f"bytes differ: {kept}")
            shutil.rmtree(out)
    columns = ("kills", "ended well at once", "runs after the kill", "identical")
    print(f"\n| Spark | killed | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    for (master, kind), counted in tally.items():
        print(f"| {master} | {kind} | {' | '.join(str(counted[c]) for c in columns)} |")


if __name__ == "__main__":
    main()
