"""One driver at a time: a lock file with an owner, renewed while it works and taken over when it no longer is.

Whether a lock is alive is judged by whether it changes while one watches, never by comparing clocks of two machines.
The lock keeps two drivers from doing the same work twice or with two configs; it is not what makes files whole (every
file is written aside and renamed), so losing it costs time and never bytes.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import StageError, WinnowError
from pipeline.schemas import LOCK
from pipeline.storage import join, read_bytes, remove, write_bytes, write_new

log = logging.getLogger("winnow")
BEAT_S = 5.0
"""The owner rewrites its lock this often."""
EXPIRY_S = 30.0
"""A lock that did not change for so long while it was watched belongs to nobody."""
SETTLE_S = 1.0
"""Who takes over a dead driver's lock waits so long for another follower that may have removed it."""
TORN: dict[str, Any] = {"host": "?", "pid": "?", "stage": "?", "token": None}
"""A lock file that cannot be understood is watched, and followed, as any other."""


@contextmanager
def hold_lock(out: str, stage: str) -> Iterator[Callable[[], None]]:
    """Hold OUT's lock for a block of work; yield a check to call before what must not be written by two.

    A lock of a dead process of this machine is taken over at once, one of another machine after EXPIRY_S without a
    sign of life.  Raises StageError when another driver is at work; so does the check, and the end of the block, when
    this one lost its lock while it slept.
    """
    url = join(out, LOCK)
    owner = {**_name_process(), "stage": stage, "token": uuid.uuid4().hex}
    _take(url, owner)
    stop, lost = threading.Event(), threading.Event()
    beat = threading.Thread(target=_beat, args=(url, owner, stop, lost), name="winnow lock", daemon=True)
    beat.start()

    def check() -> None:
        if lost.is_set() or not _is_mine(url, owner):
            raise StageError(f"{stage}: another driver took {url} over while this one did not move. Run it again.")

    try:
        yield check
        check()
    finally:
        stop.set()
        beat.join()
        if _is_mine(url, owner):
            remove(url)


def read_lock(out: str) -> dict[str, Any] | None:
    """Return who holds OUT: {"host", "pid", "stage", "token", "beats"}; None when nobody does."""
    return _read(join(out, LOCK))


def _name_process() -> dict[str, Any]:
    """Return what names this process; two containers may share a host's name and not its processes."""
    space = Path("/proc/self/ns/pid")
    namespace = str(space.readlink()) if space.is_symlink() else ""
    return {"host": socket.gethostname(), "space": namespace, "pid": os.getpid()}


def _take(url: str, owner: dict[str, Any]) -> None:
    taken_over = False
    for _ in range(3):  # a lock may vanish, or be taken, between two looks
        if _write_mine(url, owner):
            time.sleep(SETTLE_S if taken_over else 0)
            if _is_mine(url, owner):  # else another follower of the same dead driver removed it
                return
        found = _read(url)
        if found is None:
            continue
        if not _is_dead(found):
            _watch(url, found)
        log.warning("the lock of process %s on %s, which is gone, is taken over: %s", found["pid"], found["host"], url)
        taken_over = True
        if _read(url) == found:
            remove(url)
    raise StageError(f"{url} is taken and given back all the time. See which drivers write there.")


def _write_mine(url: str, owner: dict[str, Any]) -> bool:
    """Return whether there was no lock, and now is this one."""
    try:
        return write_new(url, _pack(owner, 0))
    except FileNotFoundError:  # its temporary name: the driver at work swept what killed writers left
        if _read(url) is None:
            raise
        return False


def _watch(url: str, found: dict[str, Any]) -> None:
    """Return when the lock has not changed for EXPIRY_S.  Raises StageError when its owner shows a sign of life."""
    log.warning("%s is held by process %s on %s; watching whether it lives", url, found["pid"], found["host"])
    deadline = time.monotonic() + EXPIRY_S
    while time.monotonic() < deadline:
        time.sleep(0.2)
        now = _read(url)
        if now is None:
            return
        if now != found:
            raise StageError(
                f"process {now['pid']} on {now['host']} is at work here ({now['stage']}; {url}). "
                "Wait for it, stop it, or name another folder."
            )


def _is_dead(found: dict[str, Any]) -> bool:
    """Return whether the owner was a process of this machine and is no more."""
    here = _name_process()
    if (found["host"], found.get("space")) != (here["host"], here["space"]):
        return False
    return not Path(f"/proc/{found['pid']}").exists() if Path("/proc").is_dir() else False


def _beat(url: str, owner: dict[str, Any], stop: threading.Event, lost: threading.Event) -> None:
    beats = 0
    while not stop.wait(BEAT_S):
        try:
            if not _is_mine(url, owner):
                lost.set()
                return
            beats += 1
            write_bytes(url, _pack(owner, beats))
        except (OSError, WinnowError) as error:  # a store that is away for a moment, a disk that is full
            log.warning("%s could not be renewed: %s", url, error)


def _is_mine(url: str, owner: dict[str, Any]) -> bool:
    found = _read(url)
    return found is not None and found["token"] == owner["token"]


def _read(url: str) -> dict[str, Any] | None:
    """Return what the lock file says, TORN when it says nothing, None when there is none.  Raises StorageError."""
    try:
        content = json.loads(read_bytes(url))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError):
        return TORN
    return content if isinstance(content, dict) and content.keys() >= TORN.keys() else TORN


def _pack(owner: dict[str, Any], beats: int) -> bytes:
    return json.dumps(owner | {"beats": beats}).encode()
