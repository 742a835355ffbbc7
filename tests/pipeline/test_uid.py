import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import PoolError
from pipeline.uid import (
    CHECKED_ROWS,
    UID_DTYPE,
    count_below,
    derive_uid,
    format_uids,
    is_at_most,
    is_sorted,
    parse_uids,
    read_uids,
    sort_uids,
    unique_uids,
)

EDGES = ["0" * 32, "f" * 32, "0" * 16 + "f" * 16, "f" * 16 + "0" * 16, "08c2eab084f57bb091a8f9676e0a6567"]


def test_words_are_the_digits() -> None:
    words = parse_uids(pa.array(EDGES))
    assert words.dtype == UID_DTYPE
    assert [(int(h), int(low)) for h, low in words] == [(int(u[:16], 16), int(u[16:], 16)) for u in EDGES]


@pytest.mark.parametrize("uids", [[], EDGES[:1], EDGES, EDGES * 3])
def test_round_trip(uids: list[str]) -> None:
    assert format_uids(parse_uids(pa.array(uids, pa.string()))).to_pylist() == uids


def test_slices_and_chunks_are_read_from_their_own_place() -> None:
    array = pa.array(EDGES)
    assert format_uids(parse_uids(array[2:4])).to_pylist() == EDGES[2:4]
    assert format_uids(parse_uids(pa.chunked_array([array[:2], array[3:]]))).to_pylist() == EDGES[:2] + EDGES[3:]


@pytest.mark.parametrize("bad", [None, "", "0" * 31, "0" * 33, "F" * 32, "g" * 32, "é" * 16])
def test_bad_uid_is_named_with_its_row(bad: str | None) -> None:
    with pytest.raises(PoolError, match="row 1"):
        parse_uids(pa.array([EDGES[0], bad], pa.string()))


def test_order_is_that_of_the_text() -> None:
    rng = np.random.default_rng(0)
    texts = [rng.bytes(16).hex() for _ in range(500)] + EDGES
    assert format_uids(sort_uids(parse_uids(pa.array(texts)))).to_pylist() == sorted(texts)
    assert is_sorted(parse_uids(pa.array(sorted(texts))))
    assert not is_sorted(parse_uids(pa.array(sorted(texts)[::-1])))


@pytest.mark.parametrize("place", [1, CHECKED_ROWS - 1, CHECKED_ROWS, CHECKED_ROWS + 1, 2 * CHECKED_ROWS])
def test_disorder_is_seen_wherever_it_is(place: int) -> None:
    uids = np.zeros(2 * CHECKED_ROWS + 1, UID_DTYPE)
    uids["f0"] = np.arange(len(uids)) // 3
    uids["f1"] = np.arange(len(uids)) % 3
    assert is_sorted(uids)
    uids[[place - 1, place]] = uids[[place, place - 1]]
    assert not is_sorted(uids)


@pytest.mark.parametrize("high", [1, 3, 2**64])
def test_repeats_and_places_are_those_of_numbers(high: int) -> None:
    """Also where many uids share their first word, which the quick sort does not tell apart."""
    rng = np.random.default_rng(0)
    uids = np.zeros(300, UID_DTYPE)
    uids["f0"], uids["f1"] = rng.integers(0, high, 300, dtype=np.uint64), rng.integers(0, 40, 300)
    numbers = [(int(h) << 64) | int(low) for h, low in uids]
    distinct = [(int(h) << 64) | int(low) for h, low in unique_uids(uids)]
    assert distinct == sorted(set(numbers))
    for asked in [*numbers[:20], 0, 2**64 + 1, 2**128 - 1, 2**128]:
        assert count_below(sort_uids(uids), asked) == sum(n < asked for n in numbers)
        if asked < 2**128:
            assert is_at_most(uids, asked).tolist() == [n <= asked for n in numbers]


def test_uids_of_foreign_tables() -> None:
    octets = pa.array([bytes.fromhex(u) for u in EDGES], pa.binary(16))
    for column in (pa.array(EDGES), pa.array(EDGES, pa.large_string()), octets):
        assert format_uids(read_uids(column)).to_pylist() == EDGES
        assert format_uids(read_uids(column[1:3])).to_pylist() == EDGES[1:3]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([1, 2]), "type int64"),
        (pa.array([b"x"]), "type binary"),
        (pa.array([b"x" * 15], pa.binary(15)), "fixed_size_binary"),
        (pa.array([None, b"x" * 16], pa.binary(16)), "1 nulls"),
        (pa.array(["x"]), "uid 'x' in row 0"),
    ],
)
def test_foreign_columns_that_hold_no_uids(column: pa.Array, message: str) -> None:
    with pytest.raises(PoolError, match=message):
        read_uids(column)


def test_derived_uid_tells_absent_from_empty_and_pieces_apart() -> None:
    uids = {derive_uid(None, "a"), derive_uid("", "a"), derive_uid("a", ""), derive_uid("a"), derive_uid(b"ab", "c")}
    assert len(uids | {derive_uid(b"a", "bc")}) == 6
    assert derive_uid("x", None) == derive_uid("x", None)
