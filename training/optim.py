"""AdamW groups, the learning rate of a step and the clamp of the logit scale, all as open_clip_train 3.3.0 has them."""

import math

import torch
from torch import nn

from training.config import TrainConfig

MAX_LOG_SCALE = math.log(100)
"""The logits are scaled by at most 100 (Radford et al. 2021, section 2.5)."""
UNDECAYED_NAMES = ("bn", "ln", "bias", "logit_scale")


def takes_weight_decay(name: str, parameter: torch.Tensor) -> bool:
    """Return whether a parameter decays: at least two dims and no norm, bias or logit scale by name.

    Position and token embeddings do decay.  Source: open_clip_train 3.3.0 main.py.
    """
    return parameter.ndim >= 2 and not any(part in name for part in UNDECAYED_NAMES)


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW (fused) with two groups: without and with weight decay, in that order."""
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[takes_weight_decay(name, parameter)].append(parameter)
    return torch.optim.AdamW(
        [{"params": groups[False], "weight_decay": 0.0}, {"params": groups[True], "weight_decay": config.weight_decay}],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Return the learning rate of a step counted from 0: linear warmup, then cosine to 0.

    Source: open_clip_train 3.3.0 scheduler.py cosine_lr, equal to it bit for bit.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
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
