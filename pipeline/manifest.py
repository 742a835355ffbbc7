"""The manifest: JSON beside each artifact, written last, that says what was asked, from what, and where every row went.

A manifest holds no time and no host, so the same work gives the same bytes.  An artifact without one does not exist:
`find_done` is how every stage asks "has exactly this been made already?".
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from pipeline.errors import StageError
from pipeline.schemas import FORMAT_VERSION, MANIFEST
from pipeline.storage import exists, join, read_bytes, remove, write_bytes

log = logging.getLogger("winnow")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Where rows went: read = kept + sum(dropped) + sum(failed)."""

    read: int
    kept: int
    dropped: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Rows a rule turned away, by rule."""
    failed: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Rows that could not be worked on, by reason."""

    def check(self, where: str) -> None:
        """Raise StageError unless every row read is accounted for."""
        accounted = self.kept + sum(self.dropped.values()) + sum(self.failed.values())
        if accounted != self.read:
            raise StageError(
                f"{where}: {self.read} rows in, {accounted} accounted for "
                f"(kept {self.kept}, dropped {dict(self.dropped)}, failed {dict(self.failed)}). "
                "This is a bug in winnow."
            )


def add_counts(parts: Iterable[Counts]) -> Counts:
    """Return the sum of several accounts; reasons come out sorted."""
    read = kept = 0
    dropped: dict[str, int] = {}
    failed: dict[str, int] = {}
    for part in parts:
        read, kept = read + part.read, kept + part.kept
        for total, addition in ((dropped, part.dropped), (failed, part.failed)):
            for reason, number in addition.items():
                total[reason] = total.get(reason, 0) + number
    return Counts(read=read, kept=kept, dropped=dict(sorted(dropped.items())), failed=dict(sorted(failed.items())))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What one stage made.  `identity` is decided by stage, config and parents alone."""

    stage: str
    config: Mapping[str, Any]
    """The choices that decide the bytes, as plain JSON values."""
    parents: Mapping[str, str]
    """Name -> identity of each artifact this one was made from."""
    counts: Mapping[str, Counts] = dataclasses.field(default_factory=dict)
    """One account per filter, step or pass of the stage."""
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What came out: files, thresholds, numbers; plain JSON values."""
    format_version: int = FORMAT_VERSION

    @property
    def identity(self) -> str:
        """Hex sha256 of stage, format version, config and parents."""
        return hash_json([self.stage, self.format_version, self.config, self.parents])


def hash_json(value: Any) -> str:
    """Return the hex sha256 of a JSON value in canonical form (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_manifest(folder: str, manifest: Manifest, *, name: str = MANIFEST) -> None:
    """Check every account and write the manifest atomically.  Raises StageError when rows are unaccounted for."""
    for what, counts in manifest.counts.items():
        counts.check(f"{manifest.stage} ({what})")
    content = {"identity": manifest.identity, **dataclasses.asdict(manifest)}
    write_bytes(join(folder, name), (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_manifest(folder: str, *, name: str = MANIFEST) -> Manifest | None:
    """Return the manifest in `folder`, or None when there is none.  Raises StageError if it is not one."""
    url = join(folder, name)
    if not exists(url):
        return None
    try:
        content = json.loads(read_bytes(url))
        content.pop("identity")
        content["counts"] = {what: Counts(**counts) for what, counts in content["counts"].items()}
        return Manifest(**content)
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(f"{url} is not a winnow manifest ({error}). Delete it to make the artifact again.") from None


def find_done(
    folder: str,
    wanted: Manifest,
    *,
    name: str = MANIFEST,
    is_whole: Callable[[Manifest], bool] = lambda found: True,
    keep_stale: bool = False,
) -> Manifest | None:
    """Return the manifest on disk if it has the identity of `wanted` and its artifact `is_whole`; else None.

    Before None is returned, what changed is named and the stale manifest deleted: a kill from here on must not leave it
    beside newer files.  With `keep_stale` the caller deletes it, when nothing can fail any more before new files.
    Raises StageError when the folder is another stage's.
    """
    found = read_manifest(folder, name=name)
    if found is None:
        return None
    if found.stage != wanted.stage:
        raise StageError(f"{folder!r} holds the output of {found.stage!r}. Name another --out for {wanted.stage!r}.")
    same = found.identity == wanted.identity
    if same and is_whole(found):
        return found
    why = "files of it are missing or changed" if same else "; ".join(changes(found, wanted))
    log.warning("%s: %s is made again because %s", wanted.stage, join(folder, name), why)
    if not keep_stale:
        remove(join(folder, name))
    return None


def changes(old: Manifest, new: Manifest) -> list[str]:
    """Return one phrase per difference in what decides the bytes, e.g. `config.fraction changed from 0.3 to 0.4`."""
    before, after = ({"config": m.config, "parents": m.parents, "format": m.format_version} for m in (old, new))
    return describe_changes(before, after)


def describe_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one phrase per place in which two JSON values differ, in the order of their names."""
    return list(_compare(old, new, ""))


def _compare(old: Any, new: Any, path: str) -> Iterator[str]:
    before, after = _list_members(old), _list_members(new)
    if before is None or after is None:
        if old != new:
            yield f"{path} changed from {old} to {new}"
        return
    for name in sorted(before.keys() | after.keys()):
        place = f"{path}.{name}" if path else name
        if name not in before or name not in after:
            yield f"{place} is {'new' if name in after else 'gone'}"
        else:
            yield from _compare(before[name], after[name], place)


def _list_members(value: Any) -> dict[str, Any] | None:
    """Return what a mapping or list holds, by name or number; None for a leaf."""
    if isinstance(value, Mapping):
        return {str(name): member for name, member in value.items()}
    return {str(n): member for n, member in enumerate(value)} if isinstance(value, (list, tuple)) else None
