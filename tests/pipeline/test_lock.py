import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline import lock
from pipeline.errors import StageError
from pipeline.lock import hold_lock, read_lock
from pipeline.schemas import LOCK


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rules with shorter waits."""
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    monkeypatch.setattr(lock, "EXPIRY_S", 0.6)
    monkeypatch.setattr(lock, "SETTLE_S", 0.1)


def forge(folder: Path, **owner: object) -> Path:
    url = folder / LOCK
    url.write_text(json.dumps({"host": "elsewhere", "pid": 1, "stage": "score", "token": "t", "beats": 0} | owner))
    return url


def test_it_says_who_holds_it_and_is_gone_afterwards(tmp_path: Path) -> None:
    with hold_lock(str(tmp_path), "score"):
        owner = read_lock(str(tmp_path))
        assert owner and (owner["pid"], owner["stage"]) == (os.getpid(), "score")
    assert read_lock(str(tmp_path)) is None


def test_it_is_given_back_when_the_work_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), hold_lock(str(tmp_path), "score"):
        raise ZeroDivisionError
    assert not (tmp_path / LOCK).exists()


def test_a_second_driver_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    with hold_lock(str(tmp_path), "score"):
        refusal = pytest.raises(StageError, match=rf"process {os.getpid()} .* is at work here")
        with refusal, hold_lock(str(tmp_path), "score"):
            raise AssertionError("both are in")
        assert (tmp_path / LOCK).exists()


def test_a_driver_whose_temporary_name_is_swept_away_finds_the_lock_taken(tmp_path: Path) -> None:
    """The driver at work sweeps its folder just after it took the lock."""
    url, stop = str(forge(tmp_path)), threading.Event()

    def sweep() -> None:
        while not stop.is_set():
            for path in tmp_path.glob(".tmp-*"):
                path.unlink(missing_ok=True)

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        assert not any(lock._write_mine(url, {"token": str(n)}) for n in range(50))
    finally:
        stop.set()
        sweeper.join()
    with pytest.raises(FileNotFoundError):
        lock._write_mine("/proc/nowhere/lock", {"token": "t"})


def test_of_many_drivers_at_once_one_gets_in(tmp_path: Path) -> None:
    inside, refused = [], []

    def drive() -> None:
        try:
            with hold_lock(str(tmp_path), "score"):
                inside.append(1)
                time.sleep(1.0)
        except StageError:
            refused.append(1)

    threads = [threading.Thread(target=drive) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(inside), len(refused)) == (1, 3)


def test_a_dead_process_of_this_machine_is_followed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "EXPIRY_S", 600)
    script = "import os, sys; from pipeline.lock import hold_lock\nwith hold_lock(sys.argv[1], 'score'): os._exit(9)"
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False, timeout=60)
    assert (tmp_path / LOCK).exists()
    start = time.monotonic()
    with hold_lock(str(tmp_path), "score"):
        pass
    assert time.monotonic() - start < lock.EXPIRY_S


def test_a_silent_driver_elsewhere_is_followed_after_a_while_whatever_its_clock(tmp_path: Path) -> None:
    url = forge(tmp_path)
    os.utime(url, (4e9, 4e9))  # written in the year 2096, by its clock
    start = time.monotonic()
    with hold_lock(str(tmp_path), "score"):
        assert time.monotonic() - start >= lock.EXPIRY_S


def test_who_lost_the_lock_while_asleep_is_told(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"took .* over"), hold_lock(str(tmp_path), "score"):
        forge(tmp_path, token="another")
    assert (tmp_path / LOCK).exists(), "the other's lock stays"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff"])
def test_a_lock_that_says_nothing_is_followed_after_a_while(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LOCK).write_bytes(content)
    with hold_lock(str(tmp_path), "score") as check:
        check()
    assert not (tmp_path / LOCK).exists()


def test_the_check_tells_before_anything_is_written(tmp_path: Path) -> None:
    def work() -> None:
        with hold_lock(str(tmp_path), "score") as check:
            check()
            forge(tmp_path, token="another")
            check()

    with pytest.raises(StageError, match=r"took .* over"):
        work()
