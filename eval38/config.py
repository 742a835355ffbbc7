"""What an evaluation may choose; where model and data lie is said beside it."""

from typing import Literal

from eval38.tasks import find_task, folder_of, own_task
from pipeline.config import config
from pipeline.errors import ConfigError

Precision = Literal["fp32", "bf16"]


@config
class EvalConfig:
    """Choices of one evaluation.  Nothing is random, so there is no seed."""

    tasks: tuple[str, ...] = ()
    """Keys of the task list; empty means every task whose data is there."""
    own: tuple[str, ...] = ()
    """Names of further classification sets, never counted: each a folder wds_<name>_test in the hub's layout, or
    <name> with a folder of images per class."""
    batch_size: int = 256
    """Images per forward."""
    precision: Precision = "fp32"
    """Number format of the forwards (bf16: autocast); vectors, means and cosines are float32 either way."""

    def __post_init__(self) -> None:
        """Raise ConfigError (a ValueError) for an unknown or repeated name or folder, or a batch of nothing."""
        for key in self.tasks:
            find_task(key)
        folders: dict[str, str] = {}
        for name in self.own:
            if not name.strip():
                raise ConfigError(f"own set {name!r} has an empty name.")
            other = folders.setdefault(folder := folder_of(own_task(name)), name)
            if other != name:
                raise ConfigError(f"own sets {other!r} and {name!r} would both be {folder}: rename one.")
        names = self.tasks + self.own
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ConfigError(f"each task is evaluated once, but {repeated} are named more than once.")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size should be at least 1, not {self.batch_size}.")
