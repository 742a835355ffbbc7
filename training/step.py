"""One batch -> one step of the optimiser, whole or in parts (gradient caching, Gao et al. 2021, arXiv:2101.06983).

In parts: the features of all parts without gradients, the loss of the whole batch and its gradients at the features,
then each part once more with gradients, from the same random state, so that dropout, drop path and patch dropout are
the same in both passes.  Memory is that of one part; loss and gradients are those of the whole batch.
Of several processes each takes its part of the batch; their gradients are averaged while the backward pass goes on.
B rows in this process's part of the batch, C = 3 channels, H and W pixels, L tokens, D embedding dims.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pipeline.errors import ConfigError
from training.checkpoint import RunState
from training.config import TrainConfig
from training.data import Batch
from training.images import Crop, normalise
from training.loss import contrastive_loss, sigmoid_loss
from training.optim import clamp_logit_scale, learning_rate_at, set_learning_rate
from training.order import step_seed
from training.sharding import drop_gradients_of_others, share_weights
from training.text import encode_text
from training.world import World

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def take_step(
    config: TrainConfig, state: RunState, batch: Batch, crop: Crop, *, with_norm: bool
) -> tuple[Tensor, Tensor | None]:
    """Train on one batch; return its loss and, if asked or clipping, the gradient norm, both still on the device.

    Of several processes each returns the loss of its part; the batch's is their mean.
    In fp16 a step whose gradients overflow leaves the weights alone and lowers the loss scale (GradScaler).
    """
    model, optimizer, scaler = state.model, state.optimizer, state.scaler
    set_learning_rate(optimizer, learning_rate_at(state.step, config))
    optimizer.zero_grad(set_to_none=True)
    image_BCHW, token_BL = move_batch(batch, crop, model.logit_scale.device)
    if config.cut_text and not token_BL.is_floating_point():
        token_BL = batch.token_BL.long()  # moved when cut
    run = backward_whole if config.accum_freq == 1 else backward_in_parts
    loss = run(config, state, image_BCHW, token_BL)
    norm = None
    if with_norm or config.grad_clip_norm is not None or state.owners:
        scaler.unscale_(optimizer)  # of all gradients, so that all processes pass over the same steps
        limit = math.inf if config.grad_clip_norm is None else config.grad_clip_norm
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    if state.owners:
        drop_gradients_of_others(optimizer, state.owners, state.world.rank)
    scaler.step(optimizer)
    scaler.update()
    if state.owners:
        share_weights(optimizer, state.owners)
    clamp_logit_scale(model)
    state.step += 1
    state.is_seen_N[batch.row_B] = True
    state.is_unreadable_N[batch.unreadable] = True
    state.num_unreadable_draws += len(batch.unreadable)
    return loss, norm


def move_batch(batch: Batch, crop: Crop, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return float32 images (B, C, H, W) and int64 tokens (B, L), or a locked tower's features, on the device."""
    image_BCHW = normalise(batch.pixel_BHWC.to(device, non_blocking=True), crop)
    token_BL = batch.token_BL.to(device, non_blocking=True)
    return image_BCHW, token_BL.float() if token_BL.is_floating_point() else token_BL.long()


def backward_whole(config: TrainConfig, state: RunState, image_BCHW: Tensor, token_BL: Tensor) -> Tensor:
    """Add a batch's gradients to the parameters; return its loss, detached."""
    torch.manual_seed(part_seed(config, state, 0))
    with autocast(config, image_BCHW.device):
        loss = measure_loss(config, state.world, *_encode_spread(config, state, image_BCHW, token_BL))
    with _still_statistics(state.model):
        state.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def backward_in_parts(config: TrainConfig, state: RunState, image_BCHW: Tensor, token_BL: Tensor) -> Tensor:
    """Do the same in config.accum_freq parts of equal size.

    Batch norm normalises each part by itself; its running statistics see each part once.
    """
    model, last = state.model, config.accum_freq - 1
    parts = list(zip(image_BCHW.chunk(config.accum_freq), token_BL.chunk(config.accum_freq), strict=True))
    cached = []
    with torch.no_grad(), _still_statistics(model):
        for number, part in enumerate(parts):
            torch.manual_seed(part_seed(config, state, number))
            with autocast(config, image_BCHW.device):
                cached.append(encode(config, model, *part))
    image_BD, text_BD = (torch.cat(features).requires_grad_() for features in list(zip(*cached, strict=True))[:2])
    scalars = [scalar.detach().requires_grad_() for scalar in cached[0][2:]]
    with autocast(config, image_BCHW.device):
        loss = measure_loss(config, state.world, image_BD, text_BD, *scalars)
    state.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    gradients = zip(*(f_BD.grad.chunk(config.accum_freq) for f_BD in (image_BD, text_BD)), strict=True)  # type: ignore[union-attr]
    for number, (part, gradient) in enumerate(zip(parts, gradients, strict=True)):
        torch.manual_seed(part_seed(config, state, number))
        is_shared = number == last or state.spread is None
        with nullcontext() if is_shared else state.spread.no_sync():
            with autocast(config, image_BCHW.device):
                outputs = _encode_spread(config, state, *part)
            # the scalars belong to no part: their gradients go with the last
            given = [*gradient, *(scalar.grad for scalar in scalars)] if number == last else gradient
            pairs = [(f, g) for f, g in zip(outputs, given, strict=False) if f.requires_grad]  # a locked tower's do not
            with _still_statistics(model):
                torch.autograd.backward([f for f, _ in pairs], [g for _, g in pairs])
    return loss.detach()


def part_seed(config: TrainConfig, state: RunState, number: int) -> int:
    """Return the seed of dropout in a part of a step's batch; parts are counted on from process to process.

    So two processes drop what one does with twice the accum_freq.
    """
    return (step_seed(config.seed, state.step) + state.world.rank * config.accum_freq + number) % 2**63


def measure_loss(config: TrainConfig, world: World, image_BD: Tensor, text_BD: Tensor, *scalars: Tensor) -> Tensor:
    """Return the loss that the config names of what `encode` gave, a scalar in nats."""
    if config.loss == "siglip":
        return sigmoid_loss(image_BD, text_BD, scalars[0], scalars[1], world)
    return contrastive_loss(image_BD, text_BD, scalars[0], world)


def encode(config: TrainConfig, model: Any, image_BCHW: Tensor, token_BL: Tensor) -> tuple[Tensor, ...]:
    """Return unit-norm features of both, the factor of the logits and, for SigLIP, their bias.

    Images come first, since both draw from one random stream.
    """
    image_BD = model.encode_image(image_BCHW, normalize=True)
    text_BD = token_BL if token_BL.is_floating_point() else encode_captions(config, model, token_BL)
    scale = model.logit_scale.exp()
    return (image_BD, text_BD, scale, model.logit_bias) if config.loss == "siglip" else (image_BD, text_BD, scale)


def encode_captions(config: TrainConfig, model: Any, token_BL: Tensor) -> Tensor:
    """Return unit-norm (B, D) of int64 tokens."""
    return encode_text(model, token_BL) if config.cut_text else model.encode_text(token_BL, normalize=True)


def _encode_spread(config: TrainConfig, state: RunState, image_BCHW: Tensor, token_BL: Tensor) -> tuple[Tensor, ...]:
    """Do the same so that a backward pass averages the gradients of all processes."""
    if state.spread is None:
        return encode(config, state.model, image_BCHW, token_BL)
    return state.spread(image_BCHW, token_BL)  # type: ignore[no-any-return]


class Towers(torch.nn.Module):
    """`encode` as a module, since DistributedDataParallel takes one forward."""

    def __init__(self, config: TrainConfig, model: torch.nn.Module) -> None:
        super().__init__()
        self.config, self.model = config, model

    def forward(self, image_BCHW: Tensor, token_BL: Tensor) -> tuple[Tensor, ...]:
        """Return what `encode` does."""
        return encode(self.config, self.model, image_BCHW, token_BL)


def check_batch_norms(model: Any, world: World) -> None:
    """Raise ConfigError for batch norms that cannot normalise over the rows of all processes: torch's do on GPUs alone.

    Without that the number of processes would change the weights.
    """
    norms = _list_batch_norms(model)
    if world.size > 1 and norms and model.logit_scale.device.type != "cuda":
        raise ConfigError(
            f"the model has {len(norms)} batch norms, which normalise over the rows of all processes, and torch does "
            "that between GPUs only. Train it in one process, or on GPUs."
        )


def spread_towers(config: TrainConfig, state: RunState) -> None:
    """Let the state's gradients be averaged over its processes, in which the first's weights are from now on.

    Batch norms normalise over the rows of all processes from now on.
    """
    if state.world.size > 1:
        if _list_batch_norms(state.model):
            from timm.layers import convert_sync_batchnorm  # torch's own loses the activations that timm's contain

            convert_sync_batchnorm(state.model)
        towers = Towers(config, state.model)
        state.spread = DistributedDataParallel(towers, gradient_as_bucket_view=True)


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """Return the context in which a run's towers and loss are computed."""
    return torch.autocast(device.type, DTYPES[config.precision], enabled=config.precision != "fp32")


@contextmanager
def _still_statistics(model: Any) -> Iterator[None]:
    """Leave the running statistics of batch norms as they are; a backward pass may compute forward again."""
    norms = _list_batch_norms(model)
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked


def _list_batch_norms(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
