import numpy as np
import pytest

from training.order import draw_uniform, replacement_row, rows_at, step_seed


@pytest.mark.parametrize(("num_rows", "samples"), [(1, 5), (7, 3), (7, 7), (10, 34), (100, 250), (333, 999)])
def test_each_row_is_drawn_floor_or_ceil_of_its_share(num_rows, samples):
    times = np.bincount(rows_at(range(samples), num_rows=num_rows, seed=3), minlength=num_rows)
    assert times.sum() == samples
    assert set(times) <= {samples // num_rows, -(-samples // num_rows)}


def test_any_cut_of_the_positions_gives_the_same_rows():
    whole = rows_at(range(100), num_rows=13, seed=5)
    for size in (1, 4, 13, 32):
        pieces = [rows_at(range(s, min(s + size, 100)), num_rows=13, seed=5) for s in range(0, 100, size)]
        assert np.array_equal(np.concatenate(pieces), whole)


def test_epochs_and_seeds_differ():
    first, second = rows_at(range(200), num_rows=100, seed=0).reshape(2, 100)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, rows_at(range(100), num_rows=100, seed=1))


def test_random_numbers_depend_on_seed_and_position_alone():
    all_at_once = draw_uniform(7, np.arange(50), 8)
    assert np.array_equal(draw_uniform(7, np.array([31]), 8)[0], all_at_once[31])
    assert np.array_equal(draw_uniform(7, np.arange(50), 3), all_at_once[:, :3])
    assert len(np.unique(np.concatenate([all_at_once, draw_uniform(8, np.arange(50), 8)]))) == 800


def test_random_numbers_are_uniform():
    numbers = draw_uniform(0, np.arange(20_000), 4)
    assert (numbers >= 0).all() and (numbers < 1).all()
    assert np.abs(numbers.mean(axis=0) - 0.5).max() < 0.01
    assert np.abs(np.corrcoef(numbers.T) - np.eye(4)).max() < 0.03


def test_the_largest_seed_works():
    seed = 2**63 - 1
    assert 0 <= replacement_row(seed, 10**12, 3, num_rows=9) < 9
    assert 0 <= step_seed(seed, 10**9) < 2**63
    assert len(rows_at(range(5), num_rows=3, seed=seed)) == 5
