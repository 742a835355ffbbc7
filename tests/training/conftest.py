"""Small shards, made from scratch: tars of rendered coloured squares, and tars with chosen faults."""

import io
import itertools
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "yellow", "white", "black", "purple", "orange")
PLACES = {"top left": (2, 2), "top right": (16, 2), "bottom left": (2, 16), "bottom right": (16, 16)}
SIDES = {"tiny": 5, "small": 8, "large": 11, "huge": 14}
GROUNDS = ("grey", "pink")


def render_square(colour: str, place: str, side: str, ground: str) -> bytes:
    image = Image.new("RGB", (32, 32), ground)
    x, y = PLACES[place]
    ImageDraw.Draw(image).rectangle((x, y, x + SIDES[side] - 1, y + SIDES[side] - 1), fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def make_rows(num: int) -> list[tuple[str, bytes]]:
    kinds = list(itertools.product(COLOURS, PLACES, SIDES, GROUNDS))[:num]
    return [(f"a {s} {c} square at the {p} on {g}", render_square(c, p, s, g)) for c, p, s, g in kinds]


@pytest.fixture(scope="session")
def square_rows() -> Callable[[int], list[tuple[str, bytes]]]:
    """num -> that many (caption, png) pairs, all different; up to 256."""
    return make_rows


@pytest.fixture(scope="session")
def write_tar() -> Callable[[Path, Iterable[tuple[str, bytes]]], Path]:
    """(path, (member name, content) pairs) -> path of a new tar."""

    def write(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return path

    return write


@pytest.fixture(scope="session")
def write_shards(write_tar: Callable[..., Path]) -> Callable[..., Path]:
    """(folder, (caption, image) pairs, rows per tar) -> folder of shards."""

    def write(folder: Path, rows: list[tuple[str, bytes]], per_tar: int = 100) -> Path:
        for start in range(0, len(rows), per_tar):
            members = []
            for number, (caption, image) in enumerate(rows[start : start + per_tar], start):
                members += [(f"{number:09d}.png", image), (f"{number:09d}.txt", caption.encode())]
            write_tar(folder / f"{start // per_tar:08d}.tar", members)
        return folder

    return write


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory, write_shards: Callable[..., Path]) -> Path:
    """A folder of 3 shards with 256 distinct rows."""
    return write_shards(tmp_path_factory.mktemp("squares"), make_rows(256))
