"""(seed, position) -> row and random numbers.  Pure functions: a run's position is all the data state it has.

Position p counts samples from the start of the run.  Epochs are permutations of all rows laid end to end, so after any
number of positions each row was drawn floor or ceil of its share.  Random numbers come from a counter-based hash
(splitmix64's finaliser, Steele et al. 2014), one stream per (seed, position), so they need no state and no order.
"""

import functools

import numpy as np

_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def rows_at(positions: range, *, num_rows: int, seed: int) -> np.ndarray:
    """Return int64 (positions,): the row at each position, epoch after epoch."""
    rows = np.empty(len(positions), np.int64)
    position = positions.start
    while position < positions.stop:
        epoch, start = divmod(position, num_rows)
        stop = min(num_rows, start + positions.stop - position)
        done = position - positions.start
        rows[done : done + stop - start] = _permute(seed, epoch, num_rows)[start:stop]
        position += stop - start
    return rows


def order_epoch(seed: int, epoch: int, sets: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Return the rows of one epoch of a union of sets, each (rows, rows per epoch), in order; not to be written to.

    It holds exactly `rows per epoch` of each set.  The rows of a set come in the order of `rows_at` over that set
    alone, so each is seen floor or ceil of its share too.  Row numbers run on from set to set.
    """
    if all(num_rows == per_epoch for num_rows, per_epoch in sets):
        return _permute(seed, epoch, sum(num_rows for num_rows, _ in sets))
    return _mix_epoch(seed, epoch, sets)


@functools.lru_cache(maxsize=2)
def _mix_epoch(seed: int, epoch: int, sets: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Return int64 (rows of one epoch,)."""
    blocks, first = [], 0
    for number, (num_rows, per_epoch) in enumerate(sets):
        own_seed = int(hash_counters(seed ^ (0x5E7 << 32), np.array([number]), 1)[0, 0] >> np.uint64(1))
        drawn = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        blocks.append(first + rows_at(drawn, num_rows=num_rows, seed=own_seed))
        first += num_rows
    set_of_row = np.repeat(np.arange(len(sets)), [per_epoch for _, per_epoch in sets])
    set_of_position = set_of_row[_permute(seed, epoch, len(set_of_row))]
    mixed = np.empty(len(set_of_row), np.int64)
    mixed[np.argsort(set_of_position, kind="stable")] = np.concatenate(blocks)
    return mixed


def heldout_rows(num_heldout: int, *, num_rows: int, seed: int) -> np.ndarray:
    """Return int64 (num_heldout,), sorted: rows kept out of training."""
    ranks = hash_counters(seed ^ (0x4E1D << 32), np.arange(num_rows), 1)[:, 0]
    return np.sort(np.argsort(ranks, kind="stable")[:num_heldout])


@functools.lru_cache(maxsize=2)
def _permute(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """Return the order of one epoch; two are kept because a batch can span two."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64)))
    return generator.permutation(num_rows).astype(np.int32 if num_rows < 2**31 else np.int64)


def shuffle_window(seed: int, window: int, num_rows: int) -> np.ndarray:
    """Return int64 (num_rows,): an order of range(num_rows)."""
    key = np.array([seed ^ (0x317D << 32), window], np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(num_rows)


def order_shards(seed: int, epoch: int, num_shards: int) -> np.ndarray:
    """Return int64 (num_shards,): the order in which an epoch comes to them."""
    key = np.array([seed ^ (0x5A4D << 32), epoch], np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(num_shards)


def hash_counters(seed: int, positions: np.ndarray, num: int) -> np.ndarray:
    """Return uint64 (positions, num): well mixed bits that depend on seed, position and column alone."""
    start = _mix(np.array([seed], np.uint64) + _STEP)
    stream = _mix(start ^ _mix(positions.astype(np.uint64) * _STEP + _STEP))
    columns = np.arange(1, num + 1, dtype=np.uint64) * _STEP
    return _mix(stream[:, None] + columns[None, :])


def draw_uniform(seed: int, positions: np.ndarray, num: int) -> np.ndarray:
    """Return float64 (positions, num) in [0, 1)."""
    return (hash_counters(seed, positions, num) >> np.uint64(11)) * 2.0**-53


def replacement_row(seed: int, position: int, attempt: int, *, num_rows: int) -> int:
    """Return the row tried instead of an unreadable one at `position`; `attempt` counts from 1."""
    bits = hash_counters(seed ^ (0x5EED << 32), np.array([position]), attempt)
    return int(bits[0, attempt - 1] % np.uint64(num_rows))


def step_seed(seed: int, step: int) -> int:
    """Return a seed below 2**63 for what is random inside the model (dropout, drop path) at one step."""
    return int(hash_counters(seed ^ (0xD40 << 32), np.array([step]), 1)[0, 0] >> np.uint64(1))


def _mix(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    mixed: np.ndarray = value ^ (value >> np.uint64(31))
    return mixed
