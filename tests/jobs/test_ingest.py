"""img2dataset through `winnow ingest`, against a server on this machine."""

import functools
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy import render

from pipeline.pool import list_parts, read_part
from pipeline.tars import read_rows

ROOT = Path(__file__).parent.parent.parent


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A loopback web server over tmp_path/www."""
    (tmp_path / "www").mkdir()
    handler = functools.partial(QuietHandler, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def ingest(*words: str) -> subprocess.CompletedProcess[str]:
    """The verb in a process of its own: img2dataset sets signal handlers and starts processes."""
    environment = os.environ | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    command = [sys.executable, "-m", "jobs", "ingest", *words, "--processes", "1", "--threads", "2"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_urls_become_a_pool(server: str, tmp_path: Path) -> None:
    for n in range(3):
        (tmp_path / "www" / f"{n}.jpg").write_bytes(render("red", n))
    rows = [{"uid": f"{n:032x}", "url": f"{server}/{n}.jpg", "text": f"picture {n} 🙂"} for n in range(4)]
    (tmp_path / "urls").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "urls" / "a.parquet")
    done = ingest("--urls", str(tmp_path / "urls"), "--out", str(tmp_path / "pool"))
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = dict(line.split() for line in done.stdout.splitlines() if len(line.split()) == 2)
    assert outcomes["success"] == "3" and outcomes["failed_to_download"] == "1"
    (part,) = list_parts(str(tmp_path / "pool"))
    read = read_part(part)
    captions = dict(zip(read.table["uid"].to_pylist(), read.table["text"].to_pylist(), strict=True))
    assert captions == {row["uid"]: row["text"] for row in rows[:3]}  # img2dataset's row order is that of arrival
    assert read.failed == {"not_downloaded": 1}
    assert len(list(read_rows(part.tar or ""))) == 3


def test_table_without_captions(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["http://127.0.0.1:1/x"], "text": ["a"]}), tmp_path / "a.parquet")
    done = ingest("--urls", str(tmp_path), "--out", str(tmp_path / "pool"), "--caption-column", "alt")
    assert done.returncode == 1 and "has no column 'alt'" in done.stderr
