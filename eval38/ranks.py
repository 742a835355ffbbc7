"""The processes that torchrun started for one evaluation: who this is, and how their shares come together.

A set's rows are cut into batches by their number alone, and batch n goes to process n modulo their number, so a vector
comes from the same batch whoever makes it.  What comes out lies in main memory and goes by gloo.  All processes then
know the same and go the same way; the first alone writes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from pipeline.errors import WinnowError
from training.world import ALONE, World, count_processes

T = TypeVar("T")
TIMEOUT = timedelta(days=1)
"""How long a process waits for the share of another before the evaluation ends with an error."""


@contextmanager
def join_ranks() -> Iterator[World]:
    """Meet the other processes, if torchrun started any, and yield which one this is."""
    if count_processes() == 1:
        yield ALONE
        return
    dist.init_process_group("gloo", timeout=TIMEOUT)
    yield World(dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()  # not after an error: the others see this process end


def is_own(number: int, world: World) -> bool:
    """Return whether the batch of this number is one of this process's."""
    return number % world.size == world.rank


def gather(world: World, work: Callable[[], T]) -> list[T]:
    """Do `work` and return what it gave in each process, by rank.

    If it fails in one process with an error that winnow explains, or an OSError, all raise that error.
    """
    if world.size == 1:
        return [work()]
    made: T | WinnowError | OSError
    try:
        made = work()
    except (WinnowError, OSError) as error:
        made = error
    boxes: list[Any] = [None] * world.size
    dist.all_gather_object(boxes, made, group=world.group)
    for box in boxes:
        if isinstance(box, WinnowError | OSError):
            raise box
    return boxes


def ask_first(world: World, work: Callable[[], T]) -> T:
    """Return in all processes what the first gives; `work` is done there alone."""
    first, *_ = gather(world, lambda: work() if world.is_first else None)
    return first  # type: ignore[return-value]


def do_in_all(world: World, work: Callable[[], T]) -> T:
    """Return what `work` gives in this process, if it fails in none."""
    made: list[T] = []
    gather(world, lambda: made.append(work()))
    return made[0]
