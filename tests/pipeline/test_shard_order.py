from collections import Counter

import numpy as np
import pytest

from pipeline.shard_order import deal, find_edge, permute, spread


@pytest.mark.parametrize("num_shares", [1, 2, 3, 7, 10])
def test_shares_are_equal_and_grow_to_the_end(num_shares: int) -> None:
    for total in range(40):
        edges = [find_edge(total, num_shares, number) for number in range(num_shares + 1)]
        sizes = np.diff(edges)
        assert edges[0] == 0 and edges[-1] == total
        assert max(sizes) - min(sizes) <= 1 and list(sizes) == sorted(sizes)


def test_copies_meet_only_when_there_are_more_than_shards_and_no_share_is_exceeded() -> None:
    """The whole scheme on random multisets: uids with 1 to 12 copies over 1 to 9 shards."""
    random = np.random.default_rng(0)
    for _ in range(300):
        num_shards = int(random.integers(1, 10))
        times = random.integers(1, random.integers(2, 13), random.integers(1, 30))
        uids = np.repeat(np.arange(len(times)), times)
        repeats = uids[times[uids] > 1]
        shards = deal(len(repeats), num_shards)
        for copies in (Counter(shards[repeats == uid]) for uid in np.unique(repeats)):
            assert max(copies.values()) == -(-copies.total() // num_shards)
        dealt = np.bincount(shards, minlength=num_shards)
        for edge, total in ((0, len(repeats)), (1, len(uids))):
            shares = np.diff([find_edge(total, num_shards, n) for n in range(num_shards + 1)])
            assert (dealt <= shares).all() if edge else (dealt == shares).all()


@pytest.mark.parametrize("total", [1, 2, 3, 5, 16, 17, 100, 1000, 65_537])
def test_permutation_takes_every_place_once_and_can_be_asked_in_pieces(total: int) -> None:
    places = np.arange(total)
    whole = permute(places, total, "a")
    assert np.array_equal(np.sort(whole), places)
    assert np.array_equal(permute(places[::-2], total, "a"), whole[::-2])
    assert len(permute(places[:0], total, "a")) == 0
    if total >= 100:
        assert (permute(places, total, "b") == whole).mean() < 0.1
        assert abs(np.corrcoef(places, whole)[0, 1]) < 0.3


def test_permutations_of_few_places_are_about_equally_frequent() -> None:
    seen = Counter(tuple(permute(np.arange(3), 3, str(seed)).tolist()) for seed in range(3000))
    assert len(seen) == 6 and min(seen.values()) > 350


def test_permutation_is_what_it_was() -> None:
    """A frozen value: a shuffled shard must come out the same with a later numpy."""
    assert permute(np.arange(12), 12, "0").tolist() == [4, 10, 7, 6, 5, 0, 1, 11, 8, 3, 2, 9]


def test_spread_leaves_different_uids_alone_and_parts_copies() -> None:
    assert spread(np.array([3, 1, 2])).tolist() == [0, 1, 2]
    assert len(spread(np.empty(0, np.int64))) == 0
    random = np.random.default_rng(1)
    for _ in range(100):
        copies, singles = int(random.integers(2, 6)), int(random.integers(10, 60))
        uids = random.permutation(np.concatenate([np.zeros(copies, np.int64), np.arange(1, singles + 1)]))
        order = spread(uids)
        assert np.array_equal(np.sort(order), np.arange(len(uids)))
        gaps = np.diff(np.flatnonzero(uids[order] == 0))
        assert gaps.min() >= len(uids) // copies - 1
