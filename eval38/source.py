"""source.json beside a downloaded set: which commit of which repository it is, and which files were proven.

    {"repo": "djghosh/wds_mnist_test", "commit": "...",
     "files": {"test/0.tar": {"size": 1, "sha256": "...", "modified": nanoseconds}, ...}}

A small file has git's object id (`git`) where a large one has its sha256.  While size and time of a file are those
written down, its hash stands for its content: the set is then the same set on every machine.
"""

import json
from typing import Any

from pipeline.schemas import EVAL_SOURCE
from pipeline.storage import (
    exists,
    fingerprint,
    fingerprint_all,
    folder_of,
    is_folder,
    join,
    list_folder,
    name_of,
    read_bytes,
)

TEST_FOLDER = "test"


def describe_proven(url: str, algorithm: str, hash: str) -> dict[str, Any]:
    """Return the entry of a file that was proven as it lies there."""
    found = fingerprint(url)
    return {"size": found["size"], algorithm: hash, "modified": found["modified"]}


def read_proven(folder: str) -> dict[str, dict[str, Any]]:
    """Return the entries of a set's folder by path; {} when nobody has written them down, or not in this form."""
    url = join(folder, EVAL_SOURCE)
    if not exists(url):
        return {}
    try:
        files = json.loads(read_bytes(url))["files"]
        return {str(name): dict(entry) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def list_visible(folder: str) -> list[str]:
    """Return the files directly in a folder, sorted, but for hidden ones."""
    return [url for url in list_folder(folder) if not name_of(url).startswith(".")]


def identify_file(url: str) -> dict[str, Any]:
    """Return what tells a set's file from another: its name, size and proven hash, else name, size and time.

    Of a folder of images these are its name and what tells its files.
    """
    if is_folder(url):
        return {"name": name_of(url), "files": fingerprint_all(list_visible(url))}
    found, folder, name = fingerprint(url), folder_of(url), name_of(url)
    if name_of(folder) == TEST_FOLDER:
        folder, name = folder_of(folder), f"{TEST_FOLDER}/{name}"
    entry = read_proven(folder).get(name, {})
    hashes: dict[str, Any] = {algorithm: entry[algorithm] for algorithm in ("sha256", "git") if algorithm in entry}
    if hashes and all(entry.get(what) == found[what] for what in ("size", "modified")):
        return {"name": found["name"], "size": found["size"], **hashes}
    return found
