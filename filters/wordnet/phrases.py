"""Names of ImageNet-21k entities in running text: nouns of one or more words, whatever stands around them.

A word is a run of letters and digits, with hyphens and dots where WordNet has it so ("t-shirt", "U.S."); other
hyphens and dots, underscores, slashes and white space part words.  Case, accents and a possessive 's do not count.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

from filters.wordnet.words import NOUN, Words, find_lemma, index_words, inflect_back

PLAIN_WORD = re.compile(r"[^\W_]+(?:['.][^\W_]+)*")
UNDOTTED_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
WORD = re.compile(r"[^\W_]+(?:(?:'?-|['.])[^\W_]+)*")
ACCENTS = re.compile("[\u0300-\u036f]+")
POSSESSIVE = "'s"
NO_WORDS: frozenset[str] = frozenset()
LONGEST_WORD = 100
"""Characters of the longest word that is inflected; WordNet's longest noun has 71."""


class Phrases(NamedTuple):
    """WordNet's nouns as words with one space between them; a name is one whose first sense is in ImageNet-21k."""

    nouns: Words
    known: frozenset[str]
    """All nouns, all irregular forms and all words of names of several words."""
    parts: frozenset[str]
    """All words of names of several words."""
    followers: dict[str, frozenset[str]]
    """First word of such names -> their second words."""
    seconds: frozenset[str]
    """All those second words."""
    longest: dict[str, int]
    """First word of such names -> number of words of the longest."""


class Word(NamedTuple):
    """A word of a text."""

    text: str
    is_name: bool
    followers: frozenset[str]
    """Second words of the names that it starts."""
    stems: tuple[str, ...]
    """The second words of names that it can be."""


NOTHING = Word("", False, NO_WORDS, ())
"""A word that is no part of any name."""
IS_NAME = attrgetter("is_name")


def read_phrases(words: Words) -> Phrases:
    """Return the nouns; of two spellings (".22", "22") the one that is spelled so decides, and "e" is no name."""
    senses: dict[str, bool] = {}
    for lemma, in_imagenet in words.senses[NOUN].items():
        spelled = _spell(lemma)
        if spelled not in senses or spelled == lemma.replace("_", " "):
            senses[spelled] = in_imagenet and len(spelled) > 1
    irregular = {_spell(form): [_spell(lemma) for lemma in lemmas] for form, lemmas in words.irregular[NOUN].items()}
    names = [name for name, is_name in senses.items() if is_name]
    names += [form for form, lemmas in irregular.items() if any(senses.get(lemma) for lemma in lemmas)]
    several = [name.split(" ") for name in names if " " in name]
    followers, longest = defaultdict[str, set[str]](set), defaultdict[str, int](int)
    for first, second, *rest in several:
        followers[first].add(second)
        longest[first] = max(2 + len(rest), longest[first])
    nouns, parts = index_words({NOUN: senses}, {NOUN: irregular}), frozenset(chain(*several))
    return Phrases(
        nouns=nouns,
        known=nouns.forms | parts,
        parts=parts,
        followers={first: frozenset(seconds) for first, seconds in followers.items()},
        seconds=frozenset(second for _, second, *_ in several),
        longest=dict(longest),
    )


def _spell(lemma: str) -> str:
    return " ".join(WORD.findall(lemma))


def read_token(phrases: Phrases, token: str) -> tuple[Word, ...]:
    """Return the words of a token of white-space split text."""
    token = token.lower()
    if not token.isascii():
        token = ACCENTS.sub("", unicodedata.normalize("NFKD", token)).replace("\u2019", "'")
    if token.isalnum():
        return (look_up_word(phrases, token),)
    runs = WORD.findall(token)
    return tuple([look_up_word(phrases, word) for run in runs for word in split_run(phrases, run)])


def split_run(phrases: Phrases, run: str) -> list[str]:
    """Return a word with hyphens or dots as it is where WordNet knows it, else its parts."""
    if not ("-" in run or "." in run) or run in phrases.parts:
        return [run]
    if len(run) <= LONGEST_WORD and find_noun(phrases, run) is not None:
        return [run]
    words = PLAIN_WORD.findall(run)
    return [part for word in words for part in ([word] if word in phrases.known else UNDOTTED_WORD.findall(word))]


def look_up_word(phrases: Phrases, word: str) -> Word:
    """Return what counting asks about a lower-case word."""
    forms = [word]
    if word.endswith(("s", "men")) and len(word) <= LONGEST_WORD:  # as all inflected nouns do
        forms += inflect_back(word.removesuffix(POSSESSIVE), NOUN)
    if phrases.known.isdisjoint(forms):
        return NOTHING
    names = {word, word.replace("-", " ")}  # "ice-cream" is a word of a longer name, and "ice cream" a name
    return Word(
        word,
        any(find_noun(phrases, name) for name in names),
        phrases.followers.get(word, NO_WORDS),
        tuple([form for form in forms if form in phrases.seconds]),
    )


def find_noun(phrases: Phrases, phrase: str) -> bool | None:
    """Return whether the first sense of a noun is in ImageNet-21k; None where the phrase is no noun of WordNet's."""
    lemma = find_lemma(phrases.nouns, phrase.removesuffix(POSSESSIVE), NOUN)
    return None if lemma is None else phrases.nouns.senses[NOUN][lemma]


def find_longest(phrases: Phrases, words: Sequence[str]) -> int:
    """Return the number of words of the longest name of several words that a text starts with; 1 where none does."""
    sizes = range(len(words), 1, -1)
    return next((size for size in sizes if find_noun(phrases, " ".join(words[:size]))), 1)
