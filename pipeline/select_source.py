"""Stored scores and the passes over them: what each group of parts counts, added up or side by side."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from pipeline.select_radix import RADIX_BITS
from pipeline.select_table import PartGroup, Pass, Passing, ScorePart, ScoreTable, Spread, group_parts, sum_in_threads

NUM_BUCKETS = 1 << RADIX_BITS


@dataclass(frozen=True, slots=True)
class Source:
    """Stored scores, measured."""

    table: ScoreTable
    parts: Sequence[ScorePart]
    types: Mapping[str, str]
    """Column -> name of its Arrow type."""
    num_pool: int
    """Rows that `of: pool` is a share of."""
    start: Callable[[], Any]
    """Returns the Spark session."""
    spread: Spread = sum_in_threads

    @property
    def num_rows(self) -> int:
        """Rows of all parts."""
        return sum(part.num_rows for part in self.parts)

    def sum_groups(self, work: Pass, size: int = NUM_BUCKETS) -> np.ndarray:
        """Return the sum of work(group), int64 (size,), over all parts."""
        return self.spread(work, group_parts(self.parts), size)

    def list_groups(self, work: Pass, size: int) -> np.ndarray:
        """Return what work(group), int64 (size,), gives for each group, (groups, size): where a sum would not do."""
        groups = group_parts(self.parts)
        return self.spread(partial(_place, work, len(groups)), groups, len(groups) * size).reshape(-1, size)


def _place(work: Pass, num_groups: int, group: PartGroup) -> np.ndarray:
    found = work(group)
    places = np.zeros((num_groups, len(found)), np.int64)
    places[group.number] = found
    return places.reshape(-1)


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows that reached a step."""

    passing: Passing
    num: int
