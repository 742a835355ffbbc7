"""Tar bytes <-> rows.  The only code that knows tar members; nothing is ever extracted to disk.

A row is a run of members that share a key: `000000012.jpg`, `000000012.json`, `000000012.txt` (webdataset's rule: the
key ends at the first dot of the last path component).  Members keep their names, order and bytes.
Reading is sequential, so a pipe or an object store works, and a tar cut short is told from one that ends.
"""

import io
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
    start: int
    """Byte position of its first header (a long-name header included)."""
    offset: int
    """Byte position of the content."""
    size: int
    content: bytes
    """Empty when the tar was read without contents."""

    @property
    def end(self) -> int:
        """Byte position after the content and its padding, where the next header starts."""
        return self.offset + _pad(self.size)

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

    @property
    def span(self) -> tuple[int, int]:
        """(start, end) bytes of the row in its tar: headers, contents and padding, ready to be copied."""
        return self.members[0].start, self.members[-1].end

    def find(self, extensions: Iterable[str]) -> bytes | None:
        """Return the content of the first member with one of the extensions (in their order), or None."""
        by_extension = {m.extension: m.content for m in reversed(self.members)}
        return next((by_extension[e] for e in extensions if e in by_extension), None)


def split_name(name: str) -> tuple[str, str]:
    """Return (key, extension) of a member name: `a/b.c/12.seg.JPG` -> (`a/b.c/12`, `seg.jpg`)."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _pad(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def read_rows(url: str, *, contents: bool = True) -> Iterator[TarRow]:
    """Yield the rows of a tar in order; a row is known to be complete or it is not yielded.

    Without `contents` only headers are read (the file must be seekable) and members hold no bytes.

    Raises BrokenTar at the point where the tar is cut short, damaged, or comes back to an earlier key (webdataset
    asks that a row's members stand together), after all whole rows before it.
    """
    group: list[Member] = []
    seen: set[str] = set()
    with open_file(url) as file:
        for member in read_members(file, url, contents=contents):
            if group and member.key != group[0].key:
                yield TarRow(group[0].key, tuple(group))
                seen.add(group[0].key)
                group = []
            if member.key in seen:
                raise BrokenTar(f"{url}: the members of {member.key!r} do not stand together.")
            group.append(member)
    if group:
        yield TarRow(group[0].key, tuple(group))


def read_members(file: IO[bytes], url: str, *, contents: bool = True) -> Iterator[Member]:
    """Yield the regular files of an open tar in order (ustar, GNU, pax names); folders and links are passed over."""
    num_bytes = None if contents else _measure(file)
    position, start, long_name = 0, 0, ""
    while True:
        header = read_exactly(file, BLOCK_BYTES)
        if header == bytes(BLOCK_BYTES):
            _check_end(file, url)
            return
        info = _parse_header(header, url, position)
        names_next = info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE)
        if names_next and info.size > MAX_HEADER_BYTES:
            raise BrokenTar(f"{url}: a name header of {info.size} bytes at byte {position} is not plausible.")
        offset = position + BLOCK_BYTES
        position = offset + _pad(info.size)
        content = _read_or_skip(file, info, offset, None if names_next else num_bytes, url)
        if info.type == tarfile.GNUTYPE_LONGNAME:
            long_name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif info.type == tarfile.XHDTYPE:
            long_name = _pax_path(content, url) or long_name
        elif info.type != tarfile.XGLTYPE:
            if info.isreg():
                yield Member((long_name or info.name).removeprefix("./"), start, offset, info.size, content)
            long_name = ""
        start = start if names_next else position


def _check_end(file: IO[bytes], url: str) -> None:
    """Raise BrokenTar when more than padding follows the end mark: of joined tars only the first would be read."""
    while piece := file.read(RECORD_BYTES):
        if piece.strip(b"\0"):
            raise BrokenTar(f"{url} goes on after its end mark: several tars joined in one file are not read.")


def _measure(file: IO[bytes]) -> int:
    num_bytes = file.seek(0, 2)
    file.seek(0)
    return num_bytes


def _read_or_skip(file: IO[bytes], info: tarfile.TarInfo, offset: int, num_bytes: int | None, url: str) -> bytes:
    """Return a member's content, or b"" after seeking past it in a file of `num_bytes`.  Raises BrokenTar if cut."""
    content = read_exactly(file, _pad(info.size)) if num_bytes is None else b""
    present = len(content) if num_bytes is None else num_bytes - offset
    if present < info.size:
        raise BrokenTar(f"{url} is cut short: member {info.name!r} has {present} of {info.size} bytes.")
    if num_bytes is not None:
        file.seek(_pad(info.size), 1)
    return content[: info.size]


def _parse_header(header: bytes, url: str, position: int) -> tarfile.TarInfo:
    if len(header) < BLOCK_BYTES:
        raise BrokenTar(f"{url} is cut short: it ends at byte {position + len(header)} without an end mark.")
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise BrokenTar(f"{url}: no tar header at byte {position} ({error}).") from None
    if info.size < 0 or info.type == tarfile.GNUTYPE_SPARSE:
        raise BrokenTar(f"{url}: member {info.name!r} is sparse or has a size of {info.size} bytes; neither is read.")
    return info


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
        elif key == b"size" or key.startswith(b"GNU.sparse"):
            raise BrokenTar(f"{url}: members over 8 GiB and sparse ones are not read.")
        content = content[int(digits) :]
    return path


def write_rows(file: IO[bytes], rows: Iterable[TarRow]) -> int:
    """Write rows as a tar and return how many; the same rows give the same bytes (time 0, owner 0, mode 0644)."""
    num_rows = position = 0
    for row in rows:
        position += file.write(pack_row(row))
        num_rows += 1
    write_end(file, position)
    return num_rows


def pack_row(row: TarRow) -> bytes:
    """Return the tar bytes of one row: a header, the content and its padding for each member."""
    pieces: list[bytes] = []
    for member in row.members:
        info = tarfile.TarInfo(member.name)
        info.size, info.mode = len(member.content), 0o644
        header = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
        pieces += [header, member.content, bytes(-len(member.content) % BLOCK_BYTES)]
    return b"".join(pieces)


def unpack_row(packed: bytes, url: str) -> TarRow:
    """Return the row that a span of `url` holds.  Raises BrokenTar when the bytes are not one."""
    members = tuple(read_members(io.BytesIO(packed + bytes(BLOCK_BYTES)), url))
    if not members:
        raise BrokenTar(f"{url}: a row's bytes hold no file.")
    return TarRow(members[0].key, members)


def write_end(file: IO[bytes], position: int) -> None:
    """Write the end mark after `position` bytes, filled up to a whole record as tar programs do."""
    end = END_BLOCKS * BLOCK_BYTES
    file.write(bytes(end + -(position + end) % RECORD_BYTES))


def rename_row(row: TarRow, key: str) -> TarRow:
    """Return the row under another key; extensions and bytes stay."""
    members = (make_member(key + m.name[len(m.key) :], m.content) for m in row.members)
    return TarRow(key, tuple(members))


def make_member(name: str, content: bytes) -> Member:
    """Return a member that is in no tar yet."""
    return Member(name, 0, 0, len(content), content)
