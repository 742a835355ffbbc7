"""The rules of select that look at many rows at once, written the obvious way, on Python dicts."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from pipeline.select import Step
from pipeline.select_rules import Balance, HardCap, Quota, Ranking, SoftCap

Rows = Mapping[int, dict[str, Any]]
GOLDEN = 0x9E3779B97F4A7C15


def is_number(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def read_ranking(rows: Rows, rule: Ranking) -> dict[int, float | None]:
    """The score of each row; that of a mixture is added up in the order of the columns' names."""
    if rule.mix is None:
        return {n: row[rule.by] for n, row in rows.items()}
    whole = {n: row for n, row in rows.items() if all(is_number(row[c]) for c in rule.mix)}
    total = dict.fromkeys(whole, 0.0)
    for column in sorted(rule.mix):
        values = [row[column] for row in whole.values()]
        offset, scale = 0.0, 1.0
        if rule.norm == "minmax":
            offset, scale = min(values, default=0), max(values, default=0) - min(values, default=0)
        elif rule.norm == "z":
            exact, num = [Fraction(v) for v in values], max(len(values), 1)
            mean = sum(exact, Fraction(0)) / num
            offset, scale = float(mean), math.sqrt(sum(((v - mean) ** 2 for v in exact), Fraction(0)) / num)
        for n, row in whole.items():
            total[n] += rule.mix[column] * (row[column] - offset) / scale if scale else 0
    return {n: total.get(n) for n in rows}


def choose_jointly(rows: Rows, step: Step, num_pool: int) -> tuple[list[int], int, dict[str, Any]]:
    """(rows kept, number without what the step needs, what it found) of a quota or a balance."""
    if step.quota:
        return _fill_quotas(rows, step.quota, num_pool)
    assert step.balance
    return _throw_coins(rows, step.balance)


def _fill_quotas(rows: Rows, rule: Quota, num_pool: int) -> tuple[list[int], int, dict[str, Any]]:
    clusters: dict[int, list[int]] = {}
    for n, row in rows.items():
        if row[rule.cluster] is not None and row[rule.cluster] >= 0 and is_number(row[rule.distance]):
            clusters.setdefault(row[rule.cluster], []).append(n)
    num = sum(map(len, clusters.values()))
    amount = rule.count if rule.count is not None else (num_pool if rule.of == "pool" else num) * (rule.fraction or 0)
    quotas = allot(rows, clusters, rule, min(int(round(amount, 6)), num))
    kept: list[int] = []
    for cluster, members in clusters.items():
        sign = {"hard": -1, "easy": 1}.get(rule.keep, 0)

        def order(n: int, sign: int = sign) -> tuple[float, int]:
            uid = rows[n]["uid"]
            return (sign * rows[n][rule.distance], int(uid, 16)) if sign else (0, shuffle(uid, rule.seed))

        members = sorted(members, key=order)
        first = members[: quotas[cluster]]
        kept += [n for n in members if first and order(n) <= order(first[-1])]
    of_cluster = [sum(n in kept for n in members) for members in clusters.values()]
    ends = {"fewest": min(of_cluster), "most": max(of_cluster)} if clusters else {}
    return kept, len(rows) - num, {"clusters": len(clusters)} | ends


def allot(rows: Rows, clusters: Mapping[int, Sequence[int]], rule: Quota, wanted: int) -> dict[int, int]:
    """The quota of each cluster: DBP's problem solved by halving an interval, then largest remainders."""
    if not wanted:
        return dict.fromkeys(clusters, 0)
    ids = sorted(clusters)
    complexity = []
    for j in ids:
        isolations = [rows[n][rule.isolation] for n in clusters[j] if is_number(rows[n][rule.isolation])]
        distances = [rows[n][rule.distance] for n in clusters[j]]
        inter = sum(isolations) / len(isolations) if isolations else math.nan
        complexity.append(inter * sum(distances) / len(distances))
    known = [c for c in complexity if not math.isnan(c)]
    mean = sum(known) / len(known) if known else 0
    weights = [math.exp((mean if math.isnan(c) else c) / rule.temperature) for c in complexity]
    aims = [wanted * w / sum(weights) for w in weights]
    most = [len(clusters[j]) for j in ids]
    least = math.floor(rule.min_share * wanted / len(ids)) if rule.min_share else min(1, wanted // len(ids))
    bounds = [(min(least, size - 1), size) for size in most]
    low, high = -1e7, 1e7
    for _ in range(200):
        middle = (low + high) / 2
        values = [min(max(aim + middle, a), b) for aim, (a, b) in zip(aims, bounds, strict=True)]
        low, high = (middle, high) if sum(values) < wanted else (low, middle)
    rounded = [round(v, 6) for v in values]
    quotas = [math.floor(v) for v in rounded]
    order = sorted(range(len(ids)), key=lambda j: (quotas[j] - rounded[j], j))
    for j in [j for j in order if quotas[j] < most[j]][: wanted - sum(quotas)]:
        quotas[j] += 1
    return dict(zip(ids, quotas, strict=True))


def _throw_coins(rows: Rows, rule: Balance) -> tuple[list[int], int, dict[str, Any]]:
    listed = {n: row for n, row in rows.items() if row[rule.entries] is not None}
    counts: dict[int, int] = {}
    for row in listed.values():
        for entry in row[rule.entries]:
            counts[entry] = counts.get(entry, 0) + 1

    def keeps(uid: str, entry: int) -> bool:
        coin = mix((shuffle(uid, rule.seed) // 2**64 + (entry + 1) * GOLDEN) % 2**64)
        return counts[entry] <= rule.t or coin * counts[entry] < rule.t * 2**64

    kept = [n for n, row in listed.items() if any(keeps(row["uid"], entry) for entry in row[rule.entries])]
    frequent = sum(count > rule.t for count in counts.values())
    empty = sum(not row[rule.entries] for row in listed.values())
    return kept, len(rows) - len(listed), {"entries": len(counts), "frequent": frequent, "without_entry": empty}


def draw_copies(rows: Rows, rule: SoftCap | HardCap, num_pool: int) -> tuple[dict[int, int], int]:
    """(row -> how often it is drawn, number of rows without a score) of a cap, one race after the other."""
    scores = {n: score for n, score in read_ranking(rows, rule).items() if is_number(score)}
    best: dict[str, float] = {}
    for n, score in scores.items():
        best[rows[n]["uid"]] = max(score, best.get(rows[n]["uid"], -math.inf))
    amount = rule.count if rule.count is not None else (num_pool if rule.of == "pool" else len(scores)) * rule.fraction
    z = {uid: score / rule.temperature for uid, score in best.items()}
    total = int(round(amount, 6)) if best else 0
    draws = race_softly(z, rule, total) if isinstance(rule, SoftCap) else race_hard(z, rule, total)
    return {n: draws[rows[n]["uid"]] for n in scores}, len(rows) - len(scores)


def draw_time(uid: str, seed: int, turn: int) -> float:
    """An exponential variate, the same for the same words."""
    word = mix((shuffle(uid, seed) // 2**64 + (turn + 1) * GOLDEN) % 2**64)
    return -math.log1p(-((word // 4096 + 0.5) * 2.0**-52))


def race_softly(z: dict[str, float], rule: SoftCap, total: int) -> dict[str, int]:
    z, draws, turn = dict(z), dict.fromkeys(z, 0), 0
    while total:
        times = {uid: math.log(draw_time(uid, rule.seed, turn)) - z[uid] for uid in z}
        batch = sorted(z, key=lambda uid: (times[uid], uid))[: min(rule.batch, total)]
        for uid in batch:
            draws[uid] += 1
            z[uid] -= rule.alpha
        total, turn = total - len(batch), turn + 1
    return draws


def race_hard(z: dict[str, float], rule: HardCap, total: int) -> dict[str, int]:
    arrivals = []
    for uid in z:
        times = np.cumsum([draw_time(uid, rule.seed, turn) for turn in range(rule.cap)])
        arrivals += [(math.log(time) - z[uid], uid) for time in times]
    drawn = [uid for _, uid in sorted(arrivals)[:total]]
    return {uid: drawn.count(uid) for uid in z}


def mix(word: int) -> int:
    """The end of splitmix64."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
    return word ^ (word >> 31)


def shuffle(uid: str, seed: int) -> int:
    """The number by which rows are sampled: four Feistel rounds over the halves of a uid, keys by splitmix64."""
    left, right = int(uid[:16], 16), int(uid[16:], 16)
    for turn in (1, 2, 3, 4):
        key = mix((seed + turn * GOLDEN) % 2**64)
        left, right = right, left ^ mix((right + key) % 2**64)
    return (left << 64) | right
