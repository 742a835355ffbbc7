"""Thumbnails of the report."""

import io
import zlib

import pytest
from PIL import Image

from pipeline.report.pictures import make_thumbnail


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "CMYK", "I;16"])
def test_thumbnails_of_all_modes(mode: str) -> None:
    out = io.BytesIO()
    Image.new(mode, (300, 40)).save(out, "JPEG" if mode == "CMYK" else "PNG")
    uri = make_thumbnail(out.getvalue())
    assert uri and uri.startswith("data:image/jpeg;base64,")


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff\xe0 cut short", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_no_thumbnail_of_junk(content: bytes) -> None:
    assert make_thumbnail(content) is None


def test_no_thumbnail_where_transparency_is_longer_than_the_palette() -> None:
    """It decodes, but Pillow cannot apply it; the page must still be built."""
    out = io.BytesIO()
    Image.new("P", (4, 4)).save(out, "PNG")
    name, long = b"tRNS", bytes(300)
    chunk = len(long).to_bytes(4, "big") + name + long + zlib.crc32(name + long).to_bytes(4, "big")
    place = out.getvalue().index(b"IDAT") - 4
    assert make_thumbnail(out.getvalue()[:place] + chunk + out.getvalue()[place:]) is None
    assert make_thumbnail(out.getvalue())
