"""Which entries of a metadata list a caption has (MetaCLIP, Xu et al. 2024, arXiv:2309.16671, substr_matching.py).

A caption has an entry when it stands in it as it is spelled, between spaces; `, . ; : ? ! and backtick are words of
their own, and tab, newline and carriage return are spaces.  Case counts, as in MetaCLIP's code.  What keeps the rows is
the select step `balance`; docs/SELECT.md says how a list is made.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import partial

import pyarrow as pa

from filters.captions import find_null_captions
from filters.wordnet.words import SHA256, read_words
from pipeline.config import config
from pipeline.contract import Filter, Score, Scored
from pipeline.errors import ConfigError
from pipeline.schemas import TEXT, entries_column
from pipeline.storage import exists, read_bytes

WORDNET = "wordnet"
"""Names the words of WordNet 3.0 that winnow has with it."""
SPACED = str.maketrans({c: f" {c} " for c in ",.;:?!`"} | dict.fromkeys("\t\n\r", " "))
ENTRIES = pa.list_(pa.int32())
Lengths = Mapping[str, tuple[int, ...]]
"""First word of entries -> how many words they have."""


@config
class Options:
    """Which entries."""

    metadata: str
    """A .json list of texts, as MetaCLIP's metadata.json, or another file with an entry a line; or `wordnet`.  An
    entry's number is its place in the list, from 0."""


def build(name: str, options: Options) -> Filter:
    """Return the filter, with the hash of the entries in its identity.  Raises ConfigError when there are none."""
    if options.metadata != WORDNET and not exists(options.metadata):
        raise ConfigError(
            f"filter {name!r}: there is no metadata at {options.metadata!r}. Give a .json list, an entry a line, "
            f"or {WORDNET!r}."
        )
    return Filter(
        name=name,
        needs=(TEXT,),
        makes=((entries_column(name), ENTRIES),),
        version=1,
        settings={"metadata": _hash_metadata(options.metadata)},
        load=partial(load, options.metadata, _hash_metadata(options.metadata)),
    )


def _hash_metadata(place: str) -> str:
    return SHA256 if place == WORDNET else hashlib.sha256(read_bytes(place)).hexdigest()


def load(place: str, sha256: str) -> Score:
    """Return the scoring function.  Raises ConfigError for metadata that is no list, or not that of the hash."""
    if _hash_metadata(place) != sha256:
        raise ConfigError(f"metadata {place!r} changed since this run began. Start it again.")
    entries = read_entries(place)
    return partial(score, number_entries(entries, place), find_lengths(entries))


def read_entries(place: str) -> list[str]:
    """Return the entries in order; those of `wordnet` are its words of all parts of speech, sorted, with spaces.

    Raises ConfigError for a file that is neither JSON nor text of that kind.
    """
    if place == WORDNET:
        return sorted({word.replace("_", " ") for words in read_words().senses.values() for word in words})
    try:
        text = read_bytes(place).decode()
        found = json.loads(text) if place.endswith(".json") else text.removesuffix("\n").split("\n")
    except ValueError as error:
        raise ConfigError(f"metadata {place!r} is neither .json nor UTF-8 with an entry a line: {error}.") from None
    if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
        raise ConfigError(f"metadata {place!r} is JSON, and no list of texts.")
    return [entry.removesuffix("\r") for entry in found]


def number_entries(entries: Iterable[str], place: str) -> dict[str, int]:
    """Return the number of each entry.  Raises ConfigError for one that is empty or stands twice."""
    numbers: dict[str, int] = {}
    for number, entry in enumerate(entries):
        if not entry or entry in numbers:
            why = f"stands twice, as number {numbers[entry]} too" if entry else "is empty"
            raise ConfigError(f"metadata {place!r}: entry {entry!r}, number {number}, {why}. Take it out.")
        numbers[entry] = number
    return numbers


def find_lengths(entries: Iterable[str]) -> Lengths:
    """Return how many words the entries with each first word have."""
    lengths: dict[str, set[int]] = {}
    for entry in entries:
        words = entry.split(" ")
        lengths.setdefault(words[0], set()).add(len(words))
    return {first: tuple(sorted(some)) for first, some in lengths.items()}


def match_entries(numbers: Mapping[str, int], lengths: Lengths, text: str) -> list[int]:
    """Return the numbers of the entries that the text has, ascending.

    What stands between two spaces of the text is some of its words, so the runs of words are all that can be entries.
    """
    words = text.translate(SPACED).split(" ")
    found = set()
    for start, first in enumerate(words):
        for length in lengths.get(first, ()):
            number = numbers.get(first if length == 1 else " ".join(words[start : start + length]))
            if number is not None:
                found.add(number)
    return sorted(found)


def score(numbers: Mapping[str, int], lengths: Lengths, batch: pa.RecordBatch) -> Scored:
    """Return list<int32> (rows,): the numbers of each caption's entries; null for a null caption."""
    texts: list[str | None] = batch.column(TEXT).to_pylist()
    entries = [None if text is None else match_entries(numbers, lengths, text) for text in texts]
    return Scored((pa.array(entries, ENTRIES),), find_null_captions(batch.column(TEXT)))
