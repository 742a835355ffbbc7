"""Seed -> the embedded pool behind `winnow demo`: drawn scenes with captions, as img2dataset would have stored them.

A scene is one shape in one color on another color, with a gradient, soft noise and sometimes a small distractor.
Three things are written, from three separate random streams: a spoiled pool (with the truth beside it), a clean pool
for training a data filter, and three zero-shot tasks.  The same seed and library versions give the same bytes.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from pipeline.errors import ConfigError
from pipeline.scene_captions import (
    COLORS,
    KIND_FRACTIONS,
    OBJECTS,
    RIGHT_KINDS,
    SHAPES,
    TASK_TEMPLATES,
    Content,
    choose_caption,
    draw_content,
    pick,
)
from pipeline.schemas import (
    CAPTION,
    CAPTION_EXTENSION,
    CLASS_EXTENSION,
    JSON_EXTENSION,
    KEY,
    ORIGINAL_HEIGHT,
    ORIGINAL_WIDTH,
    PARQUET_SUFFIX,
    PART_PATTERN,
    STATS_SUFFIX,
    STATUS,
    STATUS_SUCCESS,
    TAR_SUFFIX,
    TEXT,
    UID,
    URL,
)
from pipeline.storage import join, write_atomic, write_bytes
from pipeline.tars import TarRow, make_member, write_rows
from pipeline.uid import derive_uid

TASKS = ("scenes-shape", "scenes-color", "scenes-object")
"""Task names; the folder of one is `wds_NAME_test`, as on the hub."""

TRUTH = "truth.parquet"
TRUTH_SCHEMA = pa.schema([(UID, pa.string()), ("kind", pa.string()), ("caption_is_right", pa.bool_())])
"""caption_is_right: a readable picture whose English caption states what is in it; a right foreign caption is false."""
POOL_SCHEMA = pa.schema(
    [(UID, pa.string()), (URL, pa.string()), (TEXT, pa.string())]
    + [(ORIGINAL_WIDTH, pa.int64()), (ORIGINAL_HEIGHT, pa.int64())]
    + [("face_bboxes", pa.list_(pa.list_(pa.float64()))), ("sha256", pa.string()), (KEY, pa.string())]
    + [(STATUS, pa.string()), ("error_message", pa.string()), ("width", pa.int64()), ("height", pa.int64())]
)

STORED_SIDE_PX = 64
"""The short side is shrunk to this for storage; smaller originals stay as they are."""
MAX_PART_ROWS = 10_000
TASK_SHARD_ROWS = 500
POOL_STREAM, CLEAN_STREAM, TASK_STREAM = 1, 2, 3

COLOR_RGB = {
    "red": (230, 45, 45),
    "green": (60, 190, 70),
    "blue": (65, 110, 250),
    "yellow": (250, 225, 60),
    "orange": (250, 145, 30),
    "purple": (160, 75, 215),
    "pink": (255, 150, 200),
    "white": (245, 245, 245),
}
BACKGROUND_RGB = {
    "black": (18, 18, 18),
    "gray": (75, 75, 75),
    "brown": (85, 55, 30),
    "navy": (22, 32, 85),
    "maroon": (88, 18, 35),
    "teal": (12, 78, 82),
}
"""Darker than any object: with both signs of contrast a tiny model learns no shapes in a minute on a CPU."""


@dataclass(frozen=True, slots=True)
class SceneRow:
    """One row of a pool, before it gets its key."""

    uid: str
    url: str
    caption: str | None
    image: bytes
    extension: str
    size_px: tuple[int, int]
    """Stored (width, height)."""
    original_px: tuple[int, int]
    """(width, height) the scene was drawn at."""
    kind: str


# ---- drawing


def draw_scene(content: Content, size_px: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Return the RGB picture of a scene at (width, height).

    The object is whole and in the middle of the short side, give or take 5 %; along the long side it is anywhere.
    """
    picture = _draw_background(content.background, size_px, rng)
    short = min(size_px)
    if rng.random() < 0.25:
        _draw_distractor(picture, content, short, rng)
    radius = short * rng.uniform(0.36, 0.46)
    room = np.maximum(np.array(size_px) / 2 - radius * 1.05, 0)
    reach = np.minimum(room, max(short * 0.05, 1) + (np.array(size_px) - short) / 2)
    center = np.array(size_px) / 2 + rng.uniform(-1, 1, 2) * reach
    rgb = _jitter(COLOR_RGB[content.color], 14, rng)
    _paste_shape(picture, content.shape, rgb, center, radius, rng.uniform(-0.2, 0.2))
    return picture


def _draw_background(color: str, size_px: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Return a color with a gradient and blotches: drawn as a coarse grid, then enlarged."""
    cells = int(rng.integers(6, 25))
    across = np.linspace(-1, 1, cells)
    slope = rng.uniform(-18, 18, 2)
    shade = slope[0] * across[:, None] + slope[1] * across[None, :]
    noise = rng.normal(0, rng.uniform(2, 10), (cells, cells))
    grid = np.array(_jitter(BACKGROUND_RGB[color], 6, rng))[None, None, :] + (shade + noise)[:, :, None]
    coarse = Image.fromarray(np.clip(grid, 0, 255).astype(np.uint8))
    return coarse.resize(size_px, Image.Resampling.BILINEAR)


def _draw_distractor(picture: Image.Image, content: Content, short: int, rng: np.random.Generator) -> None:
    """Put a small shape of another color into a corner."""
    others = tuple(color for color in COLORS if color != content.color)
    radius = short * rng.uniform(0.04, 0.07)
    corner = np.array([rng.integers(2), rng.integers(2)]) * (np.array(picture.size) - 3 * radius) + 1.5 * radius
    color = _jitter(COLOR_RGB[pick(rng, others)], 14, rng)
    _paste_shape(picture, pick(rng, SHAPES), color, corner, radius, rng.uniform(-3, 3))


def _jitter(rgb: tuple[int, ...], most: int, rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(c) for c in np.clip(np.array(rgb) + rng.integers(-most, most + 1, 3), 0, 255))


def _paste_shape(
    picture: Image.Image, shape: str, rgb: tuple[int, ...], center: np.ndarray, radius: float, turn: float
) -> None:
    """Draw a shape that fits a circle of `radius` px around `center`, turned by `turn` radians."""
    cos, sin = np.cos(turn), np.sin(turn)
    rotation = np.array([[cos, sin], [-sin, cos]])
    corner = np.floor(center - radius).astype(int)
    side = int(np.ceil(radius * 2)) + 2
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    for fill, outline in zip((255, 0), _outlines_of(shape), strict=False):
        points = outline @ rotation * radius + center - corner
        pen.polygon([(float(x), float(y)) for x, y in points], fill=fill)
    picture.paste(rgb, (int(corner[0]), int(corner[1])), mask)


@cache
def _outlines_of(shape: str) -> tuple[np.ndarray, ...]:
    """Return the outline of a shape within the unit circle, then that of its hole if it has one; y points down."""
    circle = _points_at(np.ones(48))
    if shape in ("circle", "ring"):
        return (circle, circle * 0.55) if shape == "ring" else (circle,)
    if shape == "square":
        return (_points_at(np.ones(4), start=np.pi / 4),)
    if shape == "triangle":
        return (_points_at(np.ones(3)),)
    if shape == "star":
        return (_points_at(np.tile([1.0, 0.4], 5)),)
    if shape == "crescent":
        return (circle, circle * 0.82 + np.array([0.5, 0.0]))
    if shape == "heart":
        return (_heart(),)
    assert shape == "cross", shape
    arm = np.array([(-0.3, -0.3), (-0.3, -0.95), (0.3, -0.95)])
    quarter = arm @ np.array([[0, 1], [-1, 0]])
    return (np.concatenate([arm, quarter, -arm, -quarter]),)


def _points_at(radii: np.ndarray, *, start: float = 0.0) -> np.ndarray:
    """Return points at equal angles, the first one at the top (or `start` radians on), at these distances."""
    angles = start + np.arange(len(radii)) * 2 * np.pi / len(radii)
    return np.stack([np.sin(angles) * radii, -np.cos(angles) * radii], axis=1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y - 2], axis=1) / 17.5


# ---- rows


def _draw_size(kind: str, rng: np.random.Generator) -> tuple[int, int]:
    """Return (width, height) in px: ordinary 200-400, too_small below 200, extreme_aspect over 3 to 1."""
    if kind == "extreme_aspect":
        short = int(rng.integers(200, 240))
        sides = (short, int(short * rng.uniform(3.1, 4.0)))
    else:
        low, high = (40, 190) if kind == "too_small" else (200, 320)
        short = int(rng.integers(low, high))
        sides = (short, int(short * rng.uniform(1.0, 1.25)))
    return sides if rng.random() < 0.5 else sides[::-1]


def _store(picture: Image.Image, rng: np.random.Generator) -> tuple[bytes, str, tuple[int, int]]:
    """Return (bytes, extension, size) with the short side shrunk by area to STORED_SIDE_PX; a few are png or webp."""
    ratio = STORED_SIDE_PX / min(picture.size)
    if ratio < 1:
        width, height = (max(STORED_SIDE_PX, round(side * ratio)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BOX)
    roll = rng.random()
    extension, options = ("jpg", {"quality": 92}) if roll > 0.05 else ("png", {}) if roll > 0.02 else ("webp", {})
    file = io.BytesIO()
    picture.save(file, "jpeg" if extension == "jpg" else extension, **options)
    return file.getvalue(), extension, picture.size


def _make_row(seed: int, stream: int, number: int, kind: str, source: int) -> SceneRow:
    """Return one row; a duplicate is the honest row `source` again, under its own url and uid."""
    if kind == "duplicate":
        row = _make_row(seed, stream, source, "honest", source)
    else:
        rng = np.random.default_rng([seed, stream, number + 1])
        content, original_px = draw_content(rng), _draw_size(kind, rng)
        image, extension, size_px = _store(draw_scene(content, original_px, rng), rng)
        caption = choose_caption(kind, content, rng)
        if kind == "unreadable":
            image = _damage(image, rng)
        row = SceneRow("", "", caption, image, extension, size_px, original_px, kind)
    url = f"https://pictures.example/{seed}/{stream}/{number:08d}.{row.extension}"
    return dataclasses.replace(row, uid=derive_uid(url, row.caption), url=url, kind=kind)


def _damage(image: bytes, rng: np.random.Generator) -> bytes:
    """Return what broken downloads hold: an error page, a file cut short within its header, or noise."""
    broken = (b"<!DOCTYPE html><title>404 Not Found</title>", image[: min(100, len(image) // 4)], rng.bytes(len(image)))
    return broken[int(rng.integers(3))]


# ---- pools


def write_demo_pool(folder: str, *, seed: int, num_rows: int, rows_per_part: int) -> None:
    """Write a spoiled pool into `folder` and what is true of each row to truth_url(folder), beside it.

    Every kind of KIND_FRACTIONS is there, as often as its share says; the truth has TRUTH_SCHEMA, in the pool's order.
    Raises ConfigError for fewer than 100 rows or parts of more than 10,000.
    """
    if num_rows < 100:
        raise ConfigError(f"a demo pool of {num_rows} rows cannot hold every kind of row. Ask for 100 or more.")
    plan = _plan_kinds(seed, num_rows)
    rows = _write_pool(folder, seed, POOL_STREAM, plan, rows_per_part)
    truth = [{UID: uid, "kind": kind, "caption_is_right": kind in RIGHT_KINDS} for uid, kind in rows]
    with write_atomic(truth_url(folder)) as file:
        pq.write_table(pa.Table.from_pylist(truth, TRUTH_SCHEMA), file)


def truth_url(folder: str) -> str:
    """Return where the truth about the pool in `folder` lies: `truth.parquet` in the parent folder."""
    parent, slash, _ = folder.rstrip("/").rpartition("/")
    return join(parent, TRUTH) if parent else slash + TRUTH


def write_demo_clean(folder: str, *, seed: int, num_rows: int, rows_per_part: int) -> None:
    """Write a pool of honest rows only; none is in the spoiled pool of any seed.  Raises ConfigError for big parts."""
    _write_pool(folder, seed, CLEAN_STREAM, [("honest", row) for row in range(num_rows)], rows_per_part)


def _plan_kinds(seed: int, num_rows: int) -> list[tuple[str, int]]:
    """Return each row's (kind, source), shuffled; a duplicate's source is an honest row, any other's the row itself."""
    rng = np.random.default_rng([seed, POOL_STREAM])
    counts = {kind: round(num_rows * share) for kind, share in KIND_FRACTIONS.items() if kind != "honest"}
    kinds = [kind for kind, count in counts.items() for _ in range(max(count, 1))]
    kinds += ["honest"] * (num_rows - len(kinds))
    shuffled = [kinds[i] for i in rng.permutation(num_rows)]
    honest = [row for row, kind in enumerate(shuffled) if kind == "honest"]
    return [(k, honest[int(rng.integers(len(honest)))] if k == "duplicate" else row) for row, k in enumerate(shuffled)]


def _write_pool(
    folder: str, seed: int, stream: int, plan: Sequence[tuple[str, int]], rows_per_part: int
) -> list[tuple[str, str]]:
    """Write every part and return (uid, kind) of each row in order."""
    if not 0 < rows_per_part <= MAX_PART_ROWS:
        raise ConfigError(f"{rows_per_part} rows a part: img2dataset's keys leave room for 1 to {MAX_PART_ROWS}.")
    written = []
    for part, start in enumerate(range(0, len(plan), rows_per_part)):
        rows = [_make_row(seed, stream, n, *plan[n]) for n in range(start, min(start + rows_per_part, len(plan)))]
        _write_part(join(folder, PART_PATTERN.format(part)), part, rows)
        written += [(row.uid, row.kind) for row in rows]
    return written


def _write_part(stem: str, part: int, rows: Sequence[SceneRow]) -> None:
    """Write the tar, the parquet and the stats of one part as img2dataset does, the stats last."""
    columns = [_describe(row, f"{part * MAX_PART_ROWS + number:012d}") for number, row in enumerate(rows)]
    with write_atomic(stem + TAR_SUFFIX) as file:
        write_rows(file, (_tar_row(row, column) for row, column in zip(rows, columns, strict=True)))
    with write_atomic(stem + PARQUET_SUFFIX) as file:
        pq.write_table(pa.Table.from_pylist(columns, POOL_SCHEMA), file)
    done = len(rows)
    stats: dict[str, object] = {"count": done, "successes": done, "failed_to_download": 0, "failed_to_resize": 0}
    stats |= {"duration": 0.0, "start_time": 0.0, "end_time": 0.0, "status_dict": {STATUS_SUCCESS: done}}
    write_bytes(stem + STATS_SUFFIX, json.dumps(stats, indent=4).encode())


def _describe(row: SceneRow, key: str) -> dict[str, object]:
    """Return the row's values for POOL_SCHEMA; sha256 is of the stored bytes, since none were fetched."""
    return {
        UID: row.uid,
        URL: row.url,
        TEXT: row.caption,
        ORIGINAL_WIDTH: row.original_px[0],
        ORIGINAL_HEIGHT: row.original_px[1],
        "face_bboxes": [],
        "sha256": hashlib.sha256(row.image).hexdigest(),
        KEY: key,
        STATUS: STATUS_SUCCESS,
        "error_message": None,
        "width": row.size_px[0],
        "height": row.size_px[1],
    }


def _tar_row(row: SceneRow, columns: dict[str, object]) -> TarRow:
    details = {CAPTION if name == TEXT else name: value for name, value in columns.items()} | {"exif": "{}"}
    contents = {
        row.extension: row.image,
        JSON_EXTENSION: json.dumps(details, indent=4).encode(),
        CAPTION_EXTENSION: (row.caption or "").encode(),
    }
    return _sorted_row(str(columns[KEY]), contents)


def _sorted_row(key: str, contents: dict[str, bytes]) -> TarRow:
    """Return a tar row with its members in alphabetical order of the extension, as webdataset's writer has them."""
    return TarRow(key, tuple(make_member(f"{key}.{extension}", contents[extension]) for extension in sorted(contents)))


# ---- tasks


def write_demo_tasks(folder: str, *, seed: int, num_images: int) -> None:
    """Write the three TASKS over the same `num_images` scenes, each as `folder/wds_NAME_test` in the hub's layout.

    Labels index classnames.txt: SHAPES, COLORS or OBJECTS; every object is there equally often (give or take one).
    Raises ConfigError for fewer images than objects.
    """
    if num_images < len(OBJECTS):
        raise ConfigError(f"{num_images} images cannot show all {len(OBJECTS)} objects. Ask for that many or more.")
    order = np.random.default_rng([seed, TASK_STREAM]).permutation(num_images) % len(OBJECTS)
    images = [_draw_task_image(seed, row, int(label)) for row, label in enumerate(order)]
    num_shapes = len(SHAPES)
    _write_task(join(folder, f"wds_{TASKS[0]}_test"), "shape", SHAPES, images, order % num_shapes)
    _write_task(join(folder, f"wds_{TASKS[1]}_test"), "color", COLORS, images, order // num_shapes)
    _write_task(join(folder, f"wds_{TASKS[2]}_test"), "object", OBJECTS, images, order)


def _draw_task_image(seed: int, row: int, label: int) -> tuple[str, bytes]:
    rng = np.random.default_rng([seed, TASK_STREAM, row + 1])
    picture = draw_scene(draw_content(rng, label), _draw_size("honest", rng), rng)
    image, extension, _ = _store(picture, rng)
    return extension, image


def _write_task(
    root: str, of: str, classes: Sequence[str], images: Sequence[tuple[str, bytes]], labels: np.ndarray
) -> None:
    write_bytes(join(root, "classnames.txt"), "\n".join(classes).encode())
    write_bytes(join(root, "zeroshot_classification_templates.txt"), "\n".join(TASK_TEMPLATES[of]).encode())
    starts = range(0, len(images), TASK_SHARD_ROWS)
    for shard, start in enumerate(starts):
        with write_atomic(join(root, "test", f"{shard}{TAR_SUFFIX}")) as file:
            write_rows(file, _task_rows(images, labels, range(start, min(start + TASK_SHARD_ROWS, len(images)))))
    write_bytes(join(root, "test", "nshards.txt"), str(len(starts)).encode())


def _task_rows(images: Sequence[tuple[str, bytes]], labels: np.ndarray, rows: range) -> Iterator[TarRow]:
    for row in rows:
        extension, image = images[row]
        yield _sorted_row(f"s{row:07d}", {extension: image, CLASS_EXTENSION: str(labels[row]).encode()})
