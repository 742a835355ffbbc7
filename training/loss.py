"""The contrastive losses of CLIP and SigLIP.  B rows of this process, G rows of all, R rows at once, D dims.

Each process has the logits of its own rows against all rows (open_clip's local_loss and gather_with_grad); the mean of
their losses is the loss of the whole batch, and so is the mean of their gradients.  Alone, B is G.
Where B x G logits are many they are made R rows at a time, and again in the backward pass; the loss is then the same to
rounding, and memory that of one piece.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid
from torch.utils.checkpoint import checkpoint

from training.world import ALONE, World

MOST_LOGITS = 2**26
"""Made at once: 256 MiB in float32, all of a batch of 8,192 on one device."""


def contrastive_loss(image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor, world: World = ALONE) -> Tensor:
    """Return the mean cross entropy of matching images to texts and texts to images, a scalar in nats.

    Radford et al. 2021, arXiv:2103.00020, figure 3.
    image_BD and text_BD are unit-norm; row b of one belongs to row b of the other; logit_scale is the factor itself.
    Source: open_clip 3.3.0 loss.py ClipLoss on one process, equal to it bit for bit up to MOST_LOGITS.
    """

    def measure(rows_RD: Tensor, all_GD: Tensor, owner_R: Tensor) -> Tensor:
        return cross_entropy(logit_scale * rows_RD @ all_GD.T, owner_R, reduction="sum")

    per_image = _sum_over_rows(measure, image_BD, world.gather_rows(text_BD), world)
    per_text = _sum_over_rows(measure, text_BD, world.gather_rows(image_BD), world)
    return (per_image / len(image_BD) + per_text / len(image_BD)) / 2


def sigmoid_loss(
    image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor, logit_bias: Tensor, world: World = ALONE
) -> Tensor:
    """Return the sum over all pairs of -log sigmoid of whether they match, per row, a scalar in nats.

    Zhai et al. 2023, arXiv:2303.15343, algorithm 1.  Arguments as above; logit_bias is added to every logit.
    Source: open_clip 3.3.0 loss.py SigLipLoss on one process, equal to it bit for bit up to MOST_LOGITS.
    """

    def measure(rows_RD: Tensor, all_GD: Tensor, owner_R: Tensor) -> Tensor:
        logit_RG = logit_scale * rows_RD @ all_GD.T + logit_bias
        sign_RG = torch.full_like(logit_RG, -1, dtype=rows_RD.dtype).scatter_(1, owner_R[:, None], 1)
        return -logsigmoid(sign_RG * logit_RG).sum()

    return _sum_over_rows(measure, image_BD, world.gather_rows(text_BD), world) / len(image_BD)


def _sum_over_rows(
    measure: Callable[[Tensor, Tensor, Tensor], Tensor], rows_BD: Tensor, all_GD: Tensor, world: World
) -> Tensor:
    """Return the sum of measure(rows, all rows, which of them belongs to each), in pieces where they are many."""
    owner_B = torch.arange(len(rows_BD), device=rows_BD.device) + world.rank * len(rows_BD)
    if len(rows_BD) * len(all_GD) <= MOST_LOGITS:
        return measure(rows_BD, all_GD, owner_B)
    num_rows = max(1, MOST_LOGITS // len(all_GD))
    pieces = zip(torch.split(rows_BD, num_rows), torch.split(owner_B, num_rows), strict=True)
    again = functools.partial(checkpoint, measure, use_reentrant=False, preserve_rng_state=False)
    sums = [again(rows_RD, all_GD, owner_R) for rows_RD, owner_R in pieces]
    return torch.stack(sums).sum()
