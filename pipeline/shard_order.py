"""Which line goes into which shard: arithmetic alone, so that each task finds its own lines and nobody holds them all.

A line is one row to write once.  Shards take equal shares of the lines.  Lines whose uid is written once are dealt in
pool order, or in the order of a seeded permutation; the others (repeats) are dealt round the shards like cards, sorted
by uid, so that copies of a uid meet in one shard only when there are more copies than shards.
"""

import hashlib

import numpy as np

ROUNDS = 8
_MIX = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))
"""Multipliers of MurmurHash3's 64-bit finaliser (Appleby, public domain)."""


def find_edge(total: int, num_shares: int, number: int) -> int:
    """Return where share `number` of `total` lines begins; shares are equal, the last total % num_shares one larger."""
    size, larger = divmod(total, num_shares)
    return number * size + max(0, number - (num_shares - larger))


def deal(num_lines: int, num_shards: int) -> np.ndarray:
    """Return int64 (num_lines,): the shard of each repeat in the order of uids, dealt from the last shard to the first.

    Any `num_shards` neighbours get different shards, and shares grow where those of find_edge do, so no shard is dealt
    more than its share of all lines.
    """
    return num_shards - 1 - np.arange(num_lines, dtype=np.int64) % max(num_shards, 1)


def spread(uids: np.ndarray) -> np.ndarray:
    """Return the order (lines,) in which copies of one uid stand as far apart as they can; all different: as they are.

    Lines of one uid are laid evenly round a circle, starting where the first of them stands.
    """
    _, first, which, times = np.unique(uids, return_index=True, return_inverse=True, return_counts=True)
    if len(first) == len(uids):
        return np.arange(len(uids))
    by_uid = np.argsort(which, kind="stable")
    copy = np.empty(len(uids), np.int64)
    copy[by_uid] = np.arange(len(uids)) - np.repeat(np.cumsum(times) - times, times)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    place = rank[which] / len(first) + copy / times[which]
    return np.argsort(place % 1.0, kind="stable")


def permute(places: np.ndarray, total: int, seed: str) -> np.ndarray:
    """Return int64 (places,): where a permutation of range(total) takes each of `places`; decided by total and seed.

    A Feistel network over the next even number of bits; a value beyond `total` is taken on until it falls inside
    (cycle walking; Black and Rogaway 2002, "Ciphers with arbitrary finite domains").  Any part of the permutation can
    be computed alone: no memory beyond `places`, and no generator whose stream a new numpy may change.
    """
    half = max(1, ((total - 1).bit_length() + 1) // 2)
    digest = hashlib.sha512(f"{total}/{seed}".encode()).digest()
    keys = np.frombuffer(digest, "<u8", count=ROUNDS)
    values = places.astype(np.uint64)
    outside = np.ones(len(values), bool)
    while outside.any():
        values[outside] = _encrypt(values[outside], keys, half)
        outside = values >= total
    return values.astype(np.int64)


def _encrypt(values: np.ndarray, keys: np.ndarray, half_bits: int) -> np.ndarray:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    joined: np.ndarray = (left << shift) | right
    return joined


def _mix(values: np.ndarray) -> np.ndarray:
    for multiplier in _MIX:
        values = (values ^ (values >> np.uint64(33))) * multiplier
    mixed: np.ndarray = values ^ (values >> np.uint64(33))
    return mixed
