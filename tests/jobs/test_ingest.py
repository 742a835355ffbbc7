"""`winnow ingest` against a server on this machine that answers as the web does: well, wrongly, slowly, without end."""

import hashlib
import http.server
import json
import os
import resource
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy import render, toy_row, write_part

from pipeline.batches import read_batches
from pipeline.images import decode_image
from pipeline.intake.url_tables import keep_if_whole
from pipeline.manifest import Manifest, read_manifest
from pipeline.pool import list_parts, read_part
from pipeline.tars import read_rows

ROOT = Path(__file__).parent.parent.parent
TIMEOUT_S = 2.0
GOOD = {
    "a.jpg": render("red", 1),
    "b.png": render("green", 2, kind="PNG"),
    "c.webp": render("blue", 3, kind="WEBP"),
    "d.jpg": render("yellow", 4, side=600),
}

NO_IMAGES = {"html": b"<html>no image here</html>", "empty": b""}


class Web(http.server.BaseHTTPRequestHandler):
    """One path per way to answer; every request is counted."""

    requests: Counter[str]
    release: threading.Event

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.strip("/")
        self.requests[name] += 1
        answer = getattr(self, f"answer_{name.replace('-', '_')}", None)
        try:
            self.send(GOOD[name]) if name in GOOD else answer() if answer else self.send_error(404)
        except OSError:  # the client left
            self.close_connection = True

    def send(self, body: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for header, value in ({"Content_Length": str(len(body))} | headers).items():
            self.send_header(header.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def answer_500(self) -> None:
        self.send(b"", 500)

    def answer_moved(self) -> None:
        self.send(b"", 301, Location="/a.jpg")

    def answer_loop(self) -> None:
        self.send(b"", 302, Location="/loop")

    def answer_to_file(self) -> None:
        self.send(b"", 302, Location="file:///etc/hostname")

    def answer_slow(self) -> None:
        self.release.wait(4 * TIMEOUT_S)

    def answer_drip(self) -> None:
        """A byte now and then: no wait is as long as the timeout."""
        self.send(b"", Content_Length="1000")
        while not self.release.wait(TIMEOUT_S / 3):
            self.wfile.write(b"x")

    def answer_head(self) -> None:
        """The same, and never a body."""
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Slow: ")
        while not self.release.wait(TIMEOUT_S / 3):
            self.wfile.write(b"x")

    def answer_short(self) -> None:
        self.send(GOOD["a.jpg"][:100], Content_Length="5000")

    def answer_huge(self) -> None:
        self.send(b"x", Content_Length=str(10**12))

    def answer_html(self) -> None:
        self.send(NO_IMAGES["html"], Content_Type="text/html")

    def answer_empty(self) -> None:
        self.send(b"")

    def answer_noai(self) -> None:
        self.send(GOOD["a.jpg"], X_Robots_Tag="noai")


class Server(http.server.ThreadingHTTPServer):
    """Takes many connections at once: with the default of 5, one that is refused comes back a second later."""

    request_queue_size = 128


@pytest.fixture
def web() -> Iterator[tuple[str, Counter[str]]]:
    """The address of a loopback server, and what was asked of it."""
    requests: Counter[str] = Counter()
    release = threading.Event()
    handler = type("Handler", (Web,), {"requests": requests, "release": release})
    with Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", requests
        release.set()
        server.shutdown()
        thread.join()


def ingest(*words: str, limit: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    """The verb in a process of its own, as a user starts it."""
    environment = os.environ | {"no_proxy": "127.0.0.1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "jobs", "ingest", "--timeout", str(TIMEOUT_S), "--retries", "0", *words]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False, preexec_fn=limit
    )


def write_table(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    return folder


def manifest_of(pool: Path) -> Manifest:
    manifest = read_manifest(str(pool), name="ingest.json")
    assert manifest
    return manifest


def read_captions(pool: Path) -> dict[str, str]:
    """uid -> caption of every row that a later stage reads with an image that opens."""
    found = {}
    for part in list_parts(str(pool)):
        for batch in read_batches(part, read_part(part), images=True):
            for uid, text, image in zip(*(batch[c].to_pylist() for c in ("uid", "text", "image")), strict=True):
                assert max(decode_image(image).size) <= 512
                found[uid] = text
    return found


EXPECTED = {
    **dict.fromkeys(GOOD, "success"),
    "moved": "success",
    "gone": "http_404",
    "500": "http_500",
    "loop": "bad_redirect",
    "to-file": "bad_redirect",
    "slow": "timeout",
    "drip": "timeout",
    "head": "timeout",
    "short": "truncated",
    "huge": "too_large",
    "html": "decode_error",
    "empty": "decode_error",
    "noai": "opted_out",
    "file:///etc/hostname": "not_http",
    "ftp://127.0.0.1/x.jpg": "not_http",
    "data:image/gif;base64,R0lGODlhAQABAAAAACw=": "not_http",
    "no url at all": "not_http",
    "http://127.0.0.1:1/refused.jpg": "connection_error",
    "http://127.0.0.1:x/": "bad_url",
}


def make_rows(url: str) -> list[dict[str, Any]]:
    """One row per answer, with the hash of what should come, and two rows more: a wrong hash, and none."""
    names = [*EXPECTED, "a.jpg", "a.jpg"]
    rows = []
    for number, name in enumerate(names):
        content = (GOOD | NO_IMAGES).get(name, GOOD["a.jpg"])
        rows.append(
            {
                "uid": f"{number + 1:032x}",
                "url": name if ":" in name or " " in name else f"{url}/{name}",
                "text": f"picture {number} 🙂",
                "face_bboxes": [[0.2, 0.2, 0.6, 0.6]] if name == "b.png" else [],
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        )
    rows[-2]["sha256"], rows[-1]["sha256"] = "0" * 64, None
    return rows


@pytest.mark.spark
def test_every_answer_has_its_reason_on_spark(web: tuple[str, Counter[str]], tmp_path: Path) -> None:
    url, requests = web
    rows = make_rows(url)
    tables, pool = write_table(tmp_path / "urls", rows), tmp_path / "pool"
    words = ["--urls", str(tables), "--out", str(pool), "--rows-per-shard", "16", "--threads", "8"]
    done = ingest(*words, "--master", "local[2]")
    assert done.returncode == 0, done.stderr[-3000:]
    reasons = Counter(EXPECTED.values())
    kept = reasons.pop("success")
    counts = manifest_of(pool).counts["rows"]
    assert (counts.read, counts.kept) == (len(rows), kept)
    assert dict(counts.failed) == {**reasons, "hash_mismatch": 1, "no_expected_hash": 1}
    assert manifest_of(pool).facts["hashes"] == {"matched": kept, "mismatched": 1, "unknown": 1}
    assert f"{'hash_mismatch':24s}{1:12,}" in done.stdout

    good = {
        row["uid"]: row["text"] for row, reason in zip(rows, EXPECTED.values(), strict=False) if reason == "success"
    }
    assert read_captions(pool) == good
    listed = pa.concat_tables(pq.read_table(file) for file in sorted(pool.glob("*.parquet")))
    carried = ["uid", "url", "caption", "face_bboxes", "expected_sha256"]
    renamed = [dict(zip(carried, row.values(), strict=True)) for row in rows]
    assert sorted(listed.select(carried).to_pylist(), key=lambda r: r["uid"]) == renamed
    members = [row for part in list_parts(str(pool)) for row in read_rows(part.tar or "")]
    details = {d["uid"]: d for d in (json.loads(row.find(["json"]) or b"") for row in members)}
    assert details.keys() == good.keys()
    for row in rows[: len(GOOD)]:
        assert details[row["uid"]]["face_bboxes"] == row["face_bboxes"]
        assert details[row["uid"]]["sha256"] == details[row["uid"]]["expected_sha256"] == row["sha256"]

    before = requests.copy()
    assert ingest(*words).returncode == 0
    assert requests == before, "a finished pool asks for nothing again"
    (pool / "00000001_stats.json").unlink()  # as a kill leaves a shard that was being written
    (pool / "00000001.tar").write_bytes((pool / "00000001.tar").read_bytes()[:700])
    assert ingest(*words, "--distributor", "multiprocessing", "--processes", "1").returncode == 0
    assert read_captions(pool) == good and manifest_of(pool).counts["rows"] == counts
    assert requests["b.png"] == before["b.png"], "the first shard was whole"


def test_mismatched_images_can_be_kept_and_other_choices_are_refused(
    web: tuple[str, Counter[str]], tmp_path: Path
) -> None:
    url, _ = web
    (tmp_path / "urls.csv").write_text(f"link,alt,md5\n{url}/a.jpg,one,{'0' * 32}\n{url}/b.png,two,\n")
    pool = tmp_path / "pool"
    words = [
        "--urls",
        str(tmp_path / "urls.csv"),
        "--out",
        str(pool),
        "--url-column",
        "link",
        "--caption-column",
        "alt",
    ]
    words += ["--distributor", "multiprocessing", "--processes", "1", "--keep-mismatched"]
    done = ingest(*words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(read_captions(pool).values()) == ["one", "two"]
    assert manifest_of(pool).facts["hashes"] == {"mismatched": 1, "unknown": 1}
    (row,) = (r for r in pq.read_table(pool / "00000000.parquet").to_pylist() if r["caption"] == "one")
    assert row["md5"] == hashlib.md5(GOOD["a.jpg"]).hexdigest() and row["expected_md5"] == "0" * 32

    changed = ingest(*words, "--image-size", "256")
    assert changed.returncode == 2 and "config.image_size changed from 512 to 256" in changed.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.md").touch()
    foreign = ingest(*words, "--out", str(tmp_path / "mine"))
    assert foreign.returncode == 1 and "files that it did not write (notes.md" in foreign.stderr


def limit_files() -> None:
    """As a disk that is full after 30,000 bytes of a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))


def test_shard_that_hangs_or_fails_is_named_and_made_by_the_next_run(
    web: tuple[str, Counter[str]], tmp_path: Path
) -> None:
    url, _ = web
    tables = write_table(tmp_path / "urls", [{"url": f"{url}/{n}", "text": n} for n in ("a.jpg", "d.jpg", "drip")])
    pool = tmp_path / "pool"
    words = ["--urls", str(tables), "--out", str(pool), "--rows-per-shard", "1", "--distributor", "multiprocessing"]
    words += ["--processes", "1"]  # one after the other: how long a worker takes to start does not matter
    stalled = ingest(*words, "--timeout", "60", "--stall", "4", limit=limit_files)
    assert stalled.returncode == 1, stalled.stderr[-600:]
    assert "2 of 3 shards are missing (00000001: OSError: [Errno 27] File too large" in stalled.stderr
    assert "00000002: stalled: it did not grow for 4 s" in stalled.stderr
    manifest = manifest_of(pool)
    assert set(manifest.facts["missing"]) == {"00000001", "00000002"}
    assert manifest.counts["rows"].failed == {"shard_not_made": 2}
    assert list(read_captions(pool).values()) == ["a.jpg"], "what was half written is gone"
    again = ingest(*words)
    assert again.returncode == 0, again.stderr[-2000:]
    assert sorted(read_captions(pool).values()) == ["a.jpg", "d.jpg"]
    assert manifest_of(pool).counts["rows"].failed == {"timeout": 1}


@pytest.mark.parametrize(
    ("suffix", "damage", "whole"),
    [
        (".tar", lambda content: content, True),
        (".tar", lambda content: content[:700], False),
        (".tar", lambda content: content[:1024], False),
        (".tar", None, False),
        (".parquet", lambda content: content[:-10], False),
        (".parquet", None, False),
        ("_stats.json", lambda content: b"", False),
        ("_stats.json", None, False),
    ],
)
def test_what_a_kill_leaves_of_a_shard_is_deleted(
    suffix: str, damage: Callable[[bytes], bytes] | None, whole: bool, tmp_path: Path
) -> None:
    row = toy_row(0)
    write_part(tmp_path, "00000000", [row], {row["key"]: GOOD["a.jpg"]})
    (tmp_path / "00000000_stats.json").write_text("{}")
    file = tmp_path / f"00000000{suffix}"
    content = file.read_bytes()
    file.unlink() if damage is None else file.write_bytes(damage(content))
    assert keep_if_whole(str(tmp_path), 0) is whole
    assert len(list(tmp_path.iterdir())) == (3 if whole else 0)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--caption-column", "txt"], 2, "did you mean 'text'"),
        (["--url-column", "urls"], 2, "did you mean 'url'"),
        (["--rows-per-shard", "0"], 2, "must be above 0"),
        (["--urls", "nowhere"], 1, "'nowhere' does not exist"),
    ],
)
def test_mistakes_are_explained(words: list[str], code: int, message: str, tmp_path: Path) -> None:
    tables = write_table(tmp_path / "urls", [{"url": "http://127.0.0.1:1/x", "text": "a"}])
    done = ingest("--urls", str(tables), "--out", str(tmp_path / "pool"), *words)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False)
    assert message in done.stderr
    assert not (tmp_path / "pool").exists()
