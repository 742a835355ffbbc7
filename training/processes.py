"""Work on many items -> what it gives, in order, made ahead by forked processes (torch's DataLoader)."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

from pipeline.devices import count_cores
from pipeline.errors import StageError, WinnowError
from training.stopping import ignore_sigterm

T = TypeVar("T")
WORD_SECONDS = 2.0
"""How long torch's word of a process that died is waited for, at most."""
ITEMS_PER_PROCESS = 8
"""Fewer items are not worth a process."""


class _Told(Dataset[Any]):
    """Gives an error that explains itself as an item: the loader would put a traceback around its message."""

    def __init__(self, work: Callable[[int], Any]) -> None:
        self.work = work

    def __getitem__(self, number: int) -> Any:
        try:
            return self.work(number)
        except WinnowError as error:
            return error
        except OSError as error:  # not every kind of it can be sent to another process
            return StageError(f"train: {error}")


def make_ahead(
    work: Callable[[int], T], numbers: Sequence[int], *, num_processes: int, pin: bool = False
) -> Generator[T, None, None]:
    """Return what yields work(number) of each number; the processes are there when this returns.

    `pin` puts tensors in page-locked memory.  What work raises is raised here; StageError says that a process was
    killed.
    """
    loader = DataLoader(
        _Told(work),
        batch_size=None,
        sampler=numbers,
        num_workers=num_processes,
        pin_memory=pin,
        collate_fn=_leave,
        worker_init_fn=ignore_sigterm,
    )
    return _take_made(iter(loader))


def map_in_processes(
    work: Callable[[Any], T], items: Sequence[Any], *, num_processes: int | None = None
) -> Iterator[T]:
    """Return work(item) of each item, in order; by default in as many processes as there are cores, or items for.

    For what reads or computes in Python; a graphics card must not be asked in it.
    """
    wanted = min(count_cores(), len(items) // ITEMS_PER_PROCESS) if num_processes is None else num_processes
    if wanted < 2:
        return map(work, items)
    return make_ahead(partial(_work_on, work, items), range(len(items)), num_processes=wanted)


def _work_on(work: Callable[[Any], T], items: Sequence[Any], number: int) -> T:
    return work(items[number])


def _leave(made: Any) -> Any:
    return made


def _take_made(loader: Iterator[Any]) -> Generator[Any, None, None]:
    try:
        for made in _await_word(loader):
            if isinstance(made, WinnowError):
                raise made
            yield made
    except (RuntimeError, OSError, EOFError) as error:
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
            raise
        raise StageError(
            f"train: a process that reads ahead was lost: {' '.join(str(error).split())} It is mostly main memory or "
            "/dev/shm that is short: lower num_workers or batch_size, and run the same command again to go on."
        ) from error
    finally:
        del loader  # ends the processes: where a traceback holds this frame, Python's exit would wait for them


def _await_word(loader: Iterator[Any]) -> Generator[Any, None, None]:
    """Yield the same.  Where a process died before its item was fetched, torch's signal handler says so in a moment."""
    try:
        yield from loader
    except (OSError, EOFError):
        time.sleep(WORD_SECONDS)  # the signal's RuntimeError ends this
        raise
    finally:
        del loader
