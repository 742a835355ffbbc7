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

from pipeline.manifest import hash_json
from pipeline.pool import Part
from pipeline.schemas import LEDGER
from pipeline.storage import (
    exists,
    fingerprint,
    fingerprint_all,
    is_local,
    join,
    read_bytes,
    sha256_of_file,
    write_bytes,
)

log = logging.getLogger("winnow")
FINGERPRINT = ("name", "size", "modified")
FileRecord = Mapping[str, Any]
"""{"name", "size", "modified", "digest"} of one file as it was when it was read."""
Ledger = Mapping[str, Sequence[FileRecord]]
"""Part name -> its files."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One part to work on, with what the last run noted of its files."""

    part: Part
    known: tuple[FileRecord, ...] = ()


def digest_file(url: str, known: Sequence[FileRecord] = ()) -> FileRecord:
    """Return the file's record; its bytes are read unless it is remote, or `known` has it with this size and time."""
    now = fingerprint(url)
    for record in known:
        if all(record.get(field) == value for field, value in now.items()):
            return record
    return now | {"digest": sha256_of_file(url) if is_local(url) else hash_json(now)}


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


def list_inputs(part: Part, *, images: bool) -> list[str]:
    """Return the part's files that are read: its table, and its tar when there are `images` to read or no table."""
    return [url for url in (part.table, part.tar if images or part.table is None else None) if url]


def find_new(parts: Sequence[Part], ledger: Ledger, *, images: bool) -> list[str]:
    """Return the names of parts with a file to read that is not, by name, size and time, one the ledger speaks of."""
    files = [(part.name, url) for part in parts for url in list_inputs(part, images=images)]
    now = fingerprint_all([url for _, url in files])
    noted = {
        name: [{field: r.get(field) for field in FINGERPRINT} for r in records] for name, records in ledger.items()
    }
    new = {name for (name, _), found in zip(files, now, strict=True) if found not in noted.get(name, ())}
    return [part.name for part in parts if part.name in new]
