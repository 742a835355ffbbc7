"""Kill -9 an evaluation of all 40 tasks again and again, run it again, compare all bytes with an undisturbed one.

    python tests/faults/eval_kills.py --kills 30 --seed 0

Two models are evaluated together, with a feature cache.  A victim is a forked process, so that it works from its first
instant; it is killed a random moment after a random number of the files it writes, or at any time.  Half-written files
in the feature cache stay: another evaluation may be writing there.
"""

import argparse
import logging
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from made_evalsets import make_sets_and_model  # noqa: E402

from eval38.config import EvalConfig  # noqa: E402
from eval38.evaluate import evaluate_models  # noqa: E402
from pipeline.clip_model import open_model  # noqa: E402


def run(models: list[str], data: Path, folder: Path) -> None:
    """Evaluate the models on all sets under `data`."""
    outs = {str(folder / str(n)): model for n, model in enumerate(models)}
    features = str(folder / "features")
    evaluate_models(EvalConfig(batch_size=8), outs, data=str(data), features=features, device="cpu", quiet=True)


def read_all(folder: Path) -> dict[str, bytes]:
    """Return every file under a folder, leftovers of half writes included but for those in the feature cache."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: path.read_bytes()
        for name, path in files.items()
        if not (name.startswith("features/") and path.name.startswith(".tmp-"))
    }


def start(*arguments: object) -> int:
    """Fork a process that runs an evaluation; return its id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run(*arguments)  # type: ignore[arg-type]
            code = 0
        finally:
            os._exit(code)
    return pid


def count_files(folder: Path) -> int:
    """Return how many files there are now, half-written ones included."""
    return sum(len(files) for _, _, files in os.walk(folder))


def kill_once(rng: random.Random, folder: Path, seconds: float, *arguments: object) -> bool:
    """Start an evaluation and kill it; return whether it was still at work."""
    before, wait_for, latest = count_files(folder), rng.randint(1, 40), time.monotonic() + rng.uniform(0, seconds)
    by_files = rng.random() < 0.7
    pid = start(*arguments)
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if count_files(folder) - before >= wait_for if by_files else time.monotonic() >= latest:
            time.sleep(rng.uniform(0, 0.02))
            os.kill(pid, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        time.sleep(0.001)
    return False


def main() -> None:
    """Make sets and models, run undisturbed, then kill, finish and compare until there were enough kills."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # the sets are smaller than the real ones
    torch.set_num_threads(1)  # a fork has no threads of its own to lose
    rng, kills, runs = random.Random(args.seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        models = [make_sets_and_model(root), f"winnow-vit-tiny@{root / 'other.pt'}"]
        torch.save(open_model("winnow-vit-tiny").model.state_dict(), root / "other.pt")
        began = time.monotonic()
        assert os.waitstatus_to_exitcode(os.waitpid(start(models, root / "data", root / "whole"), 0)[1]) == 0
        seconds, wanted = time.monotonic() - began, read_all(root / "whole")
        while kills < args.kills:
            out, of_run = root / f"killed-{runs}", 0
            while kills < args.kills and kill_once(rng, out, seconds, models, root / "data", out):
                kills, of_run = kills + 1, of_run + 1
            assert os.waitstatus_to_exitcode(os.waitpid(start(models, root / "data", out), 0)[1]) == 0
            found = read_all(out)
            different = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
            print(
                f"run {runs}: {of_run} kills, {len(found)} files, {len(different)} differ {different[:5]}", flush=True
            )
            assert not different
            runs += 1
    print(f"{kills} kills in {runs} runs: all {len(wanted)} files are those of the undisturbed run")


if __name__ == "__main__":
    main()
