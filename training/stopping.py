"""SIGTERM, as a scheduler sends it before it ends a job -> a flag that the training loop looks at between steps."""

import signal
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from training.world import ALONE, World

T = TypeVar("T")


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
