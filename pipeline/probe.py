"""A linear probe: logistic regression on stored embeddings, positives against the pool (DFN's binary filter, Table 1).

Fang et al. 2023, arXiv:2309.17425, train such a classifier on frozen CLIP embeddings with ImageNet or CC12M as
positives and Common Crawl as negatives; they publish none of the constants below.  All is float64 on the CPU.
"""

from collections.abc import Iterator, Sequence
from dataclasses import field
from typing import Literal, NamedTuple

import numpy as np

from pipeline.config import config
from pipeline.embeddings import find_whole, read_embedding_set
from pipeline.errors import ConfigError, PoolError
from pipeline.gather import Batches, Kind, check_kind, split_blocks, spool
from pipeline.kmeans import NOT_SAMPLED
from pipeline.manifest import Counts
from pipeline.schemas import REASON_MISSING_EMBEDDING
from pipeline.select import Step
from pipeline.select_draw import shuffle_uids

HISTORY, GRADIENT_TOLERANCE, CHANGE_TOLERANCE = 10, 1e-9, 1e-15
"""Of L-BFGS: pairs it remembers, and when it stops."""


@config
class ProbeConfig:
    """What the classifier reads, and how it is trained."""

    kind: Literal["probe"] = "probe"
    embedding: str | list[str]
    """Column, or several put side by side: keys of the pool's npz such as l14_img, or scores such as clip_img."""
    positives: str
    """Embeddings of clean rows (embeddings.py says what can be read).  All are held in memory."""
    positive_columns: list[str] = field(default_factory=list)
    """Columns or keys of the positives, one for each of `embedding`; none: they are called the same."""
    rows: list[Step] = field(default_factory=list)
    """Rules over scores that say which rows of the pool may be negatives; none: all."""
    negatives: int = 100_000
    """Rows of the pool that are drawn as negatives, and held in memory; all where there are fewer."""
    held_out: float = 0.1
    """Share of both classes that is kept from training, in [0, 1), to measure the probe on."""
    l2: float = 1e-3
    """Weight of half the squared weights beside the mean loss."""
    iterations: int = 200
    """Of L-BFGS, at most."""
    seed: int = 0
    """Of the negatives and of what is held out."""

    def __post_init__(self) -> None:
        if not self.list_columns() or len(self.list_positive_columns()) != len(self.list_columns()):
            raise ConfigError(f"fit: positive_columns {self.positive_columns} are not one for each of `embedding`.")
        if min(self.negatives, self.iterations) < 1 or not 0 <= self.held_out < 1:
            raise ConfigError(
                f"fit: negatives {self.negatives}, iterations {self.iterations} and held_out {self.held_out} should be "
                "at least 1, at least 1 and in [0, 1)."
            )
        if not 0 <= self.l2 < float("inf") or self.seed < 0:
            raise ConfigError(f"fit: l2 {self.l2} and seed {self.seed} should be finite and not below 0.")

    def list_columns(self) -> list[str]:
        """Return the columns of the pool."""
        return [self.embedding] if isinstance(self.embedding, str) else self.embedding

    def list_positive_columns(self) -> list[str]:
        """Return the columns of the positives, in the same order."""
        return self.positive_columns or self.list_columns()


class Probe(NamedTuple):
    """A fitted classifier: logit = weights . (x - mean) / scale + bias, positive for rows like the positives."""

    weights: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    """float64 (D,), (), (D,), (D,)."""

    def score(self, block_ND: np.ndarray) -> np.ndarray:
        """Return float32 (rows,) logits."""
        slope_D = self.weights / self.scale
        logit_N: np.ndarray = block_ND.astype(np.float64) @ slope_D + (self.bias - self.mean @ slope_D)
        return logit_N.astype(np.float32)


def read_positives(config: ProbeConfig) -> tuple[np.ndarray, Counts]:
    """Return the finite positives (P, D) in an order that the seed decides, and where the others went.

    Raises ConfigError or PoolError as read_embedding_set does; PoolError when the columns have different rows.
    """
    columns = [_read_all(config.positives, column) for column in config.list_positive_columns()]
    if len({len(column) for column in columns}) > 1:
        raise PoolError(f"{config.positives!r}: the columns have {[len(c) for c in columns]} rows, not the same.")
    row_ND = np.concatenate(columns, axis=1)
    whole_ND = row_ND[find_whole(row_ND)]
    order = np.random.default_rng(config.seed).permutation(len(whole_ND))
    failed = {REASON_MISSING_EMBEDDING: len(row_ND) - len(whole_ND)} if len(whole_ND) < len(row_ND) else {}
    return whole_ND[order], Counts(read=len(row_ND), kept=len(whole_ND), failed=failed)


def _read_all(url: str, column: str) -> np.ndarray:
    with spool(read_embedding_set(url, column)) as matrix_ND:
        return np.array(matrix_ND)


def draw_negatives(batches: Batches, config: ProbeConfig) -> tuple[np.ndarray, Counts]:
    """Return the finite rows (at most config.negatives, D) whose uids a seeded shuffle puts first, in that order.

    Of rows that share a uid the first is taken.  Memory holds up to five times as many, and a batch.
    """
    held: list[tuple[np.ndarray, np.ndarray]] = []
    kind: Kind | None = None
    read = whole = 0
    for uids, block_ND in batches:
        whole_N = find_whole(block_ND)
        read, whole = read + len(uids), whole + int(whole_N.sum())
        if whole_N.any():
            kind = check_kind(kind, block_ND)
            held.append((shuffle_uids(uids[whole_N], config.seed), block_ND[whole_N]))
        if sum(len(keys) for keys, _ in held) > 2 * config.negatives:
            held = [_take_first(held, config.negatives)]
    row_ND = _take_first(held, config.negatives)[1] if held else np.empty((0, 0), np.float32)
    dropped = {NOT_SAMPLED: whole - len(row_ND)} if len(row_ND) < whole else {}
    failed = {REASON_MISSING_EMBEDDING: read - whole} if whole < read else {}
    return row_ND, Counts(read=read, kept=len(row_ND), dropped=dropped, failed=failed)


def _take_first(held: Sequence[tuple[np.ndarray, np.ndarray]], number: int) -> tuple[np.ndarray, np.ndarray]:
    keys, row_ND = (np.concatenate(pieces) for pieces in zip(*held, strict=True))
    order = np.lexsort((keys["f1"], keys["f0"]))  # stable
    is_first = np.append(True, keys[order][1:] != keys[order][:-1])
    order = order[is_first][:number]
    return keys[order], row_ND[order]


def fit_probe(positive_PD: np.ndarray, negative_QD: np.ndarray, config: ProbeConfig) -> tuple[Probe, dict[str, float]]:
    """Return the probe, and how it did on the rows of both that come first and were held out.

    Each class has half the weight, whatever the numbers of rows.  Facts: loss (with the penalty), steps, and, where
    both classes have rows held out, auroc and balanced accuracy at logit 0.
    Raises ConfigError when the two differ in length, or a class has no row to train on.
    """
    if not len(positive_PD) or not len(negative_QD):
        raise ConfigError(
            f"a probe cannot be trained on {len(positive_PD)} positives and {len(negative_QD)} negatives."
        )
    if positive_PD.shape[1] != negative_QD.shape[1]:
        lengths = f"{positive_PD.shape[1]} numbers and pool rows of {negative_QD.shape[1]}"
        raise ConfigError(f"positives of {lengths} are of different models.")
    classes = (positive_PD, negative_QD)
    held = [int(config.held_out * len(rows)) for rows in classes]
    probe, facts = _train([rows[number:] for rows, number in zip(classes, held, strict=True)], config)
    if all(held):
        positive, negative = (probe.score(rows[:number]) for rows, number in zip(classes, held, strict=True))
        accuracy = ((positive > 0).mean() + (negative <= 0).mean()) / 2
        facts |= {"auroc": measure_auroc(positive, negative), "accuracy": round(float(accuracy), 6)}
    return probe, facts


def measure_auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Return the share of (positive, negative) pairs whose positive has the larger score; a tie is half a pair."""
    ranked = np.sort(negative)
    below, up_to = np.searchsorted(ranked, positive, "left"), np.searchsorted(ranked, positive, "right")
    return round(float((below + up_to).mean() / (2 * len(ranked))), 6)


def _train(classes: Sequence[np.ndarray], config: ProbeConfig) -> tuple[Probe, dict[str, float]]:
    """Return the minimum of mean log loss, each class half, + l2/2 |weights|^2, over standardised rows."""
    import torch

    number = sum(map(len, classes))
    mean_D = sum(block.sum(axis=0) for block, _ in _label(classes)) / number
    variance_D = sum(((block - mean_D) ** 2).sum(axis=0) for block, _ in _label(classes)) / number
    scale_D = np.sqrt(np.where(variance_D > 0, variance_D, 1))
    theta = torch.zeros(len(mean_D) + 1, dtype=torch.float64)  # weights, then the bias
    optimizer = torch.optim.LBFGS(
        [theta],
        max_iter=config.iterations,
        max_eval=config.iterations * 2,
        history_size=HISTORY,
        tolerance_grad=GRADIENT_TOLERANCE,
        tolerance_change=CHANGE_TOLERANCE,
        line_search_fn="strong_wolfe",
    )

    def measure() -> float:
        weights_D, bias = theta.numpy()[:-1], float(theta[-1])
        loss, gradient = config.l2 / 2 * float(weights_D @ weights_D), np.append(config.l2 * weights_D, 0.0)
        for block, sign in _label(classes):
            unit_nD = (block - mean_D) / scale_D
            margin_n = sign * (unit_nD @ weights_D + bias)
            share = 0.5 / len(classes[0] if sign > 0 else classes[1])
            loss += share * float(np.logaddexp(0, -margin_n).sum())
            pull_n = -share * sign * np.exp(-np.logaddexp(0, margin_n))
            gradient += np.append(pull_n @ unit_nD, pull_n.sum())
        theta.grad = torch.from_numpy(gradient)
        return loss

    optimizer.step(measure)  # type: ignore[no-untyped-call]
    probe = Probe(theta.numpy()[:-1], np.array(float(theta[-1])), mean_D, scale_D)
    return probe, {"loss": float(f"{measure():.5g}"), "steps": optimizer.state[theta]["n_iter"]}


def _label(classes: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, int]]:
    """Yield float64 blocks of both classes with their sign, positives first."""
    for rows, sign in zip(classes, (1, -1), strict=True):
        for block in split_blocks(rows):
            yield block.astype(np.float64), sign
