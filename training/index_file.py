"""The index of an unfinished run, kept beside its saves, so that going on does not read every tar again.

An npz of plain arrays, and the rest as JSON; never unpickled.  It is of the files, sizes and times it was made from and
of the tokenizer's architecture; with anything else, or damaged, it is made anew.
"""

import dataclasses
import json
import logging
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.clip_model import OpenedClip
from pipeline.errors import StageError
from pipeline.manifest import Counts, hash_json
from pipeline.schemas import RUN_INDEX
from pipeline.storage import exists, join, open_file, write_atomic
from training.captioned import TrainSet, identify_sets, read_sets
from training.index import RowIndex, SetRows
from training.world import ALONE, World

log = logging.getLogger("winnow")
ARRAYS = ("tar_N", "offset_N", "size_N", "caption_N", "num_captions_N", "twin_N", "token_UL")
REST = "rest"
FORMAT = 2


def read_sets_once(
    sets: Sequence[TrainSet],
    opened: OpenedClip,
    *,
    out: str,
    architecture: str,
    quiet: bool = False,
    world: World = ALONE,
) -> RowIndex:
    """Return the index of all sets, from the file that a run in folder `out` left, if any; else read and leave it.

    Of several processes the first reads, and the others take the file; StageError says that one cannot.
    """
    url = join(out, RUN_INDEX)
    shares = [[part.name, part.share, list(part.urls)] for part in sets]
    identity = world.share(hash_json([FORMAT, architecture, shares, identify_sets(sets)]))
    index = _load_index(url, identity) if world.is_first and exists(url) else None
    if index is None and world.is_first:
        index = read_sets(sets, tokenize=opened.tokenize, quiet=quiet)
        _save_index(url, index, identity)
    world.share(None)  # the file is there
    if not world.is_first:
        index = _load_index(url, identity)
    if index is None:
        raise StageError(
            f"train: process {world.rank} cannot read {url}, which the first wrote. "
            "All machines must see the same run folder."
        )
    return index


def _save_index(url: str, index: RowIndex, identity: str) -> None:
    parts = [[part.name, dataclasses.asdict(part.counts), part.per_epoch] for part in index.sets]
    rest = json.dumps({"identity": identity, "urls": index.urls, "sets": parts}).encode()
    arrays: dict[str, Any] = {name: getattr(index, name) for name in ARRAYS}
    with write_atomic(url, lasting=False) as file:
        np.savez(file, **arrays | {REST: np.frombuffer(rest, np.uint8)})


def _load_index(url: str, identity: str) -> RowIndex | None:
    try:
        with open_file(url) as file, np.load(file, allow_pickle=False) as arrays:
            rest = json.loads(arrays[REST].tobytes())
            if rest["identity"] != identity:
                return None
            sets = tuple(SetRows(name, Counts(**counts), per_epoch) for name, counts, per_epoch in rest["sets"])
            return RowIndex(tuple(rest["urls"]), sets=sets, **{name: arrays[name] for name in ARRAYS})
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError, EOFError, OSError) as error:
        log.warning("train: reading the tars again because %s cannot be read: %s", url, error)
        return None
