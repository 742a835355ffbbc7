"""A folder of loose images -> a pool: tars of N rows in the order of the paths, image bytes as they are.

The tree is walked once and the rows are planned on the driver; a part's plan lies in OUT/_import until it is done.
No link that leads out of the folder is followed, and what a table or a file name says is never a path to write to.
"""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from stat import S_ISREG
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ConfigError, PoolError, check_name
from pipeline.images import UnreadableImage, open_image
from pipeline.intake.claim import claim_folder
from pipeline.intake.own_tars import (
    FORMAT_VERSION,
    IMPORT,
    STATE,
    Run,
    finish,
    is_whole,
    read_outcome,
    write_outcome,
)
from pipeline.intake.tables import TABLE_SUFFIXES, list_table_columns, read_tables
from pipeline.lock import hold_lock
from pipeline.manifest import Counts, Manifest, find_done, hash_json
from pipeline.schemas import (
    CAPTION,
    CAPTION_EXTENSION,
    IMAGE_EXTENSIONS,
    JSON_EXTENSION,
    KEY,
    ORIGINAL_HEIGHT,
    ORIGINAL_WIDTH,
    PARQUET_SUFFIX,
    PART_PATTERN,
    REASON_MISSING_IMAGE,
    REASON_NULL_CAPTION,
    REASON_UNREADABLE_IMAGE,
    TAR_SUFFIX,
    TEXT,
    UID,
    URL,
)
from pipeline.storage import is_local, join, open_file, remove, sha256_of_file, write_atomic
from pipeline.tars import TarRow, make_member, write_rows
from pipeline.uid import derive_uid

PLAN = "plan"
PATH, WIDTH, HEIGHT = "path", "width", "height"
"""Columns beside the pool's own: the image's path in the folder, and its size, which is the source's size here."""
FROM_TXT, FROM_FOLDER = "txt", "folder"
REASON_LINK, REASON_UNREADABLE_FILE = "link_out_of_folder", "unreadable_file"
REASON_SAME_NAME, REASON_REPEATED = "duplicate_name", "duplicate_row"
REASON_BAD_NAME = "name_is_not_text"
MAX_CAPTION_BYTES = 1 << 20
TABLE_ROWS = 65_536
PLAN_SCHEMA = pa.schema([(PATH, pa.string()), (TEXT, pa.string())])
ROW_SCHEMA = pa.schema(
    [(UID, pa.string()), (KEY, pa.string()), (URL, pa.string()), (TEXT, pa.string()), (PATH, pa.string())]
    + [(name, pa.int64()) for name in (WIDTH, HEIGHT, ORIGINAL_WIDTH, ORIGINAL_HEIGHT)]
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Captions:
    """Where captions come from."""

    source: str = FROM_TXT
    """"txt": NAME.txt beside NAME.jpg; "folder": the name of the image's folder; else a table's file."""
    file_column: str = "file"
    """Column of the table with paths relative to the image folder."""
    caption_column: str = CAPTION

    @property
    def table(self) -> str | None:
        """The table, None for the other two."""
        return None if self.source in (FROM_TXT, FROM_FOLDER) else self.source


def import_images(run: Run, folder: str, captions: Captions, out: str, *, rows_per_tar: int = 10_000) -> Manifest:
    """Make OUT a pool of the .jpg, .jpeg, .png and .webp files below a folder; return OUT/import.json.

    Hidden files are passed over; linked folders are not entered and are named in facts["links_not_followed"].
    Counted as failed: images without a caption, links that lead out, files that cannot be read or decoded, a second
    image of the same stem (two images cannot own one .txt), table rows that repeat or name no image.
    Raises ConfigError for an unknown column or when OUT was begun from another folder or other choices, PoolError when
    there is nothing to import.
    """
    _check_places(folder, captions, out, rows_per_tar)
    files, links = walk(folder)
    wanted = Manifest(
        stage="import",
        config={"kind": "images", "captions": dataclasses.asdict(captions), "rows_per_tar": rows_per_tar},
        parents={"folder": hash_json(files), "table": sha256_of_file(captions.table) if captions.table else ""},
        format_version=FORMAT_VERSION,
    )
    with hold_lock(out, "import"):
        claim_folder(out, wanted, state=STATE)
        if done := find_done(out, wanted, name=IMPORT, is_whole=partial(is_whole, out)):
            return done
        rows, lost = plan_rows(folder, [path for path, *_ in files], captions)
        names = _write_plans(rows, out, rows_per_tar)
        pack = partial(pack_part, folder=folder, out=out, mode=captions.source, rows_per_tar=rows_per_tar)
        results = run(pack, range(len(names)))
        planned = Counts(read=lost.total(), kept=0, failed=dict(sorted(lost.items())))
        manifest = finish(out, wanted, names, results, planned=planned, facts={"links_not_followed": links})
        remove(join(out, STATE, PLAN))
        return manifest


def _write_plans(rows: Sequence[tuple[str, str | None]], out: str, rows_per_tar: int) -> list[str]:
    """Write one plan per tar into the state folder, and return the names of the tars."""
    names = [PART_PATTERN.format(number) for number in range(-(-len(rows) // rows_per_tar))]
    for number, name in enumerate(names):
        lines = rows[number * rows_per_tar : (number + 1) * rows_per_tar]
        table = pa.table({PATH: [path for path, _ in lines], TEXT: [text for _, text in lines]}, schema=PLAN_SCHEMA)
        with write_atomic(join(out, STATE, PLAN, name + PARQUET_SUFFIX)) as file:
            pq.write_table(table, file)
    return names


def _check_places(folder: str, captions: Captions, out: str, rows_per_tar: int) -> None:
    if not is_local(folder) or not Path(folder).is_dir():
        raise PoolError(
            f"{folder!r} is no folder of this machine. Copy or mount the images first; --tars may be remote."
        )
    if is_local(out) and Path(out).resolve().is_relative_to(Path(folder).resolve()):
        raise PoolError(f"--out {out!r} lies in the folder of the images, which is left as it is. Name another place.")
    if rows_per_tar < 1:
        raise ConfigError(f"rows per tar {rows_per_tar} must be above 0.")
    if captions.table is None:
        return
    if not captions.table.endswith(TABLE_SUFFIXES):
        kinds = ", ".join(TABLE_SUFFIXES)
        raise ConfigError(f"--captions {captions.source!r} is neither 'txt' nor 'folder' nor a table ({kinds}).")
    present = list_table_columns(captions.table)
    for name, flag in ((captions.file_column, "--file-column"), (captions.caption_column, "--caption-column")):
        check_name(name, present, kind=f"column of {captions.table} for {flag}")


def walk(folder: str) -> tuple[list[tuple[str, int, int]], list[str]]:
    """Return (path, bytes, modified in ns) of each image and .txt below a folder, and the linked folders, sorted.

    Paths are relative, with `/`.  A file that is gone or a link to nowhere has size -1.
    """
    files: list[tuple[str, int, int]] = []
    links: list[str] = []
    for parent, folders, names in os.walk(folder):
        at = Path(parent)
        links += [(at / name).relative_to(folder).as_posix() for name in folders if (at / name).is_symlink()]
        folders[:] = [name for name in folders if not name.startswith(".") and not (at / name).is_symlink()]
        for name in names:
            if not name.startswith(".") and _extension(name) in (*IMAGE_EXTENSIONS, CAPTION_EXTENSION):
                files.append(_describe_file(at / name, (at / name).relative_to(folder).as_posix()))
    return sorted(files), sorted(links)


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower() if "." in name else ""


def _describe_file(file: Path, path: str) -> tuple[str, int, int]:
    try:
        stat = file.stat()
    except OSError:
        return path, -1, 0
    return (path, stat.st_size, stat.st_mtime_ns) if S_ISREG(stat.st_mode) else (path, -1, 0)


def plan_rows(
    folder: str, paths: Sequence[str], captions: Captions
) -> tuple[list[tuple[str, str | None]], Counter[str]]:
    """Return (image path, caption) per row in the order of the paths, and what is lost already, by reason.

    A caption of None is read from the .txt when the row is packed; `paths` are sorted, relative to the folder.
    """
    lost: Counter[str] = Counter()
    images = [path for path in paths if _extension(path) != CAPTION_EXTENSION]
    images = [path for path in images if _is_fit(folder, path, lost)]
    if captions.table:
        return _plan_from_table(images, captions, lost)
    if captions.source == FROM_FOLDER:
        named = [(path, PurePosixPath(path).parent.name or None) for path in images]
        lost[REASON_NULL_CAPTION] += sum(text is None for _, text in named)
        return [(path, text) for path, text in named if text], +lost
    first: dict[str, str] = {}
    rows: list[tuple[str, str | None]] = []
    for path in images:
        if first.setdefault(path.rpartition(".")[0], path) == path:
            rows.append((path, None))
        else:
            lost[REASON_SAME_NAME] += 1
    return rows, +lost


def _is_fit(folder: str, path: str, lost: Counter[str]) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:  # a name that is no UTF-8 cannot stand in a table
        lost[REASON_BAD_NAME] += 1
        return False
    if not is_inside(folder, path):
        lost[REASON_LINK] += 1
        return False
    return True


def is_inside(folder: str, path: str) -> bool:
    """Return whether a relative path, links followed, stays below the folder."""
    return Path(folder, path).resolve().is_relative_to(Path(folder).resolve())


def _plan_from_table(
    images: Sequence[str], captions: Captions, lost: Counter[str]
) -> tuple[list[tuple[str, str | None]], Counter[str]]:
    """Return one row per image and distinct caption; an image may have several, as in COCO."""
    found: dict[str, dict[str, None]] = {path: {} for path in images}
    named: set[str] = set()
    for path, text in _read_captions(captions):
        name = (path or "").removeprefix("./")
        named.add(name)
        if name not in found:
            lost[REASON_MISSING_IMAGE] += 1
        elif not (text or "").strip():
            lost[REASON_NULL_CAPTION] += 1
        elif text in found[name]:
            lost[REASON_REPEATED] += 1
        else:
            found[name][str(text)] = None
    listed = [(path, text) for path, texts in found.items() for text in texts]
    lost[REASON_NULL_CAPTION] += sum(path not in named for path in found)
    return list(listed), +lost


def _read_captions(captions: Captions) -> Iterator[tuple[str | None, str | None]]:
    assert captions.table
    columns = [captions.file_column, captions.caption_column]
    for table in read_tables(captions.table, columns, rows=TABLE_ROWS):
        paths, texts = (table[name].cast(pa.string()).to_pylist() for name in columns)
        yield from zip(paths, texts, strict=True)


def pack_part(number: int, *, folder: str, out: str, mode: str, rows_per_tar: int) -> dict[str, Any]:
    """Write one tar with parquet and stats, unless all is there, and return its account as import_tar does.

    Keys count the rows of the tar without a gap, in img2dataset's form: part number and row, 8 + log10(N) digits.
    """
    name = PART_PATTERN.format(number)
    if outcome := read_outcome(out, name):
        return outcome
    with open_file(join(out, STATE, PLAN, name + PARQUET_SUFFIX)) as file:
        plan = pq.read_table(file)
    rows: list[dict[str, Any]] = []
    lost: Counter[str] = Counter()
    digits = len(str(rows_per_tar - 1))

    def pack() -> Iterator[TarRow]:
        for path, text in zip(plan[PATH].to_pylist(), plan[TEXT].to_pylist(), strict=True):
            key = f"{number * 10**digits + len(rows):0{8 + digits}d}"
            caption = _read_txt(folder, path) if mode == FROM_TXT else text
            try:
                row, content = _describe_image(folder, path, caption, key)
            except _RowLost as why:
                lost[str(why)] += 1
                continue
            rows.append(row)
            yield _make_row(row, content, _extension(path))

    with write_atomic(join(out, name + TAR_SUFFIX)) as file:
        write_rows(file, pack())
    if rows:
        with write_atomic(join(out, name + PARQUET_SUFFIX)) as file:
            pq.write_table(pa.Table.from_pylist(rows, ROW_SCHEMA), file, compression="zstd")
    else:
        remove(join(out, name + TAR_SUFFIX))
    counts = Counts(read=plan.num_rows, kept=len(rows), failed=dict(sorted(lost.items())))
    found = {"counts": dataclasses.asdict(counts), "noted": {}, "broken": None, "unused_table": None}
    write_outcome(out, name, found)
    return found


class _RowLost(Exception):
    """A row cannot be packed; the message is the reason that is counted."""


def _read_txt(folder: str, path: str) -> str | None:
    """Return the caption in the .txt of the image's stem, without white space around it; None when there is none."""
    txt = f"{path.rpartition('.')[0]}.{CAPTION_EXTENSION}"
    if not is_inside(folder, txt):
        return None
    try:
        with Path(folder, txt).open("rb") as file:
            return file.read(MAX_CAPTION_BYTES).decode("utf-8-sig", "replace").strip()
    except OSError:
        return None


def _describe_image(folder: str, path: str, caption: str | None, key: str) -> tuple[dict[str, Any], bytes]:
    """Return a row of ROW_SCHEMA and the image's bytes.  Raises _RowLost."""
    if not caption:
        raise _RowLost(REASON_NULL_CAPTION)
    if not is_inside(folder, path):
        raise _RowLost(REASON_LINK)
    if not Path(folder, path).is_file():  # a pipe would be waited for
        raise _RowLost(REASON_UNREADABLE_FILE)
    try:
        content = Path(folder, path).read_bytes()
        width, height = open_image(content).size
    except OSError:
        raise _RowLost(REASON_UNREADABLE_FILE) from None
    except UnreadableImage:
        raise _RowLost(REASON_UNREADABLE_IMAGE) from None
    sizes = {WIDTH: width, HEIGHT: height, ORIGINAL_WIDTH: width, ORIGINAL_HEIGHT: height}
    row = {UID: derive_uid(content, caption), KEY: key, URL: None, TEXT: caption, PATH: path}
    return row | sizes, content


def _make_row(row: Mapping[str, Any], content: bytes, extension: str) -> TarRow:
    """Return the members as img2dataset names and orders them: by extension."""
    details = {CAPTION if name == TEXT else name: value for name, value in row.items()}
    members = {
        extension: content,
        JSON_EXTENSION: json.dumps(details, indent=4).encode(),
        CAPTION_EXTENSION: row[TEXT].encode(),
    }
    return TarRow(row[KEY], tuple(make_member(f"{row[KEY]}.{e}", members[e]) for e in sorted(members)))
