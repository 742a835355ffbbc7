"""Byte ranges of files on any fsspec URL: read into new memory, or into memory that the caller keeps.

Raises PoolError when a file is shorter than a range, and what pipeline/storage.py raises.
"""

import io
from collections.abc import Iterator, Sequence
from typing import IO, Self

from pipeline.errors import PoolError
from pipeline.filesystem import explained, find_filesystem
from pipeline.storage import fingerprint, is_local, open_file, read_exactly

BATCH_BYTES, BATCH_RANGES = 16 << 20, 256
"""What is asked of a remote store at once."""
Span = tuple[int, int]
"""The bytes [start, end)."""


def read_ranges(url: str, spans: Sequence[Span]) -> Iterator[bytes]:
    """Yield the bytes of each span, in order, reading little else of the file.

    A local file is opened once; of a remote one the ranges are asked for in batches of BATCH_BYTES and BATCH_RANGES, so
    memory is bounded by a batch (or by one span, if that is larger).
    """
    pieces = _read_local(url, spans) if is_local(url) else _read_remote(url, spans)
    for span, piece in zip(spans, pieces, strict=True):
        _check_length(url, span, len(piece))
        yield piece


def _check_length(url: str, span: Span, num_bytes: int) -> None:
    start, end = span
    if num_bytes < end - start:
        raise PoolError(
            f"{url} holds {num_bytes} of the bytes {start} to {end}: it is shorter than when it was listed. "
            "Put the file back, or run the command again to read it anew."
        )


def _read_local(url: str, spans: Sequence[Span]) -> Iterator[bytes]:
    with open_file(url) as file:
        for start, end in spans:
            file.seek(start)
            yield read_exactly(file, end - start)


def _read_remote(url: str, spans: Sequence[Span]) -> Iterator[bytes]:
    """Yield each span's bytes, fewer where the file ends before; an empty span is not asked for (S3 sends the file)."""
    filesystem, path = find_filesystem(url)
    for batch in _batch_spans(spans):
        starts, ends = ([span[edge] for span in batch if span[0] < span[1]] for edge in (0, 1))
        found = iter(filesystem.cat_ranges([path] * len(starts), starts, ends))
        for start, end in batch:
            piece = next(found) if start < end else b""
            yield _explain_range(url, end, piece) if isinstance(piece, Exception) else piece


def _explain_range(url: str, end: int, error: Exception) -> bytes:
    """Return b"" when a range was refused because the file is shorter; raise the error otherwise."""
    with explained(url):
        if not isinstance(error, OSError) or isinstance(error, PermissionError) or fingerprint(url)["size"] >= end:
            raise error
    return b""


def _batch_spans(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """Yield the spans in runs of at most BATCH_RANGES, and of BATCH_BYTES unless one span alone is larger."""
    batch: list[Span] = []
    num_bytes = 0
    for start, end in spans:
        if batch and (len(batch) == BATCH_RANGES or num_bytes + end - start > BATCH_BYTES):
            yield batch
            batch, num_bytes = [], 0
        batch.append((start, end))
        num_bytes += end - start
    if batch:
        yield batch


class RangeReader:
    """Reads ranges of one file after another into the caller's memory; a local file stays open until the next.

    Memory that is asked for anew can cost more than the copy into it, and opening a file is a round trip on NFS.
    """

    def __init__(self) -> None:
        self._url = ""
        self._file: IO[bytes] = io.BytesIO()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def fill(self, url: str, spans: Sequence[Span], buffers: Sequence[memoryview]) -> None:
        """Read each span into its buffer, which has its length."""
        if not is_local(url):
            for buffer, piece in zip(buffers, read_ranges(url, spans), strict=True):
                buffer[:] = piece
            return
        if url != self._url:
            self._file.close()
            self._url, self._file = url, open(url, "rb", buffering=0)  # noqa: PTH123, SIM115
        for span, buffer in zip(spans, buffers, strict=True):
            self._file.seek(span[0])
            _check_length(url, span, _read_into(self._file, buffer))


def _read_into(file: IO[bytes], buffer: memoryview) -> int:
    """Fill the buffer and return its length, or less at the end of the file."""
    filled = 0
    while filled < len(buffer) and (num_bytes := file.readinto(buffer[filled:])):  # type: ignore[attr-defined]
        filled += num_bytes
    return filled
