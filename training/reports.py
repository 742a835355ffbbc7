"""Lines of metrics.jsonl and zeroshot.jsonl -> TensorBoard (OUT/tensorboard) and Weights & Biases, as the config says.

Event files hold times and hosts, so they are part of no manifest.  A run that goes on from a save takes back what was
shown of later steps (TensorBoard's purge_step; W&B keeps the first of two equal steps), so the curves do not overlap.
An event file on an object store is REMOTE_SECONDS behind, so a kill may leave a gap of that in a curve there.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.schemas import TENSORBOARD_FOLDER
from pipeline.storage import is_local, join, list_folder, name_of, write_bytes
from training.metrics import REMOTE_SECONDS, Report

AXES = ("step", "samples")


def check_reports(names: Sequence[str]) -> None:
    """Raise ConfigError for a report that is not installed."""
    if "wandb" in names:
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise ConfigError("report_to wandb needs it: pip install wandb, or leave it out.") from None


def sign_in(names: Sequence[str]) -> None:
    """Raise ConfigError where W&B has no key, which takes long to be noticed otherwise."""
    if "wandb" in names:
        import wandb

        with _explained():
            wandb.login()


@contextmanager
def _explained() -> Iterator[None]:
    import wandb

    try:
        yield
    except wandb.Error as error:
        raise ConfigError(f"report_to wandb: {error} Or set WANDB_MODE=offline, or leave it out.") from None


@contextmanager
def open_reports(names: Sequence[str], out: str, *, step: int, identity: str) -> Iterator[list[Report]]:
    """Yield one function per name, for a run that goes on after that step; on leaving all is written."""
    with ExitStack() as stack:
        yield [stack.enter_context(OPENERS[name](out, step, identity)) for name in names]


@contextmanager
def _open_tensorboard(out: str, step: int, identity: str) -> Iterator[Report]:
    from torch.utils.tensorboard import SummaryWriter

    folder, uploaded = join(out, TENSORBOARD_FOLDER), -math.inf
    with tempfile.TemporaryDirectory() as own:
        written = folder if is_local(folder) else own
        writer = SummaryWriter(written, purge_step=step + 1 if step else None)

        def upload() -> None:
            for file in list_folder(own):  # empty if written in place; an object store cannot append
                write_bytes(join(folder, name_of(file)), Path(file).read_bytes())

        def report(values: dict[str, Any]) -> None:
            nonlocal uploaded
            for name, value in values.items():
                if name not in AXES and value is not None:
                    writer.add_scalar(name, value, values["step"])
            writer.flush()
            if time.perf_counter() - uploaded >= REMOTE_SECONDS:
                upload()
                uploaded = time.perf_counter()

        try:
            yield report
        finally:
            writer.close()
            upload()


@contextmanager
def _open_wandb(out: str, step: int, identity: str) -> Iterator[Report]:
    import wandb

    with _explained():
        run = wandb.init(project="winnow", name=name_of(out), id=identity[:16], resume="allow")

    def report(values: dict[str, Any]) -> None:
        run.log({name: value for name, value in values.items() if value is not None}, step=values["step"])

    try:
        yield report
    finally:
        run.finish()


Opener = Callable[[str, int, str], AbstractContextManager[Report]]
OPENERS: dict[str, Opener] = {"tensorboard": _open_tensorboard, "wandb": _open_wandb}
