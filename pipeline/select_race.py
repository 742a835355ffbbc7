"""Weighted draws as races: who is drawn is decided by a seeded hash of the row, so nothing depends on an order.

Each row runs for a time E / weight with E exponential.  The first k to arrive are k draws without replacement from the
weights, in order (Plackett-Luce; as Gumbel top-k: Vieira 2014, Kool et al. 2019, arXiv:1903.06059); where a row starts
anew when it has arrived, and stops at the cap, the arrivals are draws with replacement of which those of full rows are
masked.  Logarithms are made of +, *, / alone, so all machines have the same bits.

Shapes: N rows; keys_N uint64 are hashes of the rows, z_N float64 the logarithms of their weights.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pipeline.select_draw import STEP, WORD, mix_words

SPAN_ROWS = 1 << 16
TERMS = 18
"""Of the series of a logarithm, whose ratio is 1/9 at most."""
LOG_2, SQRT_HALF = 0.6931471805599453, 0.7071067811865476
SLACK = 1e-9
"""More than rounding makes of a logarithm."""
FARTHEST = 1e300
"""A time beyond which every row is looked at."""
Arrivals = tuple[np.ndarray, np.ndarray]
"""Rows int64 and the logarithms of their times float64, (arrivals,)."""


def draw_soft(keys_N: np.ndarray, z_N: np.ndarray, *, alpha: float, batch: int, total: int) -> np.ndarray:
    """Return uint32 (N,): how often each row is drawn in `total` draws.

    A batch is drawn without replacement with probabilities softmax(z), then z of its rows falls by alpha, and so on.
    """
    z_N, counts = z_N.copy(), np.zeros(len(z_N), np.uint32)
    highest = float(z_N.max(initial=-math.inf))
    weight_N = np.exp(z_N - highest)
    turn, reach = 0, min(batch, total) / max(float(weight_N.sum()), 1.0)
    while total and len(z_N):
        size = min(batch, total, len(z_N))
        rows, times = _race_within(keys_N, z_N, weight_N, highest, turn, size, reach)
        first = _find_first(times, size)
        counts[rows[first]] += 1
        z_N[rows[first]] -= alpha
        weight_N[rows[first]] *= math.exp(-alpha)
        reach = 1.1 * math.exp(
            min(max(times[first].max() + highest, -600), 600)
        )  # the next batch takes a little longer
        turn, total = turn + 1, total - size
    return counts


def _race_within(
    keys_N: np.ndarray, z_N: np.ndarray, weight_N: np.ndarray, highest: float, turn: int, size: int, reach: float
) -> Arrivals:
    """Return arrivals of one race that have the first `size` among them; weight_N is exp(z_N - highest).

    A row whose E cannot be within reach x weight, for E is more than the uniform number it is made of, needs no
    logarithm.  The reach grows until there are enough.
    """
    growth = 2.0

    def find_near(start: int, stop: int) -> Arrivals:
        uniforms = hash_uniforms(keys_N[start:stop], turn)
        if reach < FARTHEST:
            near = np.flatnonzero(uniforms <= reach * weight_N[start:stop])
        else:
            near = np.arange(len(uniforms))
        rows = near + start
        return rows, log(exponential(uniforms[near])) - z_N[rows]

    while True:
        rows, times = _join(_map_spans(find_near, len(z_N)))
        sure = reach >= FARTHEST or (times <= math.log(reach) - highest - SLACK).sum() >= size
        if sure:
            return rows, times
        reach, growth = reach * growth, growth * growth


def draw_hard(keys_N: np.ndarray, z_N: np.ndarray, *, cap: int, total: int) -> np.ndarray:
    """Return uint32 (N,): how often each row is drawn in `total` draws, or in cap x N where these are fewer.

    Draws are with replacement with probabilities softmax(z) over the rows that were drawn less than `cap` times.
    """
    if total >= cap * len(z_N):
        return np.full(len(z_N), cap, np.uint32)
    if not total:
        return np.zeros(len(z_N), np.uint32)

    def arrive_by(bound: float) -> list[Arrivals]:
        return _map_spans(lambda start, stop: _run_on(keys_N, z_N, cap, bound, start, stop), len(z_N))

    def count(bound: float) -> int:
        return sum(len(rows) for rows, _ in arrive_by(bound))

    rows, times = _join(arrive_by(_find_bound(count, z_N, total)))
    return np.bincount(rows[_find_first(times, total)], minlength=len(z_N)).astype(np.uint32)


def _find_bound(count: Callable[[float], int], z_N: np.ndarray, total: int) -> float:
    """Return the logarithm of a time by which `total` draws have arrived, and not many more."""
    highest = float(z_N.max())
    low, bound, step = -math.inf, math.log(total) - highest - math.log(float(np.exp(z_N - highest).sum())), 0.125
    while (found := count(bound)) < total:
        low, bound, step = bound, bound + step, 2 * step
    while found > 1.25 * total + SPAN_ROWS and low < (middle := (low + bound) / 2) < bound:
        if (fewer := count(middle)) >= total:
            bound, found = middle, fewer
        else:
            low = middle
    return bound


def _run_on(keys_N: np.ndarray, z_N: np.ndarray, cap: int, bound: float, start: int, stop: int) -> Arrivals:
    """Return the arrivals within the bound of rows that start anew until they have arrived `cap` times."""
    rows, elapsed = np.arange(start, stop), np.zeros(stop - start)
    arrivals = []
    for turn in range(cap):
        elapsed = elapsed + exponential(hash_uniforms(keys_N[rows], turn))
        times = log(elapsed) - z_N[rows]
        rows, elapsed, times = (some[times <= bound] for some in (rows, elapsed, times))
        arrivals.append((rows, times))
        if not len(rows):
            break
    return _join(arrivals)


def _map_spans(work: Callable[[int, int], Arrivals], num_rows: int) -> list[Arrivals]:
    """Return work(start, stop) of spans of the rows, in order, from threads."""
    if num_rows <= SPAN_ROWS:
        return [work(0, num_rows)]
    starts = range(0, num_rows, SPAN_ROWS)
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        return list(workers.map(lambda start: work(start, min(start + SPAN_ROWS, num_rows)), starts))


def _join(arrivals: list[Arrivals]) -> Arrivals:
    rows, times = zip(*arrivals, strict=True)
    return np.concatenate(rows), np.concatenate(times)


def _find_first(times: np.ndarray, size: int) -> np.ndarray:
    """Return the places of the `size` smallest times; of equal ones the first places."""
    last = np.partition(times, size - 1)[size - 1]
    sooner = np.flatnonzero(times < last)
    return np.concatenate([sooner, np.flatnonzero(times == last)[: size - len(sooner)]])


def hash_uniforms(keys: np.ndarray, turn: int) -> np.ndarray:
    """Return float64 (rows,) in (0, 1): splitmix64 at the keys, another one each turn, as odd multiples of 2^-53."""
    words = mix_words(keys + np.uint64((turn + 1) * STEP & WORD))
    halves: np.ndarray = ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return halves


def exponential(uniforms: np.ndarray) -> np.ndarray:
    """Return -log(1 - u) of numbers in (0, 1): exponential variates, each more than its u."""
    near_zero = _double_atanh(uniforms / (2 - uniforms))
    return np.where(uniforms < 0.5, near_zero, -log(1 - uniforms))


def log(values: np.ndarray) -> np.ndarray:
    """Return the natural logarithms of positive float64 numbers, within a few units of the last place."""
    mantissas, exponents = np.frexp(values)
    small = mantissas < SQRT_HALF
    mantissas, exponents = np.where(small, 2 * mantissas, mantissas), exponents - small
    logarithms: np.ndarray = exponents * LOG_2 + _double_atanh((mantissas - 1) / (mantissas + 1))
    return logarithms


def _double_atanh(values: np.ndarray) -> np.ndarray:
    """Return log((1 + v) / (1 - v)) by its series."""
    squares, total = values * values, np.zeros(len(values))
    for odd in range(2 * TERMS - 1, 0, -2):
        total = total * squares + 1 / odd
    return 2 * values * total
