import hashlib
import json
import lzma
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from filters import build_filter
from filters.caption_entities import CACHED, LONG_TOKEN, count_names, load, open_words
from filters.wordnet.build import build_text, main, pack, read_first_senses
from filters.wordnet.phrases import find_noun, read_phrases, read_token
from filters.wordnet.words import FILE, LONGEST_FORM, NOUN, SHA256, names_entity, read_words
from pipeline.code_zip import write_zip
from pipeline.contract import Score, Scored, check_scored
from pipeline.errors import ConfigError
from pipeline.schemas import TEXT

ROOT = Path(__file__).parent.parent.parent
NLTK = json.loads((Path(__file__).parent / "nltk_entities.json").read_text())["tokens"]
DICTS = [d for d in (Path("/usr/share/wordnet"), Path.home() / "nltk_data/corpora/wordnet") if d.is_dir()]


@pytest.fixture(scope="module")
def score() -> Score:
    return load()


def texts(*captions: str | None) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({TEXT: pa.array(captions, pa.string())})


def values(scored: Scored) -> list[list[int | None]]:
    return [column.to_pylist() for column in scored.columns]


def test_first_senses_are_nltks() -> None:
    words = read_words()
    assert {token: names_entity(words, token) for token in NLTK} == NLTK


@pytest.mark.parametrize(
    ("caption", "compat", "strict"),
    [
        ("a dog", 1, 1),
        ("Two DOGS and a cat", 2, 2),
        ("a dog, (a cat) and the horse's ear.", 0, 3),
        ("women’s hats", 1, 2),
        ("dog/cat, dog-friendly", 0, 3),
        ("dog_on_beach", 0, 2),
        ("a golden retriever", 1, 1),
        ("golden retrievers' ball", 1, 2),
        ("St. Bernard", 0, 1),
        ("he walks on a line", 0, 0),
        ("t-shirts", 1, 1),
        ("dog.jpg, cute-dog.JPG, golden-retriever.png", 0, 3),
        ("a dog.Buy now", 0, 1),
        ("ice-cream", 0, 1),
        ("U.S. e.g. 3.5 p.m.", 0, 0),
        ("a black-footed ferret", 1, 1),
        ("long-haired dog", 1, 1),
        ("sons-in-law", 0, 0),
        ("https://example.org/" + "a-b-" * 30 + "dog-beds", 0, 2),
        ("construction worker", 1, 1),
        ("installed", 1, 0),
        ("athletic", 1, 0),
        ("Men's", 1, 0),
        ("e E d", 3, 0),
        ("A café", 0, 1),
        ("ｄｏｇ", 0, 1),
        ("dog\u3000dog\x1cdog\x85dog\u2028dog\tdog\ndog", 7, 7),
        ("dog\u200bdog", 0, 2),
        ("dogsssss", 1, 1),
        ("🐶 dog 🐶dog", 1, 2),
        ("собака 犬 כלב", 0, 0),
        ("", 0, 0),
        (" \n\t ", 0, 0),
        ("' - . _ '' -- 's", 0, 0),
        ("\x00", 0, 0),
    ],
)
def test_entities_of_a_caption(score: Score, caption: str, compat: int, strict: int) -> None:
    assert values(score(texts(caption))) == [[compat], [strict]]


def test_rows_keep_their_order_and_a_null_is_a_failure(score: Score) -> None:
    scored = score(texts("a dog", None, "", "a dog and a cat"))
    assert values(scored) == [[1, None, 0, 2], [1, None, 0, 2]]
    assert [(f.position, f.reason) for f in scored.failures] == [(1, "null_caption")]
    assert values(score(texts())) == [[], []]


def test_the_filter_is_what_it_promises(score: Score) -> None:
    filter = build_filter({"filter": "caption_entities"})
    batch = texts("a dog", None)
    check_scored(filter, batch, score(batch))
    assert filter.settings == {"words": SHA256}


def test_a_long_caption_has_the_answers_of_a_short_one(score: Score) -> None:
    short, times = "two golden retrievers installed a T-shirt ", 100
    assert values(score(texts(short, short * times, short))) == [[3, 3 * times, 3], [2, 2 * times, 2]]


def test_a_long_token_is_read_and_not_remembered(score: Score) -> None:
    token = "dog/" * LONG_TOKEN
    assert values(score(texts(token, f"a {token} dog"))) == [[0, 1], [LONG_TOKEN, LONG_TOKEN + 1]]


def test_no_name_goes_over_the_end_of_a_row(score: Score) -> None:
    batch = texts("a golden", "retriever", "", "town", None, "hall", "town hall", "town", "-", " - ", "hall")
    whole = values(score(batch))
    alone = [values(score(batch.slice(row, 1))) for row in range(len(batch))]
    assert whole == [[answer[which][0] for answer in alone] for which in (0, 1)]


def test_answers_stay_right_when_the_caches_are_full(score: Score) -> None:
    batch = texts(*(f"dogs {n}x" for n in range(CACHED + 1000)))
    assert set(map(tuple, values(score(batch)))) == {(1,) * len(batch)}


@pytest.mark.parametrize(
    "token", ["s" * 10**6, "es" * 10**5, "a-" * 10**5, "e\u0301" * 10**5, "dog" + "s" * LONGEST_FORM]
)
def test_huge_tokens_are_ordinary(score: Score, token: str) -> None:
    assert values(score(texts(token))) == [[0], [0]]


def test_names_are_found_as_by_trying_every_length() -> None:
    look_up, phrases = open_words(), read_phrases(read_words())
    parts = [part for part in sorted(phrases.parts)[::7] if "-" not in part] + [
        "dogs",
        "men's",
        "of",
        "retrievers",
        "xyz",
        "geese",
    ]
    names = [name for name, is_name in phrases.nouns.senses[NOUN].items() if is_name and "-" not in name][::40]
    rng = random.Random(0)
    for _ in range(2000):
        text = " ".join(rng.choice(rng.choice((parts, names))) + rng.choice(("", "", "s")) for _ in range(5))
        read = [word for token in text.split() for word in read_token(phrases, token)]
        rows = np.arange(len(read)), np.array([0, len(read)])
        spelled, expected, start = text.split(), 0, 0
        while start < len(spelled):
            sizes = range(len(spelled) - start, 0, -1)
            found = [n for n in sizes if find_noun(phrases, " ".join(spelled[start : start + n]))]
            expected, start = expected + bool(found), start + (found or [1])[0]
        assert count_names(look_up, read, *rows).tolist() == [expected], text


def test_names_take_the_longest_match_from_the_left(score: Score) -> None:
    """`calf` and `buffalo` alone are names too."""
    caption = "a water buffalo calf in a town hall market place"
    assert values(score(texts(caption, "buffalo calf", f"town {caption}", f"{caption} buffalo")))[1] == [4, 2, 4, 5]


def test_words_can_be_read_from_a_zip(tmp_path: Path) -> None:
    """As Spark ships them."""
    write_zip(str(tmp_path / "code.zip"))
    code = "import sys; sys.path.insert(0, 'code.zip'); from filters.wordnet import words; words.read_words()"
    code += "; print(words.__file__)"
    found = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (found.stdout.split(".zip")[1:], found.stderr) == (["/filters/wordnet/words.py\n"], "")


def make_dict(folder: Path, end: str) -> Path:
    """A WordNet of three words; `dog` has the offset of ImageNet's dog, the verb `test` that of a noun there."""
    lines = {
        "index.noun": ["  1 Licence", "dog n 2 1 @ 2 1 02084071 10114209  ", "idea n 1 1 @ 1 1 05833840  "],
        "index.verb": ["dog v 1 1 @ 1 1 02001858  ", "bark v 1 1 @ 1 1 02084071  "],
        "index.adj": [],
        "index.adv": [],
        "noun.exc": ["dogen dog", "dogen doge dogs"],
        "verb.exc": ["barken bark"],
        "adj.exc": [],
        "adv.exc": [],
    }
    for name, content in lines.items():
        (folder / name).write_bytes("".join(line + end for line in content).encode())
    return folder


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_table_says_which_first_senses_are_in_imagenet(tmp_path: Path, end: str) -> None:
    text = build_text(make_dict(tmp_path, end))
    assert text == "bark V\ndog Nv\nidea n\n> n dogen doge dogs\n> v barken bark\n"
    assert lzma.decompress(pack(text)).decode() == text
    assert list(read_first_senses(tmp_path, NOUN)) == [("dog", 2084071), ("idea", 5833840)]


def test_another_wordnet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"index\.noun: no such file; name the folder that holds WordNet 3\.0"):
        main([str(tmp_path)])
    with pytest.raises(ConfigError, match=r"it is not WordNet 3\.0"):
        main([str(make_dict(tmp_path, "\n"))])


@pytest.mark.skipif(not DICTS, reason="no WordNet here (Debian: wordnet-base)")
def test_the_file_can_be_made_again() -> None:
    packed = (ROOT / "filters/wordnet" / FILE).read_bytes()
    for folder in DICTS:
        text = build_text(folder)
        assert hashlib.sha256(text.encode()).hexdigest() == SHA256
        assert pack(text) == packed
