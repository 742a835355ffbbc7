import json
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from filters import captions
from filters.caption_length import score
from filters.image_size import score as score_size
from pipeline.schemas import ORIGINAL_HEIGHT, ORIGINAL_WIDTH, TEXT

CASES = json.loads((Path(__file__).parent / "datacomp_captions.json").read_text())["rows"]


def texts(values: list[str | None]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({TEXT: pa.array(values, pa.string())})


def count(values: list[str | None]) -> list[list[int | None]]:
    return [column.to_pylist() for column in score(texts(values)).columns]


def test_every_white_space_of_python_is_known() -> None:
    assert [c.encode() for c in map(chr, range(sys.maxunicode + 1)) if c.isspace()] == captions.PYTHON_SPACE


def test_words_split_where_python_splits() -> None:
    """Between every two characters of the first 0x3100, and some beyond, that could be taken for white space."""
    odd = [chr(i) for i in (*range(0x3100), 0x9680, 0xE280, 0xFEFF, 0x1F642) if not 0xD800 <= i < 0xE000]
    made = [f"{c}a{c}{c}b" for c in odd] + [a + "x" + b for a in " é\u3000猫" for b in odd] + odd
    words, chars, _ = count(made)
    assert words == [len(text.split()) for text in made]
    assert chars == [len(text) for text in made]


def test_tokens_are_fasttexts() -> None:
    assert count([c["text"] for c in CASES])[2] == [c["tokens"] for c in CASES]
    assert count(["", "\n", "a\n\nb", "a\0b", "a\u00a0b", " \n a\r\n"])[2] == [0, 1, 4, 2, 1, 3]


def test_nulls_slices_and_nothing() -> None:
    values = ["one two", None, "", "three", None, " four\n"]
    assert count(values) == [[2, None, 0, 1, None, 1], [7, None, 0, 5, None, 6], [2, None, 0, 1, None, 2]]
    sliced = score(texts(values).slice(3, 3))
    assert [c.to_pylist() for c in sliced.columns] == [[1, None, 1], [5, None, 6], [1, None, 2]]
    assert [f.position for f in sliced.failures] == [1]
    assert count([]) == [[], [], []]
    assert count([None, None]) == [[None, None]] * 3


def test_bytes_under_a_null_do_not_count() -> None:
    """Arrow allows them."""
    buffers = [pa.py_buffer(b"\x05"), pa.array([0, 1, 4, 5], pa.int32()).buffers()[1], pa.py_buffer(b"ab\nbc")]
    array = pa.Array.from_buffers(pa.string(), 3, buffers)
    assert array.to_pylist() == ["a", None, "c"]
    columns = score(pa.RecordBatch.from_arrays([array], [TEXT])).columns
    assert [c.to_pylist() for c in columns] == [[1, None, 1]] * 3


def test_rules_of_datacomp() -> None:
    """basic_filter, and the caption rule of image_based, on the frozen cases; the language comes with them."""
    words, chars, tokens = count([c["text"] for c in CASES])
    sizes = {n: pa.array([c[k] for c in CASES]) for n, k in ((ORIGINAL_WIDTH, "width"), (ORIGINAL_HEIGHT, "height"))}
    side, aspect = (column.to_pylist() for column in score_size(pa.RecordBatch.from_pydict(sizes)).columns)
    for i, case in enumerate(CASES):
        english = case["language"] == "en"
        fits = side[i] is not None and side[i] >= 200 and aspect[i] <= 3.0
        assert case["basic"] == (english and words[i] > 2 and chars[i] > 5 and fits), case
        assert case["image_based_caption"] == (english and tokens[i] > 1 and chars[i] > 5), case


@pytest.mark.parametrize("width", [[200, 0, None, -1, 7], [None] * 5, [3] * 5])
def test_sizes_that_are_not_known_are_told_by_place(width: list[int | None]) -> None:
    batch = {ORIGINAL_WIDTH: pa.array(width, pa.int64()), ORIGINAL_HEIGHT: pa.array([5] * 5)}
    positions = [f.position for f in score_size(pa.RecordBatch.from_pydict(batch)).failures]
    assert positions == [i for i, side in enumerate(width) if side is None or side < 1]
