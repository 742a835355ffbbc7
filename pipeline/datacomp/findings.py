"""What is wrong with what DataComp left: how badly, where, and the value, the reason and the remedy in one message."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from pipeline.manifest import Counts

BROKEN = "broken"
"""Of no use as it is."""
WARNING = "warning"
"""Usable; rows are missing, or DataComp's tools would lose or change some."""
NOTE = "note"
"""Worth knowing."""
METADATA, SHARDS = "metadata", "shards"
"""Where a finding is, and the names of sections."""
MAX_NAMED = 4


class Finding(NamedTuple):
    """One thing that is not as it should be."""

    level: str
    """BROKEN, WARNING or NOTE."""
    where: str
    """metadata, shards, or subset NAME."""
    message: str


class Section(NamedTuple):
    """What was found out about one folder or file."""

    counts: Counts
    """Its rows."""
    numbers: dict[str, int]
    """What the table prints, in its order."""
    facts: dict[str, Any]
    """The rest, for the manifest; plain JSON values."""
    findings: list[Finding]
    uids: str | None
    """A sorted file of its uids; None when they cannot be known."""
    identity: str
    """Hash of the names and sizes of its files, or of a subset's bytes."""


def say_some(names: Collection[str] | Mapping[str, str]) -> str:
    """Return the first few names, with their reasons where they have some, and how many more there are."""
    pairs = list(names.items()) if isinstance(names, Mapping) else [(name, "") for name in names]
    said = [f"{name}: {why.rstrip('.')}" if why else name for name, why in pairs[:MAX_NAMED]]
    more = [f"{len(pairs) - MAX_NAMED:,} more"] if len(pairs) > MAX_NAMED else []
    return "; ".join(said + more)


def say_files(names: Collection[str] | Mapping[str, str], total: int, kind: str = "files") -> str:
    """Return `2 of 26 files (a; b)`, or `all 26 files` where no reasons tell them apart."""
    if len(names) == total > 1 and not isinstance(names, Mapping):
        return f"all {total:,} {kind}"
    return f"{len(names):,} of {total:,} {kind} ({say_some(names)})"
