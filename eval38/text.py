"""Prompts -> features, each run through the text tower only as far as it reaches.

In a causal tower that pools at the end token nothing after that token counts (training/text.py, can_cut), so prompts of
one length go through it together without the padding behind them: of ImageNet's 80,000 prompts the mean has 9.6 of 77
tokens.  The features are the same but for rounding, and as a prompt is cut by its own length alone, whatever other
prompts there are never moves them.  Other towers get the full length.

Shapes: M prompts, B of them in a batch, L tokens, D embedding dims.
"""

from typing import Any

import torch
from torch import Tensor

from training.text import can_cut


class _TextSide(torch.nn.Module):
    """A model as a module whose forward encodes text, which is what functional_call needs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_BL: Tensor) -> Tensor:
        text_BD: Tensor = self.model.encode_text(token_BL)
        return text_BD


def group_prompts(model: Any, token_ML: Tensor) -> list[Tensor]:
    """Return the prompts that are encoded together, as int64 (B,) rows: those of one length, or all if none is cut."""
    if not can_cut(model):
        return [torch.arange(len(token_ML))]
    length_M = measure_lengths(token_ML)
    return [(length_M == length).nonzero()[:, 0] for length in sorted(set(length_M.tolist()))]


def measure_lengths(token_ML: Tensor) -> Tensor:
    """Return how many tokens of each prompt come before its padding: int64 (M,), at least 1.

    Padding is 0 and so is the token of `!`; the end token is not, so the last other value ends a prompt.  Where padding
    is another number this is the full length.
    """
    place_L = torch.arange(1, token_ML.shape[1] + 1, device=token_ML.device)
    return ((token_ML != 0) * place_L).amax(dim=1).clamp(min=1)


def encode_text(model: Any, token_BL: Tensor) -> Tensor:
    """Return what model.encode_text does (B, D), without the padding that all of the batch have, where that is safe."""
    if not can_cut(model):
        return model.encode_text(token_BL)  # type: ignore[no-any-return]
    length = int(measure_lengths(token_BL).max())
    tower, prefix = (model.text, "model.text") if hasattr(model, "text") else (model, "model")
    shorter = {
        f"{prefix}.positional_embedding": tower.positional_embedding[:length],
        f"{prefix}.attn_mask": tower.attn_mask[:length, :length],
    }
    return torch.func.functional_call(_TextSide(model), shorter, (token_BL[:, :length],))  # type: ignore[no-any-return]
