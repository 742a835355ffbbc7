"""Tars -> an index: where each row's image lies, and the tokens of its captions.  Images are read later, by position.

Reads every tar once, in order; of a local tar only the headers and captions.  A row needs an image member and a .txt
member, as open_clip's loader asks; rows without are counted by reason and left out.  The index holds 32 bytes per row
plus each distinct caption's tokens once.  Sets whose captions are made from classes: captioned.py.
"""

import hashlib
import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from pipeline.errors import PoolError
from pipeline.manifest import Counts, add_counts
from pipeline.schemas import (
    CAPTION_EXTENSION,
    IMAGE_EXTENSIONS,
    REASON_MISSING_IMAGE,
    REASON_NULL_CAPTION,
    REASON_TRUNCATED_TAR,
    TAR_SUFFIX,
)
from pipeline.storage import expand, is_local, open_file, read_exactly
from pipeline.tars import BrokenTar, Member, TarRow, read_rows

log = logging.getLogger("winnow")
Tokenize = Callable[[list[str]], Any]
"""Captions -> int64 (captions, context length)."""
TOKENIZE_AT_ONCE = 4096
MAX_OPEN_TARS = 64
TAIL_BYTES = 64


@dataclass(frozen=True, slots=True)
class RowIndex:
    """The usable rows of all tars, in order."""

    urls: tuple[str, ...]
    tar_N: np.ndarray
    """int32: position of each row's tar in `urls`."""
    offset_N: np.ndarray
    """int64: byte where the image starts in its tar."""
    size_N: np.ndarray
    """int32: bytes of the image."""
    caption_N: np.ndarray
    """int32: each row's first caption, a row of token_UL."""
    num_captions_N: np.ndarray
    """int32: how many captions the row has, one after the other; each time it is seen one of them is drawn."""
    twin_N: np.ndarray
    """uint64: equal for copies of one row, which have the same caption or label and the same image (hash_row)."""
    token_UL: np.ndarray
    """int32 (distinct captions, context length)."""
    sets: tuple["SetRows", ...]
    """The sets it was made from, in the order of their rows."""
    feature_UD: np.ndarray | None = None
    """float32 or float16 (distinct captions, dims): what a locked text tower makes of them (locked.py)."""

    @property
    def num_rows(self) -> int:
        """Usable rows."""
        return len(self.tar_N)

    @property
    def counts(self) -> Counts:
        """Every row met; a tar cut short counts as one more row, since how many it lost cannot be known."""
        return add_counts(part.counts for part in self.sets)

    def find_set(self, row: int) -> tuple[int, int]:
        """Return (first, number) of the rows of the set that `row` is in."""
        first = 0
        for part in self.sets:
            if row < first + part.num_rows:
                return first, part.num_rows
            first += part.num_rows
        raise IndexError(row)


class SetRows(NamedTuple):
    """One set's part of an index; its rows stand together."""

    name: str
    counts: Counts
    """kept is the usable rows."""
    per_epoch: int
    """Rows that an epoch sees; equal to the usable rows unless the set was given a share."""

    @property
    def num_rows(self) -> int:
        """Usable rows."""
        return self.counts.kept


class Located(NamedTuple):
    """Images in tars, each with the text beside it."""

    tars: list[int]
    offsets: list[int]
    sizes: list[int]
    text_of: list[int]
    """Position of each image's text in `texts`."""
    texts: list[str]
    """Distinct."""
    twins: list[int]
    """hash_row of each."""
    counts: Counts


ROWS = "rows"
"""Name of the account of a run's only set."""


def list_tars(data: str) -> list[str]:
    """Return the tars that a folder, glob, brace range or `a::b` list names.  Raises PoolError if there is none."""
    urls = [url for url in expand(data) if url.endswith(TAR_SUFFIX)]
    if not urls:
        raise PoolError(f"{data!r} has no {TAR_SUFFIX} file to train on. Name the folder that `winnow shards` wrote.")
    return urls


def read_index(urls: Sequence[str], *, tokenize: Tokenize, quiet: bool = False) -> RowIndex:
    """Return the index of all usable rows.  Raises PoolError, with the reasons, when there is none."""
    found = locate_rows(urls, CAPTION_EXTENSION, REASON_NULL_CAPTION, quiet=quiet)
    num_rows = len(found.tars)
    return RowIndex(
        tuple(urls),
        np.array(found.tars, np.int32),
        np.array(found.offsets, np.int64),
        np.array(found.sizes, np.int32),
        np.array(found.text_of, np.int32),
        np.ones(num_rows, np.int32),
        np.array(found.twins, np.uint64),
        tokenize_all(found.texts, tokenize),
        (SetRows(ROWS, found.counts, num_rows),),
    )


def locate_rows(urls: Sequence[str], extension: str, reason: str, *, quiet: bool = False) -> Located:
    """Return where the images lie that have a text member of that extension; `reason` counts those that have none.

    Raises PoolError when there is not one.
    """
    found = Located([], [], [], [], [], [], Counts(read=0, kept=0))
    places: dict[str, int] = {}
    failed: Counter[str] = Counter()
    for tar, url in enumerate(tqdm(urls, desc="index", unit="tar", disable=quiet)):
        for row in _index_tar(url, extension, reason):
            if isinstance(row, str):
                failed[row] += 1
                continue
            image, text, twin = row
            found.tars.append(tar)
            found.offsets.append(image.offset)
            found.sizes.append(image.size)
            found.text_of.append(places.setdefault(text, len(places)))
            found.twins.append(twin)
    if not found.tars:
        why = ", ".join(f"{reason}: {num}" for reason, num in sorted(failed.items())) or "the tars are empty"
        raise PoolError(f"no row of {len(urls)} tars (first {urls[0]!r}) can be trained on: {why}.")
    num_rows, lost = len(found.tars), dict(sorted(failed.items()))
    return found._replace(texts=list(places), counts=Counts(read=num_rows + failed.total(), kept=num_rows, failed=lost))


def _index_tar(url: str, extension: str, reason: str) -> Iterator[tuple[Member, str, int] | str]:
    """Yield (image member, text, hash_row) for each row of one tar, or the reason why it has none."""
    reader = TarReader([url])
    try:
        for row in read_rows(url, contents=not is_local(url)):
            image, text = _find_member(row, IMAGE_EXTENSIONS), _find_member(row, [extension])
            if image is None:
                yield REASON_MISSING_IMAGE
            elif text is None:
                yield reason
            else:
                content = reader.read(0, text.offset, text.size) if is_local(url) else text.content
                tail = image.content[-TAIL_BYTES:]
                if is_local(url):
                    tail = reader.read(0, image.offset + max(0, image.size - TAIL_BYTES), min(image.size, TAIL_BYTES))
                yield image, content.decode("utf-8", "replace"), hash_row(content, image.size, tail)
    except BrokenTar as error:
        log.warning("train: rows after the damage are lost: %s", error)
        yield REASON_TRUNCATED_TAR
    finally:
        reader.close()


def hash_row(text: bytes, size: int, tail: bytes) -> int:
    """Return 64 bits of a row's caption, its image's bytes in number and the last of them.

    The shards stage copies a repeated row's bytes, so its copies agree.  So do rows of different uids that have the
    same image file and caption, and hardly any others.
    """
    return int.from_bytes(hashlib.blake2b(b"%d %b%b" % (size, tail, text), digest_size=8).digest(), "little")


def _find_member(row: TarRow, extensions: Sequence[str]) -> Member | None:
    by_extension = {member.extension: member for member in reversed(row.members)}
    return next((by_extension[e] for e in extensions if e in by_extension), None)


def tokenize_all(captions: list[str], tokenize: Tokenize) -> np.ndarray:
    """Return int32 (captions, context length)."""
    starts = range(0, len(captions), TOKENIZE_AT_ONCE)
    return np.concatenate([tokenize(captions[s : s + TOKENIZE_AT_ONCE]).numpy().astype(np.int32) for s in starts])


class TarReader:
    """Reads byte ranges of many tars, keeping the last few open; each process opens its own."""

    def __init__(self, urls: Sequence[str]) -> None:
        self.urls = urls
        self._opened: OrderedDict[int, Any] = OrderedDict()

    def __reduce__(self) -> tuple[type["TarReader"], tuple[Sequence[str]]]:
        return TarReader, (self.urls,)

    def read(self, tar: int, offset: int, size: int) -> bytes:
        """Return `size` bytes of the tar at `offset`, fewer only where it ends."""
        file = self._open(tar)
        if isinstance(file, int):
            return os.pread(file, size, offset)
        file.seek(offset)
        return read_exactly(file, size)

    def close(self) -> None:
        """Close every open tar."""
        while self._opened:
            _close(self._opened.popitem()[1])

    def _open(self, tar: int) -> Any:
        if tar not in self._opened:
            if len(self._opened) >= MAX_OPEN_TARS:
                _close(self._opened.popitem(last=False)[1])
            url = self.urls[tar]
            self._opened[tar] = os.open(url, os.O_RDONLY) if is_local(url) else open_file(url, ahead=0)
        self._opened.move_to_end(tar)
        return self._opened[tar]


def _close(file: Any) -> None:
    if isinstance(file, int):
        os.close(file)
    else:
        file.close()
