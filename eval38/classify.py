"""Plain zero-shot classification: an image's class is the one whose vector is nearest.

Shapes: N images, C classes, T templates, D dims, K best classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from eval38.embed import Encoder, build_class_vectors, decode_batches
from eval38.metrics import measure_classification
from eval38.rows import PLACEHOLDER, EvalSet, LostImage, read_images
from pipeline.errors import EvalError

NUM_BEST = 5
"""Classes kept of each image's ranking; acc5 needs no more."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one task gave."""

    metrics: dict[str, float | None]
    num_images: int
    """Images the metrics are over."""
    lost: tuple[LostImage, ...]


def spell_prompts(eval_set: EvalSet) -> list[list[str]]:
    """Return the C x T prompts of a set, by class and then template."""
    return [[t.replace(PLACEHOLDER, name) for t in eval_set.templates] for name in eval_set.classes]


def rank_classes(image_ND: Tensor, class_CD: Tensor) -> Tensor:
    """Return the min(5, C) nearest classes of each image, nearest first: int64 (N, K).

    Both are unit vectors.  Equal cosines come in torch.topk's order, as in CLIP_benchmark.
    """
    cosine_NC = image_ND @ class_CD.T
    return cosine_NC.topk(min(NUM_BEST, len(class_CD)), dim=1).indices


def classify(
    eval_set: EvalSet,
    encoder: Encoder,
    text_MD: Tensor,
    places: Mapping[str, int],
    *,
    batch_size: int,
    quiet: bool = False,
) -> Outcome:
    """Return the metrics of a classification set; text_MD[places[prompt]] is the unit vector of a prompt.

    Raises EvalError for a label that is no class, or when not one image can be read.
    """
    place_CT = torch.tensor([[places[prompt] for prompt in row] for row in spell_prompts(eval_set)])
    class_CD = build_class_vectors(text_MD, place_CT).to(encoder.device)
    tops, labels, lost = [], [], list[LostImage]()
    rows = read_images(eval_set)
    with tqdm(total=eval_set.task.images, unit="image", desc=eval_set.task.name, disable=quiet) as progress:
        for batch in decode_batches(rows, encoder.geometry, batch_size=batch_size):
            lost += batch.lost
            if len(batch.label_N):
                tops.append(rank_classes(encoder.encode_images(batch.image_NHW3), class_CD).cpu())
                labels.append(batch.label_N)
            progress.update(len(batch.label_N) + len(batch.lost))
    if not tops:
        why = f"; the first: {lost[0].name}: {lost[0].message}" if lost else ""
        raise EvalError(f"{eval_set.task.name}: none of {len(lost)} images could be read{why}.")
    top_NK, label_N = torch.cat(tops), torch.cat(labels)
    return Outcome(measure_classification(top_NK, label_N, num_classes=len(class_CD)), len(label_N), tuple(lost))
