"""The report's numbers by hand: truth, overlap, edges of histograms, formats."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline.report.distributions import NumberColumn, find_edges
from pipeline.report.formats import format_duration, format_percent, format_points, format_score
from pipeline.report.truth import build_truth, compare_subset, cut_alike, find_kinds, measure_overlap
from pipeline.uid import UID_DTYPE, format_uids, parse_uids


def uid_of(number: int) -> str:
    return f"{number:032x}"


def uids_of(*numbers: int) -> np.ndarray:
    return parse_uids(pa.array([uid_of(n) for n in numbers], pa.string()))


def test_truth_numbers() -> None:
    kinds = ["clean", "clean", "clean", "clean", "spam", "spam", "foreign"]
    truth = build_truth(uids_of(*range(7)), kinds, ["clean"])
    assert truth.kinds == ("clean", "spam", "foreign")
    found = compare_subset(truth, uids_of(0, 0, 1, 4, 9))
    assert (found.num_kept, found.precision, found.recall, found.num_unknown) == (3, 2 / 3, 0.5, 1)
    assert found.kept_fractions == {"clean": 0.5, "spam": 0.5, "foreign": 0.0}
    nothing = compare_subset(truth, uids_of())
    assert (nothing.precision, nothing.recall) == (None, 0.0)
    assert compare_subset(build_truth(uids_of(1), ["clean"]), uids_of(1)).precision is None
    assert find_kinds(truth, uids_of(4, 0, 8)) == {uid_of(0): "clean", uid_of(4): "spam"}


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [((1, 2, 3), (2, 3, 4), 0.5), ((1, 1, 2), (1, 2, 2), 1.0), ((1,), (2,), 0.0), ((), (1,), 0.0), ((), (), None)],
)
def test_overlap(first: tuple[int, ...], second: tuple[int, ...], expected: float | None) -> None:
    assert measure_overlap(uids_of(*first), uids_of(*second)) == expected


def test_large_subsets_are_cut_at_one_uid() -> None:
    rng = np.random.default_rng(0)
    pool = np.zeros(4000, UID_DTYPE)
    pool["f0"], pool["f1"] = rng.integers(0, 2**64, (2, 4000), dtype=np.uint64)
    pool.sort()
    subsets = {"all": pool, "half": pool[::2], "none": pool[:0], "twice": np.repeat(pool[1::2], 2)}
    cut = cut_alike(subsets, 1000)
    assert [len(each) for each in cut.values()] == [1000, 500, 0, 1000]
    assert measure_overlap(cut["all"], cut["half"]) == 0.5 and measure_overlap(cut["half"], cut["twice"]) == 0.0
    assert [len(each) for each in cut_alike(subsets, 4000).values()] == [4000, 2000, 0, 4000]


def test_edges_of_whole_numbers_are_between_them() -> None:
    column = NumberColumn("words", is_whole=True, minimum=1, maximum=4)
    column.radix[0x8000 + 0x3F80] = 3
    column.radix[0x8000 + 0x4080] = 2
    np.testing.assert_array_equal(find_edges(column), [0.5, 1.5, 2.5, 3.5, 4.5])


def test_formats() -> None:
    assert [format_percent(x, unit=False) for x in (0.4, 0.0001, 0.0, None)] == ["40.0", "<0.1", "0.0", "–"]
    assert (format_points(-0.012), format_points(0.5)) == ("−1.2", "+50.0")
    assert [format_score(x) for x in (31519.0, -0.254488, 1.0)] == ["31,519", "−0.2545", "1"]
    assert format_duration(61.04).endswith("s") and format_duration(3725).startswith("1")
    assert format_uids(uids_of(5)).to_pylist() == [uid_of(5)]
