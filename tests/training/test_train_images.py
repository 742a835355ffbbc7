import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import InterpolationMode, resized_crop

from pipeline.clip_model import open_model
from pipeline.errors import ModelError
from training.images import NUM_DRAWS, choose_box, crop_image, normalise, read_crop
from training.order import draw_uniform


@pytest.fixture(scope="module")
def transform():
    return open_model("winnow-vit-tiny").train_transform


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(32, 32), (100, 60), (33, 200)])
def test_floats_equal_open_clips_bit_for_bit(transform, size):
    image, crop = noise(*size), read_crop(transform)
    uniform = draw_uniform(0, np.arange(5), NUM_DRAWS)
    pixel_BHWC = torch.from_numpy(np.stack([crop_image(image, crop, u.tolist()) for u in uniform]))
    resize_crop, *rest = transform.transforms
    for given, u in zip(normalise(pixel_BHWC, crop), uniform, strict=True):
        left, top, right, bottom = choose_box(*size, crop, u.tolist())
        box = (top, left, bottom - top, right - left)
        theirs = resized_crop(image, *box, list(resize_crop.size), InterpolationMode.BICUBIC, antialias=True)
        for step in rest:
            theirs = step(theirs)
        assert torch.equal(given, theirs)


@pytest.mark.parametrize(("width", "height"), [(32, 32), (640, 480), (20, 2000), (2000, 20), (1, 1)])
def test_boxes_follow_torchvisions_distribution(transform, width, height):
    crop, theirs = read_crop(transform), transform.transforms[0]
    boxes = np.array([choose_box(width, height, crop, u.tolist()) for u in draw_uniform(1, np.arange(3000), NUM_DRAWS)])
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    given = np.array([theirs.get_params(image, list(crop.scale), list(crop.ratio)) for _ in range(3000)])
    top, left, h, w = given.T
    ours = [boxes[:, 1], boxes[:, 0], boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0]]
    for a, b in zip(ours, (top, left, h, w), strict=True):
        error = 4 * np.hypot(a.std(), b.std()) / np.sqrt(3000)
        assert abs(a.mean() - b.mean()) <= error + 1e-9


def test_another_transform_is_refused(transform):
    with pytest.raises(ModelError, match="plain"):
        read_crop(open_model("winnow-vit-tiny").eval_transform)
