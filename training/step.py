"""One batch -> one step of the optimiser, whole or in parts (gradient caching, Gao et al. 2021, arXiv:2101.06983).

In parts: the features of all parts without gradients, the loss of the whole batch and its gradients at the features,
then each part once more with gradients, from the same random state, so that dropout, drop path and patch dropout are
the same in both passes.  Memory is that of one part; loss and gradients are those of the whole batch.
B rows in the batch, C = 3 channels, H and W pixels, L tokens, D embedding dims.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from training.checkpoint import RunState
from training.config import TrainConfig
from training.data import Batch
from training.images import Crop, normalise
from training.loss import contrastive_loss, sigmoid_loss
from training.optim import clamp_logit_scale, learning_rate_at, set_learning_rate
from training.order import step_seed
from training.text import encode_text

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def take_step(
    config: TrainConfig, state: RunState, batch: Batch, crop: Crop, *, with_norm: bool
) -> tuple[Tensor, Tensor | None]:
    """Train on one batch; return its loss and, if asked or clipping, the gradient norm, both still on the device.

    In fp16 a step whose gradients overflow leaves the weights alone and lowers the loss scale (GradScaler).
    """
    model, optimizer, scaler = state.model, state.optimizer, state.scaler
    set_learning_rate(optimizer, learning_rate_at(state.step, config))
    optimizer.zero_grad(set_to_none=True)
    image_BCHW, token_BL = move_batch(batch, crop, model.logit_scale.device)
    if config.cut_text:
        token_BL = batch.token_BL.long()  # moved when cut
    run = backward_whole if config.accum_freq == 1 else backward_in_parts
    loss = run(config, state, image_BCHW, token_BL)
    norm = None
    if with_norm or config.grad_clip_norm is not None:
        scaler.unscale_(optimizer)
        limit = math.inf if config.grad_clip_norm is None else config.grad_clip_norm
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    scaler.step(optimizer)
    scaler.update()
    clamp_logit_scale(model)
    state.step += 1
    state.is_seen_N[batch.row_B] = True
    state.is_unreadable_N[batch.unreadable] = True
    state.num_unreadable_draws += len(batch.unreadable)
    return loss, norm


def move_batch(batch: Batch, crop: Crop, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return float32 images (B, C, H, W) and int64 tokens (B, L) on the device."""
    image_BCHW = normalise(batch.pixel_BHWC.to(device, non_blocking=True), crop)
    return image_BCHW, batch.token_BL.to(device, non_blocking=True).long()


def backward_whole(config: TrainConfig, state: RunState, image_BCHW: Tensor, token_BL: Tensor) -> Tensor:
    """Add a batch's gradients to the parameters; return its loss, detached."""
    torch.manual_seed(step_seed(config.seed, state.step))
    with _autocast(config, image_BCHW):
        image_BD, text_BD = _encode(config, state.model, image_BCHW, token_BL)
        loss = measure_loss(config, state.model, image_BD, text_BD)
    with _still_statistics(state.model):
        state.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def backward_in_parts(config: TrainConfig, state: RunState, image_BCHW: Tensor, token_BL: Tensor) -> Tensor:
    """Do the same in config.accum_freq parts of equal size.

    Batch norm normalises each part by itself; its running statistics see each part once.
    """
    model, seed = state.model, step_seed(config.seed, state.step)
    parts = list(zip(image_BCHW.chunk(config.accum_freq), token_BL.chunk(config.accum_freq), strict=True))
    cached = []
    with torch.no_grad(), _still_statistics(model):
        for number, part in enumerate(parts):
            torch.manual_seed((seed + number) % 2**63)
            with _autocast(config, image_BCHW):
                cached.append(_encode(config, model, *part))
    image_BD, text_BD = (torch.cat(features).requires_grad_() for features in zip(*cached, strict=True))
    with _autocast(config, image_BCHW):
        loss = measure_loss(config, model, image_BD, text_BD)
    state.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    gradients = zip(*(f_BD.grad.chunk(config.accum_freq) for f_BD in (image_BD, text_BD)), strict=True)  # type: ignore[union-attr]
    for number, (part, gradient) in enumerate(zip(parts, gradients, strict=True)):
        torch.manual_seed((seed + number) % 2**63)
        with _autocast(config, image_BCHW):
            features = _encode(config, model, *part)
        pairs = [(f, g) for f, g in zip(features, gradient, strict=True) if f.requires_grad]  # a locked tower's do not
        with _still_statistics(model):
            torch.autograd.backward([f for f, _ in pairs], [g for _, g in pairs])
    return loss.detach()


def measure_loss(config: TrainConfig, model: Any, image_BD: Tensor, text_BD: Tensor) -> Tensor:
    """Return the loss that the config names, a scalar in nats."""
    if config.loss == "siglip":
        return sigmoid_loss(image_BD, text_BD, model.logit_scale.exp(), model.logit_bias)
    return contrastive_loss(image_BD, text_BD, model.logit_scale.exp())


def _encode(config: TrainConfig, model: Any, image_BCHW: Tensor, token_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Return unit-norm features of both, images first, since both draw from one random stream."""
    image_BD = model.encode_image(image_BCHW, normalize=True)
    if config.cut_text:
        return image_BD, encode_text(model, token_BL)
    return image_BD, model.encode_text(token_BL, normalize=True)


def _autocast(config: TrainConfig, like: Tensor) -> torch.autocast:
    return torch.autocast(like.device.type, DTYPES[config.precision], enabled=config.precision != "fp32")


@contextmanager
def _still_statistics(model: Any) -> Iterator[None]:
    """Leave the running statistics of batch norms as they are; a backward pass may compute forward again."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked
