"""Small evaluation sets in the hub's layout: four classes, each a plain colour; and one fixed tiny checkpoint."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from pipeline.clip_model import open_model

COLOURS = {"red": (200, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 200), "yellow": (200, 200, 20)}


def draw(colour: tuple[int, int, int]) -> bytes:
    """Return a 40 x 32 px PNG of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (40, 32), colour).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def make_set(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes data/wds_NAME_test with two tars of 8 images and returns its folder."""

    def make(name: str = "toy", *, classes: str | None = None, templates: str = "a {c} square\n{c}\n") -> Path:
        folder = tmp_path / "data" / f"wds_{name}_test"
        (folder / "test").mkdir(parents=True)
        (folder / "classnames.txt").write_text("\n".join(COLOURS) + "\n" if classes is None else classes)
        (folder / "zeroshot_classification_templates.txt").write_text(templates)
        (folder / "test" / "nshards.txt").write_text("2\n")
        pictures = [draw(colour) for colour in COLOURS.values()]
        for number in range(2):
            members = []
            for row in range(8):
                key = f"s{number * 8 + row:07d}"
                members += [(f"{key}.cls", str(row % 4).encode()), (f"{key}.png", pictures[row % 4])]
            write_tar(folder / "test" / f"{number}.tar", members)
        return folder

    return make


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the model string of a winnow-vit-tiny checkpoint with a fixed seed."""
    path = tmp_path_factory.mktemp("model") / "tiny.pt"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        torch.save(open_model("winnow-vit-tiny").model.state_dict(), path)
    return f"winnow-vit-tiny@{path}"
