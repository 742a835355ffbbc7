"""Text in an image -> the image without it, as T-MARS scores it (Maini et al. 2023, arXiv:2307.03132).

The detector is a TorchScript file (torch.jit.save) with this interface:
    in    float32 (1, 3, 512, 512) in [0, 1], RGB: the image stretched to the square that T-MARS' FAST-tiny takes
    out   (N, 4) boxes x0, y0, x1, y1 in pixels of that square, or (512, 512) the probability of text, masked above 0.5
Opening it runs the program in the file, so name one that you trust; unlike torch.export's files it holds no pickle.

T-MARS inpaints what its detector outlines; how is not in its repository, which ends at the outlines.  Here a masked
pixel takes the mean colour of the unmasked ones near it (`fill`), which needs no library and no parameter.
"""

import io
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import ModelError
from pipeline.images import MAX_MESSAGE_CHARS
from pipeline.schemas import REASON_TEXT_DETECTOR
from pipeline.storage import read_bytes

if TYPE_CHECKING:
    import torch
    from PIL import Image

SIDE_PX = 512
IS_TEXT = 0.5


class DetectorFailed(Exception):
    """The detector raised, or answered what its interface does not know."""

    reason = REASON_TEXT_DETECTOR
    """By which lost rows are counted."""


def open_detector(url: str, device: "str | torch.device") -> "Callable[[Image.Image], np.ndarray]":
    """Return a function: RGB image -> bool (H, W), where it has text.  It raises DetectorFailed; threads may share it.

    Raises ModelError when the file is no TorchScript, or the program in it fails on a black image.
    """
    import torch
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecated; what replaces it unpickles
            detector: Any = torch.jit.load(io.BytesIO(read_bytes(url)), map_location=device)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise ModelError(f"text detector {url!r} is no TorchScript file: {_last_line(error)}") from error
    find = partial(_find_text, detector.eval(), torch.device(device))
    try:
        find(Image.new("RGB", (SIDE_PX, SIDE_PX)))
    except DetectorFailed as error:
        raise ModelError(f"text detector {url!r} fails on a black image: {error}") from error
    return find


def _find_text(detector: Any, device: "torch.device", image: "Image.Image") -> np.ndarray:
    import torch
    from PIL import Image

    square = np.array(image.resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR))
    try:
        with torch.inference_mode():
            pixel_1HW3 = torch.from_numpy(square)[None].to(device)
            found = detector(pixel_1HW3.permute(0, 3, 1, 2).float() / 255)
            answer = np.asarray(found.float().cpu())
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"text detector: {error}") from error
    except Exception as error:  # whatever the program does
        raise DetectorFailed(f"{type(error).__name__}: {_last_line(error)}") from error
    return _paint(answer, image.width, image.height)


def _last_line(error: Exception) -> str:
    """Return the end of a message: TorchScript puts its traceback before what went wrong."""
    return (str(error).strip() or "no message").splitlines()[-1][:MAX_MESSAGE_CHARS]


def _paint(answer: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return bool (height, width) for boxes or probabilities in the square.  Raises DetectorFailed for others."""
    from PIL import Image

    if not np.isfinite(answer).all():
        raise DetectorFailed("the detector answers with NaN or infinity")
    if answer.shape == (SIDE_PX, SIDE_PX):
        text = Image.fromarray((answer > IS_TEXT).astype(np.uint8))
        return np.array(text.resize((width, height), Image.Resampling.NEAREST), bool)
    if answer.ndim != 2 or answer.shape[1] != 4:
        raise DetectorFailed(f"the detector answers with {answer.shape} numbers, neither (N, 4) nor {SIDE_PX, SIDE_PX}")
    mask_HW = np.zeros((height, width), bool)
    limit = np.array([width, height, width, height])
    edges_N4 = answer * (limit / SIDE_PX)
    edges_N4[:, :2], edges_N4[:, 2:] = np.floor(edges_N4[:, :2]), np.ceil(edges_N4[:, 2:])
    for x0, y0, x1, y1 in edges_N4.clip(0, limit).astype(int):
        mask_HW[y0:y1, x0:x1] = True
    return mask_HW


def erase_text(find_text: "Callable[[Image.Image], np.ndarray]", image: "Image.Image") -> "Image.Image":
    """Return an RGB image with its text painted over; the same one when it has none.  Raises DetectorFailed."""
    from PIL import Image

    mask_HW = find_text(image)
    return Image.fromarray(fill(np.asarray(image), mask_HW)) if mask_HW.any() else image


def fill(pixel_HW3: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    """Return uint8 (H, W, 3) in which masked pixels have the colour of their surroundings.

    That is the mean of the unmasked pixels in the smallest square of 2, 4, 8, ... px that has any, squares counted
    from the image's corner.  Where nothing is unmasked it is the image's own mean.
    """
    if mask_HW.all():
        return np.full_like(pixel_HW3, pixel_HW3.mean(axis=(0, 1)).round())
    filled_HW3, known_HW1, side = pixel_HW3.copy(), ~mask_HW[:, :, None], 1
    sums, counts = pixel_HW3 * known_HW1, known_HW1
    rows, columns = np.nonzero(mask_HW)
    while len(rows):
        sums, counts, side = _add_fours(sums), _add_fours(counts), 2 * side
        places = rows // side, columns // side
        here = counts[places][:, 0] > 0
        total, number = sums[places][here], counts[places][here]
        filled_HW3[rows[here], columns[here]] = (2 * total + number) // (2 * number)
        rows, columns = rows[~here], columns[~here]
    return filled_HW3


def _add_fours(values_HWC: np.ndarray) -> np.ndarray:
    """Return int64 (H / 2, W / 2, C), sums of 2 x 2 px; sides that are odd end in nothing."""
    height, width, channels = values_HWC.shape
    even = np.pad(values_HWC, ((0, height % 2), (0, width % 2), (0, 0)))
    folded = even.reshape((height + 1) // 2, 2, (width + 1) // 2, 2, channels)
    added: np.ndarray = folded.sum(axis=(1, 3), dtype=np.int64)
    return added
