"""A token's first WordNet sense, as NLTK 3.8.1 finds it (nltk/corpus/reader/wordnet.py, synsets and _morphy).

NLTK from 3.9 on takes endings off once only, where 3.8.1 goes on until it finds a word; all else is alike.
"""

import hashlib
import lzma
from collections.abc import Iterator
from importlib.resources import files
from itertools import chain
from typing import NamedTuple

from pipeline.errors import ConfigError

NOUN = "n"
PARTS_OF_SPEECH = (NOUN, "v", "a", "r")
"""Nouns, verbs, adjectives, adverbs: the order in which senses are looked for."""
ENDINGS: dict[str, tuple[tuple[str, str], ...]] = {
    NOUN: (
        ("s", ""),
        ("ses", "s"),
        ("ves", "f"),
        ("xes", "x"),
        ("zes", "z"),
        ("ches", "ch"),
        ("shes", "sh"),
        ("men", "man"),
        ("ies", "y"),
    ),
    "v": (("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")),
    "a": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "r": (),
}
"""Endings and what stands in their place, in the order of WordNet's manual page morphy(7), and of NLTK."""
ANY_ENDING = {pos: tuple(ending for ending, _ in pairs) for pos, pairs in ENDINGS.items()}
LAST_LETTERS = ("s", "men", "ed", "ing", "er", "est")
"""What all endings end with: the one test that most unknown tokens need."""
FILE = "words.txt.xz"
SHA256 = "fbebbb5b6062108ba0150861f33c8b4aa93c2bce32037c2cb5c1e41e6d5c13fe"
"""Of the text in FILE."""
IRREGULAR = "> "
"""Head of a line of irregular forms."""
LONGEST_FORM = 10_000
"""Characters of the longest token that is inflected; NLTK takes 10,000 endings off one by one, and so on."""


class Words(NamedTuple):
    """What words.txt.xz says, by part of speech."""

    senses: dict[str, dict[str, bool]]
    """Whether the first sense of a word is in ImageNet-21k."""
    irregular: dict[str, dict[str, list[str]]]
    """Words of an irregular form: geese -> [goose]."""
    forms: frozenset[str]
    """All words and irregular forms."""


def read_words() -> Words:
    """Return the words; raises ConfigError unless the file is the one that this code belongs to."""
    packed = files(__package__).joinpath(FILE).read_bytes()
    text = lzma.decompress(packed)
    if hashlib.sha256(text).hexdigest() != SHA256:
        raise ConfigError(f"{FILE} of filters.wordnet is not the one of this version of winnow; install winnow again.")
    senses: dict[str, dict[str, bool]] = {pos: {} for pos in PARTS_OF_SPEECH}
    irregular: dict[str, dict[str, list[str]]] = {pos: {} for pos in PARTS_OF_SPEECH}
    for line in text.decode().splitlines():
        if line.startswith(IRREGULAR):
            pos, form, *lemmas = line.removeprefix(IRREGULAR).split(" ")
            irregular[pos][form] = lemmas
        else:
            lemma, flags = line.split(" ")
            for flag in flags:
                senses[flag.lower()][lemma] = flag.isupper()
    return index_words(senses, irregular)


def index_words(senses: dict[str, dict[str, bool]], irregular: dict[str, dict[str, list[str]]]) -> Words:
    """Return words with all their forms."""
    return Words(senses, irregular, frozenset(chain(*senses.values(), *irregular.values())))


def names_entity(words: Words, token: str) -> bool:
    """Return whether the first sense of a token is in ImageNet-21k: DataComp's test (apply_filter.py:237-262).

    That compares offsets alone, so the first sense of a verb or adjective can meet the id of an unrelated noun.
    """
    form = token.lower()
    if form not in words.forms and not (form.isascii() and form.endswith(LAST_LETTERS)):
        return False
    for pos in PARTS_OF_SPEECH:
        lemma = find_lemma(words, form, pos)
        if lemma is not None:
            return words.senses[pos][lemma]
    return False


def find_lemma(words: Words, form: str, pos: str) -> str | None:
    """Return the first word of a part of speech that a lower-case form can stand for, or None."""
    known = words.senses[pos]
    if form in words.irregular[pos]:
        return next((lemma for lemma in (form, *words.irregular[pos][form]) if lemma in known), None)
    if form in known or not form.endswith(ANY_ENDING[pos]):
        return form if form in known else None
    return next((candidate for candidate in inflect_back(form, pos) if candidate in known), None)


def inflect_back(form: str, pos: str) -> Iterator[str]:
    """Yield a form, then the forms with one ending taken off, then with two, and so on."""
    forms = [form]
    while forms:
        yield from forms
        forms = [shorter for longer in forms for shorter in _take_ending_off(longer, pos)]


def _take_ending_off(form: str, pos: str) -> list[str]:
    if not form.endswith(ANY_ENDING[pos]) or len(form) > LONGEST_FORM:
        return []
    return [form[: -len(ending)] + instead for ending, instead in ENDINGS[pos] if form.endswith(ending)]
