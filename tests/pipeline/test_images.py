import io
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from pipeline.images import FORMATS, MAX_PIXELS, UnreadableImage, decode_image, open_image


def noise(mode: str = "RGB", *, width: int = 50, height: int = 41) -> Image.Image:
    shape = (height, width)
    if mode == "I;16":
        return Image.fromarray(np.random.default_rng(0).integers(0, 600, shape, dtype=np.uint16))
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)).convert(mode)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_that_says(width: int, height: int) -> bytes:
    """A PNG whose header claims a size; its pixels are junk, so decoding it would fail in another way."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"junk") + chunk(b"IEND", b"")


def webp_that_says(width: int, height: int) -> bytes:
    """An animated WebP whose canvas claims a size."""
    content = bytearray(encode(noise(), "WEBP", save_all=True, append_images=[noise("L").convert("RGB")]))
    assert content[12:16] == b"VP8X"
    content[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(content)


def refusal(content: bytes) -> str:
    with pytest.raises(UnreadableImage) as caught:
        decode_image(content)
    message = str(caught.value)
    assert 0 < len(message) <= 200 and "0x" not in message
    return message


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_decode_as_pillow_does(kind: str) -> None:
    content = encode(noise(), kind)
    found, wanted = decode_image(content), Image.open(io.BytesIO(content))
    assert found.format == kind and np.array_equal(np.asarray(found), np.asarray(wanted))


def test_a_jpeg_of_several_pictures_gives_the_first() -> None:
    """MPO, which phones write as .jpg."""
    content = encode(noise(), "MPO", save_all=True, append_images=[noise("L").convert("RGB")])
    assert np.array_equal(np.asarray(decode_image(content)), np.asarray(decode_image(encode(noise(), "JPEG"))))


@pytest.mark.parametrize("kind", ["EPS", "GIF", "BMP", "TIFF", "PPM", "ICO", "TGA"])
def test_other_formats_are_refused(kind: str) -> None:
    content = encode(noise(), kind)
    Image.open(io.BytesIO(content))
    assert refusal(content) == "not an image of the formats JPEG, PNG, WEBP"


@pytest.mark.parametrize("content", [b"", b"no image", b"RIFF\0\0\0\0WAVEfmt ", b"\x89PNG"])
def test_what_is_no_image_says_so(content: bytes) -> None:
    assert refusal(content) == "not an image of the formats JPEG, PNG, WEBP"


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_images_are_refused(kind: str, cut: float) -> None:
    content = encode(noise(), kind)
    cut_short = content[: int(cut * len(content))]
    message = refusal(cut_short)
    assert message.startswith(("OSError: ", "SyntaxError: ")) and refusal(cut_short) == message
    with pytest.raises(UnreadableImage):
        open_image(cut_short, side_px=8)


@pytest.mark.parametrize(("width", "height"), [(8193, 8192), (10_000, 10_000), (60_000, 60_000), (1, MAX_PIXELS + 1)])
def test_bombs_are_refused_before_decoding(width: int, height: int) -> None:
    """10,000 x 10,000 px is where Pillow warns, 60,000 x 60,000 where it raises."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert refusal(png_that_says(width, height)) == f"{width} x {height} px is over the limit of 67,108,864 px"
    assert not heard


@pytest.mark.parametrize("side", [8193, 10_000, 16_383])
def test_webp_bombs_are_refused(side: int) -> None:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert refusal(webp_that_says(side, side))
    assert not heard


def test_the_largest_image_is_read() -> None:
    assert decode_image(encode(Image.new("1", (8192, 8192)))).size == (8192, 8192)
    assert MAX_PIXELS == 8192 * 8192


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("RGB", "JPEG", {}),
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("1", "PNG", {}),
        ("P", "PNG", {}),
        ("P", "PNG", {"transparency": bytes(range(100))}),
        ("P", "PNG", {"transparency": 3}),
        ("RGB", "PNG", {"transparency": (1, 2, 3)}),
        ("LA", "PNG", {}),
        ("RGBA", "PNG", {}),
        ("I;16", "PNG", {}),
        ("RGBA", "WEBP", {"lossless": True}),
    ],
)
def test_every_mode_becomes_rgb(mode: str, kind: str, options: dict[str, object]) -> None:
    content = encode(noise(mode), kind, **options)
    found = decode_image(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of transparency in palettes
        wanted = Image.open(io.BytesIO(content)).convert("RGB")
    assert found.mode == "RGB" and np.array_equal(np.asarray(found), np.asarray(wanted))


@pytest.mark.parametrize(("mode", "kind"), [("P", "PNG"), ("I;16", "PNG"), ("CMYK", "JPEG"), ("RGBA", "PNG")])
def test_open_image_keeps_the_mode(mode: str, kind: str) -> None:
    assert open_image(encode(noise(mode), kind)).mode == mode


@pytest.mark.parametrize(("kind", "size"), [("JPEG", (100, 80)), ("PNG", (800, 640))])
def test_a_jpeg_is_read_smaller_on_request(kind: str, size: tuple[int, int]) -> None:
    assert open_image(encode(noise(width=800, height=640), kind), side_px=72).size == size


def test_importing_it_imports_no_pillow() -> None:
    command = [sys.executable, "-c", "import sys, pipeline.images; sys.exit('PIL' in sys.modules)"]
    assert subprocess.run(command, check=False, timeout=60).returncode == 0


def test_what_is_too_large_has_a_reason_of_its_own() -> None:
    for content, reason in ((png_that_says(8193, 8192), "oversized_image"), (b"x", "unreadable_image")):
        with pytest.raises(UnreadableImage) as caught:
            open_image(content)
        assert caught.value.reason == reason


def test_running_out_of_memory_is_no_bad_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    with pytest.raises(MemoryError):
        open_image(encode(noise()))


def test_ribbons_are_refused() -> None:
    """Resized to a shorter side of 224 px, 1 x 60,000 px would be 3 billion pixels."""
    assert "256 times" in refusal(encode(Image.new("L", (1, 60_000)), "JPEG"))
    assert decode_image(encode(Image.new("L", (4, 1024)))).size == (4, 1024)
