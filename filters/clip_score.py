"""Cosine similarity of image and caption under a frozen CLIP: DataComp's CLIP score, and every DFN.

A data filtering network is this filter with another model (Fang et al. 2023, arXiv:2309.17425, section 3).  Both
embeddings are stored as float16, as CommonPool's npz files hold them, so later filters need no second pass.
The model stays open in its worker from part to part; images are decoded and captions tokenised in the worker's threads.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from filters.text_mask import DetectorFailed, erase_text, open_detector
from pipeline.clip_model import (
    AUTO,
    OpenedClip,
    embed_dim_of,
    find_clip,
    find_hub_id,
    open_model,
    pick_device,
    sha256_of_model,
    split_transform,
)
from pipeline.config import config
from pipeline.contract import Failure, Filter, Scored, TwoStepScore
from pipeline.errors import ConfigError
from pipeline.images import UnreadableImage, decode_image, open_image
from pipeline.released import spell_licence
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
from pipeline.storage import exists, sha256_of_file

if TYPE_CHECKING:
    import torch
    from PIL import Image

    View = Callable[[bytes], Image.Image]

log = logging.getLogger("winnow")


@config
class Options:
    """Which CLIP scores the pool."""

    model: str
    """A model string (pipeline/clip_model.py): name/tag, hub id, ARCHITECTURE@file, or a run directory."""
    batch_size: int = 256
    """Pairs per forward pass; pool batches are cut to it."""
    device: str = AUTO
    """auto (the GPU that the task was given, cpu when it was given none), cpu, cuda, cuda:1, ..."""
    view: Literal["plain", "flipped", "masked"] = "plain"
    """flipped: as in a mirror, where text cannot be read (Yu et al. 2023, arXiv:2309.15954).  masked: text painted over
    (T-MARS, Maini et al. 2023; text_mask.py)."""
    detector: str | None = None
    """TorchScript file that finds text, for the masked view.  The program in it runs here."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"clip_score: batch_size {self.batch_size} is below 1.")
        if (self.view == "masked") != (self.detector is not None):
            raise ConfigError(
                f"clip_score: view {self.view!r} with detector {self.detector!r}: masked needs one, alone."
            )


def build(name: str, options: Options) -> Filter:
    """Return the filter, with the model's sha256 in its identity.  Raises ModelError or ConfigError for a bad model."""
    dim = embed_dim_of(options.model)
    embedding = pa.list_(pa.float16(), dim)
    makes = (
        (similarity_column(name), pa.float32()),
        (image_embedding_column(name), embedding),
        (text_embedding_column(name), embedding),
    )
    settings = {"architecture": find_clip(options.model).name, "sha256": sha256_of_model(options.model)}
    if options.view != "plain":
        settings["view"] = options.view
    if options.detector:
        settings["detector"] = _hash_detector(options.detector)
    if settings["sha256"] is None:
        raise ConfigError(f"filter {name!r}: model {options.model!r} names no weights, so its scores would be noise.")
    if hub := find_hub_id(options.model):
        log.warning("filter %s uses the weights of %s, licence: %s", name, hub, spell_licence(hub))
    return Filter(
        name=name,
        needs=(IMAGE, TEXT),
        makes=makes,
        version=1,
        settings=settings,
        load=partial(load, options),
        runs_on_device=options.device == AUTO,
    )


def _hash_detector(url: str) -> str:
    if not exists(url):
        raise ConfigError(f"clip_score: there is no text detector at {url!r}.")
    return sha256_of_file(url)


def load(options: Options) -> TwoStepScore:
    """Return the scoring function with the model, and the text detector, open on its device."""
    import torch

    device = torch.device(pick_device(options.device))
    scorer = Scorer(open_model(options.model, device=device), device, options.batch_size, _pick_view(options, device))
    return TwoStepScore(prepare=scorer.prepare, finish=scorer.finish, item_bytes=scorer.measure_item())


def _pick_view(options: Options, device: "torch.device") -> "View":
    """Return what opens an image the way the model is to see it."""
    from PIL import ImageOps

    if options.view == "flipped":
        return lambda content: ImageOps.mirror(open_image(content))
    if options.detector:
        find_text = open_detector(options.detector, device)
        return lambda content: erase_text(find_text, decode_image(content))
    return open_image


class Pair(NamedTuple):
    """What the model reads of one row."""

    pixel_HW3: np.ndarray
    """uint8, resized and cropped."""
    token_L: np.ndarray
    """int64."""


class Lost(NamedTuple):
    """Why a row cannot be scored."""

    reason: str
    message: str


class Scorer:
    """An open model on its device; `batch_size` falls when a GPU turns out to be too small for it."""

    def __init__(self, clip: OpenedClip, device: "torch.device", batch_size: int, view: "View | None" = None) -> None:
        self.clip, self.device, self.batch_size, self.view = clip, device, batch_size, view or open_image
        self.shape, self.scale = split_transform(clip.eval_transform)

    def measure_item(self) -> int:
        """Return the bytes of one Pair."""
        from PIL import Image

        return int(np.asarray(self.shape(Image.new("RGB", (8, 8)))).nbytes + self.clip.tokenize([""]).nbytes)

    def prepare(self, batch: pa.RecordBatch) -> list[Pair | Lost]:
        """Return a Pair per row, or why there is none."""
        texts = batch.column(TEXT).to_pylist()
        known = list({text for text in texts if text is not None})
        tokens = dict(zip(known, self.clip.tokenize(known).numpy() if known else (), strict=True))
        rows = zip(batch.column(IMAGE).to_pylist(), batch.column(IMAGE_ERROR).to_pylist(), texts, strict=True)
        return [self._prepare_row(image, error, tokens.get(text)) for image, error, text in rows]

    def _prepare_row(self, image: bytes | None, error: str | None, token_L: np.ndarray | None) -> Pair | Lost:
        if token_L is None:
            return Lost(REASON_NULL_CAPTION, "the caption is null")
        if image is None:
            return Lost(error or REASON_UNREADABLE_IMAGE, "the tar has no image for this row")
        try:
            return Pair(np.asarray(self.shape(self.view(image))), token_L)  # it makes RGB itself, after resizing
        except (UnreadableImage, DetectorFailed) as lost:
            return Lost(lost.reason, str(lost))
        except MemoryError:
            raise
        except Exception as problem:  # the transform cannot take this mode or shape
            return Lost(REASON_UNREADABLE_IMAGE, f"{type(problem).__name__}: {problem}")

    def finish(self, batch: pa.RecordBatch, items: Sequence[Pair | Lost]) -> Scored:
        """Return float32 cosine in [-1, 1] and two float16 unit vectors per row; null, and a failure, for a Lost."""
        failures = tuple(Failure(i, *item) for i, item in enumerate(items) if isinstance(item, Lost))
        good = [i for i, item in enumerate(items) if isinstance(item, Pair)]
        image_ND, text_ND = self._embed([item for item in items if isinstance(item, Pair)])
        columns = [_spread(good, batch.num_rows, values) for values in (image_ND, text_ND)]
        cosines = np.full(batch.num_rows, np.nan, np.float32)
        cosines[good] = (image_ND * text_ND).sum(axis=1)
        return Scored((pa.array(cosines, from_pandas=True), *columns), failures)

    def _embed(self, pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
        """Return two float32 (N, D) arrays of unit vectors.  A GPU's lack of memory halves the forward passes."""
        pieces = [np.empty((2, 0, self.clip.embed_dim), np.float32)]
        done = 0
        while done < len(pairs):
            some = pairs[done : done + self.batch_size]
            piece = self._forward_if_it_fits(some)
            if piece is None:
                self._halve(len(some))
            else:
                pieces.append(piece)
                done += len(some)
        image_ND, text_ND = np.concatenate(pieces, axis=1)
        return image_ND, text_ND

    def _forward_if_it_fits(self, pairs: Sequence[Pair]) -> np.ndarray | None:
        """Return float32 (2, N, D), images then texts, or None when the GPU's memory does not hold so many."""
        import torch

        try:
            with torch.inference_mode():
                pixel_NHW3 = torch.from_numpy(np.stack([pair.pixel_HW3 for pair in pairs])).to(self.device)
                token_NL = torch.from_numpy(np.stack([pair.token_L for pair in pairs])).to(self.device)
                image_ND = self.clip.model.encode_image(self.scale(pixel_NHW3), normalize=True)
                text_ND = self.clip.model.encode_text(token_NL, normalize=True)
                return torch.stack([image_ND, text_ND]).float().cpu().numpy()
        except torch.OutOfMemoryError:
            if len(pairs) == 1:
                raise
            return None

    def _halve(self, num_pairs: int) -> None:
        import torch

        self.batch_size = num_pairs // 2
        log.warning("%s has no memory for %d pairs at once: going on with %d.", self.device, num_pairs, self.batch_size)
        torch.cuda.empty_cache()


def _spread(rows: list[int], num_rows: int, values_ND: np.ndarray) -> pa.Array:
    """Return a float16 list column (num_rows,) with the vectors at `rows` and null elsewhere."""
    dim = values_ND.shape[1]
    full = np.zeros((num_rows, dim), np.float16)
    full[rows] = values_ND
    absent = np.ones(num_rows, bool)
    absent[rows] = False
    flat = pa.array(full.reshape(-1), pa.float16())
    return pa.FixedSizeListArray.from_arrays(flat, dim, mask=pa.array(absent))
