"""Tar bytes <-> rows.  The only code that knows tar members; nothing is ever extracted to disk.

A row is a run of members that share a key: `000000012.jpg`, `000000012.json`, `000000012.txt` (webdataset's rule: the
key ends at the first dot of the last path component).  Members keep their names, order and bytes.
Reading is sequential, so a pipe or an object store works, and a tar cut short is told from one that ends.
"""

import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO

from pipeline.errors import PoolError
from pipeline.storage import open_file, read_exactly

BLOCK_BYTES = 512
END_BLOCKS = 2
RECORD_BYTES = 20 * BLOCK_BYTES
MAX_HEADER_BYTES = 1 << 20
"""A pax or long-name header larger than this is not believed."""


class BrokenTar(PoolError):
    """The tar ends early or holds a damaged header; rows before that point were delivered."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a tar."""

    name: str
    offset: int
    """Byte position of the content within the tar."""
    content: bytes

    @property
    def key(self) -> str:
        """Path up to the first dot of the last component."""
        return split_name(self.name)[0]

    @property
    def extension(self) -> str:
        """What follows that dot, lower case; '' when there is none."""
        return split_name(self.name)[1]


@dataclass(frozen=True, slots=True)
class TarRow:
    """The members of one key, in tar order."""

    key: str
    members: tuple[Member, ...]

    def find(self, extensions: Iterable[str]) -> bytes | None:
        """Return the content of the first member with one of the extensions (in their order), or None."""
        by_extension = {m.extension: m.content for m in reversed(self.members)}
        return next((by_extension[e] for e in extensions if e in by_extension), None)


def split_name(name: str) -> tuple[str, str]:
    """Return (key, extension) of a member name: `a/b.c/12.seg.JPG` -> (`a/b.c/12`, `seg.jpg`)."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def read_rows(url: str) -> Iterator[TarRow]:
    """Yield the rows of a tar in order; a row is complete or it is not yielded.

    Raises BrokenTar at the point where the tar is cut short or damaged, after all whole rows before it.
    """
    group: list[Member] = []
    with open_file(url) as file:
        for member in read_members(file, url):
            if group and member.key != group[0].key:
                yield TarRow(group[0].key, tuple(group))
                group = []
            group.append(member)
    if group:
        yield TarRow(group[0].key, tuple(group))


def read_members(file: IO[bytes], url: str) -> Iterator[Member]:
    """Yield the regular files of an open tar in order (ustar, GNU and pax names); folders and links are passed over."""
    position, long_name = 0, ""
    while True:
        header = read_exactly(file, BLOCK_BYTES)
        position += len(header)
        if header == bytes(BLOCK_BYTES):
            return
        info = _parse_header(header, url, position - len(header))
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE) and info.size > MAX_HEADER_BYTES:
            raise BrokenTar(f"{url}: a name header of {info.size} bytes at byte {position} is not plausible.")
        offset, padded = position, -(-info.size // BLOCK_BYTES) * BLOCK_BYTES
        content = read_exactly(file, padded)
        position += len(content)
        if len(content) < info.size:
            raise BrokenTar(f"{url} is cut short: member {info.name!r} has {len(content)} of {info.size} bytes.")
        if info.type == tarfile.GNUTYPE_LONGNAME:
            long_name = content[: info.size].rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif info.type == tarfile.XHDTYPE:
            long_name = _pax_path(content[: info.size], url) or long_name
        elif info.type != tarfile.XGLTYPE:
            if info.isreg():
                yield Member(long_name or info.name, offset, content[: info.size])
            long_name = ""


def _parse_header(header: bytes, url: str, position: int) -> tarfile.TarInfo:
    if len(header) < BLOCK_BYTES:
        raise BrokenTar(f"{url} is cut short: it ends at byte {position + len(header)} without an end mark.")
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise BrokenTar(f"{url}: no tar header at byte {position} ({error}).") from None


def _pax_path(content: bytes, url: str) -> str:
    """Return the `path` record of a pax header, or ''.  A record reads `LENGTH KEY=VALUE\\n`."""
    path = ""
    while content:
        digits, _, _ = content.partition(b" ")
        if not digits.isdigit() or not 0 < int(digits) <= len(content):
            raise BrokenTar(f"{url}: a damaged pax header.")
        key, _, value = content[len(digits) + 1 : int(digits) - 1].partition(b"=")
        if key == b"path":
            path = value.decode("utf-8", "surrogateescape")
        elif key == b"size":
            raise BrokenTar(f"{url}: members over 8 GiB are not supported.")
        content = content[int(digits) :]
    return path


def write_rows(file: IO[bytes], rows: Iterable[TarRow]) -> int:
    """Write rows as a tar and return how many; the same rows give the same bytes (time 0, owner 0, mode 0644)."""
    num_rows = position = 0
    for row in rows:
        for member in row.members:
            position += _write_member(file, member.name, member.content)
        num_rows += 1
    end = END_BLOCKS * BLOCK_BYTES
    file.write(bytes(end + -(position + end) % RECORD_BYTES))
    return num_rows


def _write_member(file: IO[bytes], name: str, content: bytes) -> int:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o644
    header = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    padding = bytes(-len(content) % BLOCK_BYTES)
    file.write(header + content + padding)
    return len(header) + len(content) + len(padding)


def rename_row(row: TarRow, key: str) -> TarRow:
    """Return the row under another key; extensions and bytes stay."""
    return TarRow(key, tuple(Member(key + m.name[len(m.key) :], m.offset, m.content) for m in row.members))
