"""metrics.jsonl: one JSON line per logged step, in step order, no step twice however often the run was killed."""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.errors import StageError
from pipeline.storage import exists, is_local, read_bytes, write_bytes


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
    grad_norm: float
    """Total norm of all gradients, before clipping."""
    samples_per_s: float
    """Since the line before."""


class MetricsLog:
    """Appends lines for one process's part of a run, and measures the rate between them."""

    def __init__(self, url: str, *, step: int, batch_size: int) -> None:
        self.url, self.batch_size = url, batch_size
        self._step, self._time = step, time.perf_counter()

    def write(self, *, step: int, loss: float, learning_rate: float, logit_scale: float, grad_norm: float) -> None:
        """Append the line of a step.  Raises StageError if the gradient is not finite, as the weights then are lost."""
        if not math.isfinite(grad_norm):
            raise StageError(f"train: the gradient became {grad_norm} at step {step}. Lower learning_rate.")
        now = time.perf_counter()
        rate = (step - self._step) * self.batch_size / (now - self._time)
        self._step, self._time = step, now
        line = Metrics(
            step=step,
            samples=step * self.batch_size,
            loss=loss,
            learning_rate=learning_rate,
            logit_scale=logit_scale,
            grad_norm=grad_norm,
            samples_per_s=round(rate, 1),
        )
        _append(self.url, (json.dumps(asdict(line)) + "\n").encode())


def _append(url: str, content: bytes) -> None:
    """Add to a file; an object store cannot, so there the file is written again."""
    if not is_local(url):
        write_bytes(url, (read_bytes(url) if exists(url) else b"") + content)
        return
    Path(url).parent.mkdir(parents=True, exist_ok=True)
    with Path(url).open("ab") as file:
        file.write(content)


def cut_metrics(url: str, *, step: int) -> None:
    """Leave only whole lines of steps up to `step`, as a killed run may have gone further than its last save."""
    if exists(url):
        kept = [line for line in read_bytes(url).splitlines(keepends=True) if _step_of(line) <= step]
        write_bytes(url, b"".join(kept))


def _step_of(line: bytes) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
