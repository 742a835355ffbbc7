"""NormSim and VAS: how much an image embedding is like those of target tasks (Wang et al. 2024).

Source: arXiv:2405.19547, section 3.2, and ypwang61/negCLIPLoss_NormSim baselines/vas2.py:1932-1982,180-200; VAS is
arXiv:2402.02055.  With targets t_k, e.g. all training images of ImageNet-1k:
    inf: max_k |u.t_k|      2: sqrt(sum_k (u.t_k)^2)      vas: u' Sigma u with Sigma = 1/|T| sum_k t_k t_k'
2 is sqrt(|T| vas), which costs D^2 a row however many targets there are, and ranks as vas does.  Vectors are taken as
stored, as the authors take them.  The filter is target-aware: it reads training data of evaluation tasks.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa

from filters.vectors import explain_missing, read_vectors
from pipeline.clip_model import AUTO, pick_device
from pipeline.config import config
from pipeline.contract import Filter, Score, Scored
from pipeline.embeddings import find_whole, hash_embedding_set, read_embedding_set
from pipeline.errors import ConfigError, PoolError
from pipeline.schemas import score_column

if TYPE_CHECKING:
    import torch

    Measure = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

log = logging.getLogger("winnow")

BLOCK_TARGETS = 4096
"""Targets that are compared with a batch at a time: 64 MiB of float32 products for the engine's 4,096 rows."""


@config
class Options:
    """Which targets, and what is made of the products with them."""

    embedding: str
    """Column of image embeddings: a key of the pool's npz such as l14_img, or one that an earlier filter makes."""
    targets: str
    """Embeddings of the target tasks' training images by the same encoder: a file, folder, glob or `a::b` list of .npy,
    .npz, .pt or .parquet, or a scores folder of winnow (pipeline/embeddings.py)."""
    column: str | None = None
    """Which column or key of the targets, where their files have several."""
    norm: Literal["inf", 2, "vas"] = "inf"
    """inf: like its nearest target.  2: like all of them.  vas: the square of 2 over the number of targets."""


def build(name: str, options: Options) -> Filter:
    """Return the filter, with the hash of the targets in its identity.  Raises ConfigError when there are none."""
    try:
        targets = hash_embedding_set(options.targets, options.column)
    except PoolError as error:
        raise ConfigError(f"filter {name!r} has no targets: {error} Give embeddings as its `targets`.") from None
    return Filter(
        name=name,
        needs=(options.embedding,),
        makes=((score_column(name), pa.float32()),),
        version=1,
        settings={"embedding": options.embedding, "norm": options.norm, "targets": targets},
        load=partial(load, options, targets),
        vectors=(options.embedding,),
        runs_on_device=True,
        target_aware=True,
    )


def load(options: Options, targets: str) -> Score:
    """Return the scoring function with the targets, as stored, or their second moment on its device.

    Raises ConfigError for targets that hold no vector, or are not those of the hash.
    """
    import torch

    blocks, device = _read_targets(options), pick_device(AUTO)
    if options.norm == "inf":
        held = torch.from_numpy(np.concatenate(list(blocks)))
        measure: Measure = find_greatest
    else:
        moment_DD, num_targets = find_second_moment(blocks)
        held = torch.from_numpy(moment_DD * (num_targets if options.norm == 2 else 1)).float()
        measure = find_norm if options.norm == 2 else weigh
    if hash_embedding_set(options.targets, options.column) != targets:
        raise ConfigError(f"targets {options.targets!r} changed since this run began. Start it again.")
    return partial(score, options.embedding, measure, held.to(device))


def _read_targets(options: Options) -> Iterator[np.ndarray]:
    """Yield the usable targets in blocks.  Raises ConfigError when there is none, or they differ in length."""
    lost, dims = 0, set()
    for block_TD in read_embedding_set(options.targets, options.column):
        usable_T = find_whole(block_TD)
        lost += int((~usable_T).sum())
        if usable_T.any():
            dims.add(block_TD.shape[1])
            if len(dims) > 1:
                break
            yield block_TD[usable_T]
    if len(dims) != 1:
        what = f"embeddings of {' and '.join(map(str, sorted(dims)))} numbers" if dims else "no embedding"
        raise ConfigError(f"targets {options.targets!r} hold {what}; give what the pool's encoder makes of images.")
    if lost:
        log.warning("targets %s: %d rows are null or not finite and left out.", options.targets, lost)


def find_second_moment(blocks: Iterable[np.ndarray]) -> tuple[np.ndarray, int]:
    """Return float64 (D, D), the mean of t t' over blocks of targets (rows, D), and how many targets there are."""
    total_DD, num_targets = np.zeros(()), 0
    for block_TD in blocks:
        wide_TD = block_TD.astype(np.float64)
        total_DD = total_DD + wide_TD.T @ wide_TD
        num_targets += len(block_TD)
    return total_DD / num_targets, num_targets


def score(embedding: str, measure: "Measure", held: "torch.Tensor", batch: pa.RecordBatch) -> Scored:
    """Return float32 (rows,), 0 or more; null where there is no embedding.

    Raises ConfigError when embeddings and targets differ in length.
    """
    import torch

    matrix_ND, usable_N = read_vectors(batch, embedding)
    score_N = np.full(batch.num_rows, np.nan, np.float32)
    if usable_N.any():
        if matrix_ND.shape[1] != held.shape[1]:
            raise ConfigError(
                f"{embedding} has {matrix_ND.shape[1]} numbers and the targets have {held.shape[1]}: "
                "they are of different encoders."
            )
        image_ND = torch.from_numpy(matrix_ND[usable_N].astype(np.float32)).to(held.device)
        score_N[usable_N] = measure(image_ND, held).cpu().numpy()
    return Scored((pa.array(score_N, from_pandas=True),), explain_missing(usable_N, embedding))


def find_greatest(image_ND: "torch.Tensor", target_TD: "torch.Tensor") -> "torch.Tensor":
    """Return max_k |u.t_k| (rows,) of float32 embeddings; targets are widened to float32 a block at a time."""
    import torch

    greatest_N = torch.zeros(len(image_ND), device=image_ND.device)
    for block_KD in torch.split(target_TD, BLOCK_TARGETS):
        low_N, high_N = (image_ND @ block_KD.float().T).aminmax(dim=1)
        greatest_N = torch.maximum(greatest_N, torch.maximum(high_N, -low_N))
    return greatest_N


def weigh(image_ND: "torch.Tensor", moment_DD: "torch.Tensor") -> "torch.Tensor":
    """Return u' M u (rows,) of float32 embeddings; rounding makes none of them negative."""
    return ((image_ND @ moment_DD) * image_ND).sum(dim=1).clamp(min=0)


def find_norm(image_ND: "torch.Tensor", moment_DD: "torch.Tensor") -> "torch.Tensor":
    """Return the square root of u' M u (rows,)."""
    return weigh(image_ND, moment_DD).sqrt()
