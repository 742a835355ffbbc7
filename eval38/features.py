"""The vectors of a set's images, kept so that other metrics, templates or class names need no image again.

    FEATURES/<identity>/image.npy      float32 (N, D) unit vectors, exactly as the model gave them
    FEATURES/<identity>/truths.json    what is known of each image, and the images that were lost
    FEATURES/<identity>/manifest.json  written last

The identity is decided by the model's weights, its preprocessing, number format and libraries, and by the files that
hold the images; class names and templates are no part of it.  The files of one set are told apart as in rows.py.
"""

import hashlib
import io
import json
import logging
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from eval38.embed import Seen
from eval38.metadata import Tagged
from eval38.rows import EvalSet, LostImage, hash_files
from pipeline.errors import StageError
from pipeline.manifest import Counts, Manifest, read_manifest, write_manifest
from pipeline.schemas import FEATURE_TRUTHS, IMAGE_FEATURES
from pipeline.storage import is_local, join, open_file, read_bytes, sha256_of_file, write_atomic, write_bytes

log = logging.getLogger("winnow")

ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@dataclass(frozen=True, slots=True)
class FeatureCache:
    """Where vectors are kept, and what made them."""

    folder: str
    model: Mapping[str, str]
    """Everything about the model that decides a vector: weights, preprocessing, number format, libraries."""


def describe_transform(transform: Any) -> str:
    """Return a preprocessing in words that are the same in every process."""
    return ADDRESS.sub("", repr(transform))


def _plan(cache: FeatureCache, eval_set: EvalSet) -> Manifest:
    config = {"task": eval_set.task.key, "kind": eval_set.task.kind, **cache.model}
    return Manifest(stage="features", config=config, parents={"images": hash_files(eval_set.files)})


def read_features(cache: FeatureCache, eval_set: EvalSet) -> Seen[Any] | None:
    """Return the vectors of a set from the cache, or None when they are not there, not whole, or do not fit.

    A label that is no class of the set does not fit: reading the images again says which image has it.
    """
    wanted = _plan(cache, eval_set)
    folder = join(cache.folder, wanted.identity)
    try:
        found = read_manifest(folder)
        if found is None or found.identity != wanted.identity:
            return None
        seen = _read(folder, found.facts)
    except (StageError, OSError, EOFError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is not whole (%s): its images are read again", folder, error)
        return None
    classes = len(eval_set.classes)
    labels = [truth.label if isinstance(truth, Tagged) else truth for truth in seen.truths]
    fits = all(not isinstance(label, int) or label < classes for label in labels)
    return seen if fits else None


def _read(folder: str, facts: Mapping[str, Any]) -> Seen[Any]:
    content = read_bytes(join(folder, FEATURE_TRUTHS))
    if hashlib.sha256(content).hexdigest() != facts["truths_sha256"]:
        raise ValueError(f"{FEATURE_TRUTHS} has another hash")
    known = json.loads(content)
    url = join(folder, IMAGE_FEATURES)
    if sha256_of_file(url) != facts["image_sha256"]:
        raise ValueError(f"{IMAGE_FEATURES} has another hash")
    if is_local(url):
        image_ND = np.load(url, mmap_mode="c", allow_pickle=False)
    else:
        with open_file(url) as file:
            image_ND = np.load(io.BytesIO(file.read()), allow_pickle=False)
    truths = tuple(_decode_truth(truth) for truth in known["truths"])
    if image_ND.dtype != np.float32 or image_ND.shape != (len(truths), facts["dims"]):
        raise ValueError(f"{IMAGE_FEATURES} is {image_ND.dtype} {image_ND.shape}")
    return Seen(torch.from_numpy(image_ND), truths, tuple(LostImage(*row) for row in known["lost"]))


def write_features(cache: FeatureCache, eval_set: EvalSet, seen: Seen[Any]) -> None:
    """Keep a set's vectors with what is known of its images."""
    wanted = _plan(cache, eval_set)
    folder = join(cache.folder, wanted.identity)
    known = {
        "truths": [_encode_truth(truth) for truth in seen.truths],
        "lost": [[row.name, row.reason, row.message] for row in seen.lost],
    }
    content = json.dumps(known, ensure_ascii=False, separators=(",", ":")).encode()
    with write_atomic(join(folder, IMAGE_FEATURES)) as file:
        np.save(file, seen.image_ND.numpy(), allow_pickle=False)
    write_bytes(join(folder, FEATURE_TRUTHS), content)
    failed = dict(sorted(Counter(row.reason for row in seen.lost).items()))
    counts = Counts(read=len(seen.truths) + len(seen.lost), kept=len(seen.truths), failed=failed)
    facts = {
        "dims": seen.image_ND.shape[1],
        "image_sha256": sha256_of_file(join(folder, IMAGE_FEATURES)),
        "truths_sha256": hashlib.sha256(content).hexdigest(),
    }
    write_manifest(
        folder,
        Manifest(
            stage=wanted.stage, config=wanted.config, parents=wanted.parents, counts={"images": counts}, facts=facts
        ),
    )


def _encode_truth(truth: Any) -> Any:
    """Return a label, a name, captions or metadata as JSON: a number, a string, a list or an object."""
    return {"label": truth.label, "metadata": truth.metadata} if isinstance(truth, Tagged) else truth


def _decode_truth(value: Any) -> Any:
    if isinstance(value, dict):
        return Tagged(value["label"], tuple(value["metadata"]))
    return tuple(value) if isinstance(value, list) else value
