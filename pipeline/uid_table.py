"""What a fit found for each uid: one .npy of records, `u8,u8` uid first, ascending; filters look uids up in it.

The file is mapped, so the processes of a machine share its memory.  A uid stands in it once.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pyarrow as pa

from pipeline.contract import Failure, Score, Scored
from pipeline.errors import ConfigError
from pipeline.schemas import REASON_NOT_FITTED, UID
from pipeline.storage import exists, sha256_of_file
from pipeline.subset import map_array, search_subset
from pipeline.uid import UID_DTYPE, UID_FIELDS, parse_uids

NOT_FITTED = "the fit has no such row: its `rows` left it out, it has no embedding, or it is new to the pool"


def make_table(uids: np.ndarray, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return records (rows,) of the ascending uids and the columns."""
    table = np.empty(len(uids), [*UID_DTYPE.descr, *((name, values.dtype) for name, values in columns.items())])
    for name in UID_FIELDS:
        table[name] = uids[name]
    for name, values in columns.items():
        table[name] = values
    return table


def hash_table(name: str, url: str) -> str:
    """Return the sha256 of the table that filter `name` reads.  Raises ConfigError when it is not there."""
    if not exists(url):
        raise ConfigError(f"filter {name!r}: there is no table at {url!r}. `winnow fit` makes it.")
    return sha256_of_file(url)


def open_table(url: str, digest: str, fields: Sequence[str]) -> np.ndarray:
    """Return the mapped table.

    Raises ConfigError when it has not the sha256 `digest`, is no .npy, or has other fields: then it is another fit's.
    """
    if sha256_of_file(url) != digest:
        raise ConfigError(f"table {url!r} changed since this run began. Start it again.")
    try:
        table = map_array(url)
    except (ValueError, EOFError) as error:
        raise ConfigError(f"{url!r} holds no table: {error}. `winnow fit` makes one.") from None
    found, wanted = table.dtype.names or (), (*UID_FIELDS, *fields)
    if found != wanted:
        raise ConfigError(f"{url!r} holds {', '.join(found) or table.dtype}, not {', '.join(wanted)}: another fit's?")
    return table


def find_rows(table: np.ndarray, uids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return bool (rows,) whether each uid is in the table, and the records (rows,), zeros where it is not."""
    records = np.zeros(len(uids), table.dtype)
    if not len(table):
        return np.zeros(len(uids), bool), records
    places = np.minimum(search_subset(table, uids, or_equal=False), len(table) - 1)
    there_N = (table["f0"][places] == uids["f0"]) & (table["f1"][places] == uids["f1"])
    records[there_N] = table[places[there_N]]
    return there_N, records


def load_lookup(url: str, digest: str, fields: Mapping[str, pa.DataType]) -> Score:
    """Return a scoring function that gives the table's fields.  Raises ConfigError as open_table does."""
    return partial(look_up, open_table(url, digest, list(fields)), fields)


def look_up(table: np.ndarray, fields: Mapping[str, pa.DataType], batch: pa.RecordBatch) -> Scored:
    """Return the fields of each row's uid; null, and a failure, where the table lacks it.  NaN is null, no failure."""
    there_N, records = find_rows(table, parse_uids(batch.column(UID)))
    missing = tuple(Failure(row, REASON_NOT_FITTED, NOT_FITTED) for row in np.flatnonzero(~there_N).tolist())
    return Scored(tuple(to_arrow(records[name], kind, there_N) for name, kind in fields.items()), missing)


def to_arrow(values: np.ndarray, kind: pa.DataType, there_N: np.ndarray) -> pa.Array:
    """Return the values, null where they are NaN or not there."""
    return pa.array(values, kind, mask=~there_N | (values != values))
