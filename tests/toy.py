"""Small data built by hand: rendered squares and pools in img2dataset's layout."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.tars import TarRow, make_member, write_rows

COLORS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "yellow": (230, 220, 40)}


def render(color: str, seed: int = 0, *, side: int = 40, kind: str = "JPEG") -> bytes:
    """A noisy square of one colour."""
    noise = np.random.default_rng(seed).integers(0, 30, (side, side, 3))
    pixels = np.clip(np.array(COLORS[color]) - noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def toy_row(number: int) -> dict[str, Any]:
    """Row `number` of the toy pool as its parquet has it."""
    color = list(COLORS)[number % len(COLORS)]
    return {
        "uid": f"{(number * 0x9E3779B97F4A7C15F39CC0605CEDC835) % (1 << 128):032x}",
        "url": f"https://example.org/{number}.jpg",
        "text": f"a {color} square, picture {number}",
        "original_width": 200 + number,
        "original_height": 300,
        "key": f"{number:09d}",
        "status": "success",
    }


def write_part(folder: Path, name: str, rows: list[dict[str, Any]], images: dict[str, bytes | None]) -> None:
    """One tar and parquet as img2dataset writes them; an image of None leaves the row out of the tar."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    with (folder / f"{name}.tar").open("wb") as file:
        write_rows(file, (tar_row(row, image) for row in rows if (image := images.get(row["key"])) is not None))


def tar_row(row: dict[str, Any], image: bytes) -> TarRow:
    key = row["key"]
    details = json.dumps({k: v for k, v in row.items() if k != "text"} | {"caption": row["text"]}).encode()
    contents = {"jpg": image, "json": details, "txt": (row["text"] or "").encode()}
    return TarRow(key, tuple(make_member(f"{key}.{extension}", content) for extension, content in contents.items()))
