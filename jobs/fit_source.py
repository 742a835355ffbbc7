"""Where the rows of a fit come from: embeddings in the pool's own files, or those that filters made of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from jobs.stage_select import name_versions
from pipeline.errors import ConfigError, PoolError
from pipeline.filesystem import StorageError
from pipeline.gather import Batches, join_columns
from pipeline.ledger import FileRecord, Ledger, digest_file, identity_of
from pipeline.manifest import Counts, Manifest, hash_json
from pipeline.pool import Part, list_parts
from pipeline.schemas import UID
from pipeline.select_table import ScoreTable
from pipeline.storage import fingerprint_all, is_local, join
from pipeline.stored import read_stored
from pipeline.subset import is_in_subset
from pipeline.uid import parse_uids


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows that a fit may see."""

    batches: Batches
    """In the order of the pool."""
    counts: Mapping[str, Counts] = field(default_factory=dict)
    """Accounts of the steps that left these rows of the pool, if there were any."""
    broken: Mapping[str, str] = field(default_factory=dict)
    """Parts that have no rows here, or only the first of them, and why; whole when the batches are read."""
    pool: Callable[[], Batches] = tuple
    """Returns the batches of all rows of the pool, whatever the steps say."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where embeddings are, and what decides them."""

    batches: Callable[[], Batches]
    """As those of Rows."""
    parents: Mapping[str, str]
    broken: Mapping[str, str]
    """As that of Rows."""
    ledger: Ledger = field(default_factory=dict)
    """Files of the pool that were hashed."""


def open_scores(scores: str, scored: Manifest, columns: Sequence[str]) -> Source | None:
    """Return the scored parts' embeddings, or None when no filter makes the columns.

    Raises ConfigError when filters make some of them only.
    """
    owners = {c: scored.facts["columns"][c] for c in columns if c in scored.facts["columns"]}
    if not owners:
        return None
    if missing := [column for column in columns if column not in owners]:
        raise ConfigError(f"{list(owners)} are scores, and {missing} are not: one fit cannot read both.")
    broken = {name: why for name, why in scored.facts["broken"].items() if name not in scored.facts["parts"]}
    batches = partial(read_scored, scores, owners, scored.facts["parts"])
    return Source(batches, name_versions(scores, scored, set(owners.values())), broken)


def read_scored(
    scores: str, owners: Mapping[str, str], parts: Sequence[str]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield uids and embeddings of the named parts in order, batch by batch; `owners` are column -> filter."""
    table = ScoreTable({owner: join(scores, owner) for owner in owners.values()}, owners)
    for part in table.measure(parts):
        for batch in table.read(part.name, list(owners), uids=True):
            yield parse_uids(batch.column(UID)), join_columns([batch.column(column) for column in owners])


def open_pool(pool: str | None, columns: Sequence[str], *known: Ledger) -> Source:
    """Return the embeddings in the pool's own files.  Raises ConfigError when there is no pool."""
    if not pool:
        raise ConfigError(f"to fit {', '.join(columns)}, say where its rows are (--pool), or name `centroids`.")
    parts = list_parts(pool)
    broken: dict[str, str] = {}
    identity, ledger = _digest_pool(parts, known)
    return Source(partial(read_pool, parts, columns, broken), {"pool": identity}, broken, ledger)


def _digest_pool(parts: Sequence[Part], known: Sequence[Ledger]) -> tuple[str, Ledger]:
    """Return a hash of the bytes of all tables and npz files, and what to note of them, so as to read them once only.

    On an object store one listing says which version each file has.
    """
    files = {part.name: [url for url in (part.table, part.arrays) if url] for part in parts}
    if not all(is_local(url) for urls in files.values() for url in urls):
        return hash_json(fingerprint_all([url for urls in files.values() for url in urls])), {}

    def digest(name: str) -> list[FileRecord]:
        noted = [record for ledger in known for record in ledger.get(name, ())]
        return [digest_file(url, noted) for url in files[name]]

    with ThreadPoolExecutor() as readers:
        ledger = dict(zip(files, readers.map(digest, files), strict=True))
    return hash_json([[name, identity_of(records)] for name, records in ledger.items()]), ledger


def read_pool(
    parts: Sequence[Part], columns: Sequence[str], broken: dict[str, str]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield uids and embeddings of a pool, batch by batch; `broken` takes up which parts cannot be read, and why.

    Raises PoolError when that is true of all, StorageError when a store refuses.
    """
    for part in parts:
        try:
            for batch in read_stored(part, columns):
                yield parse_uids(batch.column(UID)), join_columns([batch.column(column) for column in columns])
        except StorageError:
            raise
        except PoolError as error:
            broken[part.name] = str(error)
    if len(broken) == len(parts):
        first = next(iter(broken.values()))
        raise PoolError(f"none of the {len(parts)} parts can be fitted; the first says: {first}")


def keep_subset(batches: Batches, subset: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the rows whose uids the sorted subset has."""
    for uids, block_ND in batches:
        inside_N = is_in_subset(uids, subset)
        yield uids[inside_N], block_ND[inside_N]
