"""Webdataset tars without uids or parquet -> a pool that every stage reads; the tars' bytes stay as they are.

Each tar is linked (or copied) into OUT, and gets the parquet and stats that img2dataset would have put beside it: rows
in the tar's order, with the uid of the .json where it is one and else derived from image and caption, as pool.py does
when it reads the tar alone.  A folder of loose images is packed into tars by image_folder.py.
"""

import dataclasses
import json
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.errors import PoolError
from pipeline.intake.claim import claim_folder
from pipeline.lock import hold_lock
from pipeline.manifest import Counts, Manifest, add_counts, find_done, write_manifest
from pipeline.pool import Part, PartRows, clean_text, list_parts, pool_identity, read_part
from pipeline.schemas import (
    IMAGE_EXTENSIONS,
    KEY,
    PARQUET_SUFFIX,
    PART_PATTERN,
    REASON_MISSING_IMAGE,
    REASON_NULL_CAPTION,
    ROW,
    STATS_SUFFIX,
    TAR_SUFFIX,
    TEXT,
)
from pipeline.storage import (
    exists,
    is_local,
    join,
    list_folder,
    name_of,
    open_file,
    read_bytes,
    sweep_temporaries,
    write_atomic,
    write_bytes,
)
from pipeline.tars import BrokenTar, read_rows

IMPORT, STATE = "import.json", "_import"
FORMAT_VERSION = 1
"""Of what import writes; a pool is not refused because another stage's format moved on."""
ROWS = "rows"
OUTCOME = "winnow"
"""Key of the stats file that holds what import did, so that a part that is done need not be read again."""

Work = Callable[[Any], dict[str, Any]]
Run = Callable[[Work, Sequence[Any]], list[dict[str, Any]]]
"""run(work, items) -> work(item) of each item, in order: pipeline.spark.run_each with its session."""


@dataclasses.dataclass(frozen=True, slots=True)
class TarPlan:
    """One tar to take in, and the name it gets."""

    part: Part
    name: str


def import_tars(run: Run, tars: str, out: str, *, copy: bool = False) -> Manifest:
    """Make OUT a pool of the tars that a folder, glob, brace range or `a::b` list names; return OUT/import.json.

    Tars of one folder keep their names, those of several are numbered.  A tar that ends early gives the rows before
    that point, one without any is left out; both are named in facts["broken"].  A parquet beside a tar is used when
    pool.py can read it, else it is named in facts["unused_tables"].  facts["noted"] counts rows of the pool that have
    no image or no caption.  Raises ConfigError when OUT was begun from other tars, PoolError when there is no row.
    """
    parts = [part for part in list_parts(tars) if part.tar]
    if not parts:
        raise PoolError(f"{tars!r} names no tar. For a folder of loose images there is --images.")
    plans = name_parts(parts)
    wanted = Manifest(
        stage="import",
        config={"kind": "tars", "names": [plan.name for plan in plans]},
        parents={"tars": pool_identity(parts)},
        format_version=FORMAT_VERSION,
    )
    with hold_lock(out, "import"):
        claim_folder(out, wanted, state=STATE)
        if done := find_done(out, wanted, name=IMPORT, is_whole=partial(is_whole, out)):
            return done
        results = run(partial(import_tar, out=out, copy=copy), plans)
        return finish(out, wanted, [plan.name for plan in plans], results)


def name_parts(parts: Sequence[Part]) -> list[TarPlan]:
    """Return the parts with their names in OUT: their own when these are distinct, else contiguous numbers."""
    names = [name_of(part.tar or "").removesuffix(TAR_SUFFIX) for part in parts]
    folders = {(part.tar or "").rpartition("/")[0] for part in parts}
    if len(folders) > 1 or len(set(names)) < len(names):
        names = [PART_PATTERN.format(number) for number in range(len(parts))]
    return [TarPlan(part, name) for part, name in zip(parts, names, strict=True)]


def import_tar(plan: TarPlan, *, out: str, copy: bool) -> dict[str, Any]:
    """Put one tar into OUT with its parquet and stats, unless all is there, and return its account.

    The account: {"counts", "noted": rows by what they lack, "broken": str or None, "unused_table": str or None}.
    """
    if outcome := read_outcome(out, plan.name):
        return outcome
    tar, stem = plan.part.tar, join(out, plan.name)
    assert tar
    try:
        rows, unused_table = _read_rows(plan.part)
        noted = _note_lacks(rows, tar)
        if rows.table.num_rows:
            place_tar(tar, stem + TAR_SUFFIX, copy=copy)
            with write_atomic(stem + PARQUET_SUFFIX) as file:
                pq.write_table(rows.table.drop_columns([ROW]), file, compression="zstd")
    except OSError as error:
        return _describe_broken(f"{tar} cannot be read: {error}")
    if not rows.num_listed:
        return _describe_broken(rows.broken or f"{tar} holds no row")
    counts = Counts(read=rows.num_listed, kept=rows.table.num_rows, failed=rows.failed)
    found = {
        "counts": dataclasses.asdict(counts),
        "noted": noted,
        "broken": rows.broken,
        "unused_table": unused_table,
    }
    write_outcome(out, plan.name, found)
    return found


def _describe_broken(message: str) -> dict[str, Any]:
    return {"counts": dataclasses.asdict(Counts(read=0, kept=0)), "noted": {}, "broken": message, "unused_table": None}


def _read_rows(part: Part) -> tuple[PartRows, str | None]:
    """Return the rows of a part, and why its parquet could not be used."""
    alone = Part(part.name, part.tar, None)
    if part.table is None:
        return read_part(alone), None
    try:
        return read_part(part), None
    except PoolError as error:
        return read_part(alone), str(error)


def _note_lacks(rows: PartRows, tar: str) -> dict[str, int]:
    """Return how many rows of the table have no caption, and how many of the tar's have no image."""
    noted = Counter({REASON_NULL_CAPTION: sum(not (text or "").strip() for text in rows.table[TEXT].to_pylist())})
    left = set(rows.table[KEY].to_pylist())
    try:
        for row in read_rows(tar, contents=False, repeats=True):
            if clean_text(row.key) not in left:
                continue
            left.discard(clean_text(row.key))
            noted[REASON_MISSING_IMAGE] += not any(m.extension in IMAGE_EXTENSIONS for m in row.members)
    except BrokenTar:
        pass  # named by rows.broken when the tar gives the rows; else a later stage counts the images it misses
    return dict(sorted((+noted).items()))


def place_tar(source: str, target: str, *, copy: bool) -> None:
    """Make `target` the same bytes as `source`: a hard link where the file system can, else a copy."""
    if not copy and is_local(source) and is_local(target):
        temporary = Path(target).with_name(f".tmp-{uuid.uuid4().hex}-{name_of(target)}")
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)
            temporary.hardlink_to(Path(source).resolve())
            temporary.replace(target)
            temporary.unlink(missing_ok=True)  # replace() leaves it when both are links to one file already
            return
        except OSError:
            temporary.unlink(missing_ok=True)
    with open_file(source) as old, write_atomic(target) as new:
        shutil.copyfileobj(old, new, 1 << 20)


def read_outcome(out: str, name: str) -> dict[str, Any] | None:
    """Return what write_outcome wrote, or None when the part is not whole."""
    stem = join(out, name)
    if not exists(stem + STATS_SUFFIX):
        return None
    try:
        outcome: dict[str, Any] = json.loads(read_bytes(stem + STATS_SUFFIX))[OUTCOME]
    except (ValueError, KeyError, TypeError):
        return None
    files = (TAR_SUFFIX, PARQUET_SUFFIX) if outcome["counts"]["kept"] else ()
    return outcome if all(exists(stem + suffix) for suffix in files) else None


def write_outcome(out: str, name: str, outcome: Mapping[str, Any]) -> None:
    """Write a part's stats in img2dataset's form, its account with it; this is what makes the part done."""
    read, kept = outcome["counts"]["read"], outcome["counts"]["kept"]
    stats = {"count": read, "successes": kept, "failed_to_download": 0, "failed_to_resize": 0, OUTCOME: outcome}
    write_bytes(join(out, name + STATS_SUFFIX), json.dumps(stats, sort_keys=True).encode())


def finish(
    out: str,
    wanted: Manifest,
    names: Sequence[str],
    results: Sequence[Mapping[str, Any]],
    *,
    planned: Counts | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write and return the manifest of an import; `planned` are rows that failed before any part was made.

    Raises PoolError when no row came in at all.
    """
    named = list(zip(names, results, strict=True))
    broken = {name: result["broken"] for name, result in named if result["broken"]}
    total = add_counts([*(Counts(**r["counts"]) for r in results), *([planned] if planned else [])])
    if not total.kept:
        why = "; ".join([*broken.values(), *(f"{reason} {n:,}" for reason, n in total.failed.items())][:5])
        raise PoolError(f"nothing was imported into {out!r}: {why or 'there is no row'}.")
    noted: Counter[str] = sum((Counter(result["noted"]) for result in results), Counter())
    found = {
        "parts": [name for name, result in named if result["counts"]["kept"]],
        "noted": dict(sorted(noted.items())),
        "broken": broken,
        "unused_tables": {name: result["unused_table"] for name, result in named if result["unused_table"]},
    }
    manifest = dataclasses.replace(wanted, counts={ROWS: total}, facts=found | dict(facts or {}))
    sweep_temporaries(out)
    write_manifest(out, manifest, name=IMPORT)
    return manifest


def is_whole(out: str, done: Manifest) -> bool:
    """Return whether every part that a manifest of an import speaks of is there."""
    present = {name_of(url) for url in list_folder(out)}
    return all(name + s in present for name in done.facts["parts"] for s in (TAR_SUFFIX, PARQUET_SUFFIX, STATS_SUFFIX))
