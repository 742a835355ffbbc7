"""How sure a number is: bootstrap intervals of a task's metric and of an average, and paired tests of two models.

Images are drawn with replacement, as many as there are.  Images that a metric cannot tell apart (same class, right or
not) are one cell, and how often each cell is drawn is one multinomial draw, so a resample costs by cells, not images:
this is the same distribution, exactly.  Where cells hold few images each (F1: one for every pair of true and
predicted class) images are drawn one by one, which is then cheaper.  Retrieval draws images with their captions and
keeps what they are ranked among; WinoGAViL draws instances.  Tasks are drawn apart, each from a seed of its own name,
so nothing depends on which other tasks there are.

What it does not see: another training run of the same recipe (DataComp: up to 0.006 of the average).  Where all images
are right or wrong the interval has no width.  A worst group's interval is not centred: the worst of a resample lies
below the worst there is.

Shapes: N images, C cells, G classes or groups, B resamples.  Sources: Efron 1979 (bootstrap, percentile interval);
McNemar 1947, exact form; Holm 1979.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from eval38.tasks import Metric
from pipeline.errors import EvalError

Array = np.ndarray[Any, np.dtype[Any]]
Columns = Mapping[str, Array]
"""What one model made of each image, by name: int arrays of N rows (outcomes.py)."""

LABEL, TOP, BEST, GROUP = "label", "top", "best", "group"
IMAGE_RIGHT, CAPTIONS_RIGHT, CAPTIONS = "image_right", "captions_right", "captions"
CANDIDATES, SHARED, UNION = "candidates", "shared", "union"
MIN_CANDIDATES = 10
RESAMPLES, PAIRED_RESAMPLES = 1_000, 10_000
"""For an interval, and for a test, whose smallest p is 2 / (B + 1)."""
CONFIDENCE = 0.95
NUMBERS_AT_ONCE = 1 << 20
IMAGES_PER_CELL = 10
"""With fewer it is cheaper to draw images (9 ns each) than how often each cell comes (65 to 140 ns)."""


class Measure(NamedTuple):
    """A metric as a function of drawn images."""

    reduce: Callable[[Columns], Sequence[Array]]
    """Columns -> the few int columns (N,) that decide the metric."""
    value: Callable[[Sequence[Array], Array], Array]
    """Those columns by cell (C,) and how often each is drawn (B, C) -> the metric (B,)."""


def _sum_by(count_BC: Array, key_C: Array, num_keys: int) -> Array:
    """Return the sum of the cells with each key 0 <= key < num_keys: (B, G)."""
    sum_BG = np.zeros((len(count_BC), num_keys))
    if len(key_C):
        if (np.diff(key_C) < 0).any():
            order = np.argsort(key_C, kind="stable")
            count_BC, key_C = count_BC[:, order], key_C[order]
        found, starts = np.unique(key_C, return_index=True)
        sum_BG[:, found] = np.add.reduceat(count_BC, starts, axis=1)
    return sum_BG


def _divide(part: Array, whole: Array, *, otherwise: float) -> Array:
    share: Array = np.divide(part, whole, out=np.full(whole.shape, otherwise), where=whole > 0)
    return share


def _share(cells: Sequence[Array], count_BC: Array) -> Array:
    value_B: Array = count_BC @ cells[0] / count_BC.sum(axis=1)
    return value_B


def _class_recall(cells: Sequence[Array], count_BC: Array) -> Array:
    label_C, right_C = cells
    size_BG = _sum_by(count_BC, label_C, int(label_C.max()) + 1)
    right_BG = _sum_by(count_BC[:, right_C == 1], label_C[right_C == 1], int(label_C.max()) + 1)
    value_B: Array = _divide(right_BG, size_BG, otherwise=0.0).sum(axis=1) / (size_BG > 0).sum(axis=1)
    return value_B


def _class_f1(cells: Sequence[Array], count_BC: Array) -> Array:
    label_C, best_C = cells
    num_classes = int(max(label_C.max(), best_C.max())) + 1
    size_BG, predicted_BG = (_sum_by(count_BC, of_C, num_classes) for of_C in cells)
    right_BG = _sum_by(count_BC[:, label_C == best_C], label_C[label_C == best_C], num_classes)
    f1_BG = _divide(2 * right_BG, size_BG + predicted_BG, otherwise=0.0)
    value_B: Array = (f1_BG * (size_BG > 0)).sum(axis=1) / (size_BG > 0).sum(axis=1)
    return value_B


def _worst_group(cells: Sequence[Array], count_BC: Array) -> Array:
    group_C, right_C = cells
    size_BG = _sum_by(count_BC, group_C, int(group_C.max()) + 1)
    right_BG = _sum_by(count_BC[:, right_C == 1], group_C[right_C == 1], int(group_C.max()) + 1)
    value_B: Array = _divide(right_BG, size_BG, otherwise=np.inf).min(axis=1)
    return value_B


def _mean_recall(cells: Sequence[Array], count_BC: Array) -> Array:
    image_right_C, captions_right_C, captions_C = cells
    by_caption = (count_BC @ captions_right_C) / (count_BC @ captions_C)
    value_B: Array = 0.5 * (by_caption + count_BC @ image_right_C / count_BC.sum(axis=1))
    return value_B


def _jaccard(cells: Sequence[Array], count_BC: Array) -> Array:
    shared_C, union_C = cells
    jaccard_BC = count_BC * (shared_C / union_C)  # not `@`: its last bit depends on how many resamples are in a block
    value_B: Array = jaccard_BC.sum(axis=1) / count_BC.sum(axis=1)
    return value_B


def find_right(columns: Columns, *, k: int = 1) -> Array:
    """Return 1 for each image whose label is among its k best classes, else 0: int64 (N,)."""
    right_N: Array = (columns[TOP][:, :k] == columns[LABEL][:, None]).any(axis=1).astype(np.int64)
    return right_N


def _best_right(columns: Columns) -> Array:
    right_N: Array = (columns[BEST] == columns[LABEL]).astype(np.int64)
    return right_N


def _hard_games(columns: Columns) -> Sequence[Array]:
    hard_N = columns[CANDIDATES] >= MIN_CANDIDATES
    return [columns[SHARED][hard_N], columns[UNION][hard_N]]


MEASURES: dict[Metric, Measure] = {
    "acc1": Measure(lambda of: [find_right(of)], _share),
    "mean_per_class_recall": Measure(lambda of: [of[LABEL], _best_right(of)], _class_recall),
    "F1-macro_all": Measure(lambda of: [of[LABEL], of[BEST]], _class_f1),
    "acc_worst_region": Measure(lambda of: [of[GROUP], _best_right(of)], _worst_group),
    "acc_wg": Measure(lambda of: [of[GROUP], _best_right(of)], _worst_group),
    "acc_top5_wg": Measure(lambda of: [of[GROUP], find_right(of, k=5)], _worst_group),
    "mean_recall@1": Measure(lambda of: [of[IMAGE_RIGHT], of[CAPTIONS_RIGHT], of[CAPTIONS]], _mean_recall),
    "jaccard_score_10-12": Measure(_hard_games, _jaccard),
}


def _list_cells(columns: Sequence[Array]) -> tuple[list[Array], Array]:
    """Return the distinct rows of int columns (N,), as columns (C,), and how many images each has (C,)."""
    row_Nk = np.stack([column.astype(np.int64) for column in columns], axis=1)
    if not len(row_Nk):
        raise EvalError("there is no image to draw from.")
    cell_Ck, count_C = np.unique(row_Nk, axis=0, return_counts=True)
    return list(cell_Ck.T), count_C


def measure(metric: Metric, columns: Columns) -> float:
    """Return the metric over all images.  Raises EvalError when there is none."""
    cells, count_C = _list_cells(MEASURES[metric].reduce(columns))
    return float(MEASURES[metric].value(cells, count_C[None])[0])


def bootstrap(metric: Metric, columns: Columns, *, key: str, resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """Return the metric in each resample: float64 (B,).  The draws are decided by seed and key (the task's)."""
    cells, count_C = _list_cells(MEASURES[metric].reduce(columns))
    draws = _draw(count_C, resamples, _seed_draws(key, seed))
    return np.concatenate([MEASURES[metric].value(cells, count_BC) for count_BC in draws])


def bootstrap_pair(
    metric: Metric, first: Columns, second: Columns, *, key: str, resamples: int = PAIRED_RESAMPLES, seed: int = 0
) -> Array:
    """Return `second` minus `first` in each resample of the images they share: float64 (B,).

    Both have the same images in the same order.  Raises EvalError when their numbers of images differ.
    """
    reduced = [MEASURES[metric].reduce(columns) for columns in (first, second)]
    if len(reduced[0][0]) != len(reduced[1][0]):
        raise EvalError(f"{len(reduced[0][0])} and {len(reduced[1][0])} images are no pairs.")
    cells, count_C = _list_cells([*reduced[0], *reduced[1]])
    width, value = len(reduced[0]), MEASURES[metric].value
    draws = _draw(count_C, resamples, _seed_draws(key, seed))
    return np.concatenate([value(cells[width:], count_BC) - value(cells[:width], count_BC) for count_BC in draws])


def _seed_draws(key: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")])


def _draw(count_C: Array, resamples: int, generator: np.random.Generator) -> Iterator[Array]:
    """Yield how often each cell is drawn, in blocks of resamples: float64 (b, C)."""
    num_images, num_cells = int(count_C.sum()), len(count_C)
    by_image = num_images < IMAGES_PER_CELL * num_cells
    block = max(1, NUMBERS_AT_ONCE // (num_images if by_image else num_cells))
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        if by_image:
            yield _draw_images(count_C, size, generator)
        else:
            yield generator.multinomial(num_images, count_C / num_images, size=size).astype(np.float64)


def _draw_images(count_C: Array, size: int, generator: np.random.Generator) -> Array:
    """Return how often each cell comes in `size` resamples, drawn image by image: float64 (b, C)."""
    num_cells, cell_N = len(count_C), np.repeat(np.arange(len(count_C)), count_C)
    place_BN = generator.integers(len(cell_N), size=(size, len(cell_N)), dtype=np.uint32)
    drawn_BN = cell_N[place_BN] + num_cells * np.arange(size)[:, None]
    return np.bincount(drawn_BN.ravel(), minlength=size * num_cells).reshape(size, num_cells).astype(np.float64)


def find_interval(value_B: Array, *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the percentile interval of resampled values."""
    low, high = np.quantile(value_B, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def estimate_p(difference_B: Array) -> float:
    """Return the two-sided p of "no difference" from resampled differences; at least 2 / (B + 1), at most 1."""
    sides = ((difference_B <= 0).sum(), (difference_B >= 0).sum())
    return min(1.0, 2 * (1 + int(min(sides))) / (1 + len(difference_B)))


def compare_mcnemar(first_right_N: Array, second_right_N: Array) -> float:
    """Return the exact two-sided p of "both are right equally often", from the images where one alone is right.

    That many fair coins showing so few heads or tails, or fewer; 1 when there is no such image.
    """
    only_first = int(((first_right_N == 1) & (second_right_N == 0)).sum())
    only_second = int(((first_right_N == 0) & (second_right_N == 1)).sum())
    coins, fewest = only_first + only_second, min(only_first, only_second)
    log_all = math.lgamma(coins + 1) - coins * math.log(2)
    tail = math.fsum(
        math.exp(log_all - math.lgamma(heads + 1) - math.lgamma(coins - heads + 1)) for heads in range(fewest + 1)
    )
    return min(1.0, 2 * tail)


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values of several tests made together, so that any false alarm at all is as rare as one alone."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted
