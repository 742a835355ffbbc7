"""The ledger: which bytes were read, so that a rerun knows what changed without reading everything again.

As git's index does it: a file whose size and modification time are those of the last run still has the digest noted
then; any other is read and hashed.  So a pool that was copied or touched is not scored again, and one whose bytes
changed is.  On object stores the ETag is the digest, and nothing is read for it.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.filesystem import find_place
from pipeline.manifest import hash_json
from pipeline.pool import Part
from pipeline.schemas import LEDGER
from pipeline.storage import (
    exists,
    fingerprint_all,
    is_local,
    join,
    name_of,
    read_bytes,
    sha256_of_file,
    write_bytes,
)

log = logging.getLogger("winnow")
FileRecord = Mapping[str, Any]
"""{"name", "size", "modified", "place", "digest"} of one file as it was when it was read."""
Ledger = Mapping[str, Sequence[FileRecord]]
"""Part name -> its files."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One part to work on, with what the last run noted of its files."""

    part: Part
    known: tuple[FileRecord, ...] = ()


def digest_file(url: str, known: Sequence[FileRecord] = ()) -> FileRecord:
    """Return the file's record; its bytes are read unless it is remote, or `known` has it with this size and time."""
    (now,) = _look([url])
    for record in known:
        if is_versioned(now) and all(record.get(field) == value for field, value in now.items()):
            return record
    has_etag = not is_local(url) and is_versioned(now)
    return now | {"digest": hash_json([now["size"], now["modified"]]) if has_etag else sha256_of_file(url)}


def _look(urls: Sequence[str]) -> list[dict[str, Any]]:
    """Return what tells this version of each file from others, and from files of the same name elsewhere."""
    return [found | {"place": find_place(url)} for found, url in zip(fingerprint_all(urls), urls, strict=True)]


def is_versioned(record: FileRecord) -> bool:
    """Return whether the store says when the file changed, by time or ETag; where it does not, bytes must be read."""
    return record["modified"] not in (None, "None")


def identity_of(records: Sequence[FileRecord]) -> list[list[Any]]:
    """Return what of the records decides an identity: names, sizes and digests, but no times."""
    return [[record["name"], record["size"], record["digest"]] for record in records]


def read_ledger(out: str) -> Ledger:
    """Return OUT's ledger, or {} when there is none that can be read: it only saves work."""
    url = join(out, LEDGER)
    try:
        ledger: Ledger = json.loads(read_bytes(url)) if exists(url) else {}
    except ValueError:
        log.warning("%s cannot be read; every file of the pool is hashed again", url)
        return {}
    return ledger


def write_ledger(out: str, ledger: Ledger) -> None:
    """Write OUT's ledger, one part a line."""
    lines = [f"{json.dumps(name)}: {json.dumps(list(records))}" for name, records in ledger.items()]
    write_bytes(join(out, LEDGER), ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def list_inputs(part: Part, *, images: bool, arrays: bool) -> list[str]:
    """Return the part's files that are read: its table, its tar for `images` or when there is no table, its npz."""
    tar, npz = part.tar if images or part.table is None else None, part.arrays if arrays else None
    return [url for url in (part.table, tar, npz) if url]


def find_new(parts: Sequence[Part], ledger: Ledger, *, images: bool, arrays: bool) -> list[str]:
    """Return the names of parts that are not, by name, size and time of their files, those the ledger speaks of.

    Looked at are the files to read, and any other that was read before; a part that has lost one is new.
    """
    noted = {
        name: {r["name"]: {k: v for k, v in r.items() if k != "digest"} for r in rs} for name, rs in ledger.items()
    }
    files = []
    for part in parts:
        needed, known = list_inputs(part, images=images, arrays=arrays), noted.get(part.name, {})
        present = [url for url in (part.table, part.tar, part.arrays) if url]
        files += [(part.name, url) for url in present if url in needed or name_of(url) in known]
    looked = zip(files, _look([url for _, url in files]), strict=True)
    new = {name for (name, _), now in looked if not is_versioned(now) or now != noted.get(name, {}).get(now["name"])}
    here = {(name, name_of(url)) for name, url in files}
    new |= {part.name for part in parts for known in noted.get(part.name, ()) if (part.name, known) not in here}
    return [part.name for part in parts if part.name in new]
