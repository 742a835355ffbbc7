"""Evaluation sets from the hub -> folders in the hub's layout, resumable by byte, every file proven by its hash.

The sets are djghosh/wds_<task>_test (webdataset tars) and, for retrieval and WinoGAViL, nlphuji/<name>: there the hub
holds a table and a zip of images beside a loading script, which is neither fetched nor run (`datasets` 4 refuses it,
too).  Only files with the names that evaluation reads are taken, so no answer of a server can write anywhere else.
Source: mlfoundations/datacomp at 4a8df19, download_evalsets.py, which fetches no table and checks only what is there.

A set's source.json (source.py) names its commit and proven files; a proven file is not hashed again until its size or
time changes.
"""

import json
import logging
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval38.hub import PART_SUFFIX, Hub, HubFile, Unreachable, fetch_file, find_commit, list_files
from eval38.rows import CLASSES_FILE, NUM_TARS_FILE, TEMPLATES_FILE, TYPE_FILE
from eval38.source import describe_proven, read_proven
from eval38.tasks import Task, folder_of
from pipeline.errors import ConfigError, StageError
from pipeline.schemas import EVAL_SOURCE
from pipeline.storage import CHUNK_BYTES, is_local, join, write_bytes

log = logging.getLogger("winnow")

GB = 10**9
FILES_AT_ONCE = 4
SPARE_BYTES = 1 << 30
"""Left free on the disk."""
TABLE_KINDS = ("retrieve", "winogavil")
"""Kinds whose sets are tables with archives."""
REQUIRED = (CLASSES_FILE, TEMPLATES_FILE, NUM_TARS_FILE)
TAR = re.compile(r"test/(0|[1-9][0-9]{0,4})\.tar")
TABLE = re.compile(r"(?:test/)?[A-Za-z0-9_][A-Za-z0-9._-]*\.(?:csv|zip)")
PARQUET = re.compile(r"(?:data/|test/)?(test[A-Za-z0-9._-]*\.parquet)")


@dataclass(frozen=True, slots=True)
class WantedFile:
    """A file of a set, and what of it is there."""

    file: HubFile
    target: Path
    done: bool
    """It is there and proven."""
    have: int
    """Bytes that need not be fetched."""


@dataclass(frozen=True, slots=True)
class WantedSet:
    """A task's set on the hub."""

    task: Task
    repo: str
    commit: str
    folder: Path
    files: tuple[WantedFile, ...]

    @property
    def size(self) -> int:
        """Bytes of the whole set."""
        return sum(wanted.file.size for wanted in self.files)

    @property
    def missing(self) -> int:
        """Bytes still to fetch."""
        return sum(wanted.file.size - wanted.have for wanted in self.files)


def repo_of(task: Task) -> str:
    """Return the hub repository of a task's set."""
    return f"nlphuji/{task.key.partition('/')[2]}" if task.kind in TABLE_KINDS else f"djghosh/{folder_of(task)}"


def plan_set(hub: Hub, task: Task, out: str, *, revision: str = "main") -> WantedSet:
    """Return what the hub holds of a task's set and what of it is missing in `out`; files that are there are hashed.

    Raises ConfigError unless `out` is a local folder, StageError when the hub cannot be asked or lacks a file.
    """
    if not out or not is_local(out):
        raise ConfigError(
            f"--out {out!r} should be a local folder: half a file is only kept there. Copy it afterwards."
        )
    repo, folder = repo_of(task), Path(join(out, folder_of(task)))
    commit = find_commit(hub, repo, revision)
    chosen = choose_files(task, list_files(hub, repo, commit))
    proven = read_proven(str(folder))
    files = tuple(_look(file, folder / name, proven.get(name)) for name, file in sorted(chosen.items()))
    return WantedSet(task, repo, commit, folder, files)


def plan_sets(
    hub: Hub, tasks: Sequence[Task], out: str, *, revision: str = "main"
) -> tuple[list[WantedSet], list[str]]:
    """Return the plan of each set, and one message per set that the hub refuses or does not hold: the others go on.

    Raises Unreachable when the hub does not answer, ConfigError as plan_set.
    """
    sets, failed = list[WantedSet](), list[str]()
    for task in tasks:
        try:
            sets.append(plan_set(hub, task, out, revision=revision))
        except Unreachable:
            raise
        except StageError as error:
            failed.append(f"{task.key}: {error}")
            log.warning(failed[-1])
    return sets, failed


def choose_files(task: Task, files: Sequence[HubFile]) -> dict[str, HubFile]:
    """Return the files that evaluation reads, by their path in the set's folder.

    Names are matched whole: anything else a repository holds is left there.  Raises StageError where one is missing.
    """
    if task.kind in TABLE_KINDS:
        parquet = {f"test/{m[1]}": file for file in files if (m := PARQUET.fullmatch(file.path))}
        found = parquet or {file.path: file for file in files if TABLE.fullmatch(file.path)}
        if not parquet and {Path(name).suffix for name in found} != {".csv", ".zip"}:
            raise StageError(f"{repo_of(task)} holds no table with a zip of images: {_spell(files)}.")
        return found
    names = (*REQUIRED, TYPE_FILE)
    found = {file.path: file for file in files if file.path in names or TAR.fullmatch(file.path)}
    num_tars = sum(1 for name in found if TAR.fullmatch(name))
    lacking = [name for name in (*REQUIRED, *(f"test/{n}.tar" for n in range(max(num_tars, 1)))) if name not in found]
    if lacking:
        raise StageError(f"{repo_of(task)} lacks {', '.join(lacking)}; it holds {_spell(files)}.")
    return found


def _spell(files: Sequence[HubFile]) -> str:
    return ", ".join(repr(file.path) for file in files)[:500] or "nothing"


def _look(file: HubFile, target: Path, proven: dict[str, Any] | None) -> WantedFile:
    """Return what of a file is there; one of the right size that nobody has proven yet is hashed."""
    if target.is_file():
        if proven == describe_proven(str(target), file.algorithm, file.hash) or _hash_file(file, target) == file.hash:
            return WantedFile(file, target, done=True, have=file.size)
        log.warning("%s is not the hub's file: it is fetched again", target)
    part = target.with_name(f".{target.name}{PART_SUFFIX}")
    have = part.stat().st_size if part.is_file() else 0
    return WantedFile(file, target, done=False, have=have if have <= file.size else 0)


def _hash_file(file: HubFile, target: Path) -> str | None:
    if target.stat().st_size != file.size:
        return None
    digest = file.start_digest()
    with target.open("rb") as content:
        while piece := content.read(CHUNK_BYTES):
            digest.update(piece)
    return str(digest.hexdigest())


def check_room(sets: Sequence[WantedSet], out: str, *, max_gb: float | None) -> None:
    """Raise ConfigError when what is missing is more than `max_gb` or than the disk takes."""
    missing = sum(wanted.missing for wanted in sets)
    if max_gb is not None and not missing <= max_gb * GB:  # also for nan
        raise ConfigError(f"{missing / GB:.2f} GB are missing, more than --max-gb {max_gb:g}. Name fewer tasks.")
    folder = Path(out).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if missing and missing + SPARE_BYTES > free:
        raise ConfigError(
            f"{missing / GB:.2f} GB are missing, but {folder} has {free / GB:.2f} GB free and {SPARE_BYTES / GB:.1f} "
            "are left free. Name fewer tasks or another --out."
        )


def fetch_sets(hub: Hub, sets: Sequence[WantedSet], *, quiet: bool = False) -> list[str]:
    """Fetch what the sets lack, a few files at a time; return one message per file that could not be had.

    A broken file stops neither its set nor the others.  Ctrl-C leaves whole files and resumable parts.
    """
    failed: list[str] = []
    size, missing = (sum(getattr(wanted, which) for wanted in sets) for which in ("size", "missing"))
    with tqdm(total=size, initial=size - missing, unit="B", unit_scale=True, disable=quiet) as progress:
        for wanted in sets:
            progress.set_description(wanted.task.key)
            failed += _fetch_set(hub, wanted, progress.update)
    return failed


def _fetch_set(hub: Hub, wanted: WantedSet, advance: Callable[[int], object]) -> list[str]:
    stop, lock, failed = threading.Event(), threading.Lock(), list[str]()

    def count(num_bytes: int) -> None:
        with lock:
            advance(num_bytes)

    def fetch(one: WantedFile) -> None:
        count(-one.have)
        fetch_file(hub, wanted.repo, wanted.commit, one.file, one.target, advance=count, stop=stop)

    proven = [one for one in wanted.files if one.done]
    _write_source(wanted, proven)
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        futures = {pool.submit(fetch, one): one for one in wanted.files if not one.done}
        try:
            for future in as_completed(futures):
                if error := future.exception():
                    failed.append(f"{wanted.task.key}: {error}")
                    continue
                proven.append(futures[future])
                _write_source(wanted, proven)
        except BaseException:  # Ctrl-C: the threads end at their next piece
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def _write_source(wanted: WantedSet, proven: Iterable[WantedFile]) -> None:
    names = {
        str(one.target.relative_to(wanted.folder)): describe_proven(str(one.target), one.file.algorithm, one.file.hash)
        for one in proven
    }
    content = {"repo": wanted.repo, "commit": wanted.commit, "files": dict(sorted(names.items()))}
    write_bytes(str(wanted.folder / EVAL_SOURCE), (json.dumps(content, indent=2) + "\n").encode())
