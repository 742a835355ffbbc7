"""Images and prompts -> unit vectors; reading and decoding run ahead in threads while the model works.

Shapes: N images, M prompts, C classes, T templates, D dims; H x W pixels.  Vectors are float32 and unit norm.

Threads only decode, resize and crop (uint8); the model's own scaling to floats is done for a whole batch on the
device, with the operations and so the bits of the model's transform.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from torchvision.transforms import Compose, Normalize, ToTensor
from tqdm import tqdm

from eval38.config import Precision
from eval38.features import FeatureCache, Seen, read_features, write_features
from eval38.rows import PLACEHOLDER, EvalSet, ImageRow, LostImage
from pipeline.clip_model import OpenedClip
from pipeline.errors import EvalError, ModelError
from pipeline.images import UnreadableImage, decode_image
from pipeline.schemas import REASON_UNREADABLE_IMAGE

PIECE_IMAGES = 32
"""Images one thread decodes at a time."""
NUM_BATCHES_AHEAD = 3
PROMPTS_PER_FORWARD = 512

Geometry = Callable[[Image.Image], Image.Image]
"""Resize and crop, PIL to PIL."""


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ImageBatch(Generic[T]):
    """Decoded images of consecutive rows, and the rows among them that were lost."""

    image_NHW3: Tensor
    """uint8; empty when all rows were lost."""
    truths: tuple[T, ...]
    """N long: what is known of each image."""
    lost: tuple[LostImage, ...]


class Encoder:
    """An opened model on its device, with one number format."""

    def __init__(self, opened: OpenedClip, *, device: str, precision: Precision) -> None:
        self.opened, self.device, self.precision = opened, device, precision
        self.geometry, self.scale = split_transform(opened.eval_transform)

    def encode_images(self, image_NHW3: Tensor) -> Tensor:
        """Return unit vectors (N, D) of decoded uint8 images, on the device."""
        image_N3HW = image_NHW3.to(self.device).permute(0, 3, 1, 2).contiguous().float().div(255)
        return self._run(self.opened.model.encode_image, self.scale(image_N3HW))

    def encode_prompts(self, prompts: Sequence[str], *, quiet: bool = False) -> Tensor:
        """Return unit vectors (M, D) in the order of the prompts, on the CPU."""
        text_parts = []
        with tqdm(total=len(prompts), unit="prompt", desc="prompts", disable=quiet) as progress:
            for start in range(0, len(prompts), PROMPTS_PER_FORWARD):
                part = list(prompts[start : start + PROMPTS_PER_FORWARD])
                tokens = self.opened.tokenize(part).to(self.device)
                text_parts.append(self._run(self.opened.model.encode_text, tokens).cpu())
                progress.update(len(part))
        return torch.cat(text_parts)

    def _run(self, encode: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        reduced = self.precision == "bf16"
        with torch.inference_mode(), torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=reduced):
            features = encode(inputs)
        vector_ND = normalize(features.float(), dim=-1)
        if not bool(vector_ND.isfinite().all()):
            raise ModelError(f"the model gives vectors that are not finite in {self.precision}: did training diverge?")
        return vector_ND


class Embedder:
    """An encoder that reads each prompt once, whichever tasks ask for it, and sees each set in one pass."""

    def __init__(
        self, encoder: Encoder, *, batch_size: int, quiet: bool = False, features: FeatureCache | None = None
    ) -> None:
        self.encoder, self.batch_size, self.quiet, self.features = encoder, batch_size, quiet, features
        self._places: dict[str, int] = {}
        self._text_MD = torch.empty(0, encoder.opened.embed_dim)

    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """Return unit vectors (M, D) of the prompts, which may repeat, on the CPU; known ones are not encoded again."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._places]
        if new:
            self._places |= {prompt: place for place, prompt in enumerate(new, start=len(self._places))}
            self._text_MD = torch.cat([self._text_MD, self.encoder.encode_prompts(new, quiet=self.quiet)])
        return self._text_MD[[self._places[prompt] for prompt in prompts]]

    def embed_classes(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Return unit class vectors (C, D): the mean of a class's unit prompt vectors, made unit again.

        Source: LAION-AI/CLIP_benchmark at 48de38c, zero_shot_classifier; float32 where DataComp runs it in float16.
        """
        text_CTD = self.embed_texts(spell_prompts(classes, templates)).view(len(classes), len(templates), -1)
        return normalize(text_CTD.mean(dim=1), dim=-1)

    def see_set(
        self, rows: Iterable[ImageRow[T] | LostImage], eval_set: EvalSet, *, total: int | None = None
    ) -> Seen[T]:
        """Return what `see` does of a set's rows, from the feature cache where they are there; else keep them there.

        `total`: rows expected, where it is not the set's number of images.
        """
        if self.features and (kept := read_features(self.features, eval_set)):
            return kept
        task = eval_set.task
        seen = self.see(rows, name=task.name, total=task.images if total is None else total)
        if self.features:
            write_features(self.features, eval_set, seen)
        return seen

    def see(self, rows: Iterable[ImageRow[T] | LostImage], *, name: str, total: int | None = None) -> Seen[T]:
        """Return the vectors of the rows' images with what is known of them, and the rows that were lost.

        `name` and `total` (rows expected) are for the progress bar and messages.
        Raises EvalError when not one image can be read.
        """
        vectors, truths, lost = list[Tensor](), list[T](), list[LostImage]()
        with tqdm(total=total, unit="image", desc=name, disable=self.quiet) as progress:
            for batch in decode_batches(rows, self.encoder.geometry, batch_size=self.batch_size):
                lost += batch.lost
                truths += batch.truths
                if batch.truths:
                    vectors.append(self.encoder.encode_images(batch.image_NHW3).cpu())
                progress.update(len(batch.truths) + len(batch.lost))
        if not vectors:
            why = f"; the first: {lost[0].name}: {lost[0].message}" if lost else ""
            raise EvalError(f"{name}: none of {len(lost)} images could be read{why}.")
        return Seen(torch.cat(vectors), tuple(truths), tuple(lost))


def spell_prompts(classes: Iterable[str], templates: Sequence[str]) -> list[str]:
    """Return the C * T prompts, by class and then template."""
    return [template.replace(PLACEHOLDER, name) for name in classes for template in templates]


def split_transform(transform: Any) -> tuple[Geometry, Callable[[Tensor], Tensor]]:
    """Return a model's evaluation transform as its PIL part and its scaling of float images in [0, 1].

    Raises ModelError unless it ends in ToTensor and Normalize, as every open_clip evaluation transform does.
    """
    steps = list(getattr(transform, "transforms", []))
    if len(steps) < 2 or not isinstance(steps[-2], ToTensor) or not isinstance(steps[-1], Normalize):
        raise ModelError(f"the model's evaluation transform does not end in ToTensor and Normalize: {transform}.")
    return Compose(steps[:-2]), steps[-1]


def decode_batches(
    rows: Iterable[ImageRow[T] | LostImage], geometry: Geometry, *, batch_size: int, num_threads: int | None = None
) -> Iterator[ImageBatch[T]]:
    """Yield the rows in order, decoded in batches of `batch_size` rows; a lost row makes its batch smaller.

    One thread reads and `num_threads` (default: one per core) decode, at most three batches ahead.
    """
    source = iter(rows)
    with ThreadPoolExecutor(num_threads or count_cores()) as decoders, ThreadPoolExecutor(1) as reader:

        def read_batch() -> list[Future[ImageBatch[T]]]:
            batch = list(islice(source, batch_size))
            pieces = [batch[start : start + PIECE_IMAGES] for start in range(0, len(batch), PIECE_IMAGES)]
            return [decoders.submit(decode_rows, piece, geometry) for piece in pieces]

        ahead = deque(reader.submit(read_batch) for _ in range(NUM_BATCHES_AHEAD))
        while pieces := ahead.popleft().result():
            ahead.append(reader.submit(read_batch))
            yield join_batches([piece.result() for piece in pieces])


def count_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decode_rows(rows: Sequence[ImageRow[T] | LostImage], geometry: Geometry) -> ImageBatch[T]:
    """Return the rows decoded, in order; one that cannot be is among the lost."""
    images, truths, lost = [], list[T](), list[LostImage]()
    for row in rows:
        if isinstance(row, LostImage):
            lost.append(row)
        elif isinstance(decoded := decode_row(row, geometry), LostImage):
            lost.append(decoded)
        else:
            images.append(decoded)
            truths.append(row.truth)
    image_NHW3 = torch.from_numpy(np.stack(images)) if images else torch.empty(0, dtype=torch.uint8)
    return ImageBatch(image_NHW3, tuple(truths), tuple(lost))


def decode_row(row: ImageRow[Any], geometry: Geometry) -> "np.ndarray[Any, np.dtype[np.uint8]] | LostImage":
    """Return uint8 pixels (H, W, 3), turned to RGB before they are resized, or why there are none.

    CLIP_benchmark's webdatasets decode to RGB first, too; open_clip's own transform resizes first.
    """
    try:
        return np.array(geometry(decode_image(row.content)))
    except UnreadableImage as error:
        return LostImage(row.name, REASON_UNREADABLE_IMAGE, str(error))
    except Exception as error:  # the transform cannot take this mode or shape
        return LostImage(row.name, REASON_UNREADABLE_IMAGE, f"{type(error).__name__}: {error}")


def join_batches(pieces: Sequence[ImageBatch[T]]) -> ImageBatch[T]:
    """Return consecutive batches as one."""
    images = [piece.image_NHW3 for piece in pieces if piece.truths]
    return ImageBatch(
        torch.cat(images) if images else torch.empty(0, dtype=torch.uint8),
        tuple(truth for piece in pieces for truth in piece.truths),
        tuple(lost for piece in pieces for lost in piece.lost),
    )
