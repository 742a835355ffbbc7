"""The processes of one run, as torchrun starts them: RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* in the environment.

Without these a run is alone, and everything here gives back what it was given.  Features and gradients go by NCCL
between GPUs, else by gloo; what the processes agree on, such as a save to go on from, goes by a second group of gloo
between their main memories, whose waits may be long, as the first process alone reads the tars.
B rows in this process's part of the batch, G in all parts, D dims.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import ConfigError
from training.config import TrainConfig

T = TypeVar("T")
STEP_TIMEOUT = timedelta(minutes=30)
"""How long a process waits for another's features or gradients before the run ends with an error."""
START_TIMEOUT = timedelta(days=1)
"""How long the others wait while the first reads the tars."""


@dataclass(frozen=True, slots=True)
class World:
    """Which of how many processes this is."""

    rank: int = 0
    """The first is 0; it alone writes."""
    size: int = 1
    group: Any = None
    """What the processes agree through; None if there is but one."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run directory."""
        return self.rank == 0

    def share(self, value: T) -> T:
        """Return the first process's value in all of them, when all have come here."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def check_same(self, choices: Mapping[str, Any]) -> None:
        """Raise ConfigError in every process if one was started with other choices, after all have come here."""
        if self.size == 1:
            return
        boxes: list[Any] = [None] * self.size
        dist.all_gather_object(boxes, dict(choices), group=self.group)
        for rank, found in enumerate(boxes):
            for name, value in boxes[0].items():
                if found[name] != value:
                    raise ConfigError(
                        f"process {rank} was started with {name} {found[name]!r:.200}, the first with {value!r:.200}. "
                        "Start all with the same command."
                    )

    def add(self, value_N: Tensor) -> Tensor:
        """Return the sum over all processes of a tensor in main memory, the same in each."""
        return self._reduce(value_N, dist.ReduceOp.SUM)

    def any(self, flag_N: Tensor) -> Tensor:
        """Return which flags, a bool tensor in main memory, are set in any process."""
        return self._reduce(flag_N.to(torch.uint8), dist.ReduceOp.MAX).bool() if self.size > 1 else flag_N

    def _reduce(self, value_N: Tensor, operation: Any) -> Tensor:
        if self.size == 1:
            return value_N
        reduced_N = value_N.clone()
        dist.all_reduce(reduced_N, op=operation, group=self.group)
        return reduced_N

    def gather_rows(self, rows_BD: Tensor) -> Tensor:
        """Return (G, D): the rows of all processes in the order of their ranks.

        The gradient of a row is the sum over all processes of what their losses give it: open_clip's gather_with_grad.
        """
        return rows_BD if self.size == 1 else _GatherRows.apply(rows_BD, self.size)


ALONE = World()


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_BD: Tensor, size: int) -> Tensor:
        all_GD = rows_BD.new_empty(size * len(rows_BD), *rows_BD.shape[1:])
        dist.all_gather_into_tensor(all_GD, rows_BD.contiguous())
        ctx.size = size
        return all_GD

    @staticmethod
    def backward(ctx: Any, gradient_GD: Tensor) -> tuple[Tensor, None]:
        own_BD = gradient_GD.new_empty(len(gradient_GD) // ctx.size, *gradient_GD.shape[1:])
        dist.reduce_scatter_tensor(own_BD, gradient_GD.contiguous())
        return own_BD, None


@contextmanager
def join_world(config: TrainConfig, device: torch.device) -> Iterator[World]:
    """Meet the other processes, if torchrun started any, and yield which one this is.

    Raises ConfigError for a batch that does not divide into equal parts, or an environment that contradicts itself.
    """
    size = count_processes()
    if size == 1:
        yield ALONE
        return
    check_parts(config, size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=STEP_TIMEOUT)
    yield World(dist.get_rank(), size, dist.new_group(backend="gloo", timeout=START_TIMEOUT))
    dist.destroy_process_group()  # not after an error: the others may still wait for this process, and see it end


def count_processes() -> int:
    """Return WORLD_SIZE, 1 where it is not set.

    Raises ConfigError if it is no number of processes, or what these need to meet is missing.
    """
    size, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if size != "1" and name not in os.environ]
    if missing or not (size.isdecimal() and rank.isdecimal() and int(rank) < int(size)):
        raise ConfigError(
            f"WORLD_SIZE is {size} and RANK {rank}{f', and {missing[0]} is not set' if missing else ''}: several "
            "processes are best started by torchrun, which sets all of these; to run in one, unset WORLD_SIZE."
        )
    return int(size)


def check_parts(config: TrainConfig, size: int) -> None:
    """Raise ConfigError for a batch that this many processes cannot share equally."""
    parts = size * config.accum_freq
    if config.batch_size % parts:
        over = f"{size} processes" + (f" of accum_freq {config.accum_freq}" if config.accum_freq > 1 else "")
        less, more = config.batch_size // parts * parts, -(-config.batch_size // parts) * parts
        near = f"{less} or {more}" if less else str(more)
        raise ConfigError(
            f"batch_size {config.batch_size} is that of all processes together and does not divide over {over}: "
            f"take {near}, or another --nproc-per-node."
        )


def is_first() -> bool:
    """Return whether this is the process that prints what came out, also after the others have parted."""
    return os.environ.get("RANK", "0") == "0"


def place_rank(device: str) -> str:
    """Return the device of this process: torchrun's LOCAL_RANK counts a machine's GPUs.

    Raises ConfigError if one GPU is named for several processes.
    """
    if not device.startswith("cuda") or count_processes() == 1:
        return device
    if ":" in device:
        raise ConfigError(f"device {device} is one for several processes: say cuda, and each takes its own.")
    return f"{device}:{os.environ.get('LOCAL_RANK', '0')}"
