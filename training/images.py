"""Image -> cropped pixels -> normalised floats: open_clip's train transform, taken apart so that none is wasted.

The transform is RandomResizedCrop (bicubic, antialiased), RGB, a flip (winnow's own), colour jitter, grayscale,
ToTensor, Normalize.  Here the randomness comes from given numbers instead of torch's and Python's global states,
batches travel as uint8, and normalising happens once per batch on the training device.  For equal crop boxes and
factors the floats are bit-equal (tests/training/test_train_images.py, test_dfn_augment.py).

With pixels="fast" torch resizes instead of Pillow, in a fifth of the time.  It weighs by 15 bits and not 22, so fewer
than 1 in 100 values differ, by 1; where an image is enlarged 1 in 10,000 by 2.  Pillow 13 resizes a tall image's height
before its width, and neither older ones nor torch do: there more differ, 1 in 10,000 by more than 1, as much as Pillow
12 differs from 13 (tests/training/test_train_decode.py).
Source: open_clip 3.3.0 transform.py image_transform; torchvision 0.29 RandomResizedCrop.get_params, ColorJitter.
B rows in the batch, C = 3 channels, H and W pixels.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional

from pipeline.errors import ModelError
from pipeline.images import decode_image
from training.config import NO_AUGMENT, Augment
from training.decode import decode_jpeg, decode_pixels

NUM_TRIES = 10
NUM_CROP_DRAWS = 4 * NUM_TRIES
"""Random numbers one crop may need: area, aspect, top and left for each try."""
FLIP_DRAW, JITTER_DRAW, ORDER_DRAW, GRAY_DRAW = range(NUM_CROP_DRAWS, NUM_CROP_DRAWS + 4)
FACTOR_DRAWS = slice(GRAY_DRAW + 1, GRAY_DRAW + 5)
NUM_DRAWS = FACTOR_DRAWS.stop
"""Random numbers one image may need.  Each has its own column, so that no operation moves another's."""
ORDERS = tuple(itertools.permutations(range(4)))
"""Orders in which brightness, contrast, saturation and hue are changed."""
NEUTRALS = (1.0, 1.0, 1.0, 0.0)
"""The factor of each that changes nothing."""
CHANGES = (
    functional.adjust_brightness,
    functional.adjust_contrast,
    functional.adjust_saturation,
    functional.adjust_hue,
)


@dataclass(frozen=True, slots=True)
class Crop:
    """What a model's train transform does, and what is added to it."""

    height_px: int
    width_px: int
    scale: tuple[float, float]
    """Bounds of the crop's share of the image area."""
    ratio: tuple[float, float]
    """Bounds of the crop's width / height."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    augment: Augment
    pixels: str = "exact"
    """Or "fast": torch resizes, not Pillow."""


def read_crop(transform: Any, augment: Augment = NO_AUGMENT, pixels: str = "exact") -> Crop:
    """Return the settings of a train transform.  Raises ModelError if it is not of open_clip's plain form."""
    steps = list(getattr(transform, "transforms", ()))
    names = [type(step).__name__ for step in steps]
    if names != ["RandomResizedCrop", "MaybeConvertMode", "MaybeToTensor", "Normalize"]:
        raise ModelError(f"the model's train transform is {names}, not open_clip's plain one; winnow cannot train it.")
    crop, normalize = steps[0], steps[-1]
    if crop.interpolation.value != "bicubic":
        raise ModelError(f"the model's train transform resizes by {crop.interpolation.value}, not bicubic.")
    height, width = crop.size
    scale, mean, std = augment.scale or tuple(crop.scale), tuple(normalize.mean), tuple(normalize.std)
    return Crop(height, width, scale, tuple(crop.ratio), mean, std, augment, pixels)


def choose_box(width: int, height: int, crop: Crop, uniform_D: Sequence[float]) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) in px of a random crop; uniform_D holds NUM_DRAWS numbers in [0, 1).

    Ten tries at an area and aspect that fit, then the largest centred crop of an allowed aspect, as torchvision does.
    """
    low, high = math.log(crop.ratio[0]), math.log(crop.ratio[1])
    for start in range(0, NUM_CROP_DRAWS, 4):
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


def read_image(content: bytes, crop: Crop, uniform_D: Sequence[float]) -> np.ndarray:
    """Return uint8 (H, W, C): a random crop of an image file.  Raises UnreadableImage."""
    if crop.pixels == "fast":
        return crop_pixels(decode_pixels(content), crop, uniform_D)
    pixel_HWC = decode_jpeg(content)
    if pixel_HWC is None:
        return crop_image(decode_image(content), crop, uniform_D)
    height, width, _ = pixel_HWC.shape
    left, top, right, bottom = choose_box(width, height, crop, uniform_D)
    return _resize(Image.fromarray(pixel_HWC[top:bottom, left:right]), crop, uniform_D)


def crop_pixels(pixel_HWC: np.ndarray, crop: Crop, uniform_D: Sequence[float]) -> np.ndarray:
    """Return uint8 (H, W, C): the same random crop as crop_image's, resized by torch."""
    height, width, _ = pixel_HWC.shape
    left, top, right, bottom = choose_box(width, height, crop, uniform_D)
    part_1CHW = torch.from_numpy(pixel_HWC[top:bottom, left:right]).permute(2, 0, 1)[None]
    size = (crop.height_px, crop.width_px)
    resized_1CHW = torch.nn.functional.interpolate(part_1CHW, size, mode="bicubic", antialias=True)
    resized_HWC = resized_1CHW[0].permute(1, 2, 0).contiguous().numpy()
    if crop.augment == NO_AUGMENT:
        return resized_HWC
    return np.asarray(augment_image(Image.fromarray(resized_HWC), crop.augment, uniform_D))


def crop_image(image: Image.Image, crop: Crop, uniform_D: Sequence[float]) -> np.ndarray:
    """Return uint8 (H, W, C): a random crop, resized as torchvision resizes PIL images, and augmented."""
    box = choose_box(image.width, image.height, crop, uniform_D)
    return _resize(image.crop(box), crop, uniform_D)


def _resize(image: Image.Image, crop: Crop, uniform_D: Sequence[float]) -> np.ndarray:
    """Return uint8 (H, W, C): a whole image resized and augmented."""
    image = image.resize((crop.width_px, crop.height_px), Image.Resampling.BICUBIC)
    return np.asarray(augment_image(image, crop.augment, uniform_D))


def augment_image(image: Image.Image, augment: Augment, uniform_D: Sequence[float]) -> Image.Image:
    """Return the RGB image flipped, jittered and made grey, each if its number falls below its chance."""
    if uniform_D[FLIP_DRAW] < augment.flip_prob:
        image = functional.hflip(image)
    if augment.color_jitter and uniform_D[JITTER_DRAW] < augment.color_jitter_prob:
        factors = choose_factors(augment.color_jitter, uniform_D)
        for kind in choose_order(uniform_D):
            if augment.color_jitter[kind]:
                image = CHANGES[kind](image, factors[kind])
    if uniform_D[GRAY_DRAW] < augment.gray_scale_prob:
        image = functional.rgb_to_grayscale(image, num_output_channels=3)
    return image


def choose_factors(strengths: Sequence[float], uniform_D: Sequence[float]) -> list[float]:
    """Return the factors of brightness, contrast and saturation, in [max(0, 1 - s), 1 + s], and of hue, in [-s, s]."""
    factors = []
    for strength, neutral, share in zip(strengths, NEUTRALS, uniform_D[FACTOR_DRAWS], strict=True):
        low, high = neutral - strength, neutral + strength
        low = max(low, 0.0) if neutral else low
        factors.append(low + share * (high - low))
    return factors


def choose_order(uniform_D: Sequence[float]) -> tuple[int, ...]:
    """Return in which order the four are changed; all 24 are equally likely."""
    return ORDERS[int(uniform_D[ORDER_DRAW] * len(ORDERS))]


def normalise(pixel_BHWC: torch.Tensor, crop: Crop) -> torch.Tensor:
    """Return float32 (B, C, H, W), contiguous, on the same device: pixels in [0, 1], less the mean, over the std.

    A GPU divides exactly by a tensor, and not by a number.
    """
    image_BCHW = pixel_BHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    full_111, mean_C11, std_C11 = (
        torch.tensor(values, device=image_BCHW.device)[:, None, None] for values in ((255.0,), crop.mean, crop.std)
    )
    return image_BCHW.div_(full_111).sub_(mean_C11).div_(std_C11)
