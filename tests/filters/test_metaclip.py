import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from filters import build_filter
from filters.metaclip import WORDNET, read_entries
from pipeline.contract import Score, check_scored
from pipeline.errors import ConfigError
from pipeline.schemas import TEXT

TEXTS = Path(__file__).parents[3] / "shared" / "data" / "text"


def texts(*captions: str | None) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({TEXT: pa.array(captions, pa.string())})


def open_score(place: Path, *entries: str) -> Score:
    place.write_text(json.dumps(entries))
    return build_filter({"filter": "metaclip", "metadata": str(place)}).load()


def search(text: str, entries: list[str]) -> list[int]:
    """The rule as it is told: punctuation apart, then a search for each entry between spaces."""
    text = f" {text} "
    for mark in ",.;:?!`":
        text = text.replace(mark, f" {mark} ")
    for space in "\t\n\r":
        text = text.replace(space, " ")
    return [number for number, entry in enumerate(entries) if f" {entry} " in text]


@pytest.mark.parametrize(
    ("caption", "found"),
    [
        ("a dog", ["a", "dog"]),
        ("dog, a hot dog.", ["dog", "hot dog", "a", "a hot dog", ","]),
        ("hot\tdog hot\ndog hot\rdog", ["hot dog", "dog"]),
        ("hot  dog", ["dog"]),
        ("Dog DOG dogs dog's hotdog (dog)", []),
        ("a.dog", ["a", "dog"]),
        ("hot dog day", ["hot dog", "dog", "hot dog day"]),
        ("hot dog days", ["hot dog", "dog"]),
        ("`dog`:dog;", ["dog"]),
        ("dog\u00a0dog 狗 狗", ["狗"]),
        ("", []),
        (" ", []),
        ("U.S.", []),
    ],
)
def test_entries_of_a_caption(tmp_path: Path, caption: str, found: list[str]) -> None:
    entries = ["dog", "a", "hot dog", "a hot dog", "hot dog day", ",", "狗", "U.S.", "hotdogs"]
    (numbers,) = open_score(tmp_path / "m.json", *entries)(texts(caption)).columns[0].to_pylist()
    assert {entries[n] for n in numbers} == set(found)
    assert numbers == search(caption, entries)


def test_entries_are_those_of_a_search_for_each(tmp_path: Path) -> None:
    """Texts and entries of the same few pieces, spaces and marks at any place in both."""
    draw = random.Random(0)
    pieces = ["a", "b", "ab", " ", " ", " ", ",", "!", "\n", "é", "'", "\u2003"]
    entries = sorted({"".join(draw.choices(pieces, k=draw.randint(1, 5))) for _ in range(400)})
    captions = ["".join(draw.choices(pieces, k=draw.randint(0, 12))) for _ in range(2000)]
    found = open_score(tmp_path / "m.json", *entries)(texts(*captions)).columns[0].to_pylist()
    assert found == [search(caption, entries) for caption in captions]
    assert max(map(len, found)) > 10


@pytest.mark.real
@pytest.mark.skipif(not TEXTS.is_dir(), reason="no captions here")
def test_entries_of_real_captions_are_those_of_a_search_for_each() -> None:
    captions = [t for url in sorted(TEXTS.glob("*.parquet")) for t in pq.read_table(url)["text"].to_pylist()[::2000]]
    entries = read_entries(WORDNET)
    found = build_filter({"filter": "metaclip", "metadata": WORDNET}).load()(texts(*captions)).columns[0].to_pylist()
    assert found == [None if text is None else search(text, entries) for text in captions]


def test_a_null_caption_is_counted_and_has_null(tmp_path: Path) -> None:
    filter = build_filter({"filter": "metaclip", "name": "mc", "metadata": WORDNET})
    batch = texts("a dog", None, "")
    scored = filter.load()(batch)
    check_scored(filter, batch, scored)
    words = read_entries(WORDNET)
    assert scored.columns[0].to_pylist() == [[words.index("a"), words.index("dog")], None, []]
    assert [f.reason for f in scored.failures] == ["null_caption"]
    assert filter.makes[0][0] == "mc_entries" and len(words) == 147_306


def test_an_entry_a_line(tmp_path: Path) -> None:
    place = tmp_path / "m.txt"
    place.write_bytes("dog\r\nhot dog\r\n[a\u2028b]".encode())
    assert read_entries(str(place)) == ["dog", "hot dog", "[a\u2028b]"]
    place.write_bytes(b"dog\nhot dog\n")
    assert read_entries(str(place)) == ["dog", "hot dog"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.json", b"{}", "is JSON, and no list of texts"),
        ("m.json", b"[1]", "is JSON, and no list of texts"),
        ("m.json", b"[", "is neither .json nor UTF-8"),
        ("m.txt", b"\xff\n", "is neither .json nor UTF-8"),
        ("m.txt", b"a\n\nb", "entry '', number 1, is empty"),
        ("m.txt", b"", "entry '', number 0, is empty"),
        ("m.txt", b"a\nb\na", "entry 'a', number 2, stands twice, as number 0 too"),
    ],
)
def test_metadata_that_is_none(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        build_filter({"filter": "metaclip", "metadata": str(tmp_path / name)}).load()


def test_metadata_that_is_absent_or_changed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no metadata at 'nowhere\.json'"):
        build_filter({"filter": "metaclip", "metadata": "nowhere.json"})
    place = tmp_path / "m.txt"
    place.write_text("dog")
    filter = build_filter({"filter": "metaclip", "metadata": str(place)})
    place.write_text("cat")
    assert filter.identity != build_filter({"filter": "metaclip", "metadata": str(place)}).identity
    with pytest.raises(ConfigError, match="changed since this run began"):
        filter.load()
