"""Image -> cropped pixels -> normalised floats: open_clip's train transform, taken apart so that none is wasted.

The transform is RandomResizedCrop (bicubic, antialiased), RGB, ToTensor, Normalize.  Here the crop's randomness comes
from given numbers instead of torch's global state, batches travel as uint8, and normalising happens once per batch on
the training device.  For equal crop boxes the floats are bit-equal (tests/training/test_train_images.py).
Source: open_clip 3.3.0 transform.py image_transform; torchvision 0.29 RandomResizedCrop.get_params.
B rows in the batch, C = 3 channels, H and W pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.errors import ModelError

NUM_TRIES = 10
NUM_DRAWS = 4 * NUM_TRIES
"""Random numbers one crop may need: area, aspect, top and left for each try."""


@dataclass(frozen=True, slots=True)
class Crop:
    """What a model's train transform does."""

    height_px: int
    width_px: int
    scale: tuple[float, float]
    """Bounds of the crop's share of the image area."""
    ratio: tuple[float, float]
    """Bounds of the crop's width / height."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def read_crop(transform: Any) -> Crop:
    """Return the settings of a train transform.  Raises ModelError if it is not of open_clip's plain form."""
    steps = list(getattr(transform, "transforms", ()))
    names = [type(step).__name__ for step in steps]
    if names != ["RandomResizedCrop", "MaybeConvertMode", "MaybeToTensor", "Normalize"]:
        raise ModelError(f"the model's train transform is {names}, not open_clip's plain one; winnow cannot train it.")
    crop, normalize = steps[0], steps[-1]
    if crop.interpolation.value != "bicubic":
        raise ModelError(f"the model's train transform resizes by {crop.interpolation.value}, not bicubic.")
    height, width = crop.size
    return Crop(height, width, tuple(crop.scale), tuple(crop.ratio), tuple(normalize.mean), tuple(normalize.std))


def choose_box(width: int, height: int, crop: Crop, uniform_D: Sequence[float]) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) in px of a random crop; uniform_D holds NUM_DRAWS numbers in [0, 1).

    Ten tries at an area and aspect that fit, then the largest centred crop of an allowed aspect, as torchvision does.
    """
    low, high = math.log(crop.ratio[0]), math.log(crop.ratio[1])
    for start in range(0, NUM_DRAWS, 4):
        area, aspect, top, left = uniform_D[start : start + 4]
        pixels = width * height * (crop.scale[0] + area * (crop.scale[1] - crop.scale[0]))
        ratio = math.exp(low + aspect * (high - low))
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(left * (width - w + 1)), int(top * (height - h + 1))
            return x, y, x + w, y + h
    w, h = width, height
    if width / height < crop.ratio[0]:
        h = round(width / crop.ratio[0])
    elif width / height > crop.ratio[1]:
        w = round(height * crop.ratio[1])
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def crop_image(image: Image.Image, crop: Crop, uniform_D: Sequence[float]) -> np.ndarray:
    """Return uint8 (H, W, C): a random crop, resized as torchvision resizes PIL images."""
    box = choose_box(image.width, image.height, crop, uniform_D)
    return np.asarray(image.crop(box).resize((crop.width_px, crop.height_px), Image.Resampling.BICUBIC))


def normalise(pixel_BHWC: torch.Tensor, crop: Crop) -> torch.Tensor:
    """Return float32 (B, C, H, W), contiguous, on the same device: pixels in [0, 1], less the mean, over the std."""
    image_BCHW = pixel_BHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    mean_C11, std_C11 = (
        torch.tensor(values, device=image_BCHW.device)[:, None, None] for values in (crop.mean, crop.std)
    )
    return image_BCHW.sub_(mean_C11).div_(std_C11)
