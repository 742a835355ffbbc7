"""CLIP score of the flipped and of the masked image: what the model sees, and detectors of every kind."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image, ImageDraw
from toy import render

from filters import build_filter
from filters.text_mask import SIDE_PX, erase_text, fill, open_detector
from pipeline.clip_model import open_model
from pipeline.contract import check_scored
from pipeline.errors import ConfigError, ModelError
from pipeline.schemas import IMAGE, IMAGE_ERROR, TEXT

RED = """
def forward(image):
    return (image[0, 0] > 0.8).float() * (image[0, 1] < 0.2).float()
"""
"""Finds red ink."""


def detector(folder: Path, source: str = RED) -> str:
    """A TorchScript file whose forward is `source`."""
    path = str(folder / "detector.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.CompilationUnit(source).forward.save(path)
    return path


def answer(numbers: str) -> str:
    return f"def forward(image):\n    return {numbers}\n"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run directory with fixed random weights."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    torch.save({"state_dict": open_model("winnow-vit-tiny").model.state_dict()}, folder / "checkpoint.pt")
    (folder / "model.json").write_text('{"architecture": "winnow-vit-tiny"}')
    return str(folder)


def encode(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def draw_text(width: int = 90, height: int = 61, ink: str = "red") -> Image.Image:
    """A picture in two colours with a word on it."""
    image = Image.new("RGB", (width, height), (20, 120, 60))
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 0, width // 2, height), fill=(200, 200, 40))
    pen.text((width // 4, height // 3), "SALE", fill=ink, font_size=18)
    return image


def make_batch(images: list[bytes]) -> pa.RecordBatch:
    errors = pa.nulls(len(images), pa.string())
    return pa.RecordBatch.from_pydict(
        {IMAGE: pa.array(images, pa.binary()), IMAGE_ERROR: errors, TEXT: ["a word"] * len(images)}
    )


def run(entry: dict[str, Any], images: list[bytes]) -> tuple[list[float | None], dict[int, str]]:
    filter, batch = build_filter({"filter": "clip_score", **entry}), make_batch(images)
    scored = filter.load()(batch)
    check_scored(filter, batch, scored)
    return scored.columns[0].to_pylist(), {f.position: f.reason for f in scored.failures}


def embed(run_folder: str, images: list[Image.Image]) -> np.ndarray:
    """The model's own cosines, without the filter."""
    clip = open_model(run_folder)
    with torch.inference_mode():
        image_ND = clip.model.encode_image(torch.stack([clip.eval_transform(i) for i in images]), normalize=True)
        text_ND = clip.model.encode_text(clip.tokenize(["a word"]), normalize=True)
        return (image_ND @ text_ND.T)[:, 0].numpy()


def fill_slowly(pixel_HW3: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    """The definition of fill, pixel by pixel."""
    filled = pixel_HW3.copy()
    for y, x in zip(*np.nonzero(mask_HW), strict=True):
        side, seen = 1, []
        while not len(seen):
            side *= 2
            square = np.s_[y // side * side : (y // side + 1) * side, x // side * side : (x // side + 1) * side]
            seen = pixel_HW3[square][~mask_HW[square]]
        filled[y, x] = np.floor(np.mean(seen, axis=0) + 0.5)
    return filled


def test_the_flipped_view_is_the_mirror_image(run_folder: str) -> None:
    images = [draw_text(), draw_text(40, 90), draw_text().convert("P"), draw_text().convert("RGBA")]
    found, failed = run({"model": run_folder, "view": "flipped"}, [encode(i) for i in images])
    mirrored = [i.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for i in images]
    np.testing.assert_allclose(found, embed(run_folder, mirrored), atol=1e-5)
    plain, _ = run({"model": run_folder}, [encode(i) for i in mirrored])
    assert found == plain and found[0] != run({"model": run_folder}, [encode(images[0])])[0][0] and not failed


def test_the_masked_view_is_the_image_painted_over_where_the_detector_says(run_folder: str, tmp_path: Path) -> None:
    images = [draw_text(), draw_text(SIDE_PX, SIDE_PX), draw_text(ink="blue")]
    entry = {"model": run_folder, "view": "masked", "detector": detector(tmp_path)}
    found, failed = run(entry, [encode(i) for i in images])
    wanted = []
    for image in images:
        square = np.asarray(image.resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR)) / np.float32(255)
        is_red = (square[:, :, 0] > 0.8) & (square[:, :, 1] < 0.2)
        rows = ((np.arange(image.height) + 0.5) * SIDE_PX / image.height).astype(int)
        columns = ((np.arange(image.width) + 0.5) * SIDE_PX / image.width).astype(int)
        wanted.append(Image.fromarray(fill_slowly(np.asarray(image), is_red[rows][:, columns])))
    np.testing.assert_allclose(found, embed(run_folder, wanted), atol=1e-5)
    plain, _ = run({"model": run_folder}, [encode(i) for i in images])
    assert [f == p for f, p in zip(found, plain, strict=True)] == [False, False, True] and not failed


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (7, 5), (16, 16), (33, 20)])
@pytest.mark.parametrize("share", [0.1, 0.6, 0.97])
def test_fill_is_its_definition(height: int, width: int, share: float) -> None:
    rng = np.random.default_rng(height)
    pixel_HW3 = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    mask_HW = rng.random((height, width)) < share
    mask_HW[-1, 0] = False
    np.testing.assert_array_equal(fill(pixel_HW3, mask_HW), fill_slowly(pixel_HW3, mask_HW))


def test_an_image_that_is_all_text_becomes_its_mean() -> None:
    pixel_HW3 = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    filled = fill(pixel_HW3, np.ones((2, 4), bool))
    assert (filled == np.round(pixel_HW3.reshape(-1, 3).mean(axis=0))).all()


@pytest.mark.parametrize(
    ("boxes", "covered"),
    [
        ("[[128., 128., 256., 384.]]", (slice(2, 6), slice(4, 8))),
        ("[[-90., -1e9, 33., 1e9]]", (slice(0, 8), slice(0, 2))),  # partly outside; a pixel touched is a pixel covered
        ("[[600., 0., 900., 512.]]", None),
        ("[[256., 384., 128., 128.]]", None),  # its corners the wrong way round
        ("[[128., 128., 128., 128.]]", None),
    ],
)
def test_boxes_are_scaled_and_cut_to_the_image(tmp_path: Path, boxes: str, covered: Any) -> None:
    find_text = open_detector(detector(tmp_path, answer(f"torch.tensor({boxes})")), "cpu")
    wanted = np.zeros((8, 16), bool)
    if covered:
        wanted[covered] = True
    np.testing.assert_array_equal(find_text(Image.new("RGB", (16, 8))), wanted)


def test_no_boxes_leave_the_image_as_it_is(tmp_path: Path) -> None:
    image = draw_text()
    assert erase_text(open_detector(detector(tmp_path, answer("torch.zeros(0, 4)")), "cpu"), image) is image


FAILS_ON_WHITE = """
def forward(image):
    if bool(image.mean() > 0.9):
        {}
    return torch.zeros(0, 4)
"""


@pytest.mark.parametrize(
    "then",
    ["raise ValueError('too bright')", "return torch.zeros(3)", "return torch.full((1, 4), float('nan'))"],
)
def test_a_detector_that_fails_on_one_image_costs_that_row(run_folder: str, tmp_path: Path, then: str) -> None:
    entry = {"model": run_folder, "view": "masked", "detector": detector(tmp_path, FAILS_ON_WHITE.format(then))}
    white = encode(Image.new("RGB", (9, 9), "white"))
    found, failed = run(entry, [render("red"), white, b"no image", render("blue")])
    assert failed == {1: "text_detector", 2: "unreadable_image"}
    assert [f is None for f in found] == [False, True, True, False]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: str(folder / "none.pt"), "no text detector at"),
        (
            lambda folder: detector(folder, answer("torch.zeros(3)")),
            r"black image: .* \(3,\) numbers, neither \(N, 4\)",
        ),
        (lambda folder: detector(folder, answer("(image, image)")), "fails on a black image"),
        (lambda folder: detector(folder, answer("torch.zeros(1, 4) / 0")), "NaN or infinity"),
        (lambda folder: str(Path(__file__)), "is no TorchScript file"),
    ],
)
def test_what_is_no_detector_is_told_before_any_row(
    run_folder: str, tmp_path: Path, make: Callable[[Path], str], message: str
) -> None:
    with pytest.raises((ConfigError, ModelError), match=message):
        build_filter({"filter": "clip_score", "model": run_folder, "view": "masked", "detector": make(tmp_path)}).load()


def test_a_view_and_its_detector_are_part_of_the_identity_and_plain_scores_keep_theirs(
    run_folder: str, tmp_path: Path
) -> None:
    entry = {"filter": "clip_score", "model": run_folder}
    plain = build_filter(entry)
    assert set(plain.settings) == {"architecture", "sha256"}  # as before there were views
    assert build_filter(entry | {"view": "plain"}).identity == plain.identity
    masked = entry | {"view": "masked", "detector": detector(tmp_path)}
    found = [plain.identity, build_filter(entry | {"view": "flipped"}).identity, build_filter(masked).identity]
    detector(tmp_path, answer("torch.zeros(0, 4)"))
    assert len({*found, build_filter(masked).identity}) == 4
    assert [name for name, _ in build_filter(masked | {"name": "seen"}).makes] == [
        "seen_similarity_score",
        "seen_img",
        "seen_txt",
    ]


@pytest.mark.parametrize("more", [{"view": "masked"}, {"detector": "x.pt"}, {"view": "flipped", "detector": "x.pt"}])
def test_a_detector_belongs_to_the_masked_view(run_folder: str, more: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="masked needs one, alone"):
        build_filter({"filter": "clip_score", "model": run_folder, **more})
