"""Image bytes -> pixels: the one place where bytes of unknown origin meet a decoder.

Images come from tars that others filled, so the formats are named (any other, such as the EPS that Pillow hands to
Ghostscript, is refused by its first bytes, whatever its file is called) and the size is checked before decoding.
Pillow is imported on first use: pipeline is also imported where no image is ever touched.
"""

import io
from typing import TYPE_CHECKING

from pipeline.schemas import REASON_OVERSIZED_IMAGE, REASON_UNREADABLE_IMAGE

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP")
"""What img2dataset writes and the evaluation sets on the hub hold, by Pillow's names."""
MAX_PIXELS = 1 << 26
"""A larger image is a decompression bomb, or a mistake; Pillow itself warns from 89 M pixels and raises from 179 M."""
MAX_ASPECT = 256
"""Longer side / shorter side.  CLIP's transforms bring the shorter side up to the model's: 1 x 60,000 px is a bomb."""
MAX_MESSAGE_CHARS = 200


class UnreadableImage(Exception):
    """The bytes are no whole image of FORMATS within MAX_PIXELS; the message is the same on every machine."""

    reason = REASON_UNREADABLE_IMAGE
    """By which lost rows are counted."""


class OversizedImage(UnreadableImage):
    """The header speaks of more pixels than are decoded; it is a whole image perhaps, but a bomb."""

    reason = REASON_OVERSIZED_IMAGE


def decode_image(content: bytes) -> "Image.Image":
    """Return the RGB image, decoded; transparency is dropped, 16-bit greys are clipped.  Raises UnreadableImage."""
    image = open_image(content)
    if image.mode == "RGB":
        return image
    image.info.pop("transparency", None)  # convert() warns of it, and makes the same pixels without
    return image.convert("RGB")


def open_image(content: bytes, *, side_px: int | None = None) -> "Image.Image":
    """Return the image in the mode it was stored in, decoded.  Raises UnreadableImage.

    For transforms that convert after resizing, as open_clip's do: a palette resized is not what its colours give.
    With `side_px` a JPEG may come smaller than it is, its sides still at least that; this is several times faster.
    """
    try:
        image = _open_header(content)
        if image.width * image.height > MAX_PIXELS:
            raise OversizedImage(f"{image.width} x {image.height} px is over the limit of {MAX_PIXELS:,} px")
        if max(image.size) > MAX_ASPECT * min(image.size):
            raise OversizedImage(f"{image.width} x {image.height} px is longer than {MAX_ASPECT} times its width")
        if side_px is not None:
            image.draft("RGB", (side_px, side_px))
        image.load()
        return image
    except (UnreadableImage, MemoryError):
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ValueError, ...
        raise UnreadableImage(f"{type(error).__name__}: {error}"[:MAX_MESSAGE_CHARS]) from None


def _open_header(content: bytes) -> "Image.Image":
    """Return the image with its size and mode known and no pixel decoded.

    This is Image.open(..., formats=FORMATS) without its size check, which warns: warnings can only be silenced for
    the whole process, and images are decoded in threads.  Nor is there its message, which holds a memory address.
    """
    from PIL import Image

    Image.init()  # fills OPEN, once
    for name in FORMATS:
        open_file, accept = Image.OPEN[name]
        if accept and accept(content[:16]):
            return open_file(io.BytesIO(content), "")
    raise UnreadableImage(f"not an image of the formats {', '.join(FORMATS)}")
