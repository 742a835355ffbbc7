"""The algebra of selection: what a recipe's steps may say, and what may be asked of them.  docs/SELECT.md shows each.

Steps run in order, each on the rows that the one before kept.  Some decide by a score (`where`, `at_least`, `top`), one
by chance (`sample`), some by what the rows have together (`quota`, `balance`, `soft_cap`, `hard_cap`: select_rules.py);
others run branches of steps and combine what these keep (`union`, `intersect`, `minus`, `add`, `cascade`).  A kept row
has a number of copies, 1 unless `repeat`, `add` or a cap says more.  Null and NaN never pass, and are counted.  Who
runs the steps over stored scores: select_steps.py.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Literal

from pipeline.config import as_mapping, config
from pipeline.errors import ConfigError, check_name
from pipeline.select_rules import (
    Balance,
    HardCap,
    Of,
    Quota,
    Ranking,
    SoftCap,
    check_amount,
    check_ranking,
    count_share,
)

NO_SCORE = "no_score"
"""Account of rows whose score is null or NaN where a step needs one."""
TEXT_TYPES = ("string", "large_string")
LIST_TYPE = re.compile(r"(?:large_)?list<\w+: u?int\d+(?: not null)?>")
"""Arrow's names for lists of whole numbers."""
SQL_TEXTS = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\"""")
SQL_NAMES = re.compile(r"`([^`]+)`|([A-Za-z_]\w*)")
"""What Spark SQL takes for texts, and for names: any between back-quotes."""
MAX_COPIES = 65_535
"""Most copies of a row; uint16 holds them."""
FIRST_FIELDS = frozenset({"where", "top"})
"""Fields of a step that manifests have said from the beginning; the others stand there when they are set."""


@config
class Top(Ranking):
    """Keep the rows with the largest values of a score column, or of a mixture of several."""

    fraction: float | None = None
    """Share of rows to keep, in [0, 1]; of what, `of` says.  Give this or `count`."""
    count: int | None = None
    """Number of rows to keep."""
    of: Of = "pool"
    """What `fraction` is a share of: all rows of the pool, or the rows that reached this step and have a score."""
    ties: Literal["exact", "datacomp"] = "exact"
    """exact: precisely n rows, equal scores by ascending uid (rows that share the last uid all pass).  datacomp: all
    rows >= the value at index n of the descending sort, so n+1 rows or more; none when a null or NaN stands there, for
    these sort last (DataComp baselines/apply_filter.py, get_threshold)."""
    lowest: bool = False
    """Keep the smallest values instead."""

    def __post_init__(self) -> None:
        check_ranking("top", self)
        check_amount(f"top by {self.label!r}", self.fraction, self.count)

    def count_wanted(self, *, num_pool: int, num_input: int) -> int:
        """Return how many rows to keep; 0.29 of 100 is 29, whatever 0.29 * 100 is in binary.

        DataComp's int(N f) has 28 there, and keeps one row more than that.
        """
        if self.count is not None:
            return self.count + (self.ties == "datacomp")
        share = (num_pool if self.of == "pool" else num_input) * (self.fraction or 0)
        return int(share) + 1 if self.ties == "datacomp" else int(round(share, 6))


@config
class AtLeast(Ranking):
    """Keep the rows whose score is `value` or more."""

    value: float
    """Threshold, rounded to the column's own type first, as numpy and so DataComp compare; Spark SQL compares a float
    column with a decimal number in double precision instead.  A mixture is compared in double precision."""

    def __post_init__(self) -> None:
        check_ranking("at_least", self)
        if math.isnan(self.value):
            raise ConfigError(f"at_least by {self.label!r}: value NaN lets no row pass. Give a number.")


@config
class Sample:
    """Keep rows by chance: those whose seeded hash of the uid is smallest, so precisely n, whatever the order.

    Rows that share the last uid all pass.
    """

    fraction: float | None = None
    """Share of rows to keep, in [0, 1]; of what, `of` says.  Give this or `count`."""
    count: int | None = None
    """Number of rows to keep."""
    of: Of = "pool"
    """What `fraction` is a share of: all rows of the pool, or the rows that reached this step."""
    seed: int = 0
    """Another seed draws other rows; with the same one a smaller sample is part of a larger one."""

    def __post_init__(self) -> None:
        check_amount("sample", self.fraction, self.count)

    def count_wanted(self, *, num_pool: int, num_input: int) -> int:
        """Return how many rows to keep."""
        return count_share(self.count, self.fraction, self.of, num_pool=num_pool, num_input=num_input)


@config
class Step:
    """One rule of a subset: a name and exactly one of the other fields.

    A branch is a list of steps that starts from the rows which reached this step; an empty branch keeps them all.
    """

    name: str
    """What the report calls it; within a branch, after the path of the branch (`walk`)."""
    where: str | None = None
    """Spark SQL boolean over score columns, e.g. "caption_words > 2 AND caption_language = 'en'"."""
    top: Top | None = None
    at_least: AtLeast | None = None
    sample: Sample | None = None
    quota: Quota | None = None
    balance: Balance | None = None
    soft_cap: SoftCap | None = None
    hard_cap: HardCap | None = None
    union: "list[list[Step]] | None" = None
    """Keep what any branch keeps, with the most copies that a branch gives it."""
    intersect: "list[list[Step]] | None" = None
    """Keep what every branch keeps, with the fewest copies that a branch gives it."""
    minus: "list[Step] | None" = None
    """Keep what these steps do not keep."""
    add: "list[list[Step]] | None" = None
    """Keep what any branch keeps, with the sum of the copies that the branches give it."""
    cascade: "list[Step] | None" = None
    """Steps in order, accounted as one and each."""
    use: str | None = None
    """The steps of another subset of the recipe, as a cascade."""
    repeat: int | None = None
    """Keep every row with so many times the copies it had."""

    def __post_init__(self) -> None:
        operators = [f.name for f in fields(self) if f.name != "name"]
        given = [name for name in operators if getattr(self, name) is not None]
        if len(given) != 1:
            found = f"not {' and '.join(given)}" if given else "it has none"
            raise ConfigError(f"select step {self.name!r}: give one of {', '.join(operators)}; {found}.")
        if given[0] in ("union", "intersect", "add") and not self.branches:
            raise ConfigError(f"select step {self.name!r}: {given[0]} needs a list of branches, each a list of steps.")
        if self.repeat is not None and self.repeat < 1:
            raise ConfigError(f"select step {self.name!r}: repeat {self.repeat} is less than 1.")

    @property
    def kind(self) -> str:
        """Name of the field that is set."""
        return next(f.name for f in fields(self) if f.name != "name" and getattr(self, f.name) is not None)

    @property
    def ranking(self) -> Ranking | None:
        """What rows are ordered or drawn by, where they are."""
        return self.top or self.at_least or self.soft_cap or self.hard_cap

    @property
    def scores(self) -> list[str]:
        """Columns of numbers that the rule names; those of SQL stand in `where`."""
        named = self.ranking or self.quota
        return named.columns if named else []

    @property
    def branches(self) -> "list[list[Step]]":
        """The step's branches; of minus and cascade the one, of a plain rule none."""
        several, one = self.union or self.intersect or self.add, self.minus if self.cascade is None else self.cascade
        return several or ([] if one is None else [one])


def walk(steps: Sequence[Step], within: str = "") -> Iterator[tuple[str, Step]]:
    """Yield (path, step) of every step, one with branches before the steps in these.

    A path is the names with slashes, and the branch's number where a step has several: `either/2/top 10 %`.
    """
    for step in steps:
        path = within + step.name
        yield path, step
        for start, branch in place_branches(step, path):
            yield from walk(branch, start)


def place_branches(step: Step, path: str) -> Iterator[tuple[str, list[Step]]]:
    """Yield each branch of the step at `path` with what the paths in it begin with."""
    for number, branch in enumerate(step.branches, 1):
        yield (f"{path}/{number}/" if len(step.branches) > 1 else f"{path}/"), branch


def is_entry_list(kind: str) -> bool:
    """Return whether a column of this Arrow type can be balanced: lists of whole numbers."""
    return LIST_TYPE.fullmatch(kind) is not None


def check_steps(steps: Sequence[Step], types: Mapping[str, str]) -> None:
    """Raise ConfigError for what no score can mend.

    That is a path that stands twice or is NO_SCORE, a column ordered that holds text, a `use` that was not expanded,
    or more than MAX_COPIES copies.  `types` maps each score column to the name of its Arrow type.
    """
    placed = list(walk(steps))
    paths = [path for path, _ in placed]
    for path, step in placed:
        if paths.count(path) > 1 or path == NO_SCORE:
            raise ConfigError(f"select step {path!r}: each step needs a name of its own, and {NO_SCORE!r} is taken.")
        _check_types(path, step, types)
        if step.use is not None:
            raise ConfigError(f"select step {path!r} uses subset {step.use!r}: put its steps in with expand_uses.")
    _count_copies(steps, 1)


def _check_types(path: str, step: Step, types: Mapping[str, str]) -> None:
    entries = step.balance.entries if step.balance else ""
    if entries in types and not is_entry_list(types[entries]):
        raise ConfigError(
            f"select step {path!r}: {entries!r} is {types[entries]}; balance needs lists of whole numbers."
        )
    for column in types.keys() & step.scores:
        kind = types[column]
        if kind in TEXT_TYPES or "list" in kind:
            what = "text" if kind in TEXT_TYPES else "lists"
            raise ConfigError(f"select step {path!r}: {column!r} holds {what}, and {step.kind} needs numbers.")
        if step.quota and column == step.quota.cluster and not kind.lstrip("u").startswith("int"):
            raise ConfigError(f"select step {path!r}: {column!r} is {kind}; the clusters of a quota are whole numbers.")


def _count_copies(steps: Sequence[Step], copies: int) -> int:
    """Return how many copies the steps can give a row that has so many; what the caps multiply is known when they ran.

    Raises ConfigError where they are more than MAX_COPIES, within a branch that gives none too.
    """
    for step in steps:
        found = [_count_copies(branch, copies) for branch in step.branches]
        if step.add is not None:
            copies = sum(found)
        elif found and step.minus is None:
            copies = max(found)
        copies *= step.repeat or 1
        check_copies(step.name, copies)
    return copies


def check_copies(name: str, copies: int) -> None:
    """Raise ConfigError when the step of this name can give a row more than MAX_COPIES copies."""
    if copies > MAX_COPIES:
        raise ConfigError(
            f"select step {name!r}: a row could get {copies:,} copies; at most {MAX_COPIES:,} are possible. "
            "Repeat less."
        )


def find_columns(steps: Sequence[Step], known: Iterable[str]) -> list[str]:
    """Return the score columns that the steps read, sorted.  Raises ConfigError when a step names none."""
    known = set(known)
    used: set[str] = set()
    for path, step in walk(steps):
        named = [*step.scores, *([step.balance.entries] if step.balance else [])]
        for column in named:
            check_name(column, known, kind=f"score column in step {path!r}")
        used.update(named)
        if step.where:
            words = {quoted or plain for quoted, plain in SQL_NAMES.findall(SQL_TEXTS.sub("", step.where))}
            used |= words & known
            if not words & known:
                near = next(iter(sorted(words)), step.where)
                check_name(near, known, kind=f"score column in step {path!r}")
    return sorted(used)


def expand_uses(subsets: Mapping[str, Sequence[Step]]) -> dict[str, list[Step]]:
    """Return the subsets with each `use: NAME` replaced by a cascade of the steps of the subset NAME.

    Raises ConfigError for a subset that is not there (did you mean), or that uses itself.
    """
    return {name: _expand(steps, subsets, (name,)) for name, steps in subsets.items()}


def _expand(steps: Sequence[Step], subsets: Mapping[str, Sequence[Step]], trail: tuple[str, ...]) -> list[Step]:
    expanded = []
    for step in steps:
        if step.use is not None:
            check_name(step.use, subsets, kind=f"subset in step {step.name!r}")
            if step.use in trail:
                raise ConfigError(f"subsets use each other in a circle: {' -> '.join([*trail, step.use])}.")
            step = Step(name=step.name, cascade=_expand(subsets[step.use], subsets, (*trail, step.use)))
        elif step.branches:
            branches = [_expand(branch, subsets, trail) for branch in step.branches]
            changed: dict[str, Any] = {step.kind: branches[0] if step.kind in ("minus", "cascade") else branches}
            step = replace(step, **changed)
        expanded.append(step)
    return expanded


def describe_steps(steps: Sequence[Step]) -> dict[str, Any]:
    """Return what of the steps decides a subset: as_config, and where DataComp's ties have null scores."""
    with_ties = any(step.top and step.top.ties == "datacomp" for _, step in walk(steps))
    return {"steps": as_config(steps)} | ({"nulls": "last"} if with_ties else {})  # they were left aside before


def as_config(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """Return the steps as plain JSON values for a manifest, fields that are not set left out.

    FIRST_FIELDS stand there always: the identity of a subset that needs no later field is what it was before these.
    """
    return [_drop_unset(as_mapping(step)) for step in steps]


def _drop_unset(value: Any) -> Any:
    if isinstance(value, list):
        return [_drop_unset(item) for item in value]
    if not isinstance(value, dict):
        return value
    later = {f.name for f in fields(Step)} - FIRST_FIELDS
    later |= {"mix", "norm"}
    unset = {k for k, v in value.items() if (k in later and v is None) or (k == "lowest" and v is False)}
    return {k: _drop_unset(v) for k, v in value.items() if k not in unset}
