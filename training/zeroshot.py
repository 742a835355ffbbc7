"""A model measured on tasks while it trains: zeroshot.jsonl, one line a point, no point twice or left out by a kill.

    {"step": 100, "samples": 6400, "seconds": 3.2, "tasks": {"cifar10": 0.2311, ...}}

Who evaluates is handed in, as training imports no evaluation (jobs/zeroshot.py).  A point that is due after a step is
measured before the next one, so a run that was stopped in between measures it when it goes on.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from pipeline.clip_model import OpenedClip
from pipeline.errors import ConfigError
from training.config import TrainConfig
from training.metrics import MetricsLog, append_lines, last_step
from training.world import World

Measure = Callable[[OpenedClip], Mapping[str, float | None]]
"""A model in eval mode -> the main metric of each task, in [0, 1]; None where a task could not be evaluated."""


def check_measure(config: TrainConfig, measure: Measure | None) -> None:
    """Raise ConfigError when the config names tasks and nobody was handed in who evaluates them."""
    if config.zeroshot and not measure:
        raise ConfigError(
            f"zeroshot names {[*config.zeroshot.tasks, *config.zeroshot.own]}, but train() got nothing that evaluates "
            "them: pass measure=jobs.zeroshot.open_zeroshot(config, EVAL_DATA), or leave zeroshot out."
        )


def is_due(config: TrainConfig, step: int) -> bool:
    """Return whether there is a point after that many steps."""
    if config.zeroshot is None or step == 0:
        return False
    every, seen = config.zeroshot.every_samples, step * config.batch_size
    return step == config.num_steps or seen // every > (seen - config.batch_size) // every


class ZeroshotLog:
    """Measures one run's model and appends the lines; of several processes the first does, and the others wait."""

    def __init__(
        self, url: str, *, opened: OpenedClip, measure: Measure | None, metrics: MetricsLog, quiet: bool
    ) -> None:
        """`metrics` does not count the time in its rates, and shows the values where it shows its own."""
        self.url, self.opened, self.measure, self.metrics, self.quiet = url, opened, measure, metrics, quiet
        self.last = last_step(url)

    def write(self, step: int, world: World) -> None:
        """Measure the point after a step, unless the file has it; all processes come here together."""
        if world.is_first and step > self.last:
            self._write(step)
        world.share(None)  # by the group whose waits may be long

    def _write(self, step: int) -> None:
        assert self.measure  # check_measure has seen to it
        start = time.perf_counter()
        with at_rest(self.opened.model):
            tasks = dict(self.measure(self.opened))
        seconds = time.perf_counter() - start
        self.metrics.leave_out(seconds)
        counted = {"step": step, "samples": step * self.metrics.batch_size}
        append_lines(self.url, [{**counted, "seconds": round(seconds, 2), "tasks": tasks}])
        self.last = step
        self.metrics.show(counted | {f"zeroshot/{name}": value for name, value in tasks.items()})
        if not self.quiet:
            said = ", ".join(f"{name} {'failed' if v is None else f'{100 * v:.1f} %'}" for name, v in tasks.items())
            tqdm.write(f"zero-shot after {counted['samples']:,} samples: {said} ({seconds:.1f} s)", file=sys.stderr)


@contextmanager
def at_rest(model: Any) -> Iterator[None]:
    """Put a model into eval mode; afterwards each module is in its mode of before, and so are random numbers."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:  # parents before children; train() also empties caches that eval() filled
                module.train(mode)
