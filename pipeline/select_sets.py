"""What a step's branches kept, combined: one pass over their bits and cuts leaves a bit per row, and its copies."""

from collections.abc import Sequence

import numpy as np

from pipeline.select_table import (
    PartGroup,
    Passing,
    ScorePart,
    ScoreTable,
    read_branches,
    read_copies,
    write_copies,
    write_mask,
)


def write_combined(
    table: ScoreTable, kind: str, branches: Sequence[Passing], folder: str, group: PartGroup
) -> np.ndarray:
    """Write a mask per part into FOLDER, and the copies where a row may have several; return [number of rows].

    `kind` is union, intersect, add, or minus: the rows of the first branch that are not of the second, for which no
    copies are written, since the first branch has them.
    """
    has_copies = kind == "add" or (kind != "minus" and any(branch.has_copies for branch in branches))
    total = 0
    for part in group.parts:
        weights = [read_copies(branch, part) for branch in branches] if has_copies else None
        found = _combine_part(table, kind, branches, part, weights)
        write_mask(folder, part, found > 0)
        if has_copies:
            write_copies(folder, part, found)
        total += int(np.count_nonzero(found))
    return np.array([total])


def _combine_part(
    table: ScoreTable, kind: str, branches: Sequence[Passing], part: ScorePart, weights: Sequence[np.ndarray] | None
) -> np.ndarray:
    """Return the copies of each row (rows,), 0 for one that is not kept; bool without weights."""
    found = np.zeros(part.num_rows, bool if weights is None else np.uint16)
    start = 0
    for batch, kept in read_branches(table, branches, part):
        rows = slice(start, start + batch.num_rows)
        copies = kept if weights is None else [k * weight[rows] for k, weight in zip(kept, weights, strict=True)]
        found[rows] = _combine(kind, copies)
        start = rows.stop
    return found


def _combine(kind: str, copies: Sequence[np.ndarray]) -> np.ndarray:
    """Return the copies (rows,) that branches with so many, all bool or all uint16, come to."""
    if kind == "minus":
        combined: np.ndarray = copies[0] & ~copies[1]
    else:
        combined = {"union": np.maximum, "intersect": np.minimum, "add": np.add}[kind].reduce(copies)
    return combined
