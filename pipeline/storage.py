"""List, read and atomically write files on any fsspec URL (a local path is the common case).

Every artifact is written to a temporary name in its own folder and renamed, so a reader sees all of it or nothing.
On an object store the rename is the store's own copy-and-delete; the manifest written last is what publishes.
"""

import hashlib
import io
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec
from braceexpand import braceexpand

from pipeline.errors import PoolError

CHUNK_BYTES = 1 << 20
MAX_READ_BYTES = 64 << 20
"""A file may promise any size; memory is asked for in pieces of what is really there."""


def is_local(url: str) -> bool:
    """Return whether `url` is a plain local path."""
    return "://" not in url


def join(folder: str, *names: str) -> str:
    """Return `folder/name/...` without doubled slashes."""
    return "/".join([folder.rstrip("/"), *names])


def name_of(url: str) -> str:
    """Return the last path component of `url`."""
    return url.rstrip("/").rsplit("/", 1)[-1]


def _filesystem(url: str) -> tuple[Any, str]:
    filesystem, path = fsspec.core.url_to_fs(url)
    return filesystem, path


def exists(url: str) -> bool:
    """Return whether a file or folder is there."""
    if is_local(url):
        return Path(url).exists()
    filesystem, path = _filesystem(url)
    return bool(filesystem.exists(path))


def is_folder(url: str) -> bool:
    """Return whether `url` names a folder that exists."""
    if is_local(url):
        return Path(url).is_dir()
    filesystem, path = _filesystem(url)
    return bool(filesystem.isdir(path))


def list_folder(url: str) -> list[str]:
    """Return the files directly in a folder, as full URLs sorted by name; [] when it does not exist."""
    if is_local(url):
        folder = Path(url)
        return sorted(str(p) for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
    filesystem, path = _filesystem(url)
    if not filesystem.isdir(path):
        return []
    found = [entry["name"] for entry in filesystem.ls(path, detail=True) if entry["type"] == "file"]
    return sorted(str(filesystem.unstrip_protocol(name)) for name in found)


def expand(pattern: str) -> list[str]:
    """Return the URLs a folder, glob, brace range or `a::b` list of them names, sorted within each source.

    A folder gives its files; a glob what matches; a brace range exactly what it spells.  Nothing is de-duplicated.
    Raises PoolError when a source names no file at all, or a brace range names one that is missing.
    """
    urls: list[str] = []
    for source in pattern.split("::"):
        try:
            spelled = [source] if exists(source) else list(braceexpand(source))
        except ValueError:  # braceexpand's UnbalancedBracesError
            raise PoolError(f"{source!r} has a brace that is not closed, as in {{00000..00099}}.") from None
        found: list[str] = [url for one in spelled for url in _expand_one(one)]
        if not found:
            raise PoolError(f"{source!r} matches no file. Name a folder, a glob or a {{00000..00099}}.tar range.")
        urls += found
    return urls


def _expand_one(source: str) -> list[str]:
    if is_folder(source):
        return list_folder(source)
    if exists(source):
        return [source]
    if not any(c in source for c in "*?["):
        raise PoolError(f"{source!r} does not exist.")
    filesystem, path = _filesystem(source)
    found = sorted(str(p) for p in filesystem.glob(path))
    return found if is_local(source) else [str(filesystem.unstrip_protocol(p)) for p in found]


def open_file(url: str, mode: str = "rb") -> IO[Any]:
    """Return an open binary (default) or text file."""
    if is_local(url):
        return open(url, mode)  # noqa: PTH123
    filesystem, path = _filesystem(url)
    opened: IO[Any] = filesystem.open(path, mode)
    return opened


def read_bytes(url: str) -> bytes:
    """Return the whole file."""
    with open_file(url) as file:
        content: bytes = file.read()
        return content


@contextmanager
def write_atomic(url: str) -> Iterator[IO[bytes]]:
    """Yield a binary file that becomes `url` when the block ends without an error, and vanishes otherwise."""
    temporary = join(url.rsplit("/", 1)[0] if "/" in url else ".", f".tmp-{uuid.uuid4().hex}-{name_of(url)}")
    try:
        with _open_new(temporary) as file:
            yield file
            file.flush()
            if is_local(url):
                os.fsync(file.fileno())
        _rename(temporary, url)
    except BaseException:
        remove(temporary)
        raise


def _open_new(url: str) -> IO[bytes]:
    filesystem, path = _filesystem(url)
    filesystem.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    return open_file(url, "wb")


def _rename(source: str, target: str) -> None:
    if is_local(target):
        Path(source).replace(target)
        return
    filesystem, path = _filesystem(target)
    filesystem.mv(_filesystem(source)[1], path)


def write_bytes(url: str, content: bytes) -> None:
    """Write the whole file atomically."""
    with write_atomic(url) as file:
        file.write(content)


def remove(url: str) -> None:
    """Delete a file or a folder with all it holds; absent is fine."""
    filesystem, path = _filesystem(url)
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


def sweep_temporaries(folder: str) -> None:
    """Delete what killed writers left under temporary names in `folder`."""
    for url in list_folder(folder):
        if name_of(url).startswith(".tmp-"):
            remove(url)


def fingerprint(url: str) -> dict[str, Any]:
    """Return what tells one version of a file from another without reading it: size, and etag or modification time."""
    if is_local(url):
        stat = Path(url).stat()
        return {"name": name_of(url), "size": stat.st_size, "modified": stat.st_mtime_ns}
    filesystem, path = _filesystem(url)
    info = filesystem.info(path)
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
