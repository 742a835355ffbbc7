"""Image bytes -> uint8 pixels, faster than Pillow where nothing is lost by it.

Nearly every image of a pool is a JPEG of YCbCr colours.  simplejpeg decodes it to Pillow's own pixels, as both use
libjpeg-turbo, in two thirds of the time; it is told to refuse what libjpeg complains of.  Pillow has all else: other
formats and colours, damaged files, sizes that are not decoded, and every JPEG where simplejpeg is not installed.
"""

import functools
from typing import Any

import numpy as np

from pipeline.images import MAX_ASPECT, MAX_PIXELS, decode_image

JPEG_START = b"\xff\xd8\xff"


def decode_pixels(content: bytes) -> np.ndarray:
    """Return uint8 (H, W, 3), equal to decode_image's.  Raises UnreadableImage."""
    simplejpeg = _find_simplejpeg()
    if simplejpeg and content.startswith(JPEG_START):
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
            fits = height * width <= MAX_PIXELS and max(height, width) <= MAX_ASPECT * min(height, width)
            if colours == "YCbCr" and fits:
                return simplejpeg.decode_jpeg(content, strict=True)  # type: ignore[no-any-return]
        except ValueError:
            pass  # Pillow says what is wrong, or mends it
    return np.array(decode_image(content))


@functools.cache
def _find_simplejpeg() -> Any:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg
