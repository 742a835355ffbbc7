"""One door to fsspec: URL -> filesystem, and what a remote store refuses in winnow's words.

Other processes write to a store too, so listings that fsspec remembers are forgotten at every call.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec

from pipeline.errors import PoolError, StageError

LOCAL = ("file", "local")
OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci"})
"""Protocols where an upload is atomic and a rename is a copy."""
DRIVERS = {"s3": "winnow[s3]", "s3a": "winnow[s3]", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
"""What pip installs for a protocol."""
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})
CHECK_RIGHTS = "Check the credentials (for s3: AWS_PROFILE, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) and their rights."
CHECK_WAY = "Check the endpoint (for s3: AWS_ENDPOINT_URL), the network and the credentials, here and on the workers."


class StorageError(PoolError, OSError):
    """A store refuses: wrong credentials, no such bucket, no driver, no answer."""


def protocol_of(url: str) -> str:
    """Return what stands before `://`; `file` for a plain path."""
    return url.split("://", 1)[0] if "://" in url else "file"


def find_filesystem(url: str) -> tuple[Any, str]:
    """Return (filesystem, path), with whatever listings the filesystem remembers forgotten."""
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        driver = DRIVERS.get(protocol_of(url))
        remedy = f"pip install '{driver}'." if driver else "Install it, on the workers too."
        raise StorageError(f"{url!r} needs a package that is not installed ({error}). {remedy}") from None
    except ValueError as error:
        raise StorageError(f"{url!r} is on no kind of storage that fsspec knows ({error}).") from None
    filesystem.invalidate_cache()
    return filesystem, path


def find_place(url: str) -> str:
    """Return where a file or folder really is, to tell whether two names mean the same: links and dots resolved."""
    _, path = find_filesystem(url)
    return os.path.realpath(path) if protocol_of(url) in LOCAL else str(path).rstrip("/")


def check_plain(url: str) -> None:
    """Raise StorageError for a remote name with glob signs: drivers expand them, also when they delete."""
    if protocol_of(url) not in LOCAL and any(sign in url for sign in "*?["):
        raise StorageError(f"{url!r}: a name with * ? or [ cannot be written to a remote store. Choose another.")


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn what a remote store refuses into a StorageError of one line: value, reason, remedy."""
    try:
        yield
    except (PoolError, FileExistsError):
        raise
    except FileNotFoundError as error:
        if "bucket does not exist" in str(error).lower():
            raise StorageError(f"{url!r}: {_first_line(error)}. Create the bucket, or correct its name.") from None
        raise FileNotFoundError(f"{url!r} does not exist.") from None
    except PermissionError as error:
        raise StorageError(f"{url!r} is refused: {_first_line(error)}. {CHECK_RIGHTS}") from None
    except Exception as error:
        if not _is_driver_error(error):
            raise
        raise StorageError(f"{url!r} cannot be reached: {_first_line(error)}. {CHECK_WAY}") from None


@contextmanager
def writing(url: str) -> Iterator[None]:
    """Turn a full or read-only disk into a StageError: it stops the stage, and is no fault of what was being read."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise StageError(
            f"{url} cannot be written: {error.strerror}. Make room or name another --out, and run the same command "
            "again; what is finished is kept."
        ) from error


def _is_driver_error(error: Exception) -> bool:
    """Return whether a storage driver's own library raised this (botocore's errors are no OSErrors)."""
    library = type(error).__module__.split(".")[0]
    return library in {"botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "azure", "adlfs"}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
