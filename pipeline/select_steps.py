"""A recipe's steps run over stored scores: an account of each, the thresholds found, and the kept uids as sorted runs.

Every pass reads files and returns a few counts, so nothing of the size of the pool is ever in one place.  `where` steps
that follow each other are one pass, which leaves a bit per row; only those that are no plain comparisons
(select_plain.py) need Spark (select_sql.py).  A pass of any other step is a function of some parts, and runs on threads
here or on a cluster's workers.  Each branch starts from the rows that reached its step; what the branches kept is
combined in one pass (select_sets.py).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, groupby
from typing import Any

import numpy as np

from pipeline.errors import StageError
from pipeline.manifest import Counts
from pipeline.select import NO_SCORE, Step, check_copies, check_steps, place_branches
from pipeline.select_balance import cut_balance
from pipeline.select_caps import draw_copies
from pipeline.select_cuts import cut_at_least, cut_top, draw_sample
from pipeline.select_plain import filter_plainly, parse_plain
from pipeline.select_quota import cut_quota
from pipeline.select_scores import Mixture
from pipeline.select_sets import write_combined
from pipeline.select_source import Rows, Source
from pipeline.select_sql import filter_rows
from pipeline.select_table import (
    Cut,
    PartGroup,
    Passes,
    Passing,
    ScoreTable,
    parse_kept_uids,
    read_copies,
    read_passing,
)
from pipeline.storage import join
from pipeline.subset_runs import write_run

RUN_ROWS = 1 << 19
RUNS, MASKS = "runs", "masks"
Judge = Callable[[Source, Passing, Sequence[Step], str], np.ndarray]
"""(source, passing rows, `where` steps, folder) -> int64 (steps, 3): read, kept, without an answer; masks in FOLDER."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What a recipe's steps kept."""

    rows: int
    runs: str
    """Folder of the kept uids (subset_runs.py)."""
    counts: Mapping[str, Counts]
    """One account per step, by its path (select.walk), in that order."""
    thresholds: Mapping[str, float | None]
    """By path: the smallest score that passed a `top` step (of `lowest` the largest), None when it kept nothing; and
    the value of `at_least` as it was compared."""
    found: Mapping[str, Mapping[str, Any]]
    """By path: what a quota, balance or cap came to, and how a mixture was normalised; no other step is there."""


@dataclass(frozen=True, slots=True)
class _Run:
    """What the steps share, and what they leave."""

    source: Source
    scratch: str
    counts: dict[str, Counts] = field(default_factory=dict)
    thresholds: dict[str, float | None] = field(default_factory=dict)
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=count)

    def new_folder(self) -> str:
        """Return the URL of a folder that nobody has used yet."""
        return join(self.scratch, f"{MASKS}-{next(self.numbers)}")


def select_rows(source: Source, steps: Sequence[Step], scratch: str) -> Selection:
    """Run the steps; files go to SCRATCH.

    Raises ConfigError for steps that cannot be run (select.check_steps) and for SQL that Spark cannot read.
    """
    check_steps(steps, source.types)
    run = _Run(source, scratch)
    rows = _run_steps(run, steps, Rows(Passing(), source.num_rows), "")
    runs = join(scratch, RUNS)
    kept = int(source.sum_groups(partial(write_kept, source.table, rows.passing, runs), 1)[0])
    if kept != rows.num:
        raise StageError(f"select kept {kept:,} rows and counted {rows.num:,}: scores changed while they were read.")
    return Selection(kept, runs, run.counts, run.thresholds, run.found)


def _run_steps(run: _Run, steps: Sequence[Step], rows: Rows, within: str) -> Rows:
    """Return what the steps keep of the rows; `within` begins their paths."""
    for judge, alike in groupby(steps, key=partial(_choose_judge, run.source.types)):
        if judge:
            rows = _run_where(run, judge, list(alike), rows, within)
        else:
            for step in alike:
                rows = _run_branches(run, step, rows, within) if step.branches else _run_rule(run, step, rows, within)
    return rows


def _choose_judge(types: Mapping[str, str], step: Step) -> Judge | None:
    """Return who answers a `where` step, None for any other."""
    if step.where is None:
        return None
    return _judge_by_spark if parse_plain(step.where, types) is None else _judge_plainly


def _judge_by_spark(source: Source, passing: Passing, steps: Sequence[Step], masks: str) -> np.ndarray:
    return filter_rows(source.start(), source.table, passing, source.parts, steps, source.types, masks)


def _judge_plainly(source: Source, passing: Passing, steps: Sequence[Step], masks: str) -> np.ndarray:
    rules = [parse_plain(step.where or "", source.types) or [] for step in steps]
    work = partial(filter_plainly, source.table, passing, rules, masks)
    return source.sum_groups(work, 3 * len(rules)).reshape(-1, 3)


def _run_where(run: _Run, judge: Judge, steps: Sequence[Step], rows: Rows, within: str) -> Rows:
    masks = run.new_folder()
    found = judge(run.source, rows.passing, steps, masks)
    num = rows.num
    for step, (read, kept, missing) in zip(steps, found.tolist(), strict=True):
        if read != num:
            raise StageError(f"step {step.name!r} read {read:,} rows of {num:,}: scores changed, or a bug.")
        run.counts[within + step.name] = _count(within + step.name, read, kept, missing)
        num = kept
    return Rows(replace(rows.passing, masks=masks, cuts=()), num)


def _run_branches(run: _Run, step: Step, rows: Rows, within: str) -> Rows:
    path = within + step.name
    run.counts[path] = Counts(read=rows.num, kept=rows.num)  # stands before those of its branches
    ends = [_run_steps(run, branch, rows, start) for start, branch in place_branches(step, path)]
    kept = ends[0] if step.cascade is not None else _combine(run, step, rows, ends)
    run.counts[path] = _count(path, rows.num, kept.num, 0)
    return kept


def _combine(run: _Run, step: Step, rows: Rows, ends: Sequence[Rows]) -> Rows:
    """Return the rows that a step's branches, which kept `ends` of `rows`, come to."""
    kind, passings = step.kind, [end.passing for end in ends]
    most = (sum if kind == "add" else max)(passing.most for passing in passings)
    check_copies(step.name, most)
    if kind == "minus":
        passings = [rows.passing, *passings]
    folder = run.new_folder()
    write = partial(write_combined, run.source.table, kind, passings, folder)
    num = int(run.source.sum_groups(write, 1)[0])
    if kind == "minus":
        return Rows(replace(rows.passing, masks=folder, cuts=()), num)
    has_copies = kind == "add" or any(passing.has_copies for passing in passings)
    return Rows(Passing(folder, copies=folder if has_copies else None, most=most), num)


def _run_rule(run: _Run, step: Step, rows: Rows, within: str) -> Rows:
    path = within + step.name
    if cap := step.soft_cap or step.hard_cap:
        kept, missing, run.found[path] = draw_copies(run.source, rows, cap, run.new_folder(), step.name)
    elif step.repeat:
        check_copies(step.name, rows.passing.most * step.repeat)
        passing, times = rows.passing, step.repeat
        kept, missing = Rows(replace(passing, times=passing.times * times, most=passing.most * times), rows.num), 0
    else:
        kept, missing = _run_cut(run, step, rows, path)
    run.counts[path] = _count(path, rows.num, kept.num, missing)
    return kept


def _run_cut(run: _Run, step: Step, rows: Rows, path: str) -> tuple[Rows, int]:
    """Return the rows that a step keeps by their own scores and uids, and how many have no score."""
    cut: Passes
    missing = 0
    if step.quota:
        cut, kept, missing, run.found[path] = cut_quota(run.source, rows, step.quota)
    elif step.balance:
        cut, kept, missing, run.found[path] = cut_balance(run.source, rows, step.balance)
    elif step.sample:
        cut, kept = draw_sample(run.source, rows, step.sample)
    else:
        cut, kept, missing = _cut_ranked(run, step, rows, path)
    return Rows(rows.passing.add(cut), kept), missing


def _cut_ranked(run: _Run, step: Step, rows: Rows, path: str) -> tuple[Cut, int, int]:
    if step.top:
        cut, kept, missing = cut_top(run.source, rows, step.top)
    elif step.at_least:
        cut, kept, missing = cut_at_least(run.source, rows, step.at_least)
    else:
        raise AssertionError(f"step {path!r} has no rule")
    run.thresholds[path] = cut.value
    if isinstance(cut.by, Mixture):
        run.found[path] = {"offsets": list(cut.by.offsets), "scales": list(cut.by.scales)}
    return cut, kept, missing


def _count(path: str, read: int, kept: int, missing: int) -> Counts:
    dropped = {path: read - kept - missing, NO_SCORE: missing}
    return Counts(read=read, kept=kept, dropped={reason: n for reason, n in dropped.items() if n})


def write_kept(table: ScoreTable, passing: Passing, runs: str, group: PartGroup) -> np.ndarray:
    """Write the uids of the passing rows into RUNS, RUN_ROWS or a little more a file; return [number of rows]."""
    pieces: list[tuple[np.ndarray, np.ndarray | None]] = []
    held = total = num_runs = 0
    for part in group.parts:
        copies, start = read_copies(passing, part) if passing.has_copies else None, 0
        for batch, kept in read_passing(table, passing, part, [], uids=True):
            some = None if copies is None else copies[start : start + len(kept)][kept]
            pieces.append((parse_kept_uids(batch, kept, part), some))
            start, held, total = start + len(kept), held + len(pieces[-1][0]), total + len(pieces[-1][0])
            if held >= RUN_ROWS:
                _write_pieces(runs, f"{group.number:06d}-{num_runs:06d}", pieces)
                pieces, held, num_runs = [], 0, num_runs + 1
    if held:
        _write_pieces(runs, f"{group.number:06d}-{num_runs:06d}", pieces)
    return np.array([total])


def _write_pieces(runs: str, name: str, pieces: Sequence[tuple[np.ndarray, np.ndarray | None]]) -> None:
    copies = [some for _, some in pieces if some is not None]
    write_run(runs, name, np.concatenate([uids for uids, _ in pieces]), np.concatenate(copies) if copies else None)
