"""The logit of a linear probe on stored embeddings: how like the probe's positives a row is, against the pool.

Source: the binary filters of Fang et al. 2023, arXiv:2309.17425, Table 1.  A fit of kind `probe` trains it
(pipeline/probe.py).  Say `target_aware: true` in the entry when its positives are train data of evaluation tasks.
"""

import io
import zipfile
from functools import partial

import numpy as np
import pyarrow as pa

from filters.vectors import explain_missing, read_vectors
from pipeline.config import config
from pipeline.contract import Filter, Score, Scored
from pipeline.errors import ConfigError
from pipeline.probe import Probe
from pipeline.schemas import score_column
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
        version=2,
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
    except (ValueError, TypeError, OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{url!r} holds no probe: {error}. `winnow fit` makes one.") from None
    return partial(score, probe, columns)


def score(probe: Probe, columns: tuple[str, ...], batch: pa.RecordBatch) -> Scored:
    """Return float32 (rows,) logits; null where there is no embedding.

    Raises ConfigError when embeddings and probe differ in length.
    """
    matrix_ND, usable_N = read_vectors(batch, *columns)
    if usable_N.any() and matrix_ND.shape[1] != len(probe.weights):
        raise ConfigError(f"a probe of {len(probe.weights)} numbers cannot read embeddings of {matrix_ND.shape[1]}.")
    logit_N = np.zeros(batch.num_rows, np.float32)
    if usable_N.any():
        logit_N[usable_N] = probe.score(matrix_ND[usable_N])
    return Scored((pa.array(logit_N, mask=~usable_N),), explain_missing(usable_N, " or ".join(columns)))
