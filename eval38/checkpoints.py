"""A training run, finished or not -> its kept checkpoints as model strings (training/__init__.py: what a run holds)."""

import json
import logging
from typing import Any, NamedTuple

import torch

from pipeline.clip_model import find_clip
from pipeline.errors import ModelError
from pipeline.manifest import Manifest, read_manifest
from pipeline.schemas import METRICS
from pipeline.storage import exists, is_folder, join, open_file, read_bytes
from training.checkpoint import list_saves, place_save

log = logging.getLogger("winnow")


class Checkpoint(NamedTuple):
    """The weights of a run after some steps."""

    step: int
    samples: int | None
    """Seen by then; None where the run does not say how many a step has."""
    model: str
    """Model string."""


def find_checkpoints(run: str) -> list[Checkpoint]:
    """Return the checkpoints of a run in the order of their steps: its saves, then the weights it ended with.

    `run` is a run folder, or ARCHITECTURE@FOLDER of a run that is not finished.  A save of another run is left out.
    Raises ModelError for a folder that is no run, or holds no checkpoint.
    """
    architecture, _, folder = run.partition("@")
    made = None
    if is_folder(run):
        folder = run
        architecture, made = _read_finished(folder)
    elif not folder or not is_folder(folder):
        raise ModelError(f"{run!r} is no folder: --every takes a run folder, or ARCHITECTURE@FOLDER.")
    size = _read_batch_size(folder, made)
    found = [
        Checkpoint(step, size and step * size, f"{architecture}@{place_save(folder, step)}")
        for step in _list_own_saves(folder, made)
    ]
    if made:
        samples = int(made.config["samples"])
        found.append(Checkpoint(samples // int(made.config["batch_size"]), samples, folder))
    if not found:
        raise ModelError(f"{folder!r} holds no checkpoint. Train with keep_checkpoints above 1 to keep some.")
    return found


def _read_finished(folder: str) -> tuple[str, Manifest]:
    """Return the architecture and manifest of a finished run."""
    architecture, made = find_clip(folder).architecture, read_manifest(folder)
    if made is None or made.stage != "train":
        raise ModelError(f"{folder!r} is not a finished run: name ARCHITECTURE@{folder} to evaluate its saves.")
    return architecture, made


def _list_own_saves(folder: str, made: Manifest | None) -> list[int]:
    """Return the steps of the saves of one run: the finished one, else that of the last save."""
    identities = {step: _read_identity(place_save(folder, step)) for step in list_saves(folder)}
    wanted = made.identity if made else next((found for found in reversed(identities.values()) if found), None)
    for step, identity in identities.items():
        if identity != wanted:
            log.warning("eval: left out, because it is of another run or cannot be read: %s", place_save(folder, step))
    return [step for step, identity in identities.items() if identity == wanted]


def _read_identity(url: str) -> str:
    """Return the identity of the run that a save is of; '' when it cannot be read."""
    try:
        with open_file(url) as file:
            content: dict[str, Any] = torch.load(file, map_location="meta", weights_only=True)
        return str(content["identity"])
    except Exception:  # torch.load raises RuntimeError, UnpicklingError, EOFError, ...
        return ""


def _read_batch_size(folder: str, made: Manifest | None) -> int | None:
    """Return how many samples a step has, by the manifest or the first line of the metrics."""
    if made:
        return int(made.config["batch_size"])
    url = join(folder, METRICS)
    for line in read_bytes(url).splitlines()[:1] if exists(url) else ():
        try:
            first = json.loads(line)
            return int(first["samples"]) // int(first["step"])
        except (ValueError, KeyError, TypeError, ZeroDivisionError):
            return None
    return None
