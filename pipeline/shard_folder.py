"""The folder that shards go into: whose it is, what of an earlier run may stay, and whether it is whole.

Nothing is deleted from a folder before it is known to be winnow's own, and what is replaced is named first.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from pipeline.errors import PoolError
from pipeline.filesystem import find_place
from pipeline.manifest import Manifest, hash_json, read_manifest
from pipeline.pool import Part
from pipeline.schemas import LOCK, PARQUET_SUFFIX, PART_PATTERN, REASON_BROKEN_PART, SIZES, STATS_SUFFIX, TAR_SUFFIX
from pipeline.shard_plan import PLAN_FOLDER
from pipeline.storage import exists, fingerprint, join, list_folder, name_of, read_bytes, remove, write_bytes

log = logging.getLogger("winnow")
PLAN_IDENTITY = "identity.json"
OWNER = "owner"
SHARD_FILES = re.compile(r"(\.tmp-[0-9a-f]{32}-.*|\d{8}(\.tar|\.parquet|_stats\.json)|sizes\.json|manifest\.json)")
NUMBERED = re.compile(r"(\d{8})(\.tar|\.parquet|_stats\.json)")
TAR_BYTES, PARQUET_BYTES, PLAN = "tar_bytes", "parquet_bytes", "plan"
MAX_NAMED, READERS = 8, 16
"""Names in a message; requests to the storage at a time."""


def claim_folder(out: str, parts: Sequence[Part]) -> None:
    """Mark `out` as winnow's to write shards into; nothing is deleted yet.

    Raises PoolError when the folder is the pool's own, or holds files and no sign that `winnow shards` wrote them.
    """
    present = {name_of(url) for url in list_folder(out)} - {LOCK}
    sources = {find_place(url).rpartition("/")[0] for part in parts for url in (part.tar, part.table) if url}
    made = read_manifest(out)
    ours = exists(join(out, PLAN_FOLDER, OWNER)) or (made is not None and made.stage == "shards")
    foreign = sorted(name for name in present if not ours or not SHARD_FILES.fullmatch(name))
    if foreign or find_place(out) in sources:
        what = f"files that it did not write ({foreign[0]}, ...)" if foreign else "the pool itself"
        raise PoolError(f"`winnow shards` does not write into {out!r}, which holds {what}. Name an empty folder.")
    write_bytes(join(out, PLAN_FOLDER, OWNER), b"")


def prepare_folder(out: str, identity: str, *, keep: bool = False) -> None:
    """Empty a claimed folder and name what goes, unless it holds shards of this very identity (or `keep` says so)."""
    url = join(out, PLAN_FOLDER, PLAN_IDENTITY)
    if exists(url) and json.loads(read_bytes(url)) == identity:
        return
    if not keep:
        _remove_stale(out, [url for url in list_folder(out) if name_of(url) != LOCK], "of an earlier run")
    write_bytes(url, json.dumps(identity).encode())


def discard_shards(out: str) -> None:
    """Delete, and name, every shard of a claimed folder, with its manifest and plan."""
    _remove_stale(out, [url for url in list_folder(out) if name_of(url) != LOCK], "of an earlier run")
    remove(join(out, PLAN_FOLDER, PLAN_IDENTITY))


def remove_beyond(out: str, num_shards: int) -> None:
    """Delete, and name, shard files with a number that this run does not write: training would read them."""
    numbered = [(NUMBERED.fullmatch(name_of(url)), url) for url in list_folder(out)]
    beyond = [url for found, url in numbered if found and int(found[1]) >= num_shards]
    _remove_stale(out, beyond, f"beyond the {num_shards} shards of this run")


def _remove_stale(out: str, urls: Sequence[str], what: str) -> None:
    names = [name_of(url) for url in urls if name_of(url).endswith(TAR_SUFFIX)]
    if names:
        listed = ", ".join(names[:MAX_NAMED]) + (", ..." if len(names) > MAX_NAMED else "")
        log.warning("shards: %d tars %s are removed from %s: %s", len(names), what, out, listed)
    with ThreadPoolExecutor(READERS) as removers:
        list(removers.map(remove, urls))


def read_stats(out: str, number: int) -> dict[str, Any] | None:
    """Return the stats of a shard whose files have the sizes that were written; None when it is absent or is not it.

    The stats are written last, so where they agree, tar and parquet are whole.
    """
    stem = join(out, PART_PATTERN.format(number))
    if not exists(stem + STATS_SUFFIX):
        return None
    try:
        stats: dict[str, Any] = json.loads(read_bytes(stem + STATS_SUFFIX))
        expected = (stats[TAR_BYTES], stats[PARQUET_BYTES])
    except (ValueError, KeyError, TypeError):
        return None
    return stats if (_size(stem + TAR_SUFFIX), _size(stem + PARQUET_SUFFIX)) == expected else None


def _size(url: str) -> int:
    return int(fingerprint(url)["size"]) if exists(url) else -1


def has_every_shard(out: str, made: Manifest) -> bool:
    """Return whether the folder holds exactly the shards its manifest speaks of, each of the size it was written in.

    A tar that is absent, cut, replaced by one of another size or left over, and a sizes.json of another run count.  A
    part that could not be read is tried again, so shards without it are not the whole.
    """
    if any(why.startswith(REASON_BROKEN_PART) for why in made.facts.get("broken", {}).values()):
        return False
    present = {name_of(url) for url in list_folder(out)}
    stems = [PART_PATTERN.format(number) for number in range(made.facts.get("num_shards", 0))]
    names = {stem + suffix for stem in stems for suffix in (TAR_SUFFIX, PARQUET_SUFFIX, STATS_SUFFIX)}
    if {name for name in present if NUMBERED.fullmatch(name)} != names or SIZES not in present:
        return False
    try:
        sizes = json.loads(read_bytes(join(out, SIZES)))
    except ValueError:
        return False
    with ThreadPoolExecutor(READERS) as readers:
        found = list(readers.map(partial(read_stats, out), range(len(stems))))
    recorded = [[stats[name] if stats else None for stats in found] for name in (TAR_BYTES, PARQUET_BYTES)]
    same = recorded == [made.facts.get(name) for name in (TAR_BYTES, PARQUET_BYTES)]
    return same and hash_json(sizes) == made.facts.get("sizes_sha256")


def finish_folder(out: str, written: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    """Write sizes.json from what each write_shard returned, and return the facts of the manifest."""
    sizes = {PART_PATTERN.format(n) + TAR_SUFFIX: shard["rows"] for n, shard in enumerate(written)}
    write_bytes(join(out, SIZES), json.dumps(sizes).encode())
    facts = {"num_shards": len(sizes), "rows": sum(sizes.values()), "sizes_sha256": hash_json(sizes)}
    return facts | {name: [shard[name] for shard in written] for name in (TAR_BYTES, PARQUET_BYTES)}


def drop_plan(out: str) -> None:
    """Delete the plan; called after the manifest is there."""
    remove(join(out, PLAN_FOLDER))
