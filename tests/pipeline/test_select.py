import math
from functools import partial
from typing import Any

import numpy as np
import pytest

from pipeline.config import read_config
from pipeline.errors import ConfigError
from pipeline.select import (
    MAX_COPIES,
    AtLeast,
    Sample,
    Step,
    Top,
    as_config,
    check_steps,
    describe_steps,
    expand_uses,
    find_columns,
    walk,
)
from pipeline.select_radix import Threshold, count_radix, count_uid_radix, find_last_uid, find_threshold, order_keys
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


DBP = {"cluster": "c", "distance": "d", "isolation": "i"}
ANY = {"name": "b", "where": "x > 1"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give one of where, top, at_least.*; it has none"),
        ({"where": "x > 1", "top": {"by": "x", "count": 1}}, "give one of.*; not where and top"),
        ({"union": []}, "union needs a list of branches"),
        ({"union": [ANY]}, "union.0: Input should be a valid list"),
        ({"minus": [[ANY]]}, "minus.0"),
        ({"repeat": 0}, "repeat 0 is less than 1"),
        ({"unoin": [[ANY]]}, "unknown field of step 'unoin': did you mean 'union'"),
        ({"intersect": [[{"name": "b", "wher": "x > 1"}]]}, "field of step.intersect.0.0 'wher': did you mean 'where'"),
        ({"sample": {"fraction": 0.1, "sed": 3}}, "field of step.sample 'sed': did you mean 'seed'"),
        ({"sample": {"fraction": 1.5}}, r"sample: fraction 1.5 is not in \[0, 1\]"),
        ({"at_least": {"by": "x", "value": math.nan}}, "NaN lets no row pass"),
        ({"top": {"count": 1}}, "top: give `by` with one score column, or `mix`"),
        ({"top": {"by": "x", "mix": {"x": 1}, "norm": "z", "count": 1}}, "top: give `by` with one"),
        ({"top": {"mix": {}, "norm": "z", "count": 1}}, "top: give `by` with one"),
        ({"top": {"mix": {"x": 1}, "count": 1}}, "top: `norm` is minmax, z or none"),
        ({"top": {"by": "x", "norm": "z", "count": 1}}, "`norm` is minmax, z or none where there is a `mix`"),
        ({"at_least": {"mix": {"x": 0}, "norm": "z", "value": 1}}, "weight 0.0 of 'x' should be a number other than 0"),
        ({"soft_cap": {"by": "x"}}, "soft_cap by 'x': give either fraction or count"),
        ({"soft_cap": {"by": "x", "count": 1, "alpha": -1}}, "alpha -1.0 should be 0 or more"),
        ({"soft_cap": {"by": "x", "count": 1, "batch": 0}}, "batch 0 1 or more"),
        ({"soft_cap": {"by": "x", "count": 1, "temperature": 0}}, "temperature 0.0 should be more than 0"),
        ({"hard_cap": {"by": "x", "count": 1, "cap": 0}}, "cap 0 is less than 1"),
        ({"hard_cap": {"by": "x", "count": 1, "cop": 2}}, "field of step.hard_cap 'cop': did you mean 'cap'"),
        ({"quota": DBP | {"fraction": 2}}, r"quota over 'c': fraction 2.0 is not in \[0, 1\]"),
        ({"quota": DBP | {"count": 1, "min_share": 1.5}}, r"min_share 1.5 is not in \[0, 1\]"),
        ({"balance": {"entries": "e", "t": 0}}, "t 0 is less than 1"),
    ],
)
def test_step_has_one_rule(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(Step, {"name": "a"} | settings, where="step")


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


def test_columns_of_nested_steps_are_found() -> None:
    words, clip = Step(name="w", where="words > 2"), Step(name="c", at_least=AtLeast(by="clip", value=0.3))
    steps = [Step(name="u", union=[[words], [Step(name="not", minus=[clip])]])]
    assert find_columns(steps, ["words", "clip", "dfn"]) == ["clip", "words"]
    with pytest.raises(ConfigError, match=r"step 'u/2/not/c' 'clip': did you mean 'clip_l14'"):
        find_columns(steps, ["words", "clip_l14"])


@pytest.mark.parametrize("kind", ["string", "large_string"])
@pytest.mark.parametrize("rule", [{"top": Top(by="x", count=1)}, {"at_least": AtLeast(by="x", value=0)}])
def test_text_is_not_ordered(kind: str, rule: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="'all/a': 'x' holds text"):
        check_steps([Step(name="all", cascade=[Step(name="a", **rule)])], {"x": kind})


def test_paths_are_unique_and_names_need_not_be() -> None:
    half = Step(name="half", sample=Sample(fraction=0.5))
    fine = [half, Step(name="u", union=[[half], [Step(name="v", minus=[half])]])]
    assert [path for path, _ in walk(fine)] == ["half", "u", "u/1/half", "u/2/v", "u/2/v/half"]
    check_steps(fine, {})
    for twice in ([half, half], [Step(name="u", union=[[], [half, half]])], [Step(name="no_score", repeat=2)]):
        with pytest.raises(ConfigError, match="needs a name of its own"):
            check_steps(twice, {})


@pytest.mark.parametrize(("times", "refused"), [(21_845, False), (21_846, True)])
def test_copies_are_bounded(times: int, refused: bool) -> None:
    """add gives 1 + 2, the union the larger of 3 and 1, then they are multiplied."""
    twice, many = Step(name="twice", repeat=2), Step(name="many", repeat=times)
    more = [Step(name="add", add=[[], [twice]])]
    steps = [Step(name="u", union=[more, []]), Step(name="not", minus=[many]), many]
    if refused:
        with pytest.raises(ConfigError, match="could get 65,538 copies; at most 65,535"):
            check_steps(steps, {})
    else:
        check_steps(steps, {})


def test_use_puts_in_the_steps_of_another_subset() -> None:
    half, few = Step(name="half", sample=Sample(fraction=0.5)), Step(name="few", use="base")
    subsets = {"base": [half], "not": [Step(name="rest", minus=[few])], "again": [Step(name="n", use="not")]}
    found = expand_uses(subsets)
    assert found["base"] == [half]
    assert [path for path, _ in walk(found["again"])] == ["n", "n/rest", "n/rest/few", "n/rest/few/half"]
    with pytest.raises(ConfigError, match="'rest/few' uses subset 'base': put its steps in"):
        check_steps(subsets["not"], {})
    with pytest.raises(ConfigError, match="subset in step 'few' 'base': did you mean 'bases'"):
        expand_uses({"bases": [half], "not": [few]})
    with pytest.raises(ConfigError, match="in a circle: a -> b -> a"):
        expand_uses({"a": [Step(name="x", use="b")], "b": [Step(name="y", union=[[Step(name="z", use="a")]])]})


def test_a_recipe_of_the_first_steps_keeps_its_identity() -> None:
    """The words that manifests of version 0.1.0 have; later fields stand there only where they are set."""
    top = {"by": "dfn", "fraction": 0.4, "count": None, "of": "pool", "ties": "exact"}
    old = [{"name": "words", "where": "words > 2", "top": None}, {"name": "top", "where": None, "top": top}]
    steps = [read_config(Step, step, where="step") for step in old]
    assert as_config(steps) == old
    new = [Step(name="u", union=[steps, [Step(name="s", sample=Sample(count=3))]])]
    assert [read_config(Step, step, where="step") for step in as_config(new)] == new
    assert set(as_config(new)[0]) == {"name", "where", "top", "union"}


@pytest.mark.parametrize(("fraction", "rows"), [(0.29, 29), (0.3, 30), (0.0, 0), (1.0, 100), (0.999, 99)])
def test_share_is_that_of_decimal_numbers(fraction: float, rows: int) -> None:
    assert Top(by="x", fraction=fraction).count_wanted(num_pool=100, num_input=7) == rows


def test_columns_of_the_later_rules_are_found() -> None:
    mixed = {"mix": {"a": 1.0, "b": 2.0}, "norm": "z"}
    steps = [{"top": mixed | {"count": 1}}, {"hard_cap": mixed | {"count": 1}}, {"balance": {"entries": "e"}}]
    steps += [{"quota": DBP | {"count": 1}}, {"soft_cap": {"by": "s", "count": 1}}]
    found = [read_config(Step, {"name": f"{n}"} | step, where="step") for n, step in enumerate(steps)]
    assert find_columns(found, "abcdeisx") == [*"abcdeis"]
    for step in found:
        with pytest.raises(ConfigError, match="unknown score column in step"):
            find_columns([step], "xyz")
    assert [read_config(Step, step, where="step") for step in as_config(found)] == found
    check_steps(found, dict.fromkeys("abdis", "float") | {"c": "uint16", "e": "large_list<element: int64>"})


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


def test_copies_are_bounded_where_none_come_out_too() -> None:
    inner = [Step(name="a", add=[[Step(name="r", repeat=MAX_COPIES)], []])]
    with pytest.raises(ConfigError, match=r"'a': a row could get 65,536 copies"):
        check_steps([Step(name="m", minus=inner)], {})


@pytest.mark.parametrize(
    ("sql", "columns"),
    [
        ("""lang = "it's" AND words > 2 AND other = 'en'""", ["lang", "other", "words"]),
        (r"lang = 'it\'s words' AND other > 1", ["lang", "other"]),
        ("`clip-score` > 0.3", ["clip-score"]),
        ("`größe` > 1 OR words > 1", ["größe", "words"]),
        ("lang = 'words'", ["lang"]),
    ],
)
def test_columns_of_a_rule_are_found_as_spark_reads_it(sql: str, columns: list[str]) -> None:
    known = ["lang", "words", "other", "clip-score", "größe"]
    assert find_columns([Step(name="s", where=sql)], known) == columns


def test_datacomps_ties_say_what_they_do_with_nulls() -> None:
    """They kept something where a null stood at the threshold's index; subsets of then are not those of now."""
    tops: list[Any] = [Top(by="x", count=1, ties=ties) for ties in ("exact", "datacomp")]
    exact, datacomp = (describe_steps([Step(name="u", union=[[Step(name="s", top=top)]])]) for top in tops)
    assert "nulls" not in exact and datacomp["nulls"] == "last"
