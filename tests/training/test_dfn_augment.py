import numpy as np
import open_clip.transform
import pytest
import torch
from PIL import Image
from torchvision.transforms import ColorJitter
from torchvision.transforms.functional import hflip

from pipeline.clip_model import open_model
from pipeline.errors import ConfigError
from training.config import Augment, TrainConfig, describe_choices
from training.images import (
    FLIP_DRAW,
    GRAY_DRAW,
    JITTER_DRAW,
    NUM_DRAWS,
    augment_image,
    choose_factors,
    choose_order,
    crop_image,
    read_crop,
)
from training.order import draw_uniform

STRENGTHS = (0.4, 1.5, 0.3, 0.1)


@pytest.fixture(scope="module")
def transform():
    return open_model("winnow-vit-tiny").train_transform


def noise():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8))


def draws(num):
    return draw_uniform(3, np.arange(num), NUM_DRAWS).tolist()


def test_pixels_equal_open_clips_operations_bit_for_bit(monkeypatch):
    """open_clip's own jitter and grayscale, made to take the numbers that were drawn here."""
    augment = Augment(flip_prob=0.5, color_jitter=STRENGTHS, color_jitter_prob=0.7, gray_scale_prob=0.3)
    image, seen = noise(), set()
    for uniform in draws(120):
        params = (torch.tensor(choose_order(uniform)), *choose_factors(STRENGTHS, uniform))
        monkeypatch.setattr(ColorJitter, "get_params", staticmethod(lambda *_, params=params: params))
        did = tuple(uniform[d] < p for d, p in ((FLIP_DRAW, 0.5), (JITTER_DRAW, 0.7), (GRAY_DRAW, 0.3)))
        theirs = hflip(image) if did[0] else image
        theirs = open_clip.transform.color_jitter(*STRENGTHS, p=float(did[1]))(theirs)
        theirs = open_clip.transform.gray_scale(p=float(did[2]))(theirs)
        assert np.array_equal(np.asarray(augment_image(image, augment, uniform)), np.asarray(theirs))
        seen.add(did)
    assert len(seen) == 8


def test_factors_and_orders_follow_torchvisions_distribution():
    jitter, uniform = ColorJitter(*STRENGTHS), draws(4000)
    torch.manual_seed(0)
    bounds = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    theirs = np.array([jitter.get_params(*bounds)[1:] for _ in range(4000)])
    ours = np.array([choose_factors(STRENGTHS, u) for u in uniform])
    for a, b, (low, high) in zip(ours.T, theirs.T, bounds, strict=True):
        assert low <= a.min() and a.max() <= high
        assert abs(a.mean() - b.mean()) < 4 * np.hypot(a.std(), b.std()) / np.sqrt(4000)
    _, times = np.unique([choose_order(u) for u in uniform], axis=0, return_counts=True)
    assert len(times) == 24 and times.min() > 4000 / 24 / 2


def test_chances_are_kept():
    uniform = np.array(draws(4000))
    for column in (FLIP_DRAW, JITTER_DRAW, GRAY_DRAW):
        assert (uniform[:, column] < 0.3).mean() == pytest.approx(0.3, abs=0.03)


def test_a_wider_scale_gives_smaller_crops(transform):
    given = read_crop(transform, Augment(scale=(0.2, 0.3)))
    assert given.scale == (0.2, 0.3) and read_crop(transform).scale == (0.9, 1.0)
    image = Image.new("RGB", (32, 32), "black")
    image.paste("white", (0, 0, 4, 32))
    whites = [sum(crop_image(image, c, u).mean() > 0 for u in draws(60)) for c in (given, read_crop(transform))]
    assert whites[0] < 45 and whites[1] == 60


def test_no_augmentation_changes_no_pixel():
    assert augment_image(image := noise(), Augment(), [0.0] * NUM_DRAWS) is image


def test_a_run_without_augmentation_keeps_the_identity_it_had():
    plain = TrainConfig(model="winnow-vit-tiny", samples=64)
    assert not {"augment", "heldout"} & describe_choices(plain).keys()
    other = TrainConfig(model="winnow-vit-tiny", samples=64, augment=Augment(flip_prob=0.5), heldout=3)
    assert describe_choices(other)["augment"]["flip_prob"] == 0.5 and describe_choices(other)["heldout"] == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"flip_prob": 1.5}, "flip_prob is 1.5; it must be at least 0 and at most 1"),
        ({"scale": (0.9, 0.5)}, "the smaller first"),
        ({"scale": (0.0, 0.5)}, "the smaller first"),
        ({"color_jitter_prob": 0.8}, "needs color_jitter"),
        ({"color_jitter": (0.4, 0.4, 0.4, 0.6)}, "color_jitter is 0.6"),
        ({"gray_scale_prob": float("nan")}, "gray_scale_prob"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        Augment(**values)
