"""Held-out retrieval: does an image find its caption among those of the rows that training left out, and back?

An image is right when the caption nearest to it reads as its own; a caption, when the nearest image has that caption.
Equal captions are one text, as a pool of made captions has many.
U distinct captions, N images, D dims, L tokens, H and W pixels.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from pipeline.clip_model import OpenedClip, open_model, pick_device, split_transform
from pipeline.errors import StageError
from pipeline.images import UnreadableImage, open_image
from training.captioned import TrainSet, as_sets, read_sets, split_heldout
from training.config import TrainConfig
from training.index import RowIndex, TarReader

PER_FORWARD = 256


class Recall(NamedTuple):
    """Recall@1, each in [0, 1]."""

    image_to_text: float
    text_to_image: float
    pairs: int
    """Pairs measured: images that could be read."""
    captions: int
    """Different ones among them."""

    @property
    def mean(self) -> float:
        """Of both directions."""
        return (self.image_to_text + self.text_to_image) / 2


def measure_heldout(
    config: TrainConfig,
    *,
    data: str | Sequence[TrainSet],
    models: Sequence[str],
    device: str = "auto",
    quiet: bool = False,
) -> list[Recall]:
    """Return each model's recall on the rows of `data` that a run of `config` leaves out.

    Raises StageError when not one of their images can be read.
    """
    recalls = []
    for model in tqdm(models, desc="held-out retrieval", unit="model", disable=quiet):
        opened = open_model(model, device=pick_device(device))
        index = read_sets(as_sets(data), tokenize=opened.tokenize, quiet=True)
        recalls.append(measure_recall(opened, split_heldout(index, config.heldout, seed=config.seed)[1]))
    return recalls


def measure_recall(opened: OpenedClip, index: RowIndex) -> Recall:
    """Return the recall@1 of all rows of an index.  Raises StageError when none of its images can be read."""
    shape, scale = split_transform(opened.eval_transform)
    device = opened.model.logit_scale.device
    rows, pixel_NHW3 = _read_images(index, shape)
    used_U, caption_N = np.unique(index.caption_N[rows], return_inverse=True)
    token_UL = torch.from_numpy(index.token_UL[used_U].astype(np.int64))
    with torch.inference_mode():
        pixels, tokens = torch.split(pixel_NHW3, PER_FORWARD), torch.split(token_UL, PER_FORWARD)
        image_ND = torch.cat([opened.model.encode_image(scale(p.to(device)), normalize=True) for p in pixels])
        text_UD = torch.cat([opened.model.encode_text(t.to(device), normalize=True) for t in tokens])
        cosine_NU = (image_ND @ text_UD.T).cpu().numpy()
    return Recall(
        image_to_text=float((cosine_NU.argmax(axis=1) == caption_N).mean()),
        text_to_image=float((caption_N[cosine_NU.argmax(axis=0)] == np.arange(len(used_U))).mean()),
        pairs=len(rows),
        captions=len(used_U),
    )


def _read_images(index: RowIndex, shape: Callable[[Any], Any]) -> tuple[list[int], torch.Tensor]:
    """Return the rows whose image can be read, and uint8 (N, H, W, 3)."""
    rows, images = [], []
    with closing(TarReader(index.urls)) as reader:
        for row in range(index.num_rows):
            place = (int(a[row]) for a in (index.tar_N, index.offset_N, index.size_N))
            try:
                images.append(np.asarray(shape(open_image(reader.read(*place)))))
            except UnreadableImage:
                continue
            rows.append(row)
    if not rows:
        raise StageError(f"none of {index.num_rows} held-out images can be read. Check the shards.")
    return rows, torch.from_numpy(np.stack(images))
