"""The contrastive losses of CLIP and SigLIP.  B rows of this process, G rows of all processes, D dims.

Each process has the logits of its own rows against all rows (open_clip's local_loss and gather_with_grad); the mean of
their losses is the loss of the whole batch, and so is the mean of their gradients.  Alone, B is G.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from training.world import ALONE, World


def contrastive_loss(image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor, world: World = ALONE) -> Tensor:
    """Return the mean cross entropy of matching images to texts and texts to images, a scalar in nats.

    Radford et al. 2021, arXiv:2103.00020, figure 3.
    image_BD and text_BD are unit-norm; row b of one belongs to row b of the other; logit_scale is the factor itself.
    Source: open_clip 3.3.0 loss.py ClipLoss on one process, equal to it bit for bit.
    """
    owner_B = torch.arange(len(image_BD), device=image_BD.device) + world.rank * len(image_BD)
    per_image_BG = logit_scale * image_BD @ world.gather_rows(text_BD).T
    per_text_BG = logit_scale * text_BD @ world.gather_rows(image_BD).T
    return (cross_entropy(per_image_BG, owner_B) + cross_entropy(per_text_BG, owner_B)) / 2


def sigmoid_loss(
    image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor, logit_bias: Tensor, world: World = ALONE
) -> Tensor:
    """Return the sum over all pairs of -log sigmoid of whether they match, per row, a scalar in nats.

    Zhai et al. 2023, arXiv:2303.15343, algorithm 1.  Arguments as above; logit_bias is added to every logit.
    Source: open_clip 3.3.0 loss.py SigLipLoss on one process, equal to it bit for bit.
    """
    logit_BG = logit_scale * image_BD @ world.gather_rows(text_BD).T + logit_bias
    first, (num_own, num_all) = world.rank * len(image_BD), logit_BG.shape
    own_BG = torch.eye(num_own, num_all, device=image_BD.device, dtype=image_BD.dtype).roll(first, 1)
    return -logsigmoid((2 * own_BG - 1) * logit_BG).sum() / num_own
