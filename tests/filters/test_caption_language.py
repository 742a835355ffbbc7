import json
import random
import struct
import sys
from pathlib import Path
from typing import Any

import fasttext
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from filters import build_filter, caption_language
from filters.lid import guess, words
from pipeline.contract import check_scored
from pipeline.errors import ConfigError, ModelError
from pipeline.schemas import TEXT

CASES = json.loads((Path(__file__).parent / "datacomp_captions.json").read_text())["rows"]
REAL = Path(__file__).parent.parent.parent.parent / "shared" / "data" / "text"
PIECES = [
    *"abcd. \n\t\r\v\f\0\u00a0\u3000é猫🙂ж_</>",
    " ",
    " ",
    "dog",
    "dog ",
    " the ",
    "</s>",
    "__label__",
    "__label__l1",
]


def texts(captions: list[Any]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({TEXT: pa.array(captions, pa.string())})


def make_captions(count: int) -> list[str]:
    rng = random.Random(0)
    made = ["".join(rng.choices(PIECES, k=rng.randrange(25))) for _ in range(count)]
    return [*made, "", "\0", "\n", "</s>", "</s> dog", "__label__l1", "dog " * 9000, "猫" * 3000]


def ask_fasttext(path: str, captions: list[str]) -> tuple[list[str | None], list[float | None]]:
    """fastText's own answers: DataComp's cleaning and call."""
    model = fasttext.load_model(path)
    answers = [model.f.predict(c.replace("\n", " ") + "\n", 1, 0.0, "strict") for c in captions]
    labels = [a[0][1].removeprefix("__label__") if a else None for a in answers]
    return labels, [a[0][0] if a else None for a in answers]


def test_cases_of_datacomp() -> None:
    scored = caption_language.load(None)(texts([c["text"] for c in CASES]))
    assert scored.columns[0].to_pylist() == [c["language"] for c in CASES]
    assert len({c["language"] for c in CASES}) > 20


def test_the_size_of_batches_changes_no_bit() -> None:
    captions, score = make_captions(600), caption_language.load(None)
    whole = score(texts(captions)).columns
    for size in (1, 7, 250):
        parts = [score(texts(captions[start : start + size])).columns for start in range(0, len(captions), size)]
        assert [pa.concat_arrays(column) for column in zip(*parts, strict=True)] == list(whole)


def write_model(
    path: Path,
    *,
    end_of_line: bool,
    ngrams: tuple[int, int],
    loss: int,
    num_labels: int = 7,
    prefix: str = "__label__",
    kind: int = 3,
) -> str:
    """A fastText model of random vectors, so that probabilities are all over and often close."""
    rng = np.random.default_rng(0)
    words = ["</s>"] * end_of_line + ["dog", "the", "ab", "猫", "c"]
    labels = [f"{prefix}l{i}" for i in range(num_labels)]
    dimensions, buckets = 5, 100
    header = struct.pack("<2i12id", 793712314, 12, dimensions, 5, 5, 1, 5, 1, loss, kind, buckets, *ngrams, 100, 1e-4)
    header += struct.pack("<3i2q", len(words) + num_labels, len(words), num_labels, 1000, -1)
    entries = [(word, 900 - i, 0) for i, word in enumerate(words)]
    entries += [(label, 800 - 40 * i, 1) for i, label in enumerate(labels)]
    header += b"".join(word.encode() + b"\0" + struct.pack("<qb", count, kind) for word, count, kind in entries)
    matrices = b""
    for rows, scale in ((len(words) + buckets, 2.0), (num_labels, 2.0)):
        values = rng.normal(0, scale, (rows, dimensions)).astype("<f4")
        matrices += struct.pack("<?2q", False, rows, dimensions) + values.tobytes()
    path.write_bytes(header + matrices)
    return str(path)


@pytest.mark.parametrize("end_of_line", [True, False])
@pytest.mark.parametrize("ngrams", [(2, 4), (1, 3), (0, 0)])
@pytest.mark.parametrize("loss", [1, 3], ids=["tree", "softmax"])
def test_answers_are_fasttexts_own(tmp_path: Path, end_of_line: bool, ngrams: tuple[int, int], loss: int) -> None:
    path = write_model(tmp_path / "lid.bin", end_of_line=end_of_line, ngrams=ngrams, loss=loss)
    captions = make_captions(3000)
    labels, probabilities = ask_fasttext(path, captions)
    scored = caption_language.load(path)(texts(captions))
    assert scored.columns[0].to_pylist() == labels
    assert scored.columns[1].to_pylist() == pytest.approx(probabilities, abs=1e-5)
    assert len(set(labels)) > 4
    assert (None in labels) != end_of_line


def test_labels_with_another_prefix(tmp_path: Path) -> None:
    """fastText takes any label of its dictionary for one, and leaves it out of the caption."""
    path = write_model(tmp_path / "lid.bin", end_of_line=True, ngrams=(2, 4), loss=1, prefix="lang:")
    captions = [f"{word} lang:l{n}" for word in ("dog", "the", "ab") for n in range(7)]
    assert caption_language.load(path)(texts(captions)).columns[0].to_pylist() == ask_fasttext(path, captions)[0]


def test_a_model_without_labels_is_told(tmp_path: Path) -> None:
    path = write_model(tmp_path / "cc.en.bin", end_of_line=True, ngrams=(2, 4), loss=1, kind=2)
    with pytest.raises(ModelError, match=r"cc\.en\.bin.*word vectors.*lid\.176\.bin"):
        caption_language.load(path)


def test_a_model_of_one_label(tmp_path: Path) -> None:
    path = write_model(tmp_path / "lid.bin", end_of_line=True, ngrams=(2, 4), loss=1, num_labels=1)
    assert caption_language.load(path)(texts(["dog", ""])).columns[0].to_pylist() == ["l0", "l0"]


def test_most_captions_are_not_asked_of_fasttext() -> None:
    answer = guess.open_guess(caption_language._find_embedded_model())
    captions = pa.array([c["text"].replace("<", " ").replace("_", " ") for c in CASES])
    assert answer(captions)[2].sum() <= 2
    assert answer(pa.array(["a </s>", "x __label__en", "the dog " * 2000]))[2].all()


def test_near_ties_are_asked_of_fasttext(tmp_path: Path) -> None:
    """Equal vectors of all labels: the first branches tie, and so do labels of one depth."""
    path = write_model(tmp_path / "lid.bin", end_of_line=True, ngrams=(2, 4), loss=1, num_labels=8)
    data = bytearray(Path(path).read_bytes())
    data[-8 * 5 * 4 :] = bytes(8 * 5 * 4)
    Path(path).write_bytes(data)
    captions = make_captions(20)
    assert guess.open_guess(path)(texts(captions).column(TEXT))[2].all()
    assert caption_language.load(path)(texts(captions)).columns[0].to_pylist() == ask_fasttext(path, captions)[0]


@pytest.mark.parametrize("forgetful", ["MAX_WORDS", "MAX_BYTES", "CHUNK_BYTES"])
def test_answers_do_not_depend_on_batches(monkeypatch: pytest.MonkeyPatch, forgetful: str) -> None:
    """Nor on the words seen before, nor on when they are forgotten."""
    captions = [c["text"] for c in CASES]
    whole = caption_language.load(None)(texts(captions))
    monkeypatch.setattr(words, forgetful, 40)
    score = caption_language.load(None)
    batch = texts(captions)
    for size in (1, 7, 64):
        parts = [score(batch.slice(i, size)).columns for i in range(0, len(captions), size)]
        assert [v for p in parts for v in p[0].to_pylist()] == whole.columns[0].to_pylist()
        assert [v for p in parts for v in p[1].to_pylist()] == pytest.approx(whole.columns[1].to_pylist(), abs=1e-5)


def test_nulls_and_nothing() -> None:
    score = caption_language.load(None)
    batch = texts([None, "a dog on the grass", None, "</s>"])
    scored = score(batch)
    check_scored(build_filter({"filter": "caption_language"}), batch, scored)
    assert scored.columns[0].to_pylist()[:3] == [None, "en", None]
    assert scored.columns[1].is_valid().to_pylist() == [False, True, False, True]
    assert [f.position for f in scored.failures] == [0, 2]
    assert [len(c) for c in score(texts([])).columns] == [0, 0]
    assert score(texts([None])).columns[0].to_pylist() == [None]


def test_columns_are_called_after_the_filter() -> None:
    names = [[c for c, _ in build_filter({"filter": "caption_language", **n}).makes] for n in ({}, {"name": "lid"})]
    assert names == [["caption_language", "caption_language_confidence"], ["lid", "lid_confidence"]]


@pytest.mark.parametrize("cut", [0, 3, 30, 60, 300])
def test_a_broken_model_is_told(tmp_path: Path, cut: int) -> None:
    path = Path(write_model(tmp_path / "lid.bin", end_of_line=True, ngrams=(2, 4), loss=1))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ModelError, match="is not a whole fastText classifier"):
        caption_language.load(str(path))


def test_gcld3_answers_as_datacomps(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gcld3", reason="the gcld3 extra is not installed")
    filter = build_filter({"filter": "caption_language", "name": "gcld3", "detector": "gcld3"})
    batch = texts([c["text"] for c in CASES] + [None])
    scored = filter.load()(batch)
    check_scored(filter, batch, scored)
    assert scored.columns[0].to_pylist() == [c["gcld3"] for c in CASES] + [None]
    assert [c["gcld3"] == "en" for c in CASES] == [c["laion2b_language"] for c in CASES]
    assert [f.position for f in scored.failures] == [len(CASES)]


def test_gcld3_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"filter": "caption_language", "detector": "gcld3"}
    with pytest.raises(ConfigError, match=r"gcld3 has its own model; leave out model: 'lid\.bin'"):
        build_filter({**entry, "model": "lid.bin"})
    monkeypatch.setitem(sys.modules, "gcld3", None)
    with pytest.raises(ConfigError, match=r"winnow\[gcld3\].* detector: fasttext"):
        build_filter(entry)


@pytest.mark.real
@pytest.mark.skipif(not REAL.is_dir(), reason="no ../shared/data")
@pytest.mark.parametrize("file", ["multi30k_captions", "url_text"])
def test_real_captions(file: str) -> None:
    captions = pq.read_table(REAL / f"{file}.parquet", columns=["text"])["text"].to_pylist()
    captions = random.Random(0).sample(captions, 10_000)
    labels, _ = ask_fasttext(caption_language._find_embedded_model(), captions)
    assert caption_language.load(None)(texts(captions)).columns[0].to_pylist() == labels
