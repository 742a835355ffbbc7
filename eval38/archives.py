"""Sets that the hub holds as a table and an archive of images (nlphuji/*), or that `datasets` wrote as parquet.

    one .csv and one .zip    a row per line, lists spelled as JSON; images are found by file name, in whatever folder
    *.parquet                the columns that DataComp reads, images as {bytes, path}

The hub's repositories hold the first, and a script that turns it into the second, which `datasets` 4 no longer runs.
Seen in public code that reads them: flickr (test_1k_flickr.csv, images_flickr_1k_test.zip), mscoco
(test_5k_mscoco_2014.csv, images_mscoco_2014_5k_test.zip), winogavil (winogavil_images.zip with 2,044 jpg).
"""

import ast
import csv
import io
import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from eval38.rows import ImageRow, LostImage
from pipeline.errors import EvalError
from pipeline.schemas import PARQUET_SUFFIX, REASON_MISSING_IMAGE, REASON_UNREADABLE_IMAGE
from pipeline.storage import MAX_READ_BYTES, join, list_folder, name_of, open_file, read_bytes

T = TypeVar("T")

TABLE_SUFFIX, ARCHIVE_SUFFIX = ".csv", ".zip"
ROWS_AT_ONCE = 64
MAX_FIELD_CHARS = 1 << 20
"""Longest cell of a table; Python's own limit is lower than a long list of tokens."""
HALF = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair: JSON can spell it, but it is no character."""


def find_files(folder: str) -> tuple[str, ...]:
    """Return (table, archive), or the parquet files of a set.  Raises EvalError when there is neither."""
    files = [*list_folder(folder), *list_folder(join(folder, "test"))]
    if parquet := [url for url in files if url.endswith(PARQUET_SUFFIX)]:
        return tuple(parquet)
    tables, archives = ([url for url in files if url.endswith(suffix)] for suffix in (TABLE_SUFFIX, ARCHIVE_SUFFIX))
    if len(tables) != 1 or len(archives) != 1:
        raise EvalError(
            f"{folder} should hold one {TABLE_SUFFIX} and one {ARCHIVE_SUFFIX}, as on the hub, or {PARQUET_SUFFIX} "
            f"files; it holds {', '.join(map(name_of, files)) or 'nothing'}. Fetch the set again."
        )
    return tables[0], archives[0]


def is_parquet(files: Sequence[str]) -> bool:
    """Return whether these are parquet files, rather than a table and an archive."""
    return files[0].endswith(PARQUET_SUFFIX)


def read_table(url: str, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (place, row) of a csv, a row with at least `columns`.  Raises EvalError."""
    csv.field_size_limit(MAX_FIELD_CHARS)
    try:
        reader = csv.DictReader(io.StringIO(read_bytes(url).decode("utf-8-sig"), newline=""), strict=True)
        _check_columns(url, columns, reader.fieldnames or ())
        for row in reader:
            place = f"{name_of(url)} line {reader.line_num}"
            if None in row or None in row.values():
                raise EvalError(f"{place} has not as many cells as the first line names.")
            yield place, row
    except (UnicodeDecodeError, csv.Error) as error:
        raise EvalError(f"{url} is no csv of UTF-8 text ({error}).") from None


def read_parquet(urls: Sequence[str], columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) of parquet files as Python values.  Raises EvalError."""
    for url in urls:
        try:
            with open_file(url) as file, pq.ParquetFile(file) as parquet:
                _check_columns(url, columns, parquet.schema_arrow.names)
                number = 0
                for batch in parquet.iter_batches(ROWS_AT_ONCE, columns=list(columns)):
                    for row in batch.to_pylist():
                        yield f"{name_of(url)} row {number}", row
                        number += 1
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise EvalError(f"{url} is no whole parquet file ({error}). Fetch it again.") from None


def _check_columns(url: str, columns: Sequence[str], found: Sequence[str]) -> None:
    if missing := [name for name in columns if name not in found]:
        raise EvalError(f"{url} has no column {', '.join(missing)}; it has {', '.join(found) or 'none'}.")


def parse_list(text: str, place: str) -> list[str]:
    """Return a list of strings spelled as JSON, or as Python spells it.  Raises EvalError for anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        try:
            found = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            found = text
    return check_strings(found, place)


def check_strings(found: Any, place: str) -> list[str]:
    """Return `found` if it is a list of strings, all of whole characters.  Raises EvalError otherwise."""
    if not isinstance(found, list) or not all(isinstance(entry, str) and not HALF.search(entry) for entry in found):
        raise EvalError(f"{place} should hold a list of strings, not {str(found)[:100]!r}.")
    return found


@contextmanager
def open_archive(url: str) -> Iterator["Archive"]:
    """Yield the images of a zip.  Raises EvalError when it is none."""
    with open_file(url) as file:
        try:
            archive = Archive(zipfile.ZipFile(file), name_of(url))
        except Exception as error:  # BadZipFile, NotImplementedError, struct.error, IndexError, ...
            raise EvalError(f"{url} is no whole zip ({type(error).__name__}: {error}). Fetch it again.") from None
        with archive.opened:
            yield archive


class Archive:
    """The images of an open zip, found by file name or stem; what macOS adds beside them is passed over."""

    def __init__(self, opened: zipfile.ZipFile, name: str) -> None:
        self.opened, self.name = opened, name
        self.members: dict[str, list[zipfile.ZipInfo]] = {}
        for info in opened.infolist():
            path = PurePosixPath(info.filename)
            if not info.is_dir() and not path.name.startswith(".") and "__MACOSX" not in path.parts:
                for key in {path.name, path.stem}:
                    self.members.setdefault(key, []).append(info)

    def read(self, key: str, name: str, truth: T) -> ImageRow[T] | LostImage:
        """Return the image with this file name or stem as the row `name`, or why there is none."""
        found = self.members.get(key, [])
        if len(found) != 1:
            return LostImage(name, REASON_MISSING_IMAGE, f"{len(found)} files named {key!r} in {self.name}")
        if found[0].file_size > MAX_READ_BYTES:
            return LostImage(name, REASON_UNREADABLE_IMAGE, f"{found[0].file_size:,} bytes, over {MAX_READ_BYTES:,}")
        try:
            return ImageRow(name, self.opened.read(found[0]), truth)
        except Exception as error:  # zlib.error, BadZipFile, NotImplementedError, RuntimeError, EOFError, ...
            return LostImage(name, REASON_UNREADABLE_IMAGE, f"{type(error).__name__}: {error}")


def take_picture(picture: Any, name: str, truth: T) -> ImageRow[T] | LostImage:
    """Return a parquet cell {bytes, path} as the row `name`, or why there is no image in it."""
    content = picture.get("bytes") if isinstance(picture, dict) else None
    if not isinstance(content, bytes):
        return LostImage(name, REASON_MISSING_IMAGE, "the cell holds no image bytes")
    return ImageRow(name, content, truth)
