"""What every comparison here does: train and judge models in two processes, and print means over seeds."""

import math
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from eval38.config import EvalConfig
from eval38.evaluate import evaluate
from pipeline.manifest import read_manifest

TASK = "cifar10"
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""97.5 % quantile of Student's t with n - 1 degrees of freedom, by n."""


def judge(model: str, *, eval_data: str, out: Path) -> None:
    """Measure the zero-shot accuracy of a model on CIFAR-10's test images, unless that is done."""
    evaluate(EvalConfig(tasks=(TASK,)), model=model, data=eval_data, out=str(out), device="cpu", quiet=True)


def read_accuracy(out: Path) -> float:
    """Return what `judge` found."""
    made = read_manifest(str(out))
    assert made
    return float(made.facts["tasks"][TASK]["value"])


def in_processes(work: Callable[[Any], None], items: Iterable[Any]) -> None:
    """Do work(item) for every item, two at a time, each with one thread."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as workers:
        for number, _ in enumerate(workers.map(work, items), 1):
            print(f"{number} done", flush=True)


def describe(values: Sequence[float]) -> str:
    """Return `mean +- half of the interval` in per cent."""
    half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{100 * statistics.mean(values):.1f} ± {100 * half:.1f}"
