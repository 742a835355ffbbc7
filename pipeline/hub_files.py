"""A hub model's files on this machine, in open_clip's layout: what they are called, whose they are, how to get them."""

from pipeline.errors import ModelError
from pipeline.released import RELEASED
from pipeline.storage import exists, is_local, join

HUB_CONFIG = "open_clip_config.json"
HUB_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""What a hub model's weights are called; the first that is there."""
CACHE_FOLDER = "models--"
"""Begins the folder of a model in the hub's cache: models--org--name/snapshots/REVISION."""


def find_hub_weights(folder: str) -> str:
    """Return the weights in a folder of a hub model's files; transformers' may lie beside and do not count.

    Raises ModelError for a remote folder, or one without weights.
    """
    if not is_local(folder):
        raise ModelError(f"open_clip reads a hub model's files from a local folder only: copy {folder!r} to one.")
    for name in HUB_WEIGHTS:
        if exists(join(folder, name)):
            return join(folder, name)
    raise ModelError(f"{folder!r} has {HUB_CONFIG}, but neither {' nor '.join(HUB_WEIGHTS)}. Download one to it.")


def guess_hub_id(path: str) -> str | None:
    """Return the hub id that a folder's absolute path tells: of the hub's cache, or of a released network's name."""
    names = path.split("/")
    for name in names:
        if name.startswith(CACHE_FOLDER):
            return name.removeprefix(CACHE_FOLDER).replace("--", "/", 1)
    return next((row.hub for row in RELEASED if row.hub.split("/")[1] == names[-1]), None)


def spell_download(hub: str) -> str:
    """Return in words how a hub model comes to a machine without a network."""
    return (
        f"where there is a network say `hf download {hub} --local-dir FOLDER`, copy FOLDER here ({HUB_CONFIG} and "
        f"{' or '.join(HUB_WEIGHTS)} are what is needed), and name FOLDER as the model; or fill the hub's cache "
        "(HF_HOME)"
    )
