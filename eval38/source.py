"""source.json beside a downloaded set: which commit of which repository it is, and which files were proven.

    {"repo": "djghosh/wds_mnist_test", "commit": "...",
     "files": {"test/0.tar": {"size": 1, "sha256": "...", "modified": nanoseconds}, ...}}

A small file has git's object id (`git`) where a large one has its sha256.  While size and time of a file are those
written down, its hash stands for its content: the set is then the same set on every machine.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.schemas import EVAL_SOURCE
from pipeline.storage import (
    fingerprint,
    fingerprint_all,
    folder_of,
    is_folder,
    is_local,
    join,
    name_of,
    read_bytes,
    walk_files,
)

TEST_FOLDER = "test"


def describe_proven(url: str, algorithm: str, hash: str) -> dict[str, Any]:
    """Return the entry of a file that was proven as it lies there."""
    found = fingerprint(url)
    return {"size": found["size"], algorithm: hash, "modified": found["modified"]}


def read_proven(folder: str) -> dict[str, dict[str, Any]]:
    """Return the entries of a set's folder by path; {} when nobody has written them down, or not in this form."""
    try:
        files = json.loads(read_bytes(join(folder, EVAL_SOURCE)))["files"]
        return {str(name): dict(entry) for name, entry in files.items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def list_visible(folder: str) -> list[str]:
    """Return the files of a folder at any depth, as paths from it on, but for what is hidden."""
    return [path for path in walk_files(folder) if not any(part.startswith(".") for part in path.split("/"))]


def is_readable(url: str) -> bool:
    """Return whether a listed name is a file: a local one may be a link to nothing, or a pipe that nobody fills."""
    return not is_local(url) or Path(url).is_file()


def identify_files(urls: Sequence[str]) -> list[dict[str, Any]]:
    """Return what tells each of a set's files from another: its name, size and proven hash, else name, size and time.

    Of a folder of images these are its name and what tells its files.
    """
    proven_in = functools.cache(read_proven)
    found = []
    for url in urls:
        folder, name = folder_of(url), name_of(url)
        if is_folder(url):
            found.append(_identify_folder(url))
        elif name_of(folder) == TEST_FOLDER:
            found.append(_identify_file(url, proven_in(folder_of(folder)).get(f"{TEST_FOLDER}/{name}", {})))
        else:
            found.append(_identify_file(url, proven_in(folder).get(name, {})))
    return found


def _identify_folder(url: str) -> dict[str, Any]:
    paths = list_visible(url)
    whole = [path for path in paths if is_readable(join(url, path))]
    found = dict(zip(whole, fingerprint_all([join(url, path) for path in whole]), strict=True))
    return {"name": name_of(url), "files": [{**found.get(path, {}), "name": path} for path in paths]}


def _identify_file(url: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    found = fingerprint(url)
    hashes: dict[str, Any] = {algorithm: entry[algorithm] for algorithm in ("sha256", "git") if algorithm in entry}
    if hashes and all(entry.get(what) == found[what] for what in ("size", "modified")):
        return {"name": found["name"], "size": found["size"], **hashes}
    return found
