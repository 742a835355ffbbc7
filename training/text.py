"""Captions -> features by a model's own text tower, run for each caption about as far as it reaches.

In a causal tower that pools at the end token nothing after that token counts, so captions of like length go through it
together without the padding behind them; features and gradients are the same to rounding.  (To cut all to the longest
of a batch would save little: of 256 captions of LAION-400M one fills the 77 tokens, while half have 13 or fewer.)
open_clip 3.3's towers add positions and a mask of full length, so for the call these two are replaced by their
beginnings; gradients reach the parameter itself.  B rows, L tokens, D embedding dims.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import ConfigError

POOLS = ("argmax", "eos")
"""open_clip's names for pooling at the end token."""
STEP_TOKENS = 8
"""Lengths are rounded up to this; at 77 tokens a batch has at most ten groups."""
MEASURED = 4096
"""Captions that tell the mean length of all."""


def can_cut(model: Any) -> bool:
    """Return whether the text features do not depend on what follows the end token.

    They do where the tower is not causal, adds a class token, pools elsewhere, or is another library's.
    """
    tower = getattr(model, "text", model)
    pool = getattr(tower, "pool_type", getattr(tower, "text_pool_type", None))
    mask_LL, position_LD = getattr(tower, "attn_mask", None), getattr(tower, "positional_embedding", None)
    if mask_LL is None or position_LD is None or getattr(tower, "cls_emb", None) is not None:
        return False
    return pool in POOLS and len(mask_LL) == len(position_LD)


def check_cut(model: Any, name: str) -> None:
    """Raise ConfigError for a model whose captions cannot be cut."""
    if not can_cut(model):
        raise ConfigError(f"cut_text: the text tower of {name} looks at padding, so leave it out.")


def encode_text(model: Any, token_BL: Tensor) -> Tensor:
    """Return unit-norm (B, D), as model.encode_text does, on the model's device; see can_cut.

    The tokens are best still in main memory: of those on a GPU the lengths would have to be waited for.
    """
    device = model.logit_scale.device
    groups = group_by_length(token_BL)
    pieces = [_encode_cut(model, token_BL[row_G, :length].to(device, non_blocking=True)) for row_G, length in groups]
    place_B = torch.cat([row_G for row_G, _ in groups]).argsort()
    return torch.cat(pieces).index_select(0, place_B.to(device))


def group_by_length(token_BL: Tensor) -> list[tuple[Tensor, int]]:
    """Return (rows, tokens to keep) for captions of like length; every row is in one group.

    Padding is 0 and so is the token of `!`; the end token is not, so the last other value ends a caption.
    """
    most = token_BL.shape[1]
    end_B = ((token_BL != 0) * torch.arange(1, most + 1, device=token_BL.device)).amax(1)
    length_B = (-(-end_B // STEP_TOKENS) * STEP_TOKENS).clamp(STEP_TOKENS, most)
    return [((length_B == length).nonzero()[:, 0], length) for length in sorted(set(length_B.tolist()))]


def share_of_tokens(token_UL: np.ndarray) -> float:
    """Return how many of all tokens `encode_text` runs the tower on, measured on up to twice MEASURED captions."""
    token_ML = torch.from_numpy(token_UL[:: max(1, len(token_UL) // MEASURED)].astype(np.int64))
    return sum(len(row_G) * length for row_G, length in group_by_length(token_ML)) / token_ML.numel()


def _encode_cut(model: Any, token_BL: Tensor) -> Tensor:
    """Return unit-norm (B, D) of captions that may lack padding."""
    tower = getattr(model, "text", model)
    length = token_BL.shape[1]
    shorter = {
        "positional_embedding": tower.positional_embedding[:length],
        "attn_mask": tower.attn_mask[:length, :length],
    }
    if tower is not model:
        text_BD = torch.func.functional_call(tower, shorter, (token_BL,))
        return torch.nn.functional.normalize(text_BD, dim=-1)
    made = torch.func.functional_call(model, shorter, (None, token_BL))
    return made["text_features"] if isinstance(made, dict) else made[1]  # type: ignore[no-any-return]
