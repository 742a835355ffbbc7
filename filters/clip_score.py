"""Cosine similarity of image and caption under a frozen CLIP: DataComp's CLIP score, and every DFN.

A data filtering network is this filter with another model (Fang et al. 2023, arXiv:2309.17425, section 3).  Both
embeddings are stored as float16, as CommonPool's npz files hold them, so later filters need no second pass.
The model stays open in its worker from part to part; the images of a batch are decoded in threads.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipeline.clip_model import OpenedClip, embed_dim_of, find_clip, open_model, pick_device, sha256_of_model
from pipeline.config import config
from pipeline.contract import Failure, Filter, Score, Scored
from pipeline.errors import ConfigError
from pipeline.images import UnreadableImage, open_image
from pipeline.schemas import (
    IMAGE,
    IMAGE_ERROR,
    REASON_NULL_CAPTION,
    REASON_UNREADABLE_IMAGE,
    TEXT,
    image_embedding_column,
    similarity_column,
    text_embedding_column,
)

if TYPE_CHECKING:
    import torch

DECODE_THREADS = 2


@config
class Options:
    """Which CLIP scores the pool."""

    model: str
    """A model string (pipeline/clip_model.py): name/tag, hub id, ARCHITECTURE@file, or a run directory."""
    batch_size: int = 256
    """Images per forward pass; pool batches are cut to it."""
    device: str = "auto"
    """auto (a GPU when there is one), cpu, cuda, cuda:1, ..."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"clip_score: batch_size {self.batch_size} is below 1.")


def build(name: str, options: Options) -> Filter:
    """Return the filter, with the model's sha256 in its identity.  Raises ModelError or ConfigError for a bad model."""
    dim = embed_dim_of(options.model)
    embedding = pa.list_(pa.float16(), dim)
    makes = (
        (similarity_column(name), pa.float32()),
        (image_embedding_column(name), embedding),
        (text_embedding_column(name), embedding),
    )
    settings = {"architecture": find_clip(options.model).architecture, "sha256": sha256_of_model(options.model)}
    if settings["sha256"] is None:
        raise ConfigError(f"filter {name!r}: model {options.model!r} names no weights, so its scores would be noise.")
    return Filter(
        name=name, needs=(IMAGE, TEXT), makes=makes, version=1, settings=settings, load=partial(load, options)
    )


def load(options: Options) -> Score:
    """Return a scoring function with the model open on its device."""
    import torch

    device = torch.device(pick_device(options.device))
    clip = open_model(options.model, device=device)
    return partial(score, clip, device, options.batch_size)


def score(clip: OpenedClip, device: "torch.device", batch_size: int, batch: pa.RecordBatch) -> Scored:
    """Return float32 cosine in [-1, 1] and two float16 unit vectors per row; null where image or caption is missing."""
    texts = batch.column(TEXT).to_pylist()
    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        jobs = zip(batch.column(IMAGE).to_pylist(), batch.column(IMAGE_ERROR).to_pylist(), texts, strict=True)
        decoded = list(pool.map(partial(_decode, clip.eval_transform), jobs))
    failures = tuple(Failure(i, *d) for i, d in enumerate(decoded) if isinstance(d, tuple))
    good = [i for i, d in enumerate(decoded) if not isinstance(d, tuple)]
    image_ND, text_ND = _embed(clip, device, batch_size, [decoded[i] for i in good], [texts[i] for i in good])
    cosine_N = (image_ND * text_ND).sum(axis=1)
    columns = [_spread(good, batch.num_rows, values) for values in (image_ND, text_ND)]
    cosines = np.full(batch.num_rows, np.nan, np.float32)
    cosines[good] = cosine_N
    return Scored((pa.array(cosines, from_pandas=True), *columns), failures)


def _decode(transform: Any, job: tuple[bytes | None, str | None, str | None]) -> "torch.Tensor | tuple[str, str]":
    """Return the model's input (3, H, W), or (reason, message)."""
    content, missing, text = job
    if text is None:
        return REASON_NULL_CAPTION, "the caption is null"
    if content is None:
        return missing or REASON_UNREADABLE_IMAGE, "the tar has no image for this row"
    try:
        tensor: torch.Tensor = transform(open_image(content))  # it makes RGB itself, after resizing
        return tensor
    except UnreadableImage as error:
        return REASON_UNREADABLE_IMAGE, str(error)
    except Exception as error:  # the transform cannot take this mode or shape
        return REASON_UNREADABLE_IMAGE, f"{type(error).__name__}: {error}"


def _embed(
    clip: OpenedClip, device: "torch.device", batch_size: int, images: Sequence[Any], texts: Sequence[Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Return two float32 (N, D) arrays of unit vectors."""
    import torch

    pieces: list[tuple[np.ndarray, np.ndarray]] = []
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            pixels = torch.stack(list(images[start : start + batch_size])).to(device)
            tokens = clip.tokenize(list(texts[start : start + batch_size])).to(device)
            image_BD = clip.model.encode_image(pixels, normalize=True).float().cpu().numpy()
            text_BD = clip.model.encode_text(tokens, normalize=True).float().cpu().numpy()
            pieces.append((image_BD, text_BD))
    if not pieces:
        empty = np.empty((0, clip.embed_dim), np.float32)
        return empty, empty
    return np.concatenate([p[0] for p in pieces]), np.concatenate([p[1] for p in pieces])


def _spread(rows: list[int], num_rows: int, values_ND: np.ndarray) -> pa.Array:
    """Return a float16 list column (num_rows,) with the vectors at `rows` and null elsewhere."""
    dim = values_ND.shape[1]
    full = np.zeros((num_rows, dim), np.float16)
    full[rows] = values_ND
    absent = np.ones(num_rows, bool)
    absent[rows] = False
    flat = pa.array(full.reshape(-1), pa.float16())
    return pa.FixedSizeListArray.from_arrays(flat, dim, mask=pa.array(absent))
