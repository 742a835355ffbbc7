"""Tar bytes <-> rows.  The only code that knows tar members; nothing is ever extracted to disk.

A row is a run of members that share a key: `000000012.jpg`, `000000012.json`, `000000012.txt` (webdataset's rule: the
key ends at the first dot of the last path component).  Members keep their names, order and bytes.
Reading is sequential, so a pipe or an object store works, and a tar cut short is told from one that ends.
"""

import io
import struct
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, NamedTuple

from pipeline.errors import PoolError
from pipeline.storage import open_file, read_exactly

BLOCK_BYTES = 512
END_BLOCKS = 2
RECORD_BYTES = 20 * BLOCK_BYTES
MAX_HEADER_BYTES = 1 << 20
"""A pax or long-name header larger than this is not believed."""
HEADER = struct.Struct("100s 24x 11s s 12x 6s s x s 188x s")
"""name, size, the byte after it, checksum, the byte after it, type, first of the prefix (ustar, POSIX.1-1988)."""
NAME_BYTES, CHECKSUM_AT, CHECKSUM_END = 100, 148, 156
CHECKSUM_SPACES = 8 * ord(" ")
"""The checksum counts its own eight bytes as spaces."""
REGULAR, ENDS = (b"0", b"\0"), (b" ", b"\0")
_ZEROS = bytes(BLOCK_BYTES)
_NAME_KINDS = (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE)


class BrokenTar(PoolError):
    """The tar ends early or holds a damaged header; rows before that point were delivered."""

    def __init__(self, message: str, member: str | None = None) -> None:
        super().__init__(message)
        self.member = member
        """Name of the member that is cut short, where its header could be read."""


class Member(NamedTuple):
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


def read_rows(url: str, *, contents: bool = True, repeats: bool = False) -> Iterator[TarRow]:
    """Yield the rows of a tar in order; a row is known to be complete or it is not yielded.

    With `repeats` members that come back to an earlier key are a row of their own, and not the end of what is read.

    Without `contents` only headers are read (the file must be seekable) and members hold no bytes.  On a local disk
    that is one small read a row; fsspec fetches whole blocks (5 MiB ahead), so only members larger than that are saved.

    Raises BrokenTar at the point where the tar is cut short, damaged, or comes back to an earlier key (webdataset
    asks that a row's members stand together), after all whole rows before it.
    """
    key: str | None = None
    group: list[Member] = []
    seen: set[str] = set()
    with open_file(url) as file:
        try:
            for member in read_members(file, url, contents=contents):
                member_key = split_name(member.name)[0]
                if key is not None and member_key != key:
                    yield TarRow(key, tuple(group))
                    seen.add(key)
                    group = []
                if not repeats and member_key in seen:
                    raise BrokenTar(f"{url}: the members of {member_key!r} do not stand together.")
                key = member_key
                group.append(member)
        except BrokenTar as error:
            if group and error.member and split_name(error.member)[0] != key:  # the next row had begun
                yield TarRow(str(key), tuple(group))
            raise
    if key is not None:
        yield TarRow(key, tuple(group))


def read_members(file: IO[bytes], url: str, *, contents: bool = True) -> Iterator[Member]:
    """Yield the regular files of an open tar in order (ustar, GNU, pax names); folders and links are passed over."""
    num_bytes = None if contents else _measure(file)
    position, start, long_name = 0, 0, ""
    while True:
        header = file.read(BLOCK_BYTES)
        if len(header) < BLOCK_BYTES:
            header += read_exactly(file, BLOCK_BYTES - len(header))
        if header == _ZEROS:
            _check_end(file, url)
            return
        name, size, kind = _parse_header(header, url, position)
        names_next = kind in _NAME_KINDS
        if names_next and size > MAX_HEADER_BYTES:
            raise BrokenTar(f"{url}: a name header of {size} bytes at byte {position} is not plausible.")
        offset = position + BLOCK_BYTES
        position = offset + _pad(size)
        name = name if names_next else (long_name or name).removeprefix("./")
        if num_bytes is None or names_next:
            content = _read_content(file, "" if names_next else name, size, url)
        else:
            content = b""
            _skip_content(file, name, size, num_bytes - offset, url)
        if kind == tarfile.GNUTYPE_LONGNAME:
            long_name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif kind == tarfile.XHDTYPE:
            long_name = _pax_path(content, url) or long_name
        elif not names_next:
            if kind in tarfile.REGULAR_TYPES:
                yield Member(name, start, offset, size, content)
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


def _read_content(file: IO[bytes], name: str, size: int, url: str) -> bytes:
    content = read_exactly(file, _pad(size))
    if len(content) < size:
        raise BrokenTar(f"{url} is cut short: member {name!r} has {len(content)} of {size} bytes.", name)
    return content[:size]


def _skip_content(file: IO[bytes], name: str, size: int, num_left: int, url: str) -> None:
    if num_left < size:
        raise BrokenTar(f"{url} is cut short: member {name!r} has {num_left} of {size} bytes.", name)
    file.seek(_pad(size), 1)


def _parse_header(header: bytes, url: str, position: int) -> tuple[str, int, bytes]:
    """Return (name, size, type) of a member.  Raises BrokenTar."""
    if len(header) < BLOCK_BYTES:
        raise BrokenTar(f"{url} is cut short: it ends at byte {position + len(header)} without an end mark.")
    if plain := _parse_plain(header):
        return *plain, tarfile.REGTYPE
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise BrokenTar(f"{url}: no tar header at byte {position} ({error}).") from None
    if info.size < 0 or info.type == tarfile.GNUTYPE_SPARSE:
        raise BrokenTar(f"{url}: member {info.name!r} is sparse or has a size of {info.size} bytes; neither is read.")
    return info.name, info.size, info.type


def _parse_plain(header: bytes) -> tuple[str, int] | None:
    """Return (name, size) of a whole header of the common kind, a regular file without a prefix; else None.

    About ten times as fast as TarInfo, which judges what this turns away: other types, prefixes, numbers that are not
    plain octal, and headers whose sum is not the stored one.  (Adler-32's low half is one plus the sum of the bytes
    modulo 65,521, far above what a header of text sums up to.)
    """
    name, size, size_end, checksum, checksum_end, kind, prefix = HEADER.unpack_from(header)
    if kind not in REGULAR or prefix != b"\0" or not (size + checksum).isdigit():
        return None
    name = name.partition(b"\0")[0]
    if size_end not in ENDS or checksum_end not in ENDS or (kind == b"\0" and name[-1:] == b"/"):
        return None
    spaced = zlib.adler32(header[CHECKSUM_END:], zlib.adler32(header[:CHECKSUM_AT])) & 0xFFFF
    try:
        same = spaced - 1 + CHECKSUM_SPACES == int(checksum, 8)
        return (name.decode("utf-8", "surrogateescape"), int(size, 8)) if same else None
    except ValueError:  # digits 8 and 9
        return None


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


def rename_packed(packed: bytearray, start: int, end: int, key: str, new_key: str) -> bool:
    """Give the row in bytes [start, end) of `packed` another key, in place, and return whether that was possible.

    Only the name and the checksum of each header change.  Where False comes back, nothing has: a member is not a
    regular file under a plain header that starts with the key, or a name would outgrow its field; see rename_row.
    """
    old, new = key.encode("utf-8", "surrogateescape"), new_key.encode("utf-8", "surrogateescape")
    change, grown = sum(new) - sum(old), max(0, len(new) - len(old))
    headers = []
    while start + BLOCK_BYTES <= end:
        name, size, _, checksum, _, kind, prefix = HEADER.unpack_from(packed, start)
        if kind not in REGULAR or prefix != b"\0" or not (size + checksum).isdigit() or not name.startswith(old):
            return False
        if grown and name[-grown:].strip(b"\0"):
            return False
        renamed = new + name[len(old) : NAME_BYTES - grown]
        headers.append((start, renamed.ljust(NAME_BYTES, b"\0"), b"%06o\0 " % (int(checksum, 8) + change)))
        start += BLOCK_BYTES + _pad(int(size, 8))
    for at, renamed, digits in headers if start == end else ():
        packed[at : at + NAME_BYTES] = renamed
        packed[at + CHECKSUM_AT : at + CHECKSUM_END] = digits
    return start == end


def write_end(file: IO[bytes], position: int) -> int:
    """Write the end mark after `position` bytes, filled up to a whole record as tar programs do; return its bytes."""
    end = END_BLOCKS * BLOCK_BYTES
    return file.write(bytes(end + -(position + end) % RECORD_BYTES))


def rename_row(row: TarRow, key: str) -> TarRow:
    """Return the row under another key; extensions and bytes stay."""
    members = (make_member(key + m.name[len(m.key) :], m.content) for m in row.members)
    return TarRow(key, tuple(members))


def make_member(name: str, content: bytes) -> Member:
    """Return a member that is in no tar yet."""
    return Member(name, 0, 0, len(content), content)
