"""Target-aware: what read train data of evaluation tasks, so that its numbers on these tasks are set apart.

A filter says so itself, or the score entry of a recipe does (`target_aware: true`), say of a network fine-tuned on
ImageNet's train images.  What reads the columns of such a filter is target-aware too, and so is a subset of them.
"""

from collections.abc import Sequence

from pipeline.contract import Filter
from pipeline.manifest import Manifest
from pipeline.select import SQL_NAMES, SQL_TEXTS, Step, walk
from pipeline.stored import find_makers

TARGET_AWARE = "target_aware"
"""The field of a score entry, and of such a filter in the score manifest's config; no other filter has it there."""
MARK = "†"
"""Stands behind their names in tables."""
LEGEND = f"{MARK} target-aware: it reads train data of evaluation tasks."


def list_target_aware(filters: Sequence[Filter]) -> list[str]:
    """Return the names of filters that are target-aware, themselves or by the filters they read."""
    makers = find_makers(filters)
    found: set[str] = set()
    for filter in filters:
        if filter.target_aware or found & set(makers[filter.name].values()):
            found.add(filter.name)
    return sorted(found)


def find_target_aware(scored: Manifest) -> set[str]:
    """Return the score columns of target-aware filters."""
    filters = scored.config.get("filters", {})
    owners = scored.facts["columns"]
    return {column for column, owner in owners.items() if filters.get(owner, {}).get(TARGET_AWARE)}


def is_target_aware(steps: Sequence[Step], scored: Manifest) -> bool:
    """Return whether the steps of a subset read a column of a target-aware filter; joined tables are not known."""
    aware = find_target_aware(scored)
    return any(aware & _name_columns(step) for _, step in walk(steps))


def _name_columns(step: Step) -> set[str]:
    """Return the columns that a step names itself; of a `where`, every word that may be one."""
    words = SQL_NAMES.findall(SQL_TEXTS.sub("", step.where or ""))
    entries = [step.balance.entries] if step.balance else []
    return {*step.scores, *entries, *(quoted or plain for quoted, plain in words)}


def mark(name: str, is_aware: bool) -> str:
    """Return the name, marked if it is target-aware."""
    return name + (f" {MARK}" if is_aware else "")
