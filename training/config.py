"""TrainConfig: the choices of one training run.  A recipe's `train:` block is read into it."""

import math
from typing import Any, Literal

from pipeline.config import as_mapping, config
from pipeline.errors import ConfigError, check_name

PRECISIONS = ("fp32", "bf16")
FREE_FIELDS = ("num_workers", "checkpoint_every_steps", "log_every_steps")
"""Fields that change how a run goes but not the weights it ends with; no part of its identity."""


@config
class TrainConfig:
    """Defaults suit winnow's tiny models and tens of thousands of samples on a CPU; DataComp's scales set their own.

    Of batches of 64 and 128 and rates of 5e-4 to 2e-3, these gave the best zero-shot CIFAR-10 after 30,016 samples.
    """

    model: str
    """Model string as pipeline/clip_model.py describes; weights it names are where training starts."""
    samples: int
    """Samples seen (rows, repeats counted), exact; a multiple of batch_size."""
    batch_size: int = 64
    """Rows per step."""
    learning_rate: float = 5e-4
    """Peak, after warmup; cosine to 0 from there."""
    beta1: float = 0.9
    """AdamW: decay of the mean gradient."""
    beta2: float = 0.98
    """AdamW: decay of the mean squared gradient."""
    eps: float = 1e-6
    """AdamW: added to the denominator."""
    weight_decay: float = 0.2
    """On matrices only: see optim.py."""
    warmup_steps: int = 40
    """Steps over which the learning rate rises linearly; at least the run's steps means it never falls."""
    grad_clip_norm: float | None = None
    """Greatest total gradient norm; null leaves gradients alone."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is autocast: weights and optimiser stay float32."""
    seed: int = 0
    """Decides fresh weights, the order of rows, crops and dropout."""
    num_workers: int = 0
    """Loader processes; 0 loads in a thread.  Batches are the same."""
    checkpoint_every_steps: int = 500
    """Steps between saves of the unfinished run, the most a kill can cost."""
    log_every_steps: int = 10
    """Steps between lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        check_name(self.precision, PRECISIONS, kind="precision")
        for name in ("samples", "batch_size", "checkpoint_every_steps", "log_every_steps"):
            _check_range(name, getattr(self, name), low=1)
        for name in ("weight_decay", "warmup_steps", "seed", "num_workers"):
            _check_range(name, getattr(self, name), low=0)
        for name in ("learning_rate", "eps", "grad_clip_norm"):
            _check_range(name, getattr(self, name), low=math.ulp(0.0))
        for name in ("beta1", "beta2"):
            _check_range(name, getattr(self, name), low=0, below=1)
        _check_range("seed", self.seed, low=0, below=2**63)
        _check_budget(self.samples, self.batch_size)

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the run."""
        return self.samples // self.batch_size


def _check_range(name: str, value: float | None, *, low: float, below: float = math.inf) -> None:
    if value is None or low <= value < below:
        return
    bounds = "above 0" if 0 < low < 1 else f"at least {low}"
    raise ConfigError(f"{name} is {value}; it must be {bounds}{'' if below == math.inf else f' and below {below}'}.")


def _check_budget(samples: int, batch_size: int) -> None:
    if batch_size < 2:
        raise ConfigError(f"batch_size is {batch_size}; a contrastive batch needs at least 2 rows.")
    if samples % batch_size:
        less, more = samples // batch_size * batch_size, -(-samples // batch_size) * batch_size
        near = f"{less} or {more}" if less else str(more)
        raise ConfigError(f"samples {samples} is not a multiple of batch_size {batch_size}: take {near}.")


def describe_choices(config: TrainConfig) -> dict[str, Any]:
    """Return the fields that decide the weights, ready for a manifest."""
    return {name: value for name, value in as_mapping(config).items() if name not in FREE_FIELDS}
