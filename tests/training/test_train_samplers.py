from collections import Counter

import numpy as np
import pytest

from pipeline.clip_model import open_model
from pipeline.manifest import Counts
from training.index import RowIndex, SetRows, list_tars, read_index
from training.order import order_epoch
from training.samplers import WINDOW_ROWS, DatacompSampler, ExactSampler, open_sampler


def make_index(twins, *, tars=None, sets=None):
    num = len(twins)
    tars = np.zeros(num, np.int32) if tars is None else np.array(tars, np.int32)
    parts = tuple(SetRows(str(n), Counts(read=r, kept=r), quota) for n, (r, quota) in enumerate(sets or [(num, num)]))
    zero_N = np.zeros(num, np.int32)
    return RowIndex((), tars, zero_N, zero_N, zero_N, zero_N + 1, np.array(twins, np.uint64), zero_N[:1, None], parts)


def count_meetings(rows, twins, batch_size):
    batches = np.asarray(twins)[rows].reshape(-1, batch_size)
    return sum(batch_size - len(set(batch)) for batch in batches.tolist())


CASES = {
    "pairs": ([n // 2 for n in range(120)], 8),
    "one row 12 times among 15 batches": ([0] * 12 + list(range(1, 109)), 8),
    "many copies, epochs that end inside a batch": ([n % 20 for n in range(101)], 4),
    "all different, epochs that end inside a batch": (list(range(101)), 16),
    "a batch is a third of an epoch": ([n // 2 for n in range(50)], 16),
}


@pytest.mark.parametrize("case", CASES)
def test_copies_never_meet_and_shares_stay_exact(case):
    twins, batch_size = CASES[case]
    num, sampler = len(twins), ExactSampler(make_index(twins), batch_size=batch_size, seed=3)
    rows = sampler.rows_at(range(num * batch_size))
    plain = np.concatenate([order_epoch(3, epoch, ((num, num),)) for epoch in range(batch_size)])
    assert count_meetings(plain, twins, batch_size) > 0
    assert count_meetings(rows, twins, batch_size) == 0
    for epoch in rows.reshape(batch_size, num):
        assert sorted(epoch) == list(range(num))
    again = ExactSampler(make_index(twins), batch_size=batch_size, seed=3)
    for step in (num // 2, num - 1, 0, num // 3, *range(num // 2, num)):  # as resumed runs and workers ask
        positions = range(step * batch_size, (step + 1) * batch_size)
        assert np.array_equal(again.rows_at(positions), rows[positions.start : positions.stop])


def test_only_rows_that_would_meet_move():
    twins = [0, 0, *range(1, 1000)]
    order = ExactSampler(make_index(twins), batch_size=500, seed=1).rows_at(range(1001))
    plain = order_epoch(1, 0, ((1001, 1001),))
    assert (order != plain).sum() in (0, 2)
    alone = ExactSampler(make_index(range(1001)), batch_size=500, seed=1).rows_at(range(1001))
    assert np.array_equal(alone, plain)


def test_more_copies_than_batches_stay_where_they_fall():
    twins = [0] * 30 + list(range(1, 71))
    rows = ExactSampler(make_index(twins), batch_size=10, seed=0).rows_at(range(100))
    zeros = (np.array(twins)[rows].reshape(10, 10) == 0).sum(1)
    assert sorted(rows) == list(range(100)) and zeros.min() >= 1
    tiny = ExactSampler(make_index([0, 1, 2]), batch_size=8, seed=0).rows_at(range(24))
    assert set(np.bincount(tiny)) == {8}


def test_no_place_is_looked_for_again_where_there_is_none():
    twins = [0] * 300 + [1] * 90 + list(range(2, 612))
    drawn = ExactSampler(make_index(twins), batch_size=10, seed=0)._part_twins(0)
    batches = np.array(twins)[drawn.order].reshape(100, 10)
    assert drawn.everywhere == {0} and (batches == 0).any(1).all()
    assert (batches == 1).sum(1).max() == 1


def test_sets_that_repeat_rows_within_an_epoch_are_kept_apart_too():
    index = make_index(range(60), sets=[(50, 90), (10, 30)])
    rows = ExactSampler(index, batch_size=8, seed=0).rows_at(range(240))
    assert count_meetings(rows, range(60), 8) == 0
    assert Counter((rows[:120] >= 50).tolist()) == {False: 90, True: 30}


@pytest.mark.parametrize("keys", ["{}", "{}-1"])
def test_the_index_knows_copies_by_caption_and_image(tmp_path, write_tar, square_rows, keys):
    (first, image), (_, other) = square_rows(2)
    rows = [(first, image), (first, other), ("another caption", image), (first, image)]
    names = ["a", "b", "c", keys.format("d")]
    members = [
        (f"{n}.{e}", c) for n, (t, i) in zip(names, rows, strict=True) for e, c in (("png", i), ("txt", t.encode()))
    ]
    write_tar(tmp_path / "0.tar", members[:4])
    write_tar(tmp_path / "1.tar", members[4:])
    twins = read_index(list_tars(str(tmp_path)), tokenize=open_model("winnow-vit-tiny").tokenize, quiet=True).twin_N
    assert twins[0] == twins[3] and len(set(twins.tolist())) == 3


SHARDS = np.repeat(np.arange(40), [1, 3, 9, 27] * 10)


def test_datacomp_reads_whole_shards_within_windows():
    sampler = DatacompSampler(make_index(range(len(SHARDS)), tars=SHARDS), seed=2)
    rows = sampler.rows_at(range(20 * WINDOW_ROWS)).reshape(20, WINDOW_ROWS)
    for window in rows:
        times = np.bincount(window, minlength=len(SHARDS))
        for shard in range(40):
            of_shard = times[shard == SHARDS]
            assert of_shard.max() - of_shard.min() <= 2  # cut by the window's two ends only


def test_datacomps_rows_are_equally_likely_whatever_their_shards_size():
    sampler = DatacompSampler(make_index(range(len(SHARDS)), tars=SHARDS), seed=5)
    sampler.rows_at(range(400 * WINDOW_ROWS, 400 * WINDOW_ROWS + 1))
    drawn = np.bincount(sampler.shard_D, minlength=40)
    expected = len(sampler.shard_D) / 40
    assert ((drawn - expected) ** 2 / expected).sum() < 80  # chi-square, 39 degrees: 1 in 10,000 is above 79
    uneven = make_index(range(40), tars=range(40), sets=[(30, 20), (10, 20)])
    rows = DatacompSampler(uneven, seed=0).rows_at(range(100_000))
    assert abs((rows >= 30).mean() - 0.5) < 0.01


@pytest.mark.parametrize(("name", "window"), [("exact", 0), ("exact", 3), ("datacomp", 0)])
def test_any_cut_of_the_positions_gives_the_same_rows(name, window):
    index = make_index([n // 2 for n in range(len(SHARDS))], tars=SHARDS)
    settings = {"index": index, "batch_size": 16, "window_shards": window}
    whole = open_sampler(name, seed=7, **settings).rows_at(range(9600))
    for start in (9584, 4992, 0, 4000):
        fresh = open_sampler(name, seed=7, **settings)
        assert np.array_equal(fresh.rows_at(range(start, start + 16)), whole[start : start + 16])
    assert not np.array_equal(whole, open_sampler(name, seed=8, **settings).rows_at(range(9600)))


@pytest.mark.parametrize("batch_size", [32, 24])
def test_windows_come_one_after_the_other_and_stay_exact(batch_size):
    """Epochs of 12 shards that end inside a batch, each row there twice or thrice within its shard."""
    tars, twins = np.repeat(np.arange(12), 85), [n // 3 if n % 5 < 3 else 10_000 + n for n in range(12 * 85)]
    index, num = make_index(twins, tars=tars), 12 * 85
    rows = ExactSampler(index, batch_size=batch_size, seed=4, window_shards=4).rows_at(range(num * 8))
    assert count_meetings(rows, twins, batch_size) == 0
    windows = [tars[window] for epoch in rows.reshape(-1, num) for window in epoch.reshape(3, -1)]
    for epoch in rows.reshape(-1, num):
        assert sorted(epoch) == list(range(num))
    stray = sum(len(shards) - np.sort(np.bincount(shards))[-4:].sum() for shards in windows)
    assert stray < 0.1 * batch_size * len(windows)  # rows of the batch that two windows share stand in shard order
    assert len({tuple(sorted(set(shards))) for shards in windows[::3]}) > 1  # other shards together in each epoch
    plain = ExactSampler(index, batch_size=batch_size, seed=4).rows_at(range(num))
    assert len(set(tars[plain[: num // 3]])) == 12


def test_a_part_of_a_batch_needs_few_shards():
    tars = np.repeat(np.arange(16), 500)
    rows = ExactSampler(make_index(range(8000), tars=tars), batch_size=400, seed=0, window_shards=8).rows_at(
        range(4000)
    )
    parts = tars[rows].reshape(10, 4, 100)  # of four processes
    held = [set(part.ravel()) for part in parts.transpose(1, 0, 2)]
    assert (
        all(len(shards) <= 4 for shards in held) and set.union(*held) == set(tars[rows]) and len(set(tars[rows])) == 8
    )
