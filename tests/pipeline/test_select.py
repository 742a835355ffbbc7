import math
from functools import partial
from typing import Any

import numpy as np
import pytest

from pipeline.errors import ConfigError
from pipeline.select import (
    Step,
    Threshold,
    Top,
    check_steps,
    count_radix,
    count_uid_radix,
    find_columns,
    find_last_uid,
    find_threshold,
    order_keys,
)
from pipeline.uid import UID_DTYPE, is_at_most

SPECIAL = [0.0, -0.0, 1.5, -1.5, 1e-45, -1e-45, 3.4e38, -3.4e38, math.inf, -math.inf, 0.28, 0.28]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nth_largest_is_that_of_a_sort(dtype: type) -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([np.array(SPECIAL, dtype), rng.normal(size=300).astype(dtype), np.full(40, 0.25, dtype)])
    keys, bits = order_keys(values), 8 * values.itemsize
    for n, expected in enumerate(np.sort(values)[::-1], start=1):
        found = find_threshold(partial(count_below, keys, bits), lambda _, n=n: n, bits=bits)
        above, tied = int((values > expected).sum()), int((values == expected).sum())
        assert found == Threshold(float(expected), above, tied, n - above), n


def count_below(keys: np.ndarray, bits: int, prefix: int, depth: int) -> np.ndarray:
    return count_radix(keys, prefix=prefix, depth=depth, bits=bits)


def test_threshold_of_nothing_and_of_more_than_there_is() -> None:
    keys = order_keys(np.array([1.0, 2.0], np.float32))
    assert find_threshold(partial(count_below, keys, 32), lambda _: 0, bits=32) is None
    assert find_threshold(partial(count_below, keys[:0], 32), lambda _: 5, bits=32) is None
    assert find_threshold(partial(count_below, keys, 32), lambda n: n + 5, bits=32) == Threshold(1.0, 1, 1, 1)


def test_order_keys_sort_as_values() -> None:
    values = np.array(SPECIAL, np.float32)
    assert (np.sort(values) == values[np.argsort(order_keys(values), kind="stable")]).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "a"}, "either where or top"),
        ({"name": "a", "where": "x > 1", "top": Top(by="x", count=1)}, "either where or top"),
    ],
)
def test_step_has_one_rule(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Step(**settings)


@pytest.mark.parametrize(
    "settings", [{}, {"fraction": 0.1, "count": 3}, {"fraction": 1.1}, {"fraction": -0.1}, {"count": -1}]
)
def test_top_is_a_fraction_or_a_count(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="top by 'x'"):
        Top(by="x", **settings)


def test_columns_are_found_and_unknown_ones_named() -> None:
    steps = [Step(name="a", where="words > 2 AND language = 'chars'"), Step(name="b", top=Top(by="dfn", count=1))]
    assert find_columns(steps, ["words", "chars", "language", "dfn"]) == ["dfn", "language", "words"]
    with pytest.raises(ConfigError, match="did you mean 'dfn_score'"):
        find_columns([Step(name="b", top=Top(by="dfn_scor", count=1))], ["dfn_score"])
    with pytest.raises(ConfigError, match="did you mean 'words'"):
        find_columns([Step(name="b", where="wordz > 1")], ["words"])


@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_text_is_not_ordered(kind: str) -> None:
    with pytest.raises(ConfigError, match="holds text"):
        check_steps([Step(name="a", top=Top(by="x", count=1))], {"x": kind})


@pytest.mark.parametrize(("fraction", "rows"), [(0.29, 29), (0.3, 30), (0.0, 0), (1.0, 100), (0.999, 99)])
def test_share_is_that_of_decimal_numbers(fraction: float, rows: int) -> None:
    assert Top(by="x", fraction=fraction).count_wanted(num_pool=100, num_input=7) == rows


def make_uids(kind: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    uids = np.zeros(400, UID_DTYPE)
    if kind == "hashes":
        uids["f0"], uids["f1"] = rng.integers(0, 2**64, (2, 400), dtype=np.uint64)
    elif kind == "one after the other":
        uids["f1"] = rng.permutation(400)
    elif kind == "few":
        uids["f0"], uids["f1"] = rng.integers(0, 3, 400) << 16, rng.integers(0, 3, 400) << 40
    elif kind == "ends":
        uids["f0"], uids["f1"] = rng.choice(np.array([0, 2**64 - 1], np.uint64), (2, 400))
    return uids


@pytest.mark.parametrize("kind", ["hashes", "one after the other", "few", "ends", "one"])
def test_last_uid_is_that_of_a_sort(kind: str) -> None:
    uids = make_uids(kind)
    numbers = sorted((int(high) << 64) | int(low) for high, low in uids)
    for wanted in (1, 2, 133, 267, 399, 400):
        passes: list[int] = []

        def count(prefix: int, depth: int, passes: list[int] = passes) -> np.ndarray:
            passes.append(depth)
            return count_uid_radix(uids, prefix=prefix, depth=depth)

        last, num = find_last_uid(count, wanted)
        bound = numbers[wanted - 1]
        assert num == sum(n <= bound for n in numbers) == sum(n <= last for n in numbers)
        assert is_at_most(uids, last).sum() == num
        assert len(passes) <= (2 if kind == "hashes" else 8)
