import math

import open_clip
import pytest
import torch
from open_clip_train.scheduler import cosine_lr

from pipeline.clip_model import open_model
from training.config import TrainConfig
from training.loss import contrastive_loss
from training.optim import MAX_LOG_SCALE, build_optimizer, clamp_logit_scale, learning_rate_at


def make_config(**values):
    return TrainConfig(**{"model": "winnow-vit-tiny", "samples": 1280, "batch_size": 64} | values)


@pytest.mark.parametrize(
    ("warmup", "samples"), [(0, 1280), (5, 1280), (19, 1280), (20, 1280), (500, 1280), (3, 64 * 97)]
)
def test_learning_rate_equals_open_clips(warmup, samples):
    config = make_config(warmup_steps=warmup, samples=samples, learning_rate=7e-4)
    parameter = torch.nn.Parameter(torch.zeros(1))
    adjust = cosine_lr(torch.optim.SGD([parameter], lr=1.0), 7e-4, warmup, config.num_steps)
    assert [learning_rate_at(s, config) for s in range(config.num_steps)] == [
        adjust(s) for s in range(config.num_steps)
    ]


@pytest.mark.parametrize("rows", [2, 7, 64])
def test_loss_and_gradients_equal_open_clips(rows):
    torch.manual_seed(rows)
    image_BD, text_BD = (
        torch.nn.functional.normalize(torch.randn(rows, 16), dim=-1).requires_grad_() for _ in range(2)
    )
    scale = torch.tensor(14.0, requires_grad=True)
    ours = contrastive_loss(image_BD, text_BD, scale)
    theirs = open_clip.ClipLoss()(image_BD, text_BD, scale)
    assert ours.item() == theirs.item()
    for a, b in zip(*(torch.autograd.grad(loss, [image_BD, text_BD, scale]) for loss in (ours, theirs)), strict=True):
        assert torch.equal(a, b)


def test_loss_of_unrelated_pairs_is_ln_batch():
    same = torch.nn.functional.normalize(torch.ones(8, 4), dim=-1)
    assert contrastive_loss(same, same, torch.tensor(10.0)).item() == pytest.approx(math.log(8))


@pytest.mark.parametrize("model", ["winnow-vit-tiny", "winnow-vitamin-tiny"])
def test_weight_decay_groups_follow_open_clips_rule(model):
    module = open_model(model).model
    plain, decayed = build_optimizer(module, make_config(weight_decay=0.3)).param_groups
    names = {id(p): name for name, p in module.named_parameters()}

    def is_excluded(name, p):  # open_clip_train 3.3.0 main.py, verbatim
        return p.ndim < 2 or "bn" in name or "ln" in name or "bias" in name or "logit_scale" in name

    wanted = {name for name, p in module.named_parameters() if is_excluded(name, p)}
    assert {names[id(p)] for p in plain["params"]} == wanted and "logit_scale" in wanted
    assert {names[id(p)] for p in decayed["params"]} == set(names.values()) - wanted
    assert (plain["weight_decay"], decayed["weight_decay"]) == (0.0, 0.3)


@pytest.mark.parametrize(("value", "clamped"), [(-1.0, 0.0), (2.5, 2.5), (9.0, MAX_LOG_SCALE)])
def test_logit_scale_is_clamped(value, clamped):
    model = torch.nn.Module()
    model.logit_scale = torch.nn.Parameter(torch.tensor(value))
    clamp_logit_scale(model)
    assert model.logit_scale.item() == pytest.approx(clamped)
