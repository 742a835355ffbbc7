"""A locked text tower's features: each distinct caption goes through the tower once, and no step runs it again.

They lie beside an unfinished run in one file, made by the first process and mapped into memory by all (read into it
where the run is on an object store): distinct captions x dims x 4 bytes, or 2 bytes where the run is in bf16 or fp16.
So 3.8 M captions of 768 dims take 11.7 or 5.8 GB; the tokens of as many captions take 1.2 GB.  In fp32 the features
are the tower's to rounding; in bf16 and fp16 they are rounded to float16, finer than bf16's own rounding.
Source: ViTamin's locked-text tuning (arXiv:2404.02132), whose text tower has no dropout and sees no augmentation.
U distinct captions, D dims, L tokens.
"""

import hashlib
import json
import logging
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pipeline.errors import StageError
from pipeline.manifest import hash_json
from pipeline.schemas import RUN_CAPTIONS
from pipeline.storage import exists, is_local, join, open_file, read_bytes, write_atomic
from training.config import TrainConfig
from training.index import RowIndex
from training.step import autocast, encode_captions
from training.world import ALONE, World

log = logging.getLogger("winnow")
HEADER_BYTES = 4096
CAPTIONS_AT_ONCE = 1024
TIMES_SEEN = 2
"""Captions that are seen less often than this on average are not worth a pass of their own."""


def can_store(config: TrainConfig, model: Any, index: RowIndex) -> bool:
    """Return whether features can stand for the tower, and each is used often enough."""
    if not config.lock_text or config.samples < TIMES_SEEN * len(index.token_UL):
        return False
    tower = getattr(model, "text", getattr(model, "transformer", model))
    return not any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in tower.modules())


def store_features(
    config: TrainConfig,
    model: Any,
    index: RowIndex,
    *,
    out: str,
    weights: str,
    quiet: bool = False,
    world: World = ALONE,
) -> np.ndarray:
    """Return float32 or float16 (U, D), from the file that a run in folder `out` left, if any; else make and leave it.

    `weights` identifies the tower.  Of several processes the first makes it; StageError says that one cannot read it.
    """
    url = join(out, RUN_CAPTIONS)
    tokens = hashlib.sha256(np.ascontiguousarray(index.token_UL).data).hexdigest()
    identity = hash_json([config.lock_text, weights, tokens, config.precision, config.cut_text])
    if world.is_first and _load(url, identity) is None:
        _write(url, config, model, index.token_UL, identity, quiet=quiet)
    world.share(None)  # the file is there
    feature_UD = _load(url, identity)
    if feature_UD is None:
        raise StageError(
            f"train: process {world.rank} cannot read {url}, which the first wrote. "
            "All machines must see the same run folder."
        )
    return feature_UD


def _write(url: str, config: TrainConfig, model: Any, token_UL: np.ndarray, identity: str, *, quiet: bool) -> None:
    """Write a header of HEADER_BYTES, JSON and spaces, and the features after it."""
    dtype = torch.float32 if config.precision == "fp32" else torch.float16
    num, device = len(token_UL), model.logit_scale.device
    bar = tqdm(desc="captions", total=num, unit="caption", disable=quiet)
    with bar, write_atomic(url) as file, torch.no_grad(), autocast(config, device):
        for start in range(0, num, CAPTIONS_AT_ONCE):
            token_BL = torch.from_numpy(token_UL[start : start + CAPTIONS_AT_ONCE].astype(np.int64))
            text_BD = encode_captions(config, model, token_BL if config.cut_text else token_BL.to(device))
            if not start:
                header = {"identity": identity, "shape": [num, text_BD.shape[1]], "dtype": str(dtype).split(".")[1]}
                file.write(json.dumps(header).encode().ljust(HEADER_BYTES))
            file.write(text_BD.to("cpu", dtype).numpy().tobytes())
            bar.update(len(token_BL))


def _load(url: str, identity: str) -> np.ndarray | None:
    if not exists(url):
        return None
    try:
        with open_file(url, ahead=0) as file:
            header = json.loads(file.read(HEADER_BYTES))
        if header["identity"] != identity:
            return None
        dtype, shape = np.dtype(header["dtype"]), tuple(header["shape"])
        if is_local(url):
            return np.memmap(url, dtype, "r", HEADER_BYTES, shape)
        return np.frombuffer(read_bytes(url), dtype, offset=HEADER_BYTES).reshape(shape)
    except (ValueError, KeyError, TypeError, OSError) as error:
        log.warning("train: the captions go through the text tower again because %s cannot be read: %s", url, error)
        return None
