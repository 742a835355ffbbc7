"""How many ImageNet-21k entities a caption names (DataComp "text_based" filter, Gadre et al. 2023, arXiv:2304.14108).

caption_entities is DataComp's rule (baselines/apply_filter.py:237-295): its text_based keeps a caption if this is > 0
and fastText says en.  caption_entities_strict is what that rule means to say.  They differ where
  a token has punctuation or 's   "dog," "(dog)" "dog's"      compat knows no such word; strict reads dog
  words are joined                "dog/cat" "dog.jpg"         compat knows no such word; strict reads the parts
  a name has several words        "St. Bernard" "town hall"   compat sees tokens; strict takes the longest, left first
  a token is no noun              "installed" "athletic"      compat takes a verb's or adjective's offset for a noun's
  a noun is not what is written   "Men's" (toilet) "e" (vitamin)   compat counts it; strict does not
Both take a noun's first sense and read no sentence: "white" is a person, and "can" a tin.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from filters.captions import add_up_in_rows, cut_words, find_null_captions, find_python_space, find_words, read_bytes
from filters.wordnet.phrases import NOTHING, Phrases, Word, find_longest, read_phrases, read_token
from filters.wordnet.words import SHA256, Words, names_entity, read_words
from pipeline.config import config
from pipeline.contract import Filter, Score, Scored
from pipeline.schemas import CAPTION_ENTITIES, CAPTION_ENTITIES_STRICT, TEXT

CACHED = 1 << 18
"""Tokens that a worker remembers."""
LONG_TOKEN = 100
"""Bytes; a longer token is not remembered, so that huge ones do not stay in memory."""


@config
class Options:
    """No choices."""


class Token(NamedTuple):
    """What is known of a white-space token."""

    is_entity: bool
    """Whether DataComp's rule counts it."""
    words: tuple[Word, ...]
    """Its words, as the strict rule reads them."""


class LookUp(NamedTuple):
    """What reads tokens in UTF-8, and names."""

    token: Callable[[bytes], Token]
    """Remembers what it read."""
    long_token: Callable[[bytes], Token]
    """Does not."""
    name: Callable[[tuple[str, ...]], int]
    """Words -> number of words of the longest name of several words that they start with; 1 where there is none."""
    longest: dict[str, int]
    """First word of such names -> number of words of the longest."""


UNKNOWN = Token(False, (NOTHING,))
"""Most tokens of the web; one object for all, which also keeps Python's garbage collector asleep."""
IS_ENTITY, WORDS = attrgetter("is_entity"), attrgetter("words")
SPELLING, IS_NAME, FOLLOWERS, STEMS = map(attrgetter, ("text", "is_name", "followers", "stems"))


def build(name: str, options: Options) -> Filter:
    """Return the filter; it has no options."""
    makes = ((CAPTION_ENTITIES, pa.int32()), (CAPTION_ENTITIES_STRICT, pa.int32()))
    return Filter(name=name, needs=(TEXT,), makes=makes, version=2, settings={"words": SHA256}, load=load)


def load() -> Score:
    """Return the scoring function with WordNet's words open."""
    return partial(score, open_words())


def open_words() -> LookUp:
    """Return WordNet's words, ready to be asked."""
    words = read_words()
    phrases = read_phrases(words)
    look_up, find = partial(look_up_token, words, phrases), partial(find_longest, phrases)
    return LookUp(lru_cache(CACHED)(look_up), look_up, lru_cache(CACHED)(find), phrases.longest)


def look_up_token(words: Words, phrases: Phrases, token: bytes) -> Token:
    """Return all that counting asks about a token in UTF-8; it depends on nothing else, so it can be remembered."""
    text = token.decode()
    found = Token(names_entity(words, text), read_token(phrases, text))
    return UNKNOWN if found == UNKNOWN else found


def score(look_up: LookUp, batch: pa.RecordBatch) -> Scored:
    """Return two int32 (rows,): entities by DataComp's rule and by the strict one; null for a null caption."""
    texts = batch.column(TEXT)
    nulls = texts.is_null().to_numpy(zero_copy_only=False)
    counts = count_entities(look_up, texts.fill_null(""))
    return Scored(tuple(pa.array(count_R, pa.int32(), mask=nulls) for count_R in counts), find_null_captions(texts))


def count_entities(look_up: LookUp, texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return two int64 (R,): entities by DataComp's rule and by the strict one.  Each distinct token is looked up once.

    Shapes: R rows, T tokens, D distinct tokens, V words of the distinct tokens, W words of the rows.
    """
    text_B, offsets = read_bytes(texts)
    space_B = find_python_space(text_B)
    begins_T = find_words(space_B, offsets)
    first_R = np.searchsorted(begins_T, offsets)
    encoded_T = cut_words(text_B, space_B, begins_T).dictionary_encode()
    id_T = encoded_T.indices.to_numpy(zero_copy_only=False)
    read, read_long = look_up.token, look_up.long_token
    tokens = [read(t) if len(t) <= LONG_TOKEN else read_long(t) for t in encoded_T.dictionary.to_pylist()]
    is_entity_D = np.fromiter(map(IS_ENTITY, tokens), np.bool_, len(tokens))
    words = [*map(WORDS, tokens)]
    size_D = np.fromiter(map(len, words), np.int64, len(words))
    size_T = size_D[id_T]
    end_T = np.cumsum(size_T)
    id_W = np.arange(size_T.sum()) + np.repeat(np.cumsum(size_D)[id_T] - end_T, size_T)
    first_word_R = np.concatenate([[0], end_T])[first_R]
    strict_R = count_names(look_up, [*chain.from_iterable(words)], id_W, first_word_R)
    return add_up_in_rows(is_entity_D[id_T], first_R), strict_R


def count_names(look_up: LookUp, words: Sequence[Word], id_W: np.ndarray, first_R: np.ndarray) -> np.ndarray:
    """Return int64 (R,): how many names of ImageNet-21k entities each row of words has.

    `id_W` are places in `words`, `first_R`, (R + 1,), says where rows begin.  The longest name from the left takes its
    words, and the names of one word within it do not count.
    """
    count_W = np.fromiter(map(IS_NAME, words), np.int64, len(words))[id_W]
    texts, end = [*map(SPELLING, words)], 0
    for start, row_end in find_starts(words, id_W, first_R):
        if start >= end:
            size = look_up.longest[texts[id_W[start]]]
            size = look_up.name(tuple([texts[i] for i in id_W[start : min(start + size, row_end)].tolist()]))
            if size > 1:
                end = start + size
                count_W[start:end] = 0
                count_W[start] = 1
    return add_up_in_rows(count_W, first_R)


def find_starts(words: Sequence[Word], id_W: np.ndarray, first_R: np.ndarray) -> Iterator[tuple[int, int]]:
    """Return where a word and the next of its row may start a name of several words, and where that row ends."""
    starts_V = np.fromiter(map(bool, map(FOLLOWERS, words)), np.bool_, len(words))
    follows_V = np.fromiter(map(bool, map(STEMS, words)), np.bool_, len(words))
    is_pair_W = starts_V[id_W[:-1]] & follows_V[id_W[1:]]
    is_pair_W[first_R[(first_R > 0) & (first_R < len(id_W))] - 1] = False
    place_P = np.flatnonzero(is_pair_W)
    pairs, number_P = np.unique(id_W[place_P] * len(words) + id_W[place_P + 1], return_inverse=True)
    known = [
        not words[first].followers.isdisjoint(words[second].stems)
        for first, second in zip(*(n.tolist() for n in np.divmod(pairs, len(words))), strict=True)
    ]
    place_P = place_P[np.array(known, np.bool_)[number_P]]
    row_end_P = first_R[np.searchsorted(first_R, place_P, "right")]
    return zip(place_P.tolist(), row_end_P.tolist(), strict=True)
