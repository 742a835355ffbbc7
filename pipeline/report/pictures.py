"""Chosen rows -> thumbnails and captions, from the pool's tars.  Only headers of other rows are read.

A picture that cannot be had has a reason instead; the page shows a placeholder.
"""

import base64
import io
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from pipeline.errors import PoolError
from pipeline.images import open_image
from pipeline.pool import Part, list_parts, read_part
from pipeline.report.blocks import Picture, Strip
from pipeline.report.distributions import Ranked, Shortlist
from pipeline.report.formats import format_score
from pipeline.schemas import IMAGE_EXTENSIONS, KEY, TEXT, UID
from pipeline.storage import open_file
from pipeline.tars import BrokenTar, read_rows
from pipeline.uid import format_uids

STRIP_PICTURES = 8
CAPTION_CHARS = 120
THUMBNAIL_PX, SMALL_THUMBNAIL_PX = 128, 72
"""Longer side of a thumbnail; the small one from MANY_PICTURES on, so that the page stays below 3 MB."""
MANY_PICTURES = 200
JPEG_QUALITY = 82


@dataclass(frozen=True, slots=True)
class Choice:
    """A row to look at."""

    uid: str
    score: float
    part: str


@dataclass(frozen=True, slots=True)
class Found:
    """What the pool holds of a row: its caption and either a thumbnail or the reason why there is none."""

    caption: str | None
    uri: str | None
    problem: str


def choose_strips(subset: Ranked, parts: Sequence[str]) -> dict[str, list[Choice]]:
    """Return the rows to look at by strip label, in the order of the page; `parts` are the names of the score parts."""
    lists = {name: _to_choices(found, parts) for name, found in subset.lists.items()}
    if not lists:
        return {}
    if subset.threshold is None:
        return {
            "Kept, the first by uid": lists["any_kept"],
            "Dropped, the first by uid": lists["any_dropped"],
        }
    half = STRIP_PICTURES // 2
    return {
        "Kept: the highest four, and four others": _mix(lists["highest"][:half], lists["any_kept"]),
        "Borderline: the nearest four above, and four below": lists["above"][:half][::-1] + lists["below"][:half],
        "Dropped: four, and the lowest four": _mix(lists["lowest"][:half], lists["any_dropped"]),
    }


def _to_choices(found: Shortlist, parts: Sequence[str]) -> list[Choice]:
    uids = format_uids(np.ascontiguousarray(found.rows["uid"])).to_pylist()
    scores, places = found.rows["score"].tolist(), found.rows["part"].tolist()
    return [Choice(uid, score, parts[place]) for uid, score, place in zip(uids, scores, places, strict=True)]


def _mix(ends: list[Choice], others: list[Choice]) -> list[Choice]:
    """Return the ends and enough of the others, each uid once, by falling score."""
    chosen = {choice.uid: choice for choice in ends}
    for choice in others:
        if len(chosen) < STRIP_PICTURES:
            chosen.setdefault(choice.uid, choice)
    return sorted(chosen.values(), key=lambda choice: (-choice.score, choice.uid))


def load_pictures(pool: str, choices: Iterable[Choice]) -> dict[str, Found]:
    """Return what the pool holds of each chosen row, by uid.  Raises PoolError when there is no pool at all."""
    wanted: dict[str, dict[str, None]] = {}
    for choice in choices:
        wanted.setdefault(choice.part, {})[choice.uid] = None
    parts = {part.name: part for part in list_parts(pool)}
    num = sum(map(len, wanted.values()))
    side_px = THUMBNAIL_PX if num < MANY_PICTURES else SMALL_THUMBNAIL_PX
    found: dict[str, Found] = {}
    for name, uids in sorted(wanted.items()):
        if name in parts:
            found |= _load_part(parts[name], list(uids), side_px)
        else:
            found |= dict.fromkeys(uids, Found(None, None, f"no part {name} in the pool"))
    return found


def _load_part(part: Part, uids: list[str], side_px: int) -> dict[str, Found]:
    try:
        table = read_part(part).table
    except PoolError:
        return dict.fromkeys(uids, Found(None, None, "part cannot be read"))
    rows = table.filter(pc.is_in(table[UID], pa.array(uids, pa.string()))).select([UID, KEY, TEXT]).to_pylist()
    first = {row[UID]: row for row in reversed(rows)}
    images = _read_images(part, {row[KEY] for row in first.values()})
    found = {uid: _find(row[TEXT], images.get(row[KEY]), side_px) for uid, row in first.items()}
    return dict.fromkeys(uids, Found(None, None, "not in the pool")) | found


def _find(caption: str | None, image: bytes | None, side_px: int) -> Found:
    if image is None:
        return Found(caption, None, "no image in the pool")
    uri = make_thumbnail(image, side_px=side_px)
    return Found(caption, uri, "" if uri else "image cannot be read")


def _read_images(part: Part, keys: set[str]) -> dict[str, bytes]:
    """Return key -> image bytes for the keys that the part's tar has, as far as the tar is whole."""
    images: dict[str, bytes] = {}
    if part.tar is None:
        return images
    with open_file(part.tar) as file:
        for key, (offset, size) in _find_images(part.tar, keys).items():
            file.seek(offset)
            images[key] = file.read(size)
    return images


def _find_images(tar: str, keys: set[str]) -> dict[str, tuple[int, int]]:
    """Return key -> (offset, size) in bytes of the image members; the first counts where a key repeats."""
    places: dict[str, tuple[int, int]] = {}
    try:
        for row in read_rows(tar, contents=False, repeats=True):
            members = [m for e in IMAGE_EXTENSIONS for m in row.members if m.extension == e]
            if row.key in keys and members:
                places.setdefault(row.key, (members[0].offset, members[0].size))
            if len(places) == len(keys):
                break
    except BrokenTar:
        pass  # what came before the break is shown, the rest has placeholders
    return places


def make_thumbnail(image: bytes, *, side_px: int = THUMBNAIL_PX) -> str | None:
    """Return a small JPEG of an image as a data: URI, or None when it cannot be decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = _shrink(open_image(image, side_px=side_px), side_px)
    except Exception:  # UnreadableImage, or a transparency that Pillow cannot apply
        return None
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def _shrink(picture: Image.Image, side_px: int) -> Image.Image:
    """Return the picture as RGB on white, its longer side at most `side_px`."""
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    picture = picture.convert("RGB")
    picture.thumbnail((side_px, side_px))
    return picture


def build_gallery(
    strips: Mapping[str, Sequence[Choice]], found: Mapping[str, Found], kinds: Mapping[str, str], *, by: str | None
) -> list[Strip]:
    """Return the strips of one subset's gallery; `kinds` says what the truth calls a row, where it is known."""
    return [
        Strip(label, [_show(choice, found[choice.uid], kinds.get(choice.uid, ""), by) for choice in choices])
        for label, choices in strips.items()
        if choices
    ]


def _show(choice: Choice, found: Found, kind: str, by: str | None) -> Picture:
    return Picture(
        uid=choice.uid,
        caption=_cut(found.caption),
        uri=found.uri,
        problem=found.problem,
        score=format_score(choice.score) if by else "",
        truth=kind.replace("_", " "),
    )


def _cut(caption: str | None) -> str | None:
    """Return the caption on one line, shortened."""
    if caption is None:
        return None
    words = " ".join(caption.split())
    return words if len(words) <= CAPTION_CHARS else words[: CAPTION_CHARS - 1].rstrip() + "…"
