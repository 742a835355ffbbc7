"""SemDeDup scores, looked up: cluster, distance to its centroid, its isolation, likeness to an earlier row.

Source: Abbas et al. 2023, arXiv:2303.09540.  A fit of kind `semdedup` compares the rows of the whole pool
(pipeline/semdedup.py); `where: dedup_similarity <= 0.95` then keeps what SemDeDup keeps at eps 0.05.  A row that the
fit does not have has no scores, and is counted.
"""

from functools import partial

import pyarrow as pa

from pipeline.config import config
from pipeline.contract import Filter
from pipeline.schemas import fitted_column
from pipeline.uid_table import hash_table, load_lookup

FIELDS = {
    "cluster": pa.int32(),
    "distance": pa.float32(),
    "isolation": pa.float32(),
    "similarity": pa.float32(),
}
"""Columns <name>_<field>.  distance: 1 - cosine with the centroid.  isolation: mean 1 - cosine of the centroid with
the 20 nearest others, null for a lone one.  similarity: largest cosine with an earlier row of the cluster, -1 for the
first."""


@config
class Options:
    """Which fit."""

    table: str
    """table.npy of a fit of kind semdedup; `fit: NAME` in a recipe names it."""


def build(name: str, options: Options) -> Filter:
    """Return the filter, with the table's hash in its identity.  Raises ConfigError when it is not there."""
    digest = hash_table(name, options.table)
    return Filter(
        name=name,
        needs=(),
        makes=tuple((fitted_column(name, field), kind) for field, kind in FIELDS.items()),
        version=1,
        settings={"table": digest},
        load=partial(load_lookup, options.table, digest, FIELDS),
    )
