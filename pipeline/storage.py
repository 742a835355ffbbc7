"""List, read and atomically write files on any fsspec URL (a local path is the common case).

A reader sees all of a file or nothing.  Where names can be moved (local, hdfs, sftp) a file is written to a temporary
name in its own folder and renamed.  On an object store the upload is the transaction: it becomes visible when it is
completed and is given up on an error, so nothing is copied.  A process killed during an upload of many parts leaves
parts that nobody sees and the store bills: set a lifecycle rule that ends unfinished multipart uploads.

Other processes write too: every question about a remote store is asked of the store and never of fsspec's listings
cache.  Raises StorageError for what the store refuses; a file that is absent stays a FileNotFoundError.
"""

import errno
import functools
import hashlib
import io
import os
import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from braceexpand import braceexpand

from pipeline.errors import PoolError
from pipeline.filesystem import OBJECT_STORES, check_plain, explained, find_filesystem, protocol_of, writing

TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{32}-")
CHUNK_BYTES = 1 << 20
MAX_READ_BYTES = 64 << 20
"""A file may promise any size; memory is asked for in pieces of what is really there."""
READ_AHEAD_BYTES = 8 << 20
"""What reading a remote file from front to end asks for at once (s3fs would take 50 MiB, also for a footer)."""


def is_local(url: str) -> bool:
    """Return whether `url` is a plain local path."""
    return "://" not in url


def join(folder: str, *names: str) -> str:
    """Return `folder/name/...` without doubled slashes."""
    return "/".join([folder.rstrip("/"), *names])


def name_of(url: str) -> str:
    """Return the last path component of `url`."""
    return url.rstrip("/").rsplit("/", 1)[-1]


def folder_of(url: str) -> str:
    """Return the folder of a file's URL."""
    return url.rsplit("/", 1)[0] if "/" in url else "."


def exists(url: str) -> bool:
    """Return whether a file or folder is there."""
    if is_local(url):
        return Path(url).exists()
    filesystem, path = find_filesystem(url)
    with explained(url):
        return bool(filesystem.exists(path))


def is_folder(url: str) -> bool:
    """Return whether `url` names a folder that exists."""
    if is_local(url):
        return Path(url).is_dir()
    filesystem, path = find_filesystem(url)
    try:
        with explained(url):
            return bool(filesystem.info(path)["type"] == "directory")
    except FileNotFoundError:
        return False


def list_folder(url: str) -> list[str]:
    """Return the files directly in a folder, as full URLs sorted by name; [] when it does not exist."""
    if is_local(url):
        folder = Path(url)
        return sorted(str(p) for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
    return sorted(_list_remote(url))


def walk_files(url: str) -> list[str]:
    """Return the files below a folder at any depth, as paths from it on, by folder and then name; links are followed.

    That is the order of torchvision's ImageFolder.  A local link to nothing is among them; [] without a folder.
    Raises PoolError for a link to a folder that holds it.
    """
    if is_local(url):
        found = _walk_local(url.rstrip("/"))
    else:
        filesystem, path = find_filesystem(url)
        with explained(url):
            found = (name.removeprefix(path.rstrip("/") + "/") for name in filesystem.find(path))
    return sorted(found, key=lambda path: path.rpartition("/"))


def _walk_local(top: str) -> Iterator[str]:
    if not Path(top).is_dir():
        return
    for root, folders, names in os.walk(top, onerror=_raise, followlinks=True):
        for link in (join(root, name) for name in folders):
            if Path(link).is_symlink() and Path(root).resolve().is_relative_to(Path(link).resolve()):
                raise PoolError(
                    f"{link!r} is a link to a folder that holds it, so there is no end to its files. Remove it."
                )
        head = root[len(top) + 1 :]
        yield from (join(head, name) for name in names) if head else names


def _raise(error: OSError) -> None:
    raise error


def list_sizes(url: str) -> dict[str, int]:
    """Return name -> bytes of the files directly in a folder, from one listing; {} when it does not exist."""
    if is_local(url):
        return {name_of(file): Path(file).stat().st_size for file in list_folder(url)}
    return {name_of(file): info["size"] for file, info in sorted(_list_remote(url).items())}


def _list_remote(url: str) -> dict[str, dict[str, Any]]:
    """Return URL -> fsspec's details of the files directly in a remote folder; {} when it does not exist."""
    filesystem, path = find_filesystem(url)
    try:
        with explained(url):
            entries = filesystem.ls(path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    itself = path.rstrip("/")
    files = [e for e in entries if e["type"] == "file" and e["name"].rstrip("/") != itself]
    return {str(filesystem.unstrip_protocol(e["name"])): e for e in files}


def expand(pattern: str) -> list[str]:
    """Return the URLs a folder, glob, brace range or `a::b` list of them names, sorted within each source.

    A folder gives its files; a glob what matches; a brace range exactly what it spells.  Nothing is de-duplicated.
    Raises PoolError when a source names no file at all, or a brace range names one that is missing.
    """
    urls: list[str] = []
    for source in pattern.split("::"):
        try:
            spelled = [source] if "{" not in source or exists(source) else list(braceexpand(source))
        except ValueError:  # braceexpand's UnbalancedBracesError
            raise PoolError(f"{source!r} has a brace that is not closed, as in {{00000..00099}}.") from None
        found = _expand_one(source) if len(spelled) == 1 else list(_expand_range(spelled))
        if not found:
            raise PoolError(f"{source!r} matches no file. Name a folder, a glob or a {{00000..00099}}.tar range.")
        urls += found
    return urls


def _expand_range(spelled: Sequence[str]) -> Iterator[str]:
    """Yield what each spelled source names; files are looked up in one listing of their folder, not one by one."""
    present = functools.cache(lambda folder: frozenset(map(name_of, list_folder(folder))))
    for source in spelled:
        yield from [source] if name_of(source) in present(folder_of(source)) else _expand_one(source)


def _expand_one(source: str) -> list[str]:
    if is_folder(source):
        return list_folder(source)
    if exists(source):
        return [source]
    if not any(c in source for c in "*?["):
        raise PoolError(f"{source!r} does not exist.")
    filesystem, path = find_filesystem(source)
    with explained(source):
        found = sorted(str(p) for p in filesystem.glob(path))
    return found if is_local(source) else [str(filesystem.unstrip_protocol(p)) for p in found]


def open_file(url: str, mode: str = "rb", *, ahead: int | None = None) -> IO[Any]:
    """Return an open binary (default) or text file; a remote one is read `ahead` (READ_AHEAD_BYTES) bytes at a time."""
    if is_local(url):
        return open(url, mode)  # noqa: PTH123
    filesystem, path = find_filesystem(url)
    block = {"block_size": READ_AHEAD_BYTES if ahead is None else ahead} if "r" in mode else {}
    with explained(url):
        opened: IO[Any] = filesystem.open(path, mode, **block)
        return opened


def read_bytes(url: str) -> bytes:
    """Return the whole file."""
    if is_local(url):
        return Path(url).read_bytes()
    filesystem, path = find_filesystem(url)
    with explained(url):
        return bytes(filesystem.cat_file(path))


@contextmanager
def write_atomic(url: str, *, lasting: bool = True) -> Iterator[IO[bytes]]:
    """Yield a binary file that becomes `url` when the block ends without an error, and vanishes otherwise.

    What stood at `url` before stays readable until then.  Not `lasting`: it may be gone after a power failure.
    """
    check_plain(url)
    with _upload(url) if protocol_of(url) in OBJECT_STORES else _write_and_rename(url, lasting) as file:
        yield file


@contextmanager
def _upload(url: str) -> Iterator[IO[bytes]]:
    """Yield a file whose upload is completed at the end of the block, or given up; no folder and no bucket is made."""
    filesystem, path = find_filesystem(url)
    with explained(url):
        file = filesystem.open(path, "wb")
    try:
        yield file
        with explained(url):
            file.close()
    except BaseException:
        file.closed = True  # else fsspec completes the upload when the object is collected
        with explained(url):
            file.discard()
        raise


@contextmanager
def _write_and_rename(url: str, lasting: bool) -> Iterator[IO[bytes]]:
    temporary = _temporary_name(url)
    try:
        with writing(url), _open_new(temporary) as file:
            yield file
            file.flush()
            if lasting and is_local(url):
                os.fsync(file.fileno())
        _rename(temporary, url)
    except BaseException:
        remove(temporary)
        raise


def _temporary_name(url: str) -> str:
    return join(folder_of(url), f".tmp-{uuid.uuid4().hex}-{name_of(url)}")


def _open_new(url: str) -> IO[bytes]:
    filesystem, path = find_filesystem(url)
    with explained(url):
        filesystem.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    return open_file(url, "wb")


def _rename(source: str, target: str) -> None:
    if is_local(target):
        Path(source).replace(target)
        return
    with explained(target):
        find_filesystem(target)[0].mv(find_filesystem(source)[1], find_filesystem(target)[1])


def write_bytes(url: str, content: bytes) -> None:
    """Write the whole file atomically."""
    with write_atomic(url) as file:
        file.write(content)


def write_new(url: str, content: bytes) -> bool:
    """Write the whole file unless there is one already, and return whether it was written; of two writers one wins.

    Local: a whole temporary file is hard-linked to the name, which the kernel refuses when the name is taken.
    Object stores: a conditional put (S3's If-None-Match: *, in AWS since 2024).  A
    store that does not know the condition ignores it, and then both of two writers at the same moment win.
    Elsewhere (hdfs, sftp): a look and then a write, with that same gap.
    """
    if is_local(url):
        return _link_new(url, content)
    filesystem, path = find_filesystem(url)
    if exists(url):
        return False
    if protocol_of(url) not in OBJECT_STORES:
        write_bytes(url, content)
        return True
    try:
        with explained(url):
            filesystem.pipe_file(path, content, mode="create")
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno == errno.EBUSY:  # S3's 409: another conditional put of this name is under way
            return False
        raise
    return True


def _link_new(url: str, content: bytes) -> bool:
    temporary = _temporary_name(url)
    write_bytes(temporary, content)
    try:
        _link(temporary, url)
    except FileExistsError:
        return False
    finally:
        remove(temporary)
    return True


def _link(source: str, target: str) -> None:
    """Give a file a second name; where hard links are unknown (exFAT, some FUSE), copy it to a name taken first."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        with Path(target).open("xb") as file:
            file.write(read_bytes(source))


def remove(url: str) -> None:
    """Delete a file or a folder with all it holds; absent is fine."""
    check_plain(url)
    filesystem, path = find_filesystem(url)
    with explained(url):
        if filesystem.exists(path):
            filesystem.rm(path, recursive=True)


def sweep_temporaries(folder: str) -> None:
    """Delete what killed writers left under temporary names in `folder`."""
    for url in list_folder(folder):
        if TEMPORARY.match(name_of(url)):
            remove(url)


def fingerprint(url: str) -> dict[str, Any]:
    """Return what tells one version of a file from another without reading it: size, and etag or modification time."""
    if is_local(url):
        stat = Path(url).stat()
        return {"name": name_of(url), "size": stat.st_size, "modified": stat.st_mtime_ns}
    filesystem, path = find_filesystem(url)
    with explained(url):
        return _describe(url, filesystem.info(path))


def fingerprint_all(urls: Sequence[str]) -> list[dict[str, Any]]:
    """Return `fingerprint` of each file, in order, from one listing a remote folder: 1,000 files a request, not one.

    Raises FileNotFoundError for a file that is not there.
    """
    folders = {folder_of(url) for url in urls if not is_local(url)}
    listed = {(folder, name_of(u)): info for folder in folders for u, info in _list_remote(folder).items()}
    details = [listed.get((folder_of(url), name_of(url))) for url in urls]
    return [_describe(url, info) if info else fingerprint(url) for url, info in zip(urls, details, strict=True)]


def _describe(url: str, info: dict[str, Any]) -> dict[str, Any]:
    version = info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("LastModified")
    return {"name": name_of(url), "size": info["size"], "modified": str(version)}


def sha256_of_file(url: str) -> str:
    """Return the hex sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open_file(url) as file:
        while piece := file.read(CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def read_exactly(file: IO[bytes] | io.BufferedReader, num_bytes: int) -> bytes:
    """Return the next `num_bytes`, or fewer only at the end of the file."""
    pieces: list[bytes] = []
    while num_bytes > 0 and (piece := file.read(min(num_bytes, MAX_READ_BYTES))):
        pieces.append(piece)
        num_bytes -= len(piece)
    return b"".join(pieces) if len(pieces) != 1 else pieces[0]
