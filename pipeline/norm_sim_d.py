"""NormSim_2-D, first called VAS-D: the rows that are left when the least typical are dropped again and again.

Wang et al. 2024, arXiv:2405.19547, and 2402.02055, written from their formulas (their repositories have no licence).  A
row's value is u' S u with S the second moment of the rows that are left; each round drops the lowest and takes S anew.
No target data is read.
"""

import math
from collections.abc import Iterable
from dataclasses import field
from typing import Literal

import numpy as np

from pipeline.clip_model import AUTO, pick_device
from pipeline.config import config
from pipeline.errors import ConfigError
from pipeline.gather import Gathered, check_kind, find_directed, split_blocks, to_units
from pipeline.select import Step, Top
from pipeline.uid_table import make_table

FRACTION = 0.2
"""The authors' share of the pool, where neither fraction nor count is given."""


@config
class NormSimDConfig:
    """Which rows are looked at, and how many stay; rounds and fraction are those of DataComp's medium pool."""

    kind: Literal["norm_sim_d"] = "norm_sim_d"
    embedding: str
    """Column of image embeddings: a key of the pool's npz such as l14_img, or a score such as clip_img."""
    rows: list[Step] = field(default_factory=list)
    """Rules over scores that give the rows to start from; none: all rows."""
    fraction: float | None = None
    """Share of the pool that stays in the end, not of `rows`; 0.2 where no count is given."""
    count: int | None = None
    """Number of rows that stays in the end."""
    rounds: int = 500
    """At most; the authors take 168 for DataComp's small pool."""
    first: Literal["pool", "rows"] = "pool"
    """The second moment of the first round: of the whole pool as in the authors' code, or of `rows`."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ConfigError(f"fit: rounds {self.rounds} is below 1.")
        self.count_wanted(0)

    def count_wanted(self, num_pool: int) -> int:
        """Return how many rows stay.  Raises ConfigError unless there is one of fraction and count, or none."""
        share = FRACTION if self.fraction is None and self.count is None else self.fraction
        top = Top(by=self.embedding, fraction=share, count=self.count)
        return top.count_wanted(num_pool=num_pool, num_input=num_pool)


def sum_moment(blocks: Iterable[np.ndarray]) -> tuple[np.ndarray, int]:
    """Return the sum of u u' over unit rows, float64 (D, D), and their number; rows without a direction are left out.

    (0, 0) when there is no row at all.  Raises PoolError when rows differ in D or type.
    """
    total_DD, number, kind = np.zeros((0, 0)), 0, None
    for block_ND in blocks:
        unit_ND = to_units(block_ND[find_directed(block_ND)], np.float64)
        if len(unit_ND):
            kind = check_kind(kind, block_ND)
            total_DD = unit_ND.T @ unit_ND + (total_DD if number else 0)
            number += len(unit_ND)
    return total_DD, number


def fit_survivors(rows: Gathered, num_kept: int, rounds: int, first_DD: np.ndarray | None = None) -> np.ndarray:
    """Return a table by uid of round (int32), kept (bool) and value (float32).

    round counts from 1 and is the one that dropped the row; those that stay have one more than the last.  value is u'Su
    in that round, and at the end for those that stay.  Every round drops ceil((N - num_kept) / rounds) rows, the last
    one what is left to drop.  Values are computed in float64 and compared as float32; equal ones go by ascending uid.
    first_DD is S of the first round (any multiple of it); None: that of the rows.
    """
    device = pick_device(AUTO)
    round_N, value_N = np.zeros(len(rows.uids), np.int32), np.zeros(len(rows.uids), np.float32)
    total_DD, _ = sum_moment(split_blocks(rows.matrix_ND))
    left, number, moment_DD = np.arange(len(rows.uids)), 0, first_DD
    step = math.ceil(max(len(left) - num_kept, 0) / rounds)
    while len(left) > num_kept:
        number += 1
        value = _measure(rows.matrix_ND, left, total_DD / len(left) if moment_DD is None else moment_DD, device)
        is_low = find_lowest(value, min(step, len(left) - num_kept))
        dropped = left[is_low]
        round_N[dropped], value_N[dropped] = number, value[is_low]
        total_DD -= sum_moment(rows.matrix_ND[some] for some in split_blocks(dropped))[0]
        left, moment_DD = left[~is_low], None
    round_N[left] = number + 1
    if len(left):
        value_N[left] = _measure(rows.matrix_ND, left, total_DD / len(left), device)
    return make_table(rows.uids, {"round": round_N, "kept": round_N > number, "value": value_N})


def find_lowest(value_N: np.ndarray, number: int) -> np.ndarray:
    """Return bool (N,): which rows have the `number` (at least 1) lowest values; of equal ones the first."""
    edge = np.partition(value_N, number - 1)[number - 1]
    is_low: np.ndarray = value_N < edge
    is_low[np.flatnonzero(value_N == edge)[: number - int(is_low.sum())]] = True
    return is_low


def _measure(matrix_ND: np.ndarray, places: np.ndarray, moment_DD: np.ndarray, device: str) -> np.ndarray:
    """Return u'Su as float32 of the rows at some places."""
    import torch

    s_DD = torch.from_numpy(moment_DD).to(device)
    found = []
    for some in split_blocks(places):
        unit_nD = torch.from_numpy(to_units(matrix_ND[some], np.float64)).to(device)
        found.append(((unit_nD @ s_DD) * unit_nD).sum(dim=1).float().cpu().numpy())
    return np.concatenate(found)
