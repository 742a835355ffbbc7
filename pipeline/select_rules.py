"""What rows are ordered by and how many are wanted; and the rules that look at many rows at once, with their papers.

Soft and hard caps draw rows with repetition, quotas spread them over clusters, balancing spreads them over the words of
their captions.  select.py has the step that says one of these; docs/SELECT.md has an example of each.
"""

import math
from typing import Literal

from pipeline.config import config
from pipeline.errors import ConfigError

Of = Literal["pool", "input"]
Norm = Literal["minmax", "z", "none"]


@config
class Ranking:
    """What rows are ordered by: one score column, or a weighted sum of several."""

    by: str | None = None
    """Score column; larger is better.  Give this or `mix`."""
    mix: dict[str, float] | None = None
    """Score column -> its weight in the sum."""
    norm: Norm | None = None
    """What is done to each column of `mix` first, over the rows that reach the step with a number in all of them.
    minmax: (x - min) / (max - min).  z: (x - mean) / standard deviation.  A column of one value adds 0 in both.
    none: the numbers as they are."""

    @property
    def columns(self) -> list[str]:
        """Score columns that it reads, sorted."""
        return sorted(self.mix) if self.mix else [self.by or ""]

    @property
    def label(self) -> str:
        """`clip`, or `0.5 clip + 0.5 sieve (minmax)`."""
        if not self.mix:
            return self.by or ""
        return " + ".join(f"{weight:g} {name}" for name, weight in sorted(self.mix.items())) + f" ({self.norm})"


@config
class Draws(Ranking):
    """Draw rows with probabilities that grow with their scores; a row's copies are multiplied by its draws."""

    count: int | None = None
    """Number of draws, the copies that come out of rows with one copy each.  Give this or `fraction`."""
    fraction: float | None = None
    """Number of draws as a share, which may exceed 1; of what, `of` says."""
    of: Of = "pool"
    """What `fraction` is a share of: all rows of the pool, or the rows that reached this step and have a score."""
    temperature: float = 1.0
    """What scores are divided by.  FLYT's scores are logits already, and need none."""
    seed: int = 0
    """Another seed draws other rows."""

    def check(self, kind: str) -> None:
        """Raise ConfigError for a ranking, an amount or a temperature that cannot be."""
        check_ranking(kind, self)
        check_amount(f"{kind} by {self.label!r}", self.fraction, self.count, most=65_535)
        _check_temperature(f"{kind} by {self.label!r}", self.temperature)

    def count_wanted(self, *, num_pool: int, num_input: int) -> int:
        """Return how many draws to make."""
        return count_share(self.count, self.fraction, self.of, num_pool=num_pool, num_input=num_input)


@config
class SoftCap(Draws):
    """Draw rows with repetition; each draw of a row makes its next one less likely.

    Soft Cap Sampling (FLYT, Shechter and Carmon 2025, arXiv:2503.08805, examples.ipynb): z = score / temperature; until
    n rows are drawn, a batch is drawn without replacement with probabilities softmax(z), and z of its rows falls by
    alpha.  A row's copies are multiplied by how often it is drawn; one that is never drawn is dropped.
    """

    alpha: float = 0.15
    """What a row's z loses with each draw."""
    batch: int = 100_000
    """Draws between two looks at z; at most as many as there are rows.  The last batch is cut to the number wanted."""

    def __post_init__(self) -> None:
        self.check("soft_cap")
        if not 0 <= self.alpha < math.inf or self.batch < 1:
            raise ConfigError(f"soft_cap: alpha {self.alpha} should be 0 or more, and batch {self.batch} 1 or more.")


@config
class HardCap(Draws):
    """Draw rows with replacement, with probabilities softmax(score / temperature), until each row has `cap` copies.

    Hard cap sampling (FLYT, as above).  A row's copies are multiplied by how often it is drawn; one that is never drawn
    is dropped.  At most cap x rows are drawn.
    """

    cap: int = 15
    """Most draws of one row."""

    def __post_init__(self) -> None:
        self.check("hard_cap")
        if self.cap < 1:
            raise ConfigError(f"hard_cap: cap {self.cap} is less than 1.")


@config
class Quota:
    """Keep of each cluster a number of rows that grows with how spread out the cluster is, and how far from others.

    Density-based pruning (DBP, Abbas et al. 2024, arXiv:2401.04578).  Cluster j has complexity C_j = mean distance x
    mean isolation and share P = softmax(C / temperature); of n rows it keeps n_j, the nearest whole numbers to n P_j
    with least(n_j) <= n_j <= rows of j.
    """

    cluster: str
    """Column of whole numbers: the row's cluster.  Null or less than 0: it has none."""
    distance: str
    """Column: distance of the row to its cluster's centroid, 1 - cosine or any that lies within 64 of 0."""
    isolation: str
    """Column: mean distance of the row's centroid to the centroids nearest to it, alike in all rows of a cluster.  A
    cluster that has none gets the mean complexity of the others."""
    fraction: float | None = None
    """Share of rows to keep, in [0, 1]; of what, `of` says.  Give this or `count`."""
    count: int | None = None
    """Number of rows to keep."""
    of: Of = "pool"
    """What `fraction` is a share of: all rows of the pool, or the rows that reached this step with a cluster and a
    distance."""
    temperature: float = 0.5
    """Of the softmax over complexities; the larger, the more even the quotas."""
    keep: Literal["hard", "easy", "random"] = "hard"
    """Which rows of a cluster: the farthest from the centroid, the nearest, or any.  Equal distances by ascending
    uid."""
    min_share: float = 0.5
    """A cluster keeps at least floor(min_share n / clusters) rows, or all but one where it has no more; with 0 it keeps
    at least one where it has two."""
    seed: int = 0
    """Of `keep: random`."""

    def __post_init__(self) -> None:
        check_amount(f"quota over {self.cluster!r}", self.fraction, self.count)
        if not 0 <= self.min_share <= 1:
            raise ConfigError(f"quota over {self.cluster!r}: min_share {self.min_share} is not in [0, 1].")
        _check_temperature(f"quota over {self.cluster!r}", self.temperature)

    @property
    def columns(self) -> list[str]:
        """Score columns that it reads, sorted."""
        return sorted({self.cluster, self.distance, self.isolation})

    def count_wanted(self, *, num_pool: int, num_input: int) -> int:
        """Return how many rows to keep."""
        return count_share(self.count, self.fraction, self.of, num_pool=num_pool, num_input=num_input)


@config
class Balance:
    """Thin out rows that have only frequent entries: keep a row if the coin of any of its entries says so.

    MetaCLIP (Xu et al. 2024, arXiv:2309.16671, metaclip/balancing.py): entry e of c_e rows has a coin of probability
    min(1, t / c_e).  A row without an entry is dropped.
    """

    entries: str
    """Column of lists of whole numbers: the metadata entries that the row's caption has, each once."""
    t: int = 20_000
    """Most rows that an entry is expected to keep on its own account.  20,000 for 400 M rows; MetaCLIP's code names
    170,000 for more."""
    seed: int = 0
    """Another seed throws other coins."""

    def __post_init__(self) -> None:
        if self.t < 1:
            raise ConfigError(f"balance over {self.entries!r}: t {self.t} is less than 1.")


def count_share(count: int | None, fraction: float | None, of: Of, *, num_pool: int, num_input: int) -> int:
    """Return the number that a rule asks for; 0.29 of 100 is 29, whatever 0.29 * 100 is in binary."""
    if count is not None:
        return count
    return int(round((num_pool if of == "pool" else num_input) * (fraction or 0), 6))


def check_ranking(kind: str, rule: Ranking) -> None:
    """Raise ConfigError unless the rule names one column, or columns, weights and what to do to them."""
    if (rule.by is None) == (not rule.mix):
        raise ConfigError(f"{kind}: give `by` with one score column, or `mix` with some and their weights.")
    if (rule.norm is None) == bool(rule.mix):
        raise ConfigError(f"{kind}: `norm` is minmax, z or none where there is a `mix`, and absent elsewhere.")
    for name, weight in (rule.mix or {}).items():
        if not math.isfinite(weight) or weight == 0:
            raise ConfigError(f"{kind}: weight {weight} of {name!r} should be a number other than 0.")


def check_amount(what: str, fraction: float | None, count: int | None, *, most: float = 1) -> None:
    """Raise ConfigError unless there is either a fraction in [0, most] or a count."""
    if (fraction is None) == (count is None):
        raise ConfigError(f"{what}: give either fraction or count.")
    if fraction is not None and not 0 <= fraction <= most:
        raise ConfigError(f"{what}: fraction {fraction} is not in [0, {most}].")
    if count is not None and count < 0:
        raise ConfigError(f"{what}: count {count} is negative.")


def _check_temperature(what: str, temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ConfigError(f"{what}: temperature {temperature} should be more than 0.")
