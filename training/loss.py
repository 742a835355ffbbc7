"""The contrastive losses of CLIP and SigLIP, on one device.  B rows, D dims."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid


def contrastive_loss(image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor) -> Tensor:
    """Return the mean cross entropy of matching images to texts and texts to images, a scalar in nats.

    Radford et al. 2021, arXiv:2103.00020, figure 3.
    image_BD and text_BD are unit-norm; row b of one belongs to row b of the other; logit_scale is the factor itself.
    Source: open_clip 3.3.0 loss.py ClipLoss on one process, equal to it bit for bit.
    """
    owner_B = torch.arange(len(image_BD), device=image_BD.device)
    per_image_BB = logit_scale * image_BD @ text_BD.T
    per_text_BB = logit_scale * text_BD @ image_BD.T
    return (cross_entropy(per_image_BB, owner_B) + cross_entropy(per_text_BB, owner_B)) / 2


def sigmoid_loss(image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """Return the sum over all pairs of -log sigmoid of whether they match, per row, a scalar in nats.

    Zhai et al. 2023, arXiv:2303.15343, algorithm 1.  Arguments as above; logit_bias is added to every logit.
    Source: open_clip 3.3.0 loss.py SigLipLoss on one process, equal to it bit for bit.
    """
    logit_BB = logit_scale * image_BD @ text_BD.T + logit_bias
    sign_BB = 2 * torch.eye(len(image_BD), device=image_BD.device, dtype=image_BD.dtype) - 1
    return -logsigmoid(sign_BB * logit_BB).sum() / len(image_BD)
