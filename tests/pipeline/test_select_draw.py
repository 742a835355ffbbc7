import numpy as np
import pyarrow as pa
import pytest
from made_scores import shuffle

from pipeline.select_draw import Draw, mix_words, shuffle_uids
from pipeline.uid import UID_DTYPE, format_uids


def test_mix_is_that_of_splitmix64() -> None:
    """The first outputs of Vigna's splitmix64.c seeded with 1234567, and with 0."""
    states = np.array([(1234567 + n * 0x9E3779B97F4A7C15) % 2**64 for n in (1, 2, 3)], np.uint64)
    assert mix_words(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert mix_words(np.array([0x9E3779B97F4A7C15], np.uint64)).tolist() == [0xE220A8397B1DCDAF]


@pytest.mark.parametrize("seed", [0, 1, -5, 2**70])
def test_shuffle_is_that_of_plain_numbers_and_collides_nowhere(seed: int) -> None:
    uids = np.zeros(5000, UID_DTYPE)
    uids["f1"] = np.arange(5000)
    uids["f0"][2500:] = 2**64 - 1
    shuffled = shuffle_uids(uids, seed)
    expected = [shuffle(uid, seed) for uid in format_uids(uids).to_pylist()]
    assert [(int(high) << 64) | int(low) for high, low in shuffled] == expected
    assert len(set(expected)) == 5000


def test_neighbours_are_spread_evenly_and_seeds_have_nothing_in_common() -> None:
    """Chi-squared over 256 buckets is 255 +- 23; the share of rows in two halves at once is a quarter."""
    uids = np.zeros(200_000, UID_DTYPE)
    uids["f1"] = np.arange(200_000)
    first, second = (shuffle_uids(uids, seed)["f0"] for seed in (0, 1))
    counts = np.bincount((first >> np.uint64(56)).astype(int), minlength=256)
    assert ((counts - 200_000 / 256) ** 2 / (200_000 / 256)).sum() < 255 + 4 * 23
    half = np.uint64(2**63)
    assert abs(((first < half) & (second < half)).mean() - 0.25) < 0.004


def test_draw_of_nothing_and_of_all() -> None:
    batch = pa.RecordBatch.from_pydict({"uid": [f"{n:032x}" for n in range(4)]})
    assert not Draw(0, None).passes(batch).any() and not Draw(0, None).needs_uids
    assert Draw(0, 2**128 - 1).passes(batch).all()
