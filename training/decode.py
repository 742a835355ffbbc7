"""Image bytes -> uint8 pixels, faster than Pillow where nothing is lost by it.

Nearly every image of a pool is a JPEG of YCbCr colours.  simplejpeg decodes it to Pillow's own pixels, as both use
libjpeg-turbo, in two thirds of the time; it is told to refuse what libjpeg complains of.  Pillow has all else: other
formats and colours, damaged files, sizes that are not decoded, and every JPEG where simplejpeg is not installed or does
not give the pixels of the Pillow that is (each has a libjpeg-turbo of its own; a small image is decoded by both).
"""

import functools
import io
from typing import Any

import numpy as np
from PIL import Image

from pipeline.images import MAX_ASPECT, MAX_PIXELS, decode_image

JPEG_START = b"\xff\xd8\xff"
SUBSAMPLINGS = (0, 1, 2)
"""Pillow's numbers of 4:4:4, 4:2:2 and 4:2:0."""


def decode_pixels(content: bytes) -> np.ndarray:
    """Return uint8 (H, W, 3), equal to decode_image's.  Raises UnreadableImage."""
    pixel_HWC = decode_jpeg(content)
    return np.array(decode_image(content)) if pixel_HWC is None else pixel_HWC


def decode_jpeg(content: bytes) -> np.ndarray | None:
    """Return uint8 (H, W, 3), equal to decode_image's, None for what is Pillow's to decode."""
    simplejpeg = _find_simplejpeg()
    if simplejpeg and content.startswith(JPEG_START):
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
            fits = height * width <= MAX_PIXELS and max(height, width) <= MAX_ASPECT * min(height, width)
            if colours == "YCbCr" and fits:
                return simplejpeg.decode_jpeg(content, strict=True)  # type: ignore[no-any-return]
        except ValueError:
            pass  # Pillow says what is wrong, or mends it
    return None


@functools.cache
def _find_simplejpeg() -> Any:
    try:
        import simplejpeg
    except ImportError:
        return None
    probes = [_make_probe(subsampling) for subsampling in SUBSAMPLINGS]
    same = all(np.array_equal(simplejpeg.decode_jpeg(probe), np.asarray(decode_image(probe))) for probe in probes)
    return simplejpeg if same else None


def _make_probe(subsampling: int) -> bytes:
    """Return a JPEG of colours that change from pixel to pixel, in blocks that are not all whole."""
    pixel_HWC = (np.arange(45 * 61 * 3) ** 2 % 251).astype(np.uint8).reshape(45, 61, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixel_HWC).save(buffer, "JPEG", quality=90, subsampling=subsampling)
    return buffer.getvalue()
