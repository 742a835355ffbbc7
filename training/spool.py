"""Remote shards -> local copies, brought whole and ahead of the steps that need them, and deleted after.

One request for each image is slow and dear on an object store.  Where an order comes from few shards at a time
(samplers.py: window_rows) each shard is read once a window, by a few large requests, while the steps before it go on.
The loader's processes read the copies by position.  What was not brought is read from the store by position too: a row
that changed places with one of another window, a row in place of an unreadable one, a shard of which fewer than
MIN_SHARE of the rows are needed, or whose copy failed.  So a batch never depends on what is here.

A process holds the shards of about two windows, the one it trains on and the next, and of several processes each little
more than its part of them: 2 x window_shards x bytes of a shard / processes, on the disk of TMPDIR, or in main memory
where that is /dev/shm.  Main memory otherwise holds NUM_STREAMS requests.
"""

import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pipeline.errors import PoolError
from pipeline.filesystem import explained, find_filesystem
from pipeline.storage import is_local
from training.index import RowIndex, TarReader

log = logging.getLogger("winnow")
PREFIX, LOCK = "winnow-spool-", "lock"
MIN_SHARE = 1 / 16
"""A shard of which fewer of its rows are needed is not brought."""
NUM_STREAMS = 4
"""Shards on their way at a time; s3fs asks for several parts of each."""
LOOK_SECONDS = 0.005


class Spool:
    """The copies of one process; their folder is locked while it lives, so that another may delete what it leaves."""

    def __init__(self, index: RowIndex, rows_of: Callable[[int], np.ndarray], *, steps: range, ahead: int) -> None:
        """`rows_of` tells the rows of a step; shards of the next `ahead` steps are here or on their way."""
        self.index, self.rows_of, self.steps, self.ahead = index, rows_of, steps, ahead
        self.num_rows_T = np.bincount(index.tar_N, minlength=len(index.urls))
        self.folder, self._lock = _open_folder()
        self._planned = steps.start
        self._last: dict[int, int] = {}
        self._needed: Counter[int] = Counter()
        self._waiting: list[int] = []
        self._brought: dict[int, Future[None] | None] = {}
        self._streams: ThreadPoolExecutor | None = None
        self.go_on(steps.start)

    def start(self) -> None:
        """Begin to bring shards; what forks before this has no thread of it."""
        self._streams = ThreadPoolExecutor(NUM_STREAMS, thread_name_prefix="spool")
        self._bring_waiting()

    def go_on(self, step: int) -> None:
        """Plan the steps up to `ahead` after that one, and delete what is needed before it only."""
        while self._planned < min(self.steps.stop, step + self.ahead):
            self._plan(self._planned)
            self._planned += 1
        for tar in [tar for tar, last in self._last.items() if last < step]:
            self._drop(tar)
        self._bring_waiting()

    def close(self) -> None:
        """Delete all copies."""
        if self._streams:
            self._streams.shutdown(cancel_futures=True)
        shutil.rmtree(self.folder)
        os.close(self._lock)

    def _plan(self, step: int) -> None:
        """Note what a step needs; a marker tells the loader's processes which shards to wait for."""
        tars, times = np.unique(self.index.tar_N[self.rows_of(step)], return_counts=True)
        for tar, num in zip(tars.tolist(), times.tolist(), strict=True):
            self._last[tar] = step
            self._needed[tar] += num
            is_wanted = self._needed[tar] >= MIN_SHARE * self.num_rows_T[tar]
            if is_wanted and tar not in self._brought and not is_local(self.index.urls[tar]):
                _place(self.folder, tar, "pending").touch()
                self._brought[tar] = None
                self._waiting.append(tar)

    def _bring_waiting(self) -> None:
        if self._streams:
            for tar in self._waiting:
                self._brought[tar] = self._streams.submit(bring_shard, self.index.urls[tar], self.folder, tar)
            self._waiting.clear()

    def _drop(self, tar: int) -> None:
        del self._last[tar], self._needed[tar]
        future = self._brought.pop(tar, None)
        if future:
            future.result()
            _place(self.folder, tar, "tar").unlink(missing_ok=True)


def bring_shard(url: str, folder: str, tar: int) -> None:
    """Copy a shard into a folder.  One that cannot be copied is warned of: its rows are read from the store."""
    part = _place(folder, tar, "part")
    try:
        filesystem, path = find_filesystem(url)
        with explained(url):
            filesystem.get_file(path, str(part))
        part.rename(_place(folder, tar, "tar"))
    except (OSError, PoolError) as error:
        log.warning("train: %s is read row by row, as it could not be copied to %s: %s", url, folder, error)
        part.unlink(missing_ok=True)
    finally:
        _place(folder, tar, "pending").unlink()


class SpoolReader(TarReader):
    """Reads byte ranges of tars from a spool's copies, waiting for one on its way, else from the tars themselves."""

    def __init__(self, urls: Sequence[str], folder: str) -> None:
        super().__init__(urls)
        self.folder = folder

    def __reduce__(self) -> tuple[type["SpoolReader"], tuple[Sequence[str], str]]:  # type: ignore[override]
        return SpoolReader, (self.urls, self.folder)

    def read(self, tar: int, offset: int, size: int) -> bytes:
        """Return `size` bytes of the tar at `offset`, fewer only where it ends."""
        while True:
            is_pending = _place(self.folder, tar, "pending").exists()  # asked first: it goes when the copy is there
            try:
                file = os.open(_place(self.folder, tar, "tar"), os.O_RDONLY)
            except FileNotFoundError:
                if not is_pending:
                    return super().read(tar, offset, size)
                time.sleep(LOOK_SECONDS)
                continue
            try:
                return os.pread(file, size, offset)
            finally:
                os.close(file)  # a file that stays open keeps its room on the disk


def _place(folder: str, tar: int, kind: str) -> Path:
    return Path(folder) / f"{tar}.{kind}"


def _open_folder() -> tuple[str, int]:
    """Return a new folder and its lock, after deleting those of processes that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        lock = _take_lock(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
    made = Path(tempfile.mkdtemp(prefix=f"new-{PREFIX}"))
    (made / LOCK).touch()
    lock = _take_lock(made)
    assert lock is not None  # no other process looks at it before it has its name
    return str(made.rename(made.with_name(made.name.removeprefix("new-")))), lock


def _take_lock(folder: Path) -> int | None:
    """Return the lock of a folder, None if a process has it or the folder is not ours."""
    try:
        lock = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock
