"""One door to open_clip: filters, training and evaluation all open their models here, and nothing else imports it.

A model is named by one string:

    ViT-B-32                   an architecture, fresh weights (any open_clip name, ViTamin included, or a winnow-* one)
    ViT-B-32/openai            an architecture with an open_clip pretrained tag (downloaded and cached by open_clip)
    ViT-B-32@/path/weights.pt  an architecture with a checkpoint file
    hf-hub:org/name            a Hugging Face hub model in open_clip's layout; one of released.py also as org/name
    timm:volo_d1_224           any timm backbone as image tower, fresh weights (timm_towers.py)
    /path/to/run               a run directory that training wrote, or a folder with a hub model's files

Weights are read with torch.load(weights_only=True) or safetensors, never unpickled.
"""

import functools
import importlib.resources
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.devices import find_seat
from pipeline.errors import ConfigError, ModelError, check_name
from pipeline.hub_files import HUB_CONFIG, find_hub_weights, guess_hub_id, spell_download
from pipeline.released import find_released
from pipeline.schemas import CHECKPOINT, RUN_MODEL
from pipeline.storage import exists, is_folder, join, read_bytes, sha256_of_file
from pipeline.timm_towers import TIMM_PREFIX, describe_timm
from pipeline.tokens import speed_up

if TYPE_CHECKING:
    import torch

AUTO = "auto"
"""As a device: whatever the task was given, or the machine has."""
CONFIGS = "clip_models"
"""Folder of winnow's own tiny architectures, in open_clip's config format."""
HUB_PREFIX = "hf-hub:"
FOLDER_PREFIX = "local-dir:"
"""open_clip's word for a folder with a hub model's config."""
QUICK_GELU = "-quickgelu"
"""Ends the names of architectures whose activation is QuickGELU."""
BIAS = "logit_bias"
"""The weight that SigLIP's loss adds."""
MISFITS = ("size mismatch", "Missing key", "Unexpected key", "pos_embed width changed")
"""What torch and open_clip say of a checkpoint that belongs to another architecture."""


@dataclass(frozen=True, slots=True)
class ClipSource:
    """A model string taken apart; nothing is opened or downloaded yet."""

    architecture: str
    """open_clip model name, hf-hub:org/name, or local-dir:FOLDER."""
    weights: str | None = None
    """Checkpoint file or open_clip pretrained tag; None for fresh or hub weights."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What open_clip's create_model must be told as well, as a run directory names it."""

    @property
    def brings_config(self) -> bool:
        """Whether architecture and preprocessing come with the weights, and no name of open_clip's stands for them."""
        return self.architecture.startswith((HUB_PREFIX, FOLDER_PREFIX))

    @property
    def name(self) -> str:
        """The architecture without a place: of a folder, the hash of its config."""
        if not self.architecture.startswith(FOLDER_PREFIX):
            return self.architecture
        return "config:" + sha256_of_file(join(self.architecture.removeprefix(FOLDER_PREFIX), HUB_CONFIG))


@dataclass(frozen=True, slots=True)
class OpenedClip:
    """A model with what belongs to it."""

    model: Any
    """The open_clip module: encode_image, encode_text, logit_scale, visual, output_dict=True forward."""
    train_transform: Any
    """PIL image -> float32 (3, H, W), random crop."""
    eval_transform: Any
    """PIL image -> float32 (3, H, W), resize and centre crop."""
    tokenize: Any
    """list[str] -> int64 (N, context_length)."""
    embed_dim: int


def find_clip(model: str) -> ClipSource:
    """Return the architecture and weights that a model string names.

    Raises ModelError for a path that is not a run directory, ConfigError (with near names) for an unknown architecture.
    """
    if model.startswith(HUB_PREFIX):
        return ClipSource(model)
    if is_folder(model):
        return _find_in_folder(model)
    if find_released(model):
        return ClipSource(HUB_PREFIX + model)
    architecture, at, path = model.partition("@")
    if at:
        _check_architecture(architecture)
        if not exists(path):
            raise ModelError(f"model {model!r}: there is no checkpoint at {path!r}.")
        return ClipSource(architecture, path)
    architecture, slash, tag = model.partition("/")
    if slash and architecture not in list_architectures():
        raise ModelError(
            f"model {model!r} is neither a folder that exists nor ARCHITECTURE/TAG (see `winnow doctor`), and no "
            f"released network is called that (see `winnow dfn list`). Any other hub model is {HUB_PREFIX}ORG/NAME."
        )
    _check_architecture(architecture)
    if slash:
        import open_clip

        check_name(tag, open_clip.list_pretrained_tags_by_model(architecture), kind=f"pretrained tag of {architecture}")
        return ClipSource(_match_activation(architecture, tag), tag)
    return ClipSource(architecture)


def _match_activation(architecture: str, tag: str) -> str:
    """Return the architecture with the activation that the tag's weights were trained with.

    OpenAI's, DFN's and others' use QuickGELU; open_clip 3.3 opens them without it when the architecture's name does not
    say so, with a warning, and their scores are wrong.
    """
    open_clip = _open_clip()
    trained_with = open_clip.get_pretrained_cfg(architecture, tag).get("quick_gelu", False)
    if not trained_with or open_clip.get_model_config(architecture).get("quick_gelu", False):
        return architecture
    if architecture + QUICK_GELU not in list_architectures():
        raise ModelError(f"{architecture}/{tag} needs QuickGELU, and open_clip has no {architecture}{QUICK_GELU}.")
    return architecture + QUICK_GELU


def _find_in_folder(folder: str) -> ClipSource:
    url = join(folder, RUN_MODEL)
    if not exists(url) and exists(join(folder, HUB_CONFIG)):
        return ClipSource(FOLDER_PREFIX + folder, find_hub_weights(folder))
    if not exists(url):
        raise ModelError(
            f"{folder!r} is not a finished run: it has no {RUN_MODEL}. Train it to the end, or name ARCHITECTURE@FILE."
        )
    try:
        trained = json.loads(read_bytes(url))
        _check_architecture(trained["architecture"])
        return ClipSource(trained["architecture"], join(folder, CHECKPOINT), trained.get("settings", {}))
    except (ValueError, KeyError, TypeError):
        raise ModelError(f"{url} does not say which architecture was trained.") from None


def find_hub_id(model: str) -> str | None:
    """Return the hub id org/name that a model string stands for, None for a run or a checkpoint file.

    Of a folder with a hub model's files it goes by the folder's name: that of the hub's cache, or a released network's.
    """
    source = find_clip(model)
    if source.architecture.startswith(HUB_PREFIX):
        return source.architecture.removeprefix(HUB_PREFIX)
    if source.architecture.startswith(FOLDER_PREFIX):
        return guess_hub_id(str(Path(model).absolute()))
    if source.weights is None or exists(source.weights):
        return None
    place: str = _open_clip().get_pretrained_cfg(source.architecture, source.weights).get("hf_hub") or ""
    return "/".join(place.split("/")[:2]) or None


def _check_architecture(name: str) -> None:
    if name.startswith(TIMM_PREFIX):
        return _teach(_open_clip(), {f"{name}.json": json.dumps(describe_timm(name)).encode()})
    try:
        check_name(name, list_architectures(), kind="model architecture")
    except ConfigError as error:
        near = str(error).split("Known:")[0]
        raise ConfigError(f"{near}`winnow doctor --models` lists all {len(list_architectures())}.") from None


@functools.cache
def list_architectures() -> tuple[str, ...]:
    """Return every architecture name open_clip knows, winnow's tiny ones included."""
    return tuple(_open_clip().list_models())


def list_pretrained() -> list[str]:
    """Return every ARCHITECTURE/TAG that open_clip knows."""
    return [f"{architecture}/{tag}" for architecture, tag in _open_clip().list_pretrained()]


@functools.cache
def _open_clip() -> Any:
    """Import open_clip and teach it winnow's tiny architectures."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # third-party import-time deprecations
        import open_clip
    import pipeline.tiny_vitamin  # noqa: F401  (registers the timm model that winnow-vitamin-tiny names)

    files = importlib.resources.files("pipeline").joinpath(CONFIGS).iterdir()
    _teach(open_clip, {config.name: config.read_bytes() for config in files})
    return open_clip


def _teach(open_clip: Any, configs: Mapping[str, bytes]) -> None:
    """Make architectures known to open_clip, which reads them from files, by file name."""
    with tempfile.TemporaryDirectory() as folder:  # the package may be inside a code.zip on an executor
        for name, content in configs.items():
            (Path(folder) / name).write_bytes(content)
        open_clip.add_model_config(folder)


def describe_architecture(name: str) -> dict[str, Any]:
    """Return open_clip's config of a known architecture: embed_dim, vision_cfg, text_cfg."""
    _check_architecture(name)
    return dict(_open_clip().get_model_config(name))


def sha256_of_model(model: str) -> str | None:
    """Return the hex sha256 of a model's weights file (fetched first if it is remote); None for fresh weights."""
    source = find_clip(model)
    path = fetch_weights(source)
    return sha256_of_file(path) if path else None


def fetch_weights(source: ClipSource, *, hub_file: str | None = None) -> str | None:
    """Return a local path of the weights; those named by tag or hub id come through open_clip's download cache.

    `hub_file` is fetched from a hub id instead of its weights.

    Raises ModelError, with what to download and where to put it, when they are not there and cannot be fetched.
    """
    from open_clip.pretrained import download_pretrained, download_pretrained_from_hf, get_pretrained_cfg

    is_hub = source.architecture.startswith(HUB_PREFIX)
    if not is_hub and (source.weights is None or exists(source.weights)):
        return source.weights
    try:
        if is_hub:
            return str(download_pretrained_from_hf(source.architecture.removeprefix(HUB_PREFIX), hub_file))
        return str(download_pretrained(get_pretrained_cfg(source.architecture, str(source.weights))))
    except Exception as error:
        raise ModelError(_why_not_fetched(source, error)) from error


def _why_not_fetched(source: ClipSource, error: Exception) -> str:
    model = source.architecture if source.weights is None else f"{source.architecture}/{source.weights}"
    hub = find_hub_id(model)
    without = f"download it where there is a network, copy it here and name it: {source.architecture}@FILE"
    remedy = spell_download(hub) if hub else without
    return f"model {model!r} is not on this machine and cannot be fetched ({_first_words(error)}): {remedy}."


def open_model(model: str, *, device: "str | torch.device" = "cpu", **settings: Any) -> OpenedClip:
    """Return the named model in eval mode, float32, on `device`, with its transforms and tokenizer.

    `settings` are more arguments of open_clip's create_model, such as init_logit_bias.

    Raises ModelError when a checkpoint does not fit the architecture or cannot be read safely.
    """
    source = find_clip(model)
    open_clip = _open_clip()
    try:
        with warnings.catch_warnings(), _QuietLogging():
            warnings.simplefilter("ignore")
            told = _find_bias(source) | dict(source.settings) | settings
            module, train_transform, eval_transform = _create(source, device, told)
            tokenize = speed_up(open_clip.get_tokenizer(source.architecture))
    except Exception as error:
        raise ModelError(_why_not_opened(model, source, error)) from error
    module.eval()
    return OpenedClip(module, train_transform, eval_transform, tokenize, _measure_embed_dim(module, tokenize))


def _find_bias(source: ClipSource) -> dict[str, float]:
    """Return what makes room for SigLIP's bias in an architecture without one, if a checkpoint file holds one."""
    import torch

    if source.brings_config or source.weights is None or not exists(source.weights):
        return {}
    try:
        held = torch.load(source.weights, map_location="cpu", mmap=True, weights_only=True)
    except Exception:  # no file of torch's, or on no local disk: open_clip says what is wrong, if anything is
        return {}
    has_bias = isinstance(held, dict) and any(str(name).endswith(BIAS) for name in held.get("state_dict", held))
    return {"init_logit_bias": 0.0} if has_bias else {}


def _create(source: ClipSource, device: "str | torch.device", settings: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Return module and both transforms, as open_clip makes them."""
    open_clip = _open_clip()
    if not source.architecture.startswith(FOLDER_PREFIX):
        made = open_clip.create_model_and_transforms(
            source.architecture, pretrained=source.weights, device=device, **settings
        )
    else:  # open_clip would take transformers' weights where both lie in the folder
        made = open_clip.create_model_and_transforms(
            source.architecture, device=device, load_weights=False, pretrained_text=False, **settings
        )
        open_clip.load_checkpoint(made[0], source.weights)
    return tuple(made)


def _measure_embed_dim(module: Any, tokenize: Any) -> int:
    """Return the width of the model's embeddings, seen on one caption (configs and hub models name it differently)."""
    import torch

    with torch.no_grad():
        tokens = tokenize([""]).to(next(module.parameters()).device)
        return int(module.encode_text(tokens).shape[-1])


def pick_device(device: str) -> str:
    """Return the device to run on; any name but `auto` is kept.

    `auto` is the device of this task's seat; outside Spark it is cuda when there is one, else cpu.
    """
    import torch

    if device != AUTO:
        return device
    seat = find_seat()
    return seat.device if seat else ("cuda" if torch.cuda.is_available() else "cpu")


def split_transform(transform: Any) -> "tuple[Callable[[Any], Any], Callable[[torch.Tensor], torch.Tensor]]":
    """Return an eval transform in two: PIL image -> PIL image, and uint8 (N, H, W, 3) -> float32 (N, 3, H, W).

    Decoded images then wait as uint8, and a whole batch is scaled on its device.  One after the other they give the
    transform's own bits, on any device.  Raises ModelError for a transform that is not of open_clip's form.
    """
    steps = list(getattr(transform, "transforms", ()))
    names = [type(step).__name__ for step in steps]
    if names[-3:] != ["MaybeConvertMode", "MaybeToTensor", "Normalize"]:
        raise ModelError(f"the model's eval transform is {names}, not open_clip's; winnow cannot score with it.")
    normalize = steps.pop()
    steps.pop()

    def shape(image: Any) -> Any:
        for step in steps:
            image = step(image)
        return image

    return shape, functools.partial(_scale_pixels, tuple(normalize.mean), tuple(normalize.std))


def _scale_pixels(mean: tuple[float, ...], std: tuple[float, ...], pixel_NHW3: "torch.Tensor") -> "torch.Tensor":
    """Return (pixel / 255 - mean) / std.  On a GPU torch divides exactly by a tensor, and not by a number."""
    import torch

    image_N3HW = pixel_NHW3.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    full_11, mean_311, std_311 = (
        torch.tensor(values, device=image_N3HW.device)[:, None, None] for values in ((255.0,), mean, std)
    )
    return image_N3HW.div_(full_11).sub_(mean_311).div_(std_311)


def embed_dim_of(model: str) -> int:
    """Return the width of a model's embeddings.  Raises ModelError when a hub model's config cannot be fetched."""
    source = find_clip(model)
    try:
        return int(_open_clip().get_model_config(source.architecture)["embed_dim"])
    except OSError as error:
        raise ModelError(_why_not_fetched(source, error)) from error


def _why_not_opened(model: str, source: ClipSource, error: Exception) -> str:
    first_lines = _first_words(error)
    if source.weights and any(sign in str(error) for sign in MISFITS):
        return (
            f"checkpoint {source.weights!r} is not a {source.architecture}: {first_lines}. "
            "Name the architecture it was trained as (ARCHITECTURE@FILE), or its run directory."
        )
    if "weights_only" in str(error) or "Unpickling" in type(error).__name__:
        return f"checkpoint {source.weights!r} holds more than tensors and is not opened, for safety: {first_lines}"
    kind = ", and may be no file of weights (torch.save or safetensors)" if source.weights else ""
    return f"model {model!r} could not be opened{kind}: {type(error).__name__}: {first_lines}"


def _first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


class _QuietLogging:
    """Silence open_clip's INFO and 'no pretrained weights' lines while a model is built."""

    def __enter__(self) -> None:
        self.disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)

    def __exit__(self, *_: object) -> None:
        logging.disable(self.disabled)
