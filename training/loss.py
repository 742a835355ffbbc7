"""The contrastive loss of CLIP (Radford et al. 2021, arXiv:2103.00020, figure 3), on one device.  B rows, D dims."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def contrastive_loss(image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor) -> Tensor:
    """Return the mean cross entropy of matching images to texts and texts to images, a scalar in nats.

    image_BD and text_BD are unit-norm; row b of one belongs to row b of the other; logit_scale is the factor itself.
    Source: open_clip 3.3.0 loss.py ClipLoss on one process, equal to it bit for bit.
    """
    owner_B = torch.arange(len(image_BD), device=image_BD.device)
    per_image_BB = logit_scale * image_BD @ text_BD.T
    per_text_BB = logit_scale * text_BD @ image_BD.T
    return (cross_entropy(per_image_BB, owner_B) + cross_entropy(per_text_BB, owner_B)) / 2
