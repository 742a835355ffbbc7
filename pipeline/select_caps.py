"""The caps over stored scores: what each row is drawn by is held here, and the copies are written beside its part.

Held are, per row that reached the step with a score, about 60 bytes while rows are read and put in the order of their
shuffled uids; then 40 while soft_cap draws, or 28 and up to 32 per draw while hard_cap does.  Rows that share a uid are
drawn as one, by the largest of their scores, and each gets its copies.  The race: select_race.py.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from pipeline.select import check_copies
from pipeline.select_draw import shuffle_uids
from pipeline.select_mix import find_score
from pipeline.select_race import draw_hard, draw_soft
from pipeline.select_rules import HardCap, SoftCap
from pipeline.select_scores import Score, name_columns, read_score
from pipeline.select_source import Rows, Source
from pipeline.select_table import (
    READERS,
    Passing,
    ScorePart,
    ScoreTable,
    parse_kept_uids,
    read_copies,
    read_passing,
    write_copies,
    write_mask,
)
from pipeline.uid import UID_DTYPE


@dataclass(frozen=True, slots=True)
class Runners:
    """The R rows that are drawn from, those of one uid as one: N of them."""

    keys_N: np.ndarray
    """uint64: seeded hashes of the uids, ascending."""
    score_N: np.ndarray
    """float64; divided by the temperature before the race."""
    place_R: np.ndarray
    """uint32: which of the N each row is, in the order of the parts."""
    part_rows: Sequence[int]
    """Rows of each part."""


def draw_copies(
    source: Source, rows: Rows, rule: SoftCap | HardCap, folder: str, name: str
) -> tuple[Rows, int, dict[str, Any]]:
    """Return the rows that were drawn, how many had no score, and what was found; masks and copies go to FOLDER.

    Raises ConfigError where a row would get more copies than are possible, for the step of this name.
    """
    score = find_score(source, rows.passing, rule)
    runners = _read_runners(source, rows, score, rule.seed)
    num_scored = len(runners.place_R)
    total = rule.count_wanted(num_pool=source.num_pool, num_input=num_scored) if num_scored else 0
    np.divide(runners.score_N, rule.temperature, out=runners.score_N)
    if isinstance(rule, SoftCap):
        counts_N = draw_soft(runners.keys_N, runners.score_N, alpha=rule.alpha, batch=rule.batch, total=total)
    else:
        counts_N = draw_hard(runners.keys_N, runners.score_N, cap=rule.cap, total=total)
    most = int(counts_N.max(initial=0))
    check_copies(name, rows.passing.most * most)
    kept = _write_draws(source, rows.passing, score, counts_N[runners.place_R].astype(np.uint16), runners, folder)
    passing = Passing(folder, copies=folder, most=rows.passing.most * most)
    return Rows(passing, kept), rows.num - num_scored, {"draws": int(counts_N.sum(dtype=np.int64)), "most": most}


def _read_runners(source: Source, rows: Rows, score: Score, seed: int) -> Runners:
    words, scores, part_rows = _read_parts(source, rows, score, seed)
    order = np.argsort(words["f0"])
    keys = words["f0"][order]
    is_first = np.ones(len(keys), bool)
    if (keys[1:] == keys[:-1]).any():
        order = np.lexsort((words["f1"], words["f0"]))
        low = words["f1"][order]
        is_first[1:] = (keys[1:] != keys[:-1]) | (low[1:] != low[:-1])
    del words
    place_R = np.empty(len(keys), np.uint32)
    place_R[order] = np.cumsum(is_first, dtype=np.uint32) - 1
    score_N = np.maximum.reduceat(scores[order], np.flatnonzero(is_first)) if len(keys) else scores
    return Runners(keys[is_first], score_N, place_R, part_rows)


def _read_parts(source: Source, rows: Rows, score: Score, seed: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Return shuffled uids (R,) and scores (R,) of the rows whose score is finite, and the number of rows by part."""
    words, scores, part_rows = np.empty(rows.num, UID_DTYPE), np.empty(rows.num), list[int]()
    start = 0
    with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as readers:
        found = readers.map(lambda part: _read_part(source.table, rows.passing, score, seed, part), source.parts)
        for some_words, some_scores in found:
            place = slice(start, start + len(some_words))
            words[place], scores[place] = some_words, some_scores
            start = place.stop
            part_rows.append(len(some_words))
    return words[:start], scores[:start], part_rows


def _read_part(
    table: ScoreTable, passing: Passing, score: Score, seed: int, part: ScorePart
) -> tuple[np.ndarray, np.ndarray]:
    words, scores = [np.empty(0, UID_DTYPE)], [np.empty(0)]
    for batch, kept in read_passing(table, passing, part, name_columns(score), uids=True):
        values = read_score(score, batch)
        kept = kept & np.isfinite(values)
        words.append(shuffle_uids(parse_kept_uids(batch, kept, part), seed))
        scores.append(values[kept])
    return np.concatenate(words), np.concatenate(scores)


def _write_draws(
    source: Source, passing: Passing, score: Score, draws_R: np.ndarray, runners: Runners, folder: str
) -> int:
    """Write a mask and the copies of each part; return how many rows were drawn."""
    ends = list(accumulate(runners.part_rows, initial=0))

    def write(item: tuple[ScorePart, int, int]) -> int:
        part, start, stop = item
        copies = np.zeros(part.num_rows, np.uint16)
        copies[_find_scored(source.table, passing, score, part)] = draws_R[start:stop]
        if passing.has_copies:
            copies *= read_copies(passing, part)
        write_mask(folder, part, copies > 0)
        write_copies(folder, part, copies)
        return int(np.count_nonzero(copies))

    with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as writers:
        return sum(writers.map(write, zip(source.parts, ends[:-1], ends[1:], strict=True)))


def _find_scored(table: ScoreTable, passing: Passing, score: Score, part: ScorePart) -> np.ndarray:
    """Return bool (rows,): which rows of a part _read_part had read."""
    batches = read_passing(table, passing, part, name_columns(score))
    return np.concatenate([kept & np.isfinite(read_score(score, batch)) for batch, kept in batches])
