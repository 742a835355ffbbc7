"""The logit of a linear probe on stored embeddings: how like the probe's positives a row is, against the pool.

Source: the binary filters of Fang et al. 2023, arXiv:2309.17425, Table 1.  A fit of kind `probe` trains it
(pipeline/probe.py).  Say `target_aware: true` in the entry when its positives are train data of evaluation tasks.
"""

import io
from functools import partial

import numpy as np
import pyarrow as pa

from pipeline.config import config
from pipeline.contract import Failure, Filter, Score, Scored
from pipeline.embeddings import find_whole
from pipeline.errors import ConfigError
from pipeline.gather import join_columns
from pipeline.probe import Probe
from pipeline.schemas import REASON_MISSING_EMBEDDING, score_column
from pipeline.storage import exists, read_bytes, sha256_of_file


@config
class Options:
    """Which probe, on which embeddings."""

    embedding: str | list[str]
    """Column, or several that are put side by side, as the probe was trained."""
    weights: str
    """probe.npz of a fit of kind probe; `fit: NAME` in a recipe names it, and gives the embedding."""


def build(name: str, options: Options) -> Filter:
    """Return the filter, with the hash of the weights in its identity.  Raises ConfigError when they are not there."""
    if not exists(options.weights):
        raise ConfigError(f"filter {name!r}: there is no probe at {options.weights!r}. `winnow fit` makes it.")
    columns = (options.embedding,) if isinstance(options.embedding, str) else tuple(options.embedding)
    digest = sha256_of_file(options.weights)
    return Filter(
        name=name,
        needs=columns,
        makes=((score_column(name), pa.float32()),),
        version=1,
        settings={"embedding": list(columns), "weights": digest},
        load=partial(load, options.weights, digest, columns),
        vectors=columns,
    )


def load(url: str, digest: str, columns: tuple[str, ...]) -> Score:
    """Return the scoring function.  Raises ConfigError when the file is no probe, or not the one of the hash."""
    if sha256_of_file(url) != digest:
        raise ConfigError(f"probe {url!r} changed since this run began. Start it again.")
    try:
        with np.load(io.BytesIO(read_bytes(url)), allow_pickle=False) as arrays:
            probe = Probe(**arrays)
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"{url!r} holds no probe: {error}") from None
    return partial(score, probe, columns)


def score(probe: Probe, columns: tuple[str, ...], batch: pa.RecordBatch) -> Scored:
    """Return float32 (rows,) logits; null where an embedding is null or not finite.

    Raises ConfigError when embeddings and probe differ in length.
    """
    matrix_ND = join_columns([batch.column(column) for column in columns])
    whole_N = find_whole(matrix_ND)
    if whole_N.any() and matrix_ND.shape[1] != len(probe.weights):
        raise ConfigError(f"a probe of {len(probe.weights)} numbers cannot read embeddings of {matrix_ND.shape[1]}.")
    logit_N = np.zeros(batch.num_rows, np.float32)
    if whole_N.any():
        logit_N[whole_N] = probe.score(matrix_ND[whole_N])
    message = f"{', '.join(columns)}: null, or not finite"
    missing = tuple(Failure(row, REASON_MISSING_EMBEDDING, message) for row in np.flatnonzero(~whole_N).tolist())
    return Scored((pa.array(logit_N, mask=~whole_N),), missing)
