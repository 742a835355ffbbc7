"""Lines of metrics.jsonl -> TensorBoard (in OUT/tensorboard) or Weights & Biases, where the config asks for them.

After a kill TensorBoard shows the steps done again once, and W&B goes on with the same run.
"""

from collections.abc import Callable, Sequence
from typing import Any

from pipeline.errors import ConfigError
from pipeline.storage import is_local, join, name_of
from training.metrics import Report

AXES = ("step", "samples")


def open_reports(names: Sequence[str], out: str, *, step: int, identity: str) -> list[Report]:
    """Return one function per name.  Raises ConfigError for one that is not installed."""
    return [OPENERS[name](out, step, identity) for name in names]


def _open_tensorboard(out: str, step: int, identity: str) -> Report:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError("report_to tensorboard needs it: pip install tensorboard, or leave it out.") from None
    if not is_local(out):
        raise ConfigError(f"report_to tensorboard writes to local folders only, and the run is in {out}.")
    writer = SummaryWriter(join(out, "tensorboard"), purge_step=step + 1)

    def report(values: dict[str, Any]) -> None:
        for name, value in values.items():
            if name not in AXES and value is not None:
                writer.add_scalar(name, value, values["step"])
        writer.flush()

    return report


def _open_wandb(out: str, step: int, identity: str) -> Report:
    try:
        import wandb
    except ImportError:
        raise ConfigError("report_to wandb needs it: pip install wandb, or leave it out.") from None
    run = wandb.init(project="winnow", name=name_of(out), id=identity[:16], resume="allow")

    def report(values: dict[str, Any]) -> None:
        run.log({name: value for name, value in values.items() if value is not None}, step=values["step"])

    return report


OPENERS: dict[str, Callable[[str, int, str], Report]] = {"tensorboard": _open_tensorboard, "wandb": _open_wandb}
