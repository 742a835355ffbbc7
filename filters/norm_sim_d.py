"""NormSim_2-D (VAS-D), looked up: the round that dropped a row, whether it stayed, and its last value.

Source: Wang et al. 2024, arXiv:2405.19547.  A fit of kind `norm_sim_d` makes the rounds over the whole pool
(pipeline/norm_sim_d.py); `where: NAME_kept` keeps precisely the rows that were left.  A row that the fit does not have
(it was not among the `rows` to start from, or has no embedding) was not kept: round 0, value null, and no failure.
"""

from collections.abc import Mapping
from functools import partial

import numpy as np
import pyarrow as pa

from pipeline.config import config
from pipeline.contract import Filter, Score, Scored
from pipeline.schemas import UID, fitted_column
from pipeline.uid import parse_uids
from pipeline.uid_table import find_rows, hash_table, open_table, to_arrow

FIELDS: Mapping[str, pa.DataType] = {"round": pa.int32(), "kept": pa.bool_(), "value": pa.float32()}
"""Columns <name>_<field>; those that stay have the last round and one more."""


@config
class Options:
    """Which fit."""

    table: str
    """table.npy of a fit of kind norm_sim_d; `fit: NAME` in a recipe names it."""


def build(name: str, options: Options) -> Filter:
    """Return the filter, with the table's hash in its identity.  Raises ConfigError when it is not there."""
    digest = hash_table(name, options.table)
    return Filter(
        name=name,
        needs=(),
        makes=tuple((fitted_column(name, field), kind) for field, kind in FIELDS.items()),
        version=1,
        settings={"table": digest},
        load=partial(load, options.table, digest),
    )


def load(url: str, digest: str) -> Score:
    """Return the scoring function.  Raises ConfigError as open_table does."""
    return partial(score, open_table(url, digest, list(FIELDS)))


def score(table: np.ndarray, batch: pa.RecordBatch) -> Scored:
    """Return int32 round, bool kept and float32 value of each row's uid."""
    there_N, records = find_rows(table, parse_uids(batch.column(UID)))
    everywhere = np.ones(batch.num_rows, bool)
    masks = {"round": everywhere, "kept": everywhere, "value": there_N}
    return Scored(tuple(to_arrow(records[name], kind, masks[name]) for name, kind in FIELDS.items()))
