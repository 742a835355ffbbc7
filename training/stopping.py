"""SIGTERM, looked at between steps, and a loss that is back where guessing is, which is warned of."""

import math
import signal
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch

from training.config import TrainConfig
from training.world import ALONE, World

T = TypeVar("T")
WINDOW_STEPS = 50
"""Steps whose mean loss is looked at."""
LEARNED, GUESSING = 0.75, 0.99
"""Shares of the guessing loss: a model at or below the first has learned, one above the second knows nothing."""


@contextmanager
def watch_sigterm() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM sets; what SIGTERM did before comes back afterwards.

    Outside the main thread Python takes no signal handlers, so there the event is never set.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before: Any = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def ignore_sigterm(_: int) -> None:
    """Leave SIGTERM to the process that trains: schedulers send it to that one's loader processes as well."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def take_until(asked: threading.Event, items: Iterable[T], world: World = ALONE) -> Generator[T, None, None]:
    """Yield items until the event is set; loader processes that the same signal ended are no error then.

    Of several processes all stop after the same item, when any was asked; one whose loader died cannot wait for that.
    """
    try:
        for item in items:
            yield item
            if world.any(torch.tensor([asked.is_set()])):
                return
    except RuntimeError:
        if world.size > 1 or not asked.is_set():
            raise


def find_collapse(losses: Sequence[float], config: TrainConfig) -> int | None:
    """Return the last step at which a model had learned that guesses now, None if it does not; steps count from 1.

    Both by the mean loss of WINDOW_STEPS steps.  One that never learned is not told from one that is slow.
    """
    if len(losses) < 2 * WINDOW_STEPS:
        return None
    sum_N = np.cumsum([0.0, *losses])
    share_N = (sum_N[WINDOW_STEPS:] - sum_N[:-WINDOW_STEPS]) / WINDOW_STEPS / guessing_loss(config)
    learned = np.flatnonzero(share_N <= LEARNED)
    return int(learned[-1]) + WINDOW_STEPS if len(learned) and share_N[-1] > GUESSING else None


def guessing_loss(config: TrainConfig) -> float:
    """Return the loss, in nats, of a model whose features tell nothing: ln B, or B times the entropy of 1 pair in B."""
    num = config.batch_size
    return math.log(num) + ((num - 1) * math.log(num / (num - 1)) if config.loss == "siglip" else 0.0)
