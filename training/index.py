"""Tars -> an index: where each row's image lies, and the tokens of its caption.  Images are read later, by position.

Reads every tar once, in order; of a local tar only the headers and captions.  A row needs an image member and a .txt
member, as open_clip's loader asks; rows without are counted by reason and left out.  The index holds 20 bytes per row
plus each distinct caption's tokens once.
"""

import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from pipeline.errors import PoolError
from pipeline.manifest import Counts
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
TOKENIZE_AT_ONCE = 4096
MAX_OPEN_TARS = 64


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
    """int32: each row's caption, a row of token_UL."""
    token_UL: np.ndarray
    """int32 (distinct captions, context length)."""
    counts: Counts
    """Every row met; a tar cut short counts as one more row, since how many it lost cannot be known."""

    @property
    def num_rows(self) -> int:
        """Usable rows."""
        return len(self.tar_N)


class _Place(NamedTuple):
    tar: int
    offset: int
    size: int
    caption: int


def list_tars(data: str) -> list[str]:
    """Return the tars that a folder, glob, brace range or `a::b` list names.  Raises PoolError if there is none."""
    urls = [url for url in expand(data) if url.endswith(TAR_SUFFIX)]
    if not urls:
        raise PoolError(f"{data!r} has no {TAR_SUFFIX} file to train on. Name the folder that `winnow shards` wrote.")
    return urls


def read_index(urls: Sequence[str], *, tokenize: Callable[[list[str]], Any], quiet: bool = False) -> RowIndex:
    """Return the index of all usable rows.  Raises PoolError, with the reasons, when there is none."""
    places: list[_Place] = []
    captions: dict[str, int] = {}
    failed: Counter[str] = Counter()
    for tar, url in enumerate(tqdm(urls, desc="index", unit="tar", disable=quiet)):
        for found in _index_tar(url):
            if isinstance(found, str):
                failed[found] += 1
            else:
                image, text = found
                caption = captions.setdefault(text, len(captions))
                places.append(_Place(tar, image.offset, image.size, caption))
    counts = Counts(read=len(places) + failed.total(), kept=len(places), failed=dict(sorted(failed.items())))
    if not places:
        why = ", ".join(f"{reason}: {num}" for reason, num in counts.failed.items()) or "the tars are empty"
        raise PoolError(f"no row of {len(urls)} tars (first {urls[0]!r}) can be trained on: {why}.")
    tars, offsets, sizes, texts = (np.array(column) for column in zip(*places, strict=True))
    columns = (tars.astype(np.int32), offsets.astype(np.int64), sizes.astype(np.int32), texts.astype(np.int32))
    return RowIndex(tuple(urls), *columns, _tokenize(list(captions), tokenize), counts)


def _index_tar(url: str) -> Iterator[tuple[Member, str] | str]:
    """Yield (image member, caption) for each row of one tar, or the reason why it has none."""
    reader = TarReader([url])
    try:
        for row in read_rows(url, contents=not is_local(url)):
            image, caption = _find_member(row, IMAGE_EXTENSIONS), _find_member(row, [CAPTION_EXTENSION])
            if image is None:
                yield REASON_MISSING_IMAGE
            elif caption is None:
                yield REASON_NULL_CAPTION
            else:
                content = reader.read(0, caption.offset, caption.size) if is_local(url) else caption.content
                yield image, content.decode("utf-8", "replace")
    except BrokenTar as error:
        log.warning("train: rows after the damage are lost: %s", error)
        yield REASON_TRUNCATED_TAR
    finally:
        reader.close()


def _find_member(row: TarRow, extensions: Sequence[str]) -> Member | None:
    by_extension = {member.extension: member for member in reversed(row.members)}
    return next((by_extension[e] for e in extensions if e in by_extension), None)


def _tokenize(captions: list[str], tokenize: Callable[[list[str]], Any]) -> np.ndarray:
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
            self._opened[tar] = os.open(url, os.O_RDONLY) if is_local(url) else open_file(url)
        self._opened.move_to_end(tar)
        return self._opened[tar]


def _close(file: Any) -> None:
    if isinstance(file, int):
        os.close(file)
    else:
        file.close()
