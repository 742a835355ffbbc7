"""What a run starts from: an architecture with fresh weights, or weights that a run directory can bring back."""

from dataclasses import dataclass

from pipeline.clip_model import HUB_PREFIX, OpenedClip, fetch_weights, find_clip, open_model
from pipeline.errors import ConfigError, ModelError
from pipeline.filesystem import find_place
from pipeline.storage import is_folder


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run starts."""

    architecture: str
    """What its weights will be opened as."""
    model: str
    """The model string that opens the weights it starts from."""
    is_fresh: bool
    """Whether these are drawn by the seed."""


def find_start(model: str, init: str | None, *, out: str) -> Start:
    """Return where a run of `model` starts that is written to `out`.

    `init` names weights of the same architecture: a model string, or one of the architecture's open_clip tags.
    Raises ModelError for a start whose result could not be opened again, ConfigError for one that `model` is not of.
    """
    source = find_clip(model)
    if source.architecture.startswith(HUB_PREFIX):
        raise ModelError(
            f"cannot train on from {model!r}: open_clip reads a hub model's weights from the hub only, so the "
            "trained ones could not be opened. Name its architecture, and the hub model as init."
        )
    for name in (model, init):
        if name and is_folder(name) and find_place(name) == find_place(out):
            raise ModelError(f"cannot train {name!r} into itself: name another output folder.")
    if init is None:
        return Start(source.architecture, model, is_fresh=source.weights is None)
    if source.weights is not None:
        raise ConfigError(f"model {model!r} names weights and so does init {init!r}: leave one of them out.")
    return Start(source.architecture, _find_init(source.architecture, init), is_fresh=False)


def _find_init(architecture: str, init: str) -> str:
    """Return the model string of weights for an architecture."""
    is_tag = not ("/" in init or "@" in init or is_folder(init) or init.startswith(HUB_PREFIX))
    model = f"{architecture}/{init}" if is_tag else init
    given = find_clip(model)
    if given.architecture.startswith(HUB_PREFIX):
        return f"{architecture}@{fetch_weights(given)}"
    if given.architecture != architecture:
        raise ConfigError(
            f"init {init!r} is a {given.architecture}, not a {architecture}: train that, or start afresh."
        )
    if given.weights is None:
        raise ConfigError(f"init {init!r} names no weights: leave it out to start afresh.")
    return model


def check_reopens(start: Start, opened: OpenedClip) -> None:
    """Raise ModelError if the weights came with a preprocessing that a run directory would not bring back."""
    if start.is_fresh:
        return
    fresh = open_model(start.architecture)
    if repr(fresh.eval_transform) != repr(opened.eval_transform):
        raise ModelError(
            f"the weights {start.model!r} want another preprocessing than {start.architecture} alone has, and a "
            "run cannot store that. Start from weights with open_clip's default preprocessing."
        )
