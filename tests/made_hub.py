"""A loopback server that speaks the hub's API: well, cut short, wrong, hostile."""

import hashlib
import http.server
import json
import threading
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

COMMIT = "c" * 40
TAR = bytes(range(256)) * 4000
FILES = {
    "classnames.txt": b"zero\none\n",
    "zeroshot_classification_templates.txt": b"a {c}.\n",
    "test/nshards.txt": b"2\n",
    "test/0.tar": TAR,
    "test/1.tar": TAR[::-1],
    "README.md": b"not wanted",
    "mnist.py": b"raise SystemExit",
}


@dataclass
class State:
    """What the server holds and does."""

    files: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    asked: Counter[str] = field(default_factory=Counter)
    ranges: list[str] = field(default_factory=list)
    tokens: list[tuple[str, str | None]] = field(default_factory=list)
    ill: dict[str, list[str]] = field(default_factory=dict)
    """Path -> what goes wrong with each of the next answers."""
    page: int = 1000
    other: str = ""
    """Address that large files are redirected to."""
    patient: bool = False
    """Refusals ask for a second of patience."""
    answer: object = None
    """What a listing answers with, if anything else."""


def entry(path: str, content: bytes) -> dict[str, object]:
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    found: dict[str, object] = {"type": "file", "path": path, "size": len(content), "oid": git}
    if path.endswith((".tar", ".zip")):
        found |= {"oid": "1" * 40, "lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}}
    return found


class Web(http.server.BaseHTTPRequestHandler):
    state: State

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        parts = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(parts.path)
        self.state.asked[path] += 1
        self.state.tokens.append((path, self.headers.get("Authorization")))
        ill = self.state.ill.get(path.rpartition(COMMIT + "/")[2] or path, [])
        fault = ill.pop(0) if ill else ""
        if fault.isdigit():
            self.send(b"", int(fault), **({"Retry-After": "1"} if self.state.patient else {}))
        elif fault.startswith("to "):
            self.send(b"", 302, Location=fault[3:])
        elif "/revision/" in path:
            self.send(json.dumps({"sha": COMMIT}).encode())
        elif "/tree/" in path and self.state.answer is not None:
            self.send(json.dumps(self.state.answer).encode())
        elif "/tree/" in path:
            self.list(urllib.parse.parse_qs(parts.query))
        elif path.startswith("/datasets/") and self.state.other and path.endswith(".tar"):
            self.send(b"", 302, Location=self.state.other + parts.path)
        else:
            self.send_file(self.state.files[path.rpartition(COMMIT + "/")[2]], fault)

    def list(self, query: dict[str, list[str]]) -> None:
        entries = [{"type": "directory", "path": "test", "oid": "2" * 40, "size": 0}]
        entries += [entry(*item) for item in self.state.files.items()]
        start = int(query.get("cursor", ["0"])[0])
        end = start + self.state.page
        more = end < len(entries)
        link = {"Link": f'<https://elsewhere.invalid/?recursive=1&cursor={end}>; rel="next"'} if more else {}
        self.send(json.dumps(entries[start:end]).encode(), 200, **link)

    def send_file(self, content: bytes, fault: str) -> None:
        start = 0
        if wanted := self.headers.get("Range"):
            self.state.ranges.append(wanted)
            start = 0 if fault == "whole" else int(wanted.removeprefix("bytes=").removesuffix("-"))
        headers = {"Content-Length": str(len(content) - start)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        if fault == "wrong":
            body = bytes([body[0] ^ 1]) + body[1:]
        if fault == "more":
            body, headers = body + b"x", {}
        self.send(body[: len(body) // 2] if fault == "short" else body, 206 if start else 200, **headers)

    def send(self, body: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(body))} if "Content-Length" not in headers else {}).items():
            self.send_header(name, value)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def serve(state: State) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Web,), {"state": state})) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
