"""How many ImageNet-21k entities a caption names (DataComp "text_based" filter, Gadre et al. 2023, arXiv:2304.14108).

caption_entities is DataComp's rule (baselines/apply_filter.py:237-295): its text_based keeps a caption if this is > 0
and fastText says en.  caption_entities_strict is what that rule means to say.  They differ where
  a token has punctuation or 's   "dog," "(dog)" "dog's"      compat knows no such word; strict reads dog
  words are joined                "dog/cat" "dog-friendly"    compat knows no such word; strict reads the parts
  a name has several words        "St. Bernard" "town hall"   compat sees tokens; strict takes the longest, left first
  a token is no noun              "installed" "athletic"      compat takes a verb's or adjective's offset for a noun's
  a noun is not what is written   "Men's" (toilet) "e" (vitamin)   compat counts it; strict does not
Both take a noun's first sense and read no sentence: "white" is a person, and "can" a tin.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

import pyarrow as pa

from filters.captions import find_null_captions
from filters.wordnet.phrases import NOTHING, Phrases, Word, count_names, read_phrases, read_token
from filters.wordnet.words import SHA256, Words, names_entity, read_words
from pipeline.config import config
from pipeline.contract import Filter, Score, Scored
from pipeline.schemas import CAPTION_ENTITIES, CAPTION_ENTITIES_STRICT, TEXT

CACHED = 1 << 16
"""Tokens that a worker remembers."""
LONG_CAPTION = 1_000
"""Characters; a longer caption is looked up without the caches, so that huge tokens do not stay in memory."""


@config
class Options:
    """No choices."""


class Token(NamedTuple):
    """What is known of a white-space token."""

    is_entity: bool
    """Whether DataComp's rule counts it."""
    words: tuple[Word, ...]
    """Its words, as the strict rule reads them."""


UNKNOWN = Token(False, (NOTHING,))
"""Most tokens of the web; one object for all, which also keeps Python's garbage collector asleep."""
LookUp = Callable[[str], Token]
IS_ENTITY, WORDS = attrgetter("is_entity"), attrgetter("words")


def build(name: str, options: Options) -> Filter:
    """Return the filter; it has no options."""
    makes = ((CAPTION_ENTITIES, pa.int32()), (CAPTION_ENTITIES_STRICT, pa.int32()))
    return Filter(name=name, needs=(TEXT,), makes=makes, version=1, settings={"words": SHA256}, load=load)


def load() -> Score:
    """Return the scoring function with WordNet's words open."""
    words = read_words()
    phrases = read_phrases(words)
    look_up = partial(look_up_token, words, phrases)
    return partial(score, partial(count_entities, phrases, look_up, lru_cache(CACHED)(look_up)))


def look_up_token(words: Words, phrases: Phrases, token: str) -> Token:
    """Return all that counting asks about a token; it depends on nothing else, so it can be remembered."""
    found = Token(names_entity(words, token), read_token(phrases, token))
    return UNKNOWN if found == UNKNOWN else found


def count_entities(phrases: Phrases, look_up: LookUp, remembered: LookUp, text: str) -> tuple[int, int]:
    """Return a caption's number of entities by DataComp's rule, and by the strict one."""
    tokens = [*map(remembered if len(text) < LONG_CAPTION else look_up, text.split())]
    words = [*chain.from_iterable(map(WORDS, tokens))]
    return sum(map(IS_ENTITY, tokens)), count_names(phrases, words)


def score(count: Callable[[str], tuple[int, int]], batch: pa.RecordBatch) -> Scored:
    """Return two int32 (rows,): entities by DataComp's rule and by the strict one; null for a null caption."""
    texts: list[str | None] = batch.column(TEXT).to_pylist()
    counts = [(None, None) if t is None else count(t) for t in texts]
    compat, strict = (pa.array([pair[i] for pair in counts], pa.int32()) for i in range(2))
    return Scored((compat, strict), find_null_captions(batch.column(TEXT)))
