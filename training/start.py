"""What a run starts from: an architecture with fresh weights, or weights that a run directory can bring back.

Weights may be of the same towers at another resolution (ViTamin-L to ViTamin-L-336); position embeddings are resampled.
With a locked text tower, that tower comes from a model of its own (ViTamin's locked-text tuning, arXiv:2404.02132).
"""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.clip_model import (
    BIAS,
    HUB_PREFIX,
    OpenedClip,
    describe_architecture,
    fetch_weights,
    find_clip,
    open_model,
)
from pipeline.errors import ConfigError, ModelError
from pipeline.filesystem import find_place
from pipeline.storage import exists, folder_of, is_folder
from training.checkpoint import SIGLIP_LOGIT_BIAS
from training.config import TrainConfig

log = logging.getLogger("winnow")
SIGLIP_LOG_SCALE = math.log(10)
"""Where SigLIP's logit scale starts (arXiv:2303.15343, section 3.2); CLIP's starts at ln(1 / 0.07)."""
POSITIONS = {"visual.positional_embedding": 1, "visual.trunk.pos_embed": 0}
"""Position embeddings of open_clip's own and of ViTamin's image towers -> how many are of no place in the image."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run starts."""

    architecture: str
    """What its weights will be opened as."""
    model: str
    """The model string that opens the weights it starts from."""
    is_fresh: bool
    """Whether these are drawn by the seed."""


def find_start(model: str, init: str | None, *, out: str, lock_text: str | None = None) -> Start:
    """Return where a run of `model` starts that is written to `out`.

    `init` names weights of the same architecture: a model string, or one of the architecture's open_clip tags.
    Raises ModelError for a start whose result could not be opened again, or that lies in `out` itself, as a locked text
    tower must not either; ConfigError for one that `model` is not of.
    """
    source = find_clip(model)
    if source.brings_config:
        raise ModelError(
            f"cannot train on from {model!r}: open_clip reads a hub model's weights from the hub only, so the "
            "trained ones could not be opened. Name its architecture, and the hub model as init."
        )
    for name in (model, init, lock_text):
        if name and _lies_in(name, out):
            raise ModelError(
                f"cannot train {name!r} into itself: training replaces and deletes the weights in {out!r}, and a rerun "
                "would not find these. Copy them to another folder and name that, or name another --out."
            )
    if init is None:
        return Start(source.architecture, model, is_fresh=source.weights is None)
    if source.weights is not None:
        raise ConfigError(f"model {model!r} names weights and so does init {init!r}: leave one of them out.")
    return Start(source.architecture, _find_init(source.architecture, init), is_fresh=False)


def _lies_in(model: str, out: str) -> bool:
    """Return whether a model string names that folder, or a file in it."""
    path = model.partition("@")[2] or model
    if not exists(path):
        return False
    place = find_place(path)
    return (place if is_folder(path) else folder_of(place)) == find_place(out)


def _find_init(architecture: str, init: str) -> str:
    """Return the model string of weights for an architecture."""
    is_tag = not ("/" in init or "@" in init or is_folder(init) or init.startswith(HUB_PREFIX))
    if "@" not in init and exists(init) and not is_folder(init):
        raise ConfigError(f"init {init!r} is a file, which does not say what it is of: say {architecture}@{init}.")
    model = f"{architecture}/{init}" if is_tag else init
    given = find_clip(model)
    if given.brings_config:
        return f"{architecture}@{fetch_weights(given)}"
    if not _is_resized(given.architecture, architecture):
        raise ConfigError(
            f"init {init!r} is a {given.architecture}, not a {architecture}: train that, or start afresh."
        )
    if given.weights is None:
        raise ConfigError(f"init {init!r} names no weights: leave it out to start afresh.")
    return model


def _is_resized(given: str, wanted: str) -> bool:
    """Return whether two architectures are the same but for the size of images."""
    return given == wanted or _without_size(given) == _without_size(wanted)


def _without_size(architecture: str) -> dict[str, Any]:
    settings = describe_architecture(architecture)
    image = {name: value for name, value in settings["vision_cfg"].items() if name != "image_size"}
    if "timm_model_name" in image:
        image["timm_model_name"] = re.sub(r"_\d+$", "", image["timm_model_name"])
    return settings | {"vision_cfg": image}


def open_start(start: Start, config: TrainConfig, *, device: torch.device) -> OpenedClip:
    """Return the model that a run begins with, in training mode; fresh weights are drawn by the seed.

    Raises ModelError for weights that do not fit, or whose preprocessing a run directory would not bring back.
    """
    settings: dict[str, float] = {}
    if config.loss == "siglip":
        settings = {"init_logit_scale": SIGLIP_LOG_SCALE, "init_logit_bias": SIGLIP_LOGIT_BIAS}
    if config.patch_dropout:
        settings["force_patch_dropout"] = config.patch_dropout
    torch.manual_seed(config.seed)
    if find_clip(start.model).architecture == start.architecture:
        opened = open_model(start.model, device=device, **settings)
        check_reopens(start, opened)
    else:
        opened = open_model(start.architecture, device=device, **settings)
        given = open_model(start.model)
        check_reopens(start, given)
        weights = resize_positions(given.model.state_dict(), opened.model.state_dict())
        if config.loss == "siglip":
            weights.setdefault(BIAS, torch.zeros_like(opened.model.logit_bias))  # as open_clip does
        try:
            opened.model.load_state_dict(weights)
        except RuntimeError as error:
            raise ModelError(
                f"the weights {start.model!r} do not fit {start.architecture}, and only position embeddings can be "
                f"resampled ({' '.join(str(error).split())[:200]}). Start from weights of {start.architecture}."
            ) from error
    check_trainable(opened.model, config)
    if config.lock_text:
        lock_text(opened.model, config.lock_text)
    set_checkpointing(opened.model, config.grad_checkpointing)
    opened.model.train()
    return opened


def begin_siglip(model: Any, config: TrainConfig, *, tell: bool) -> None:
    """Set SigLIP's first scale and bias where the weights brought no bias; open_clip puts 0 there."""
    if config.loss != "siglip" or model.logit_bias.any():
        return
    with torch.no_grad():
        model.logit_scale.fill_(SIGLIP_LOG_SCALE)
        model.logit_bias.fill_(SIGLIP_LOGIT_BIAS)
    if tell:
        log.warning("train: the first weights have no logit bias, so SigLIP's loss begins with scale 10 and bias -10")


def check_trainable(model: Any, config: TrainConfig) -> None:
    """Raise ConfigError for a model of which the losses here would not train all, or a choice that it passes over."""
    if hasattr(model, "text_decoder"):
        raise ConfigError(f"model {config.model!r} is a CoCa, and its captioning loss is not here. Take a CLIP model.")
    dropout = any(type(module).__name__.startswith("PatchDropout") for module in model.visual.modules())
    if config.patch_dropout and not dropout:
        raise ConfigError(f"model {config.model!r} has no patches to drop: leave patch_dropout out.")


def resize_positions(given: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return weights with position embeddings resampled (bicubic, antialiased) to the grid of `wanted`."""
    from timm.layers import resample_abs_pos_embed

    resized = dict(given)
    for name, num_prefix in POSITIONS.items():
        if name not in given or given[name].shape == wanted[name].shape:
            continue
        table_1ND = given[name].reshape(1, *given[name].shape[-2:])
        side = math.isqrt(wanted[name].shape[-2] - num_prefix)
        table_1ND = resample_abs_pos_embed(table_1ND, [side, side], num_prefix_tokens=num_prefix)
        resized[name] = table_1ND.reshape(wanted[name].shape)
    return resized


def lock_text(model: Any, source: str) -> None:
    """Give a model the text tower of another and freeze it.  Raises ModelError when it is built otherwise."""
    if find_clip(source).weights is None and not find_clip(source).brings_config:
        raise ConfigError(f"lock_text {source!r} names no weights: a frozen text tower must be a trained one.")
    given = open_model(source)
    theirs = {_text_name(name): tensor for name, tensor in given.model.state_dict().items()}
    state = model.state_dict()
    for name, tensor in state.items():
        if name.startswith(NOT_TEXT):
            continue
        other = theirs.get(_text_name(name))
        if other is None or other.shape != tensor.shape:
            found = "none" if other is None else tuple(other.shape)
            raise ModelError(
                f"lock_text {source!r}: its text tower is another than the model's: {name} is {found}, "
                f"not {tuple(tensor.shape)}. Take an architecture with that text tower (ViTamin-S-LTT has ViTamin-L's)."
            )
        state[name] = other
    model.load_state_dict(state)
    token_BL = given.tokenize(["a photo of a cat"])
    ours_BD = model.encode_text(token_BL.to(model.logit_scale.device), normalize=True).cpu()
    if not torch.allclose(ours_BD, given.model.encode_text(token_BL, normalize=True), atol=1e-2):
        raise ModelError(
            f"lock_text {source!r}: its text tower has the model's shapes but computes something else with them (other "
            "heads, pooling or activation, such as -quickgelu). Take an architecture with that text tower."
        )
    for name, parameter in model.named_parameters():  # open_clip's lock leaves a transformers tower's projection
        parameter.requires_grad_(name.startswith(NOT_TEXT))


NOT_TEXT = ("visual.", "logit_")


def _text_name(name: str) -> str:
    """Return a parameter's name without the prefix that some of open_clip's classes give the text tower."""
    return name.removeprefix("text.")


def set_checkpointing(model: Any, which: str) -> None:
    """Let blocks compute their activations again in the backward pass: none, all, or ViTamin's conv stages (conv).

    Raises ConfigError for an image tower that cannot, or for conv stages where there are none.
    """
    if which == "all":
        model.set_grad_checkpointing()
        if not any(getattr(module, "grad_checkpointing", False) for module in model.visual.modules()):
            raise ConfigError("grad_checkpointing all: the model's image tower has none. Leave it out.")
    elif which == "conv":
        stages: Any = getattr(getattr(getattr(model.visual, "trunk", None), "patch_embed", None), "backbone", None)
        if not hasattr(stages, "grad_checkpointing"):
            raise ConfigError("grad_checkpointing conv is for ViTamin, whose conv stages it means: say all, or none.")
        stages.grad_checkpointing = True


def check_reopens(start: Start, opened: OpenedClip) -> None:
    """Raise ModelError if the weights came with a preprocessing that a run directory would not bring back."""
    if start.is_fresh:
        return
    fresh = open_model(find_clip(start.model).architecture)
    if repr(fresh.eval_transform) != repr(opened.eval_transform):
        raise ModelError(
            f"the weights {start.model!r} want another preprocessing than {start.architecture} alone has, and a "
            "run cannot store that. Start from weights with open_clip's default preprocessing."
        )
