"""A subset file as anybody left it -> one in which DataComp's resharder and winnow find every row.

The resharder takes an .npy of `u8,u8` or, under any name, the bare bytes of one, and does not look at the order
(resharder.py:661-673, 927-929).
"""

from dataclasses import replace
from functools import partial

import numpy as np

from pipeline.datacomp.findings import NOTE, WARNING, Finding, Section
from pipeline.datacomp.uid_sets import find_disorder, look_up, write_sorted
from pipeline.errors import ConfigError, PoolError
from pipeline.filesystem import find_place
from pipeline.manifest import Counts, Manifest, find_done, read_manifest, write_manifest
from pipeline.storage import exists, fingerprint, is_local, join, open_file, remove, sha256_of_file
from pipeline.subset import NUMPY_MAGIC, SUBSET_SUFFIX, open_subset
from pipeline.uid import UID_BYTES, UID_DTYPE

STAGE = "import-datacomp"
HEAD_BYTES = 1 << 10
TEXT_BYTES = b"\t\n\r" + bytes(range(32, 127))


def open_multiset(url: str) -> tuple[np.ndarray, bool]:
    """Return the uids (rows,) of UID_DTYPE, mapped and in whatever order, and whether the file is bare bytes.

    Raises PoolError when it is absent, of another type, or bare bytes that are no uids.
    """
    if not exists(url):
        raise PoolError(f"there is no subset file at {url!r}.")
    with open_file(url) as file:
        head = file.read(HEAD_BYTES)
    if head.startswith(NUMPY_MAGIC):
        return open_subset(url), False
    if head and not head.translate(None, TEXT_BYTES):
        raise PoolError(f"{url} is text. A subset file is numpy.save of an array of type {UID_DTYPE.descr}.")
    num_bytes = fingerprint(url)["size"]
    if not head or num_bytes % UID_BYTES:
        raise PoolError(f"{url} has no .npy header and {num_bytes:,} bytes, which is no whole number of 16-byte uids.")
    return (np.memmap(url, UID_DTYPE, "r") if is_local(url) else open_subset(url)), True


def bring_in_subset(url: str, name: str, out: str, scratch: str) -> Section:
    """Write OUT/<name>.npy, the same multiset of uids sorted, and OUT/<name>.json as its manifest; tell what was found.

    A file that np.save made of sorted uids keeps its bytes.  Raises PoolError when it is no subset file, ConfigError
    when OUT has a <name>.npy without a manifest, StageError when that is another stage's.
    """
    uids, is_bare = open_multiset(url)
    made, manifest_name = join(out, name + SUBSET_SUFFIX), f"{name}.json"
    wanted = Manifest(stage=STAGE, config={"name": name}, parents={"subset": sha256_of_file(url)})
    is_ours = exists(join(out, manifest_name))
    if exists(made) and not is_ours:
        raise ConfigError(f"{made} is there and has no manifest, so it is left as it is. Name another --out.")
    done = find_done(out, wanted, name=manifest_name, is_whole=partial(_is_whole, made))
    if done is None:
        merged = write_sorted(made, uids, scratch)
        facts = {"rows": merged.num_copies, "uids": merged.num_uids, "copies": merged.num_copies}
        counts = {"rows": Counts(read=len(uids), kept=merged.num_copies)}
        done = replace(wanted, counts=counts, facts=facts | {"sha256": merged.sha256, "thresholds": {}})
        write_manifest(out, done, name=manifest_name)
    findings = _judge(name, uids, done.facts["uids"], is_bare=is_bare)
    numbers = {"rows": len(uids), "uids": done.facts["uids"]}
    facts = {"sha256": done.facts["sha256"]}
    return Section(done.counts["rows"], numbers, facts, findings, made, wanted.parents["subset"])


def remove_subset(url: str, name: str, out: str) -> None:
    """Delete OUT/<name>.npy and its manifest if an import made them, unless `url`, which cannot be read, is that file.

    Raises StageError when OUT/<name>.json is no manifest.
    """
    made, manifest_name = join(out, name + SUBSET_SUFFIX), f"{name}.json"
    found = read_manifest(out, name=manifest_name)
    if found is not None and found.stage == STAGE and find_place(url) != find_place(made):
        remove(made)
        remove(join(out, manifest_name))


def _is_whole(url: str, done: Manifest) -> bool:
    return exists(url) and sha256_of_file(url) == done.facts["sha256"]


def _judge(name: str, uids: np.ndarray, num_uids: int, *, is_bare: bool) -> list[Finding]:
    findings, where = [], f"subset {name}"
    num_falls, first = find_disorder(uids)
    if num_falls:
        looked_up, found = look_up(uids)
        message = f"out of order in {num_falls:,} places, first at row {first:,}"
        loss = f"DataComp's resharder finds {found:,} of {looked_up:,} of its uids, repeats those, and says nothing"
        findings.append(Finding(WARNING, where, f"{message}: {loss}. Here it is sorted; reshard what was made of it."))
    if len(uids) > num_uids:
        message = f"{len(uids) - num_uids:,} rows repeat a uid: the image is written as often"
        findings.append(Finding(NOTE, where, f"{message}."))
    if is_bare:
        findings.append(Finding(NOTE, where, f"bare bytes, read as {len(uids):,} uids; here it has an .npy header."))
    if not len(uids):
        findings.append(Finding(WARNING, where, "it has no uid at all."))
    return findings
