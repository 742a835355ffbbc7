"""metrics.jsonl: one JSON line per logged step, in step order, no step twice however often the run was killed.

zeroshot.jsonl is written and cut by the same functions.
"""

import json
import math
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline.storage import exists, is_local, read_bytes, remove, write_bytes

T = TypeVar("T")
Report = Callable[[dict[str, Any]], None]
"""Takes the values of a line to where else they are shown."""
REMOTE_SECONDS = 60.0
"""Least time between two writes of a growing file on an object store, as each writes all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """What one line says."""

    step: int
    """Steps done, this one included."""
    samples: int
    """Samples seen so far."""
    loss: float
    """Of this step's batch, in nats."""
    learning_rate: float
    """Used in this step."""
    logit_scale: float
    """Factor on the cosines after this step, 1 to 100."""
    grad_norm: float | None
    """Total norm of all gradients, before clipping; null where fp16 overflowed and the step was passed over."""
    samples_per_s: float
    """Since the line before, as are the next three."""
    data_wait: float
    """Share of the time in which the step waited for its batch."""
    tflop_per_s: float | None
    """Useful work of the model, in 10^12 floating-point operations a second; null where it cannot be counted."""
    mfu: float | None
    """That over the device's peak in bf16; null for a CPU or an unknown GPU."""


class MetricsLog:
    """Appends lines for one process's part of a run, and measures the rate between them.

    On an object store lines wait up to REMOTE_SECONDS; before a save they are flushed, so no kill leaves any out.
    """

    def __init__(
        self,
        url: str,
        *,
        step: int,
        batch_size: int,
        flops: float | None = None,
        peak: float | None = None,
        reports: Sequence[Report] = (),
    ) -> None:
        """`flops` is the work of a sample; `peak` what the device could do, in FLOP/s."""
        self.url, self.batch_size, self.flops, self.peak, self.reports = url, batch_size, flops, peak, reports
        self._step, self._time, self._waited = step, time.perf_counter(), 0.0
        self._lines: list[dict[str, Any]] = []
        self._flushed = -math.inf

    def time_waits(self, batches: Iterable[T]) -> Generator[T, None, None]:
        """Yield the same batches, adding up how long each was waited for."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - start
            yield batch

    def write(
        self,
        *,
        step: int,
        loss: float,
        learning_rate: float,
        logit_scale: float,
        grad_norm: float,
    ) -> None:
        """Append the line of a step."""
        now = time.perf_counter()
        rate, wait = (step - self._step) * self.batch_size / (now - self._time), self._waited / (now - self._time)
        self._step, self._time, self._waited = step, now, 0.0
        line = Metrics(
            step=step,
            samples=step * self.batch_size,
            loss=loss,
            learning_rate=learning_rate,
            logit_scale=logit_scale,
            grad_norm=grad_norm if math.isfinite(grad_norm) else None,
            samples_per_s=round(rate, 1),
            data_wait=round(wait, 3),
            tflop_per_s=None if self.flops is None else round(rate * self.flops / 1e12, 3),
            mfu=None if self.flops is None or self.peak is None else round(rate * self.flops / self.peak, 4),
        )
        self._lines.append(asdict(line))
        if is_local(self.url) or now - self._flushed >= REMOTE_SECONDS:
            self.flush()
        self.show(asdict(line))

    def flush(self) -> None:
        """Write the lines that wait."""
        if self._lines:
            append_lines(self.url, self._lines)
            self._lines, self._flushed = [], time.perf_counter()

    def show(self, values: dict[str, Any]) -> None:
        """Take values with their `step` to where else they are shown."""
        for report in self.reports:
            report(values)

    def leave_out(self, seconds: float) -> None:
        """Do not count time just spent on something else than training in the next line's rates."""
        self._time += seconds


def append_lines(url: str, lines: Sequence[dict[str, Any]]) -> None:
    """Add lines to a file; an object store cannot, so there the file is written again."""
    content = "".join(json.dumps(values) + "\n" for values in lines).encode()
    if not is_local(url):
        write_bytes(url, (read_bytes(url) if exists(url) else b"") + content)
        return
    Path(url).parent.mkdir(parents=True, exist_ok=True)
    with Path(url).open("ab") as file:
        file.write(content)


def cut_lines(url: str, *, step: int) -> None:
    """Leave only whole lines of steps up to `step`, as a killed run may have gone further than its last save.

    A last line that lacks only its end gets it.  A file of which nothing is left is deleted.
    """
    lines = _read_lines(url)
    kept = [line for line in lines if _step_of(line) <= step]
    if kept:
        write_bytes(url, b"".join(line + b"\n" for line in kept))
    else:
        remove(url)


def last_step(url: str) -> int:
    """Return the step of the last line, 0 when there is none."""
    lines = _read_lines(url)
    return int(_step_of(lines[-1])) if lines else 0


def _read_lines(url: str) -> list[bytes]:
    return read_bytes(url).splitlines() if exists(url) else []


def _step_of(line: bytes) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
