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
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from torchvision.transforms import Compose, Normalize, ToTensor
from tqdm import tqdm

from eval38.config import Precision
from eval38.rows import LabelledImage, LostImage
from pipeline.clip_model import OpenedClip
from pipeline.errors import ModelError
from pipeline.images import UnreadableImage, decode_image
from pipeline.schemas import REASON_UNREADABLE_IMAGE

PIECE_IMAGES = 32
"""Images one thread decodes at a time."""
NUM_BATCHES_AHEAD = 3
PROMPTS_PER_FORWARD = 512

Geometry = Callable[[Image.Image], Image.Image]
"""Resize and crop, PIL to PIL."""


@dataclass(frozen=True, slots=True)
class ImageBatch:
    """Decoded images of consecutive rows, and the rows among them that were lost."""

    image_NHW3: Tensor
    """uint8; empty when all rows were lost."""
    label_N: Tensor
    """int64."""
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
        return normalize(features.float(), dim=-1)


def split_transform(transform: Any) -> tuple[Geometry, Callable[[Tensor], Tensor]]:
    """Return a model's evaluation transform as its PIL part and its scaling of float images in [0, 1].

    Raises ModelError unless it ends in ToTensor and Normalize, as every open_clip evaluation transform does.
    """
    steps = list(getattr(transform, "transforms", []))
    if len(steps) < 2 or not isinstance(steps[-2], ToTensor) or not isinstance(steps[-1], Normalize):
        raise ModelError(f"the model's evaluation transform does not end in ToTensor and Normalize: {transform}.")
    return Compose(steps[:-2]), steps[-1]


def build_class_vectors(text_MD: Tensor, place_CT: Tensor) -> Tensor:
    """Return unit class vectors (C, D): the mean of a class's unit prompt vectors, made unit again.

    place_CT[c, t] (int64) is the row of text_MD for class c in template t.
    Source: LAION-AI/CLIP_benchmark at 48de38c, zero_shot_classifier; float32 where DataComp runs it in float16.
    """
    return normalize(text_MD[place_CT].mean(dim=1), dim=-1)


def decode_batches(
    rows: Iterable[LabelledImage | LostImage], geometry: Geometry, *, batch_size: int, num_threads: int | None = None
) -> Iterator[ImageBatch]:
    """Yield the rows in order, decoded in batches of `batch_size` rows; a lost row makes its batch smaller.

    One thread reads and `num_threads` (default: one per core) decode, at most three batches ahead.
    """
    source = iter(rows)
    with ThreadPoolExecutor(num_threads or count_cores()) as decoders, ThreadPoolExecutor(1) as reader:

        def read_batch() -> list[Future[ImageBatch]]:
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


def decode_rows(rows: Sequence[LabelledImage | LostImage], geometry: Geometry) -> ImageBatch:
    """Return the rows decoded, in order; one that cannot be is among the lost."""
    images, labels, lost = [], [], list[LostImage]()
    for row in rows:
        if isinstance(row, LostImage):
            lost.append(row)
        elif isinstance(decoded := decode_row(row, geometry), LostImage):
            lost.append(decoded)
        else:
            images.append(decoded)
            labels.append(row.label)
    image_NHW3 = torch.from_numpy(np.stack(images)) if images else torch.empty(0, dtype=torch.uint8)
    return ImageBatch(image_NHW3, torch.tensor(labels, dtype=torch.int64), tuple(lost))


def decode_row(row: LabelledImage, geometry: Geometry) -> "np.ndarray[Any, np.dtype[np.uint8]] | LostImage":
    """Return uint8 pixels (H, W, 3), turned to RGB before they are resized, or why there are none.

    CLIP_benchmark's webdatasets decode to RGB first, too; open_clip's own transform resizes first.
    """
    try:
        return np.array(geometry(decode_image(row.content)))
    except UnreadableImage as error:
        return LostImage(row.name, REASON_UNREADABLE_IMAGE, str(error))
    except Exception as error:  # the transform cannot take this mode or shape
        return LostImage(row.name, REASON_UNREADABLE_IMAGE, f"{type(error).__name__}: {error}")


def join_batches(pieces: Sequence[ImageBatch]) -> ImageBatch:
    """Return consecutive batches as one."""
    images = [piece.image_NHW3 for piece in pieces if len(piece.label_N)]
    return ImageBatch(
        torch.cat(images) if images else torch.empty(0, dtype=torch.uint8),
        torch.cat([piece.label_N for piece in pieces]),
        tuple(lost for piece in pieces for lost in piece.lost),
    )
