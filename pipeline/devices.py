"""Who may use what: the device and the number of threads of one task, so that tasks share a machine on purpose.

A seat is what a task is given.  On one machine winnow deals the seats itself: with GPUs there are as many tasks as
GPUs x tasks per GPU, each with one GPU for the whole of its life, else one task per core of `local[N]`.  On a cluster
Spark deals them: GPU addresses and cores come from the task's resources.
"""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import ConfigError, StageError

CPU = "cpu"
DECODE_THREADS = "WINNOW_DECODE_THREADS"
"""Environment variable: threads that prepare rows in one task, where its share of the cores is not the right number."""
VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class Seat:
    """What one task may use."""

    device: str
    """torch device: cpu, cuda:0, ..."""
    threads: int
    """Threads that prepare rows beside the one that runs the model."""


_TAKEN: list[Seat] = []
"""The seat of the task that this process runs; empty outside Spark."""


def take_seat(seat: Seat) -> None:
    """Make a seat this process's own: models open on its device.

    A model on the CPU runs in one thread, always: the floats of a small batch depend on how many there are.
    """
    _TAKEN[:] = [seat]
    os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it when it is imported
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def find_seat() -> Seat | None:
    """Return the seat of this process's task, None outside Spark."""
    return _TAKEN[0] if _TAKEN else None


def count_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_gpus() -> int:
    """Return how many GPUs torch sees here; none is opened."""
    import torch

    return torch.cuda.device_count()


def count_threads(cores: int, num_tasks: int) -> int:
    """Return the decoding threads of one of `num_tasks` tasks that share the cores: at least one.

    WINNOW_DECODE_THREADS overrides it; raises ConfigError when that is no whole number above 0.
    """
    said = os.environ.get(DECODE_THREADS)
    if said is None:
        return max(1, cores // max(1, num_tasks))
    if not said.isdigit() or int(said) < 1:
        raise ConfigError(f"{DECODE_THREADS}={said!r} is not a number of threads; give 1 or more, or unset it.")
    return int(said)


def deal_seats(num_gpus: int, tasks_per_gpu: int, *, cores: int, most: int) -> list[Seat]:
    """Return the seats of one machine's GPUs, `most` of them, neighbours on different GPUs; none without GPUs.

    Raises ConfigError for fewer than one task per GPU.
    """
    if tasks_per_gpu < 1:
        raise ConfigError(f"tasks per GPU: {tasks_per_gpu} is below 1; 1 gives each task a GPU of its own.")
    num_seats = min(most, num_gpus * tasks_per_gpu)
    return [Seat(f"cuda:{n % num_gpus}", count_threads(cores, num_seats)) for n in range(num_seats)]


def name_device(addresses: Sequence[str], visible: str | None) -> str:
    """Return the torch device of the first GPU address that Spark gave a task, cpu when it gave none.

    Addresses number the GPUs of the machine, as Spark's own discovery script reports them; where `visible`
    (CUDA_VISIBLE_DEVICES) is set, torch numbers only those.  Raises StageError for an address that torch cannot open.
    """
    if not addresses:
        return CPU
    address = addresses[0]
    known = [name.strip() for name in visible.split(",")] if visible else None
    if known is not None and address in known:
        return f"cuda:{known.index(address)}"
    if known is not None or not re.fullmatch(r"\d+", address):
        raise StageError(
            f"Spark gave this task GPU {address!r}, which is none of {VISIBLE_DEVICES}={visible!r}. "
            "Let the discovery script report the indices of nvidia-smi, or the names in that variable."
        )
    return f"cuda:{address}"
