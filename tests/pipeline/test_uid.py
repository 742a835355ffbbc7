import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import PoolError
from pipeline.uid import UID_DTYPE, derive_uid, format_uids, is_sorted, parse_uids, sort_uids

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


def test_derived_uid_tells_absent_from_empty_and_pieces_apart() -> None:
    uids = {derive_uid(None, "a"), derive_uid("", "a"), derive_uid("a", ""), derive_uid("a"), derive_uid(b"ab", "c")}
    assert len(uids | {derive_uid(b"a", "bc")}) == 6
    assert derive_uid("x", None) == derive_uid("x", None)
