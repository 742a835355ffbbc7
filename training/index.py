"""Tars -> an index: where each row's image lies, and the tokens of its captions.  Images are read later, by position.

Reads every tar once, several at a time; of a local tar only the headers and captions.  A row needs an image member and
a .txt member, as open_clip's loader asks; rows without are counted by reason and left out.  The index holds 32 bytes
per row plus each distinct caption's tokens once, 2 bytes each.  Captions that are made from classes: captioned.py.
"""

import hashlib
import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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
    REASON_OVERSIZED_IMAGE,
    REASON_TRUNCATED_TAR,
    TAR_SUFFIX,
)
from pipeline.storage import expand, is_local, open_file, read_exactly
from pipeline.tars import BrokenTar, Member, TarRow, read_rows
from training.processes import map_in_processes

log = logging.getLogger("winnow")
Tokenize = Callable[[list[str]], Any]
"""Captions -> int64 (captions, context length)."""
TOKENIZE_AT_ONCE = 4096
MAX_OPEN_TARS = 64
MAX_IMAGE_BYTES = np.iinfo(np.int32).max
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
    """uint16 (distinct captions, context length); int32 where a token has no room in that."""
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

    tar_N: np.ndarray
    """int32."""
    offset_N: np.ndarray
    """int64."""
    size_N: np.ndarray
    """int32."""
    text_N: np.ndarray
    """int32: position of each image's text in `texts`."""
    texts: Sequence[str]
    """Distinct."""
    twin_N: np.ndarray
    """uint64: hash_row of each."""
    counts: Counts


class TarRows(NamedTuple):
    """The images of one tar that have a text."""

    offset_N: np.ndarray
    size_N: np.ndarray
    twin_N: np.ndarray
    texts: list[str]
    """N long."""
    failed: Counter[str]
    """Rows that have none, by reason."""


ROWS = "rows"
"""Name of the account of a run's only set."""


def list_tars(data: str) -> list[str]:
    """Return the tars that a folder, glob, brace range or `a::b` list names.  Raises PoolError if there is none."""
    urls = [url for url in expand(data) if url.endswith(TAR_SUFFIX)]
    if not urls:
        raise PoolError(f"{data!r} has no {TAR_SUFFIX} file to train on. Name the folder that `winnow shards` wrote.")
    return urls


def read_index(
    urls: Sequence[str], *, tokenize: Tokenize, quiet: bool = False, num_processes: int | None = None
) -> RowIndex:
    """Return the index of all usable rows, the same by any number of processes (default: one per core).

    Raises PoolError, with the reasons, when there is none.
    """
    found = locate_rows(urls, CAPTION_EXTENSION, REASON_NULL_CAPTION, quiet=quiet, num_processes=num_processes)
    num_rows = len(found.tar_N)
    return RowIndex(
        tuple(urls),
        found.tar_N,
        found.offset_N,
        found.size_N,
        found.text_N,
        np.ones(num_rows, np.int32),
        found.twin_N,
        tokenize_all(found.texts, tokenize, quiet=quiet, num_processes=num_processes),
        (SetRows(ROWS, found.counts, num_rows),),
    )


def locate_rows(
    urls: Sequence[str], extension: str, reason: str, *, quiet: bool = False, num_processes: int | None = None
) -> Located:
    """Return where the images lie that have a text member of that extension; `reason` counts those that have none.

    Raises PoolError when there is not one.
    """
    places: dict[str, int] = {}
    tars: list[TarRows] = []
    texts = []
    found = map_in_processes(partial(index_tar, extension=extension, reason=reason), urls, num_processes=num_processes)
    for tar in tqdm(found, total=len(urls), desc="index", unit="tar", disable=quiet):
        texts.append(np.array([places.setdefault(text, len(places)) for text in tar.texts], np.int32))
        tars.append(tar._replace(texts=[]))
    failed = sum((tar.failed for tar in tars), Counter[str]())
    num_rows, lost = sum(map(len, texts)), dict(sorted(failed.items()))
    if not num_rows:
        why = ", ".join(f"{reason}: {num}" for reason, num in lost.items()) or "the tars are empty"
        raise PoolError(f"no row of {len(urls)} tars (first {urls[0]!r}) can be trained on: {why}.")
    return Located(
        np.repeat(np.arange(len(urls), dtype=np.int32), [len(text_N) for text_N in texts]),
        np.concatenate([tar.offset_N for tar in tars]),
        np.concatenate([tar.size_N for tar in tars]),
        np.concatenate(texts),
        list(places),
        np.concatenate([tar.twin_N for tar in tars]),
        Counts(read=num_rows + failed.total(), kept=num_rows, failed=lost),
    )


def index_tar(url: str, *, extension: str, reason: str) -> TarRows:
    """Return the rows of one tar; one cut short ends where it does."""
    offsets: list[int] = []
    sizes: list[int] = []
    twins: list[int] = []
    texts: list[str] = []
    failed: Counter[str] = Counter()
    for row in _read_tar(url, extension, reason):
        if isinstance(row, str):
            failed[row] += 1
            continue
        image, text, twin = row
        offsets.append(image.offset)
        sizes.append(image.size)
        twins.append(twin)
        texts.append(text)
    return TarRows(np.array(offsets, np.int64), np.array(sizes, np.int32), np.array(twins, np.uint64), texts, failed)


def _read_tar(url: str, extension: str, reason: str) -> Iterator[tuple[Member, str, int] | str]:
    """Yield (image member, text, hash_row) for each row of one tar, or the reason why it has none."""
    reader = TarReader([url])
    try:
        for row in read_rows(url, contents=not is_local(url)):
            image, text = _find_member(row, IMAGE_EXTENSIONS), _find_member(row, [extension])
            if image is None:
                yield REASON_MISSING_IMAGE
            elif text is None:
                yield reason
            elif image.size > MAX_IMAGE_BYTES:
                yield REASON_OVERSIZED_IMAGE
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


def tokenize_all(
    captions: Sequence[str], tokenize: Tokenize, *, quiet: bool = True, num_processes: int | None = None
) -> np.ndarray:
    """Return uint16 (captions, context length), or int32 where a token has no room in that."""
    starts = range(0, len(captions), TOKENIZE_AT_ONCE)
    work = partial(_tokenize_some, captions, tokenize)
    parts = []
    with tqdm(total=len(captions), desc="tokens", unit="caption", disable=quiet) as progress:
        for token_ML in map_in_processes(work, starts, num_processes=num_processes):
            parts.append(token_ML)
            progress.update(len(token_ML))
    return np.concatenate(parts)


def _tokenize_some(captions: Sequence[str], tokenize: Tokenize, start: int) -> np.ndarray:
    token_ML = tokenize(list(captions[start : start + TOKENIZE_AT_ONCE])).numpy()
    fits = token_ML.min() >= 0 and token_ML.max() <= np.iinfo(np.uint16).max
    tokens: np.ndarray = token_ML.astype(np.uint16 if fits else np.int32)
    return tokens


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
