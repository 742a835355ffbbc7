"""Save and load weights and unfinished runs.  Files appear whole or not at all, and hold tensors and numbers only.

Everything that a step depends on is in RunState or is a function of (seed, step), so loading one is an exact resume.
"""

import io
import json
import logging
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline.schemas import CHECKPOINT, METRICS, RESUME, RUN_MODEL
from pipeline.storage import exists, join, read_bytes, write_atomic, write_bytes
from training.metrics import cut_metrics

log = logging.getLogger("winnow")


@dataclass(slots=True)
class RunState:
    """A run after `step` steps."""

    model: Any
    optimizer: torch.optim.Optimizer
    is_seen_N: torch.Tensor
    """bool: rows trained on."""
    is_unreadable_N: torch.Tensor
    """bool: rows drawn whose image could not be decoded."""
    step: int = 0
    """Steps done."""
    num_unreadable_draws: int = 0
    losses: list[float] = field(default_factory=list)
    """Of every step done, in nats."""


def save_resume(out: str, state: RunState, *, identity: str) -> None:
    """Write the unfinished run; `identity` is that of the manifest it will have."""
    content = {
        "identity": identity,
        "step": state.step,
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "is_seen": state.is_seen_N,
        "is_unreadable": state.is_unreadable_N,
        "num_unreadable_draws": state.num_unreadable_draws,
        "losses": torch.tensor(state.losses, dtype=torch.float64),
    }
    _save(join(out, RESUME), content)


def load_resume(out: str, state: RunState, *, identity: str) -> bool:
    """Bring `state` to where an unfinished run of the same identity stopped; return False when there is none.

    A leftover of another run, or one that cannot be read, is named in a warning and left out.  Lines of the metrics
    after the resumed step are cut.
    """
    url = join(out, RESUME)
    content = _read_resume(url, identity) if exists(url) else None
    if content is not None:
        state.model.load_state_dict(content["model"])
        state.optimizer.load_state_dict(content["optimizer"])
        state.step, state.num_unreadable_draws = content["step"], content["num_unreadable_draws"]
        state.is_seen_N, state.is_unreadable_N = content["is_seen"], content["is_unreadable"]
        state.losses = content["losses"].tolist()
        log.info("train: going on from step %d of %s", state.step, url)
    cut_metrics(join(out, METRICS), step=state.step)
    return content is not None


def _read_resume(url: str, identity: str) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = torch.load(io.BytesIO(read_bytes(url)), map_location="cpu", weights_only=True)
        found = content["identity"]
    except Exception as error:  # torch.load raises RuntimeError, UnpicklingError, EOFError, ...
        log.warning("train: starting afresh because %s cannot be read: %s", url, error)
        return None
    if found != identity:
        log.warning(
            "train: starting afresh because %s is of another config or data (%.12s, now %.12s)", url, found, identity
        )
        return None
    return content


def save_weights(out: str, model: torch.nn.Module, *, architecture: str) -> None:
    """Write the finished weights, in open_clip's layout, and which architecture they are of."""
    state_dict = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    _save(join(out, CHECKPOINT), {"state_dict": state_dict})
    write_bytes(join(out, RUN_MODEL), (json.dumps({"architecture": architecture}) + "\n").encode())


def _save(url: str, content: dict[str, Any]) -> None:
    with write_atomic(url) as file:
        torch.save(content, file)
