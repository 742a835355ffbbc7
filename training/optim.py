"""Parameter groups, optimisers by name, the learning rate of a step and the clamp of the logit scale.

Groups, AdamW, schedules and clamp are as open_clip_train 3.3.0 has them.  timm's create_optimizer_v2 is gone round: it
makes groups of its own, and open_clip passes it eps=None and two betas where three are wanted.
"""

import math
from typing import Any

import torch
from torch import nn

from training.config import TrainConfig

MAX_LOG_SCALE = math.log(100)
"""The logits are scaled by at most 100 (Radford et al. 2021, section 2.5)."""
UNDECAYED_NAMES = ("bn", "ln", "bias", "logit_scale")
EMBEDDING_NAMES = ("embedding", "pos_embed", "cls_token")


def takes_weight_decay(name: str, parameter: torch.Tensor) -> bool:
    """Return whether a parameter decays: at least two dims and no norm, bias or logit scale by name.

    Position and token embeddings do decay.  Source: open_clip_train 3.3.0 main.py.
    """
    return parameter.ndim >= 2 and not any(part in name for part in UNDECAYED_NAMES)


def is_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Return whether a parameter maps vectors: no table of tokens or positions, no vector in the shape (1, 1, D)."""
    return parameter.numel() > max(parameter.shape) and not any(part in name for part in EMBEDDING_NAMES)


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimiser named, with two groups: without and with weight decay, in that order.

    AdamW is fused.  For muon a third group holds what decays but is no matrix in use; its AdamW takes that and vectors.
    LAMB's own clipping at norm 1 is off: grad_clip_norm says whether there is any.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    plain = [p for name, p in named if not takes_weight_decay(name, p)]
    decayed = [(name, p) for name, p in named if takes_weight_decay(name, p)]
    groups: list[dict[str, Any]] = [{"params": plain, "weight_decay": 0.0}]
    if config.optimizer == "muon":
        groups[0]["use_fallback"] = True
        tables = [p for name, p in decayed if not is_matrix(name, p)]
        groups.append({"params": tables, "weight_decay": config.weight_decay, "use_fallback": True})
        decayed = [(name, p) for name, p in decayed if is_matrix(name, p)]
    groups.append({"params": [p for _, p in decayed], "weight_decay": config.weight_decay})
    shared: dict[str, Any] = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2)}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **shared, eps=config.eps, fused=True)
    from timm.optim import Adan, Lamb, Lion, Muon

    if config.optimizer == "lion":
        return Lion(groups, **shared)  # type: ignore[no-any-return]
    if config.optimizer == "lamb":
        return Lamb(groups, **shared, eps=config.eps, max_grad_norm=None)  # type: ignore[no-any-return]
    if config.optimizer == "muon":
        return Muon(groups, **shared, eps=config.eps)  # type: ignore[no-any-return]
    three = (config.beta1, config.beta2, config.beta3)
    return Adan(groups, lr=config.learning_rate, betas=three, eps=config.eps)  # type: ignore[no-any-return]


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Return the learning rate of a step counted from 0: linear warmup, then cosine to 0 or constant.

    Source: open_clip_train 3.3.0 scheduler.py cosine_lr and const_lr, equal to them bit for bit.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    passed, total = step - config.warmup_steps, config.num_steps - config.warmup_steps
    return 0.5 * (1 + math.cos(math.pi * passed / total)) * config.learning_rate


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


@torch.no_grad()
def clamp_logit_scale(model: nn.Module) -> None:
    """Keep the log of the logit scale in [0, ln 100]."""
    model.logit_scale.clamp_(0, MAX_LOG_SCALE)  # type: ignore[operator]
