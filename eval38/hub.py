"""Dataset repositories of the hub over plain HTTP: what one holds, and its files, each proven by its hash.

Three addresses of an endpoint (https://huggingface.co or a mirror) are asked, and nothing else:

    api/datasets/REPO/revision/REVISION          the commit a name stands for
    api/datasets/REPO/tree/COMMIT?recursive=1    paths with size and hash, in pages
    datasets/REPO/resolve/COMMIT/PATH            a file; the hub redirects large ones to another host

Large files (LFS) carry a sha256, small ones git's object id, so every byte is checked.  No path of a server's answer
is believed: callers take files by names they know (download.py).
Source: huggingface_hub 2.4, hf_api.py (list_repo_tree, RepoFile).
"""

import email.utils
import errno
import fcntl
import hashlib
import http.client
import json
import logging
import os
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pipeline.errors import ConfigError, StageError
from pipeline.storage import CHUNK_BYTES

log = logging.getLogger("winnow")

HUB = "https://huggingface.co"
TRIES = 6
MAX_WAIT_S = 300.0
"""Longest wait that a server's Retry-After is granted."""
MAX_LISTING_BYTES, MAX_PAGES = 16 << 20, 100
TRANSIENT_CODES = (408, 416, 425, 429, 500, 502, 503, 504)
TRANSIENT = (OSError, http.client.HTTPException)
"""Worth another try: no connection, silence, an answer cut short (urllib's errors are OSErrors)."""
PART_SUFFIX = ".part"
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_FILE_BYTES = 1 << 50
OF_THIS_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EISDIR)
"""Errors of writing, which trying again does not mend."""


class Unreachable(StageError):
    """No try of several was answered well; another repository would fare no better."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repository at a commit."""

    path: str
    """As the server spells it: not to be joined to a folder unchecked."""
    size: int
    algorithm: str
    """sha256 for an LFS file, git (the object id of a blob) for a small one."""
    hash: str

    def start_digest(self) -> Any:
        """Return a hashlib object whose hex digest is `hash` after all bytes of the file."""
        if self.algorithm == "sha256":
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)


@dataclass(frozen=True, slots=True)
class Hub:
    """An endpoint, and how to ask it."""

    endpoint: str = HUB
    token: str | None = field(default=None, repr=False)
    """Sent to the endpoint alone, never to where it redirects."""
    timeout_s: float = 60.0
    """Of silence on a connection."""
    first_wait_s: float = 1.0
    """Before the second try; doubled for each further one."""

    def __post_init__(self) -> None:
        """Raise ConfigError unless the endpoint is an http(s) address, and the token one that a header can hold."""
        try:
            parts = urllib.parse.urlsplit(self.endpoint)
            plain = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a bracket that is not closed, a port that is no number
            plain = False
        if not plain or parts.query or parts.fragment:
            raise ConfigError(f"endpoint {self.endpoint!r} should be an address such as {HUB}.")
        if self.token and not re.fullmatch(r"[!-~]+", self.token):
            raise ConfigError("the token (HF_TOKEN) holds a space, a line end or a letter that no token has.")

    def url(self, *parts: str, **query: str) -> str:
        """Return the endpoint's address of a path; each part is quoted."""
        path = "/".join(urllib.parse.quote(part) for part in parts)
        return f"{self.endpoint.rstrip('/')}/{path}" + (f"?{urllib.parse.urlencode(query)}" if query else "")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to http(s) only, never from https to http, and takes no token to another host."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        old, new = urllib.parse.urlsplit(req.full_url), urllib.parse.urlsplit(newurl)
        if new.scheme not in ("http", "https") or (old.scheme == "https" and new.scheme == "http"):
            raise StageError(f"{req.full_url} redirects to {newurl!r}, which is not followed.")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and (new.scheme, new.netloc) != (old.scheme, old.netloc):
            request.remove_header("Authorization")
        return request


def _open(hub: Hub, url: str, headers: Mapping[str, str] | None = None) -> Any:
    """Return the answer to a GET.  Raises StageError for a refusal that a second try would meet again."""
    headers = {"User-Agent": "winnow", **(headers or {})} | (
        {"Authorization": f"Bearer {hub.token}"} if hub.token else {}
    )
    try:
        return urllib.request.build_opener(_Redirects).open(
            urllib.request.Request(url, headers=headers), timeout=hub.timeout_s
        )
    except urllib.error.HTTPError as error:
        with error:
            if error.code in TRANSIENT_CODES:
                raise
            raise StageError(f"{url}: {error.code} {error.reason}. {_advise(error.code)}") from None
    except ValueError as error:  # a redirect to what is no address
        raise StageError(f"{url}: {error}. Is it the hub or a mirror of it?") from None


def _advise(code: int) -> str:
    if code in (401, 403):
        return "It may ask for consent (give it on its page, put your token in HF_TOKEN), or it may not be there."
    if code == 404:
        return "The repository or file is not there (any more); a mirror may lack it: see --endpoint."
    return "The server does not do this."


def retry(
    hub: Hub,
    attempt: Callable[[], bool],
    *,
    what: str,
    stop: threading.Event | None = None,
    progress: Callable[[], int] = lambda: 0,
) -> None:
    """Call `attempt` until it returns True, at most TRIES times, waiting longer each time and as long as it is told to.

    A try that brings `progress` (bytes that are there) further than any before it starts the count anew.
    Raises Unreachable when the last try failed, StageError at once where a further try is of no use (the disk is full,
    the hub refuses), or after `stop` is set.
    """
    stop, reason, wait_s = stop or threading.Event(), "the hash is wrong", 0.0
    number, furthest = 0, progress()
    while number < TRIES:
        if stop.wait(wait_s):
            raise StageError(f"{what}: stopped; run the same command again to go on.")
        asked_s = 0.0
        try:
            if attempt():
                return
        except TRANSIENT as error:
            reason = str(error) or type(error).__name__
            if getattr(error, "errno", None) in OF_THIS_DISK:
                raise StageError(f"{what}: {reason}. Mend that and run the same command again to go on.") from None
            asked_s = _read_wait_s(error)
        if progress() > furthest:
            number, furthest = 0, progress()
        wait_s = max(hub.first_wait_s * 2**number, asked_s)
        number += 1
        log.info("%s: try %d failed: %s", what, number, reason)
    raise Unreachable(f"{what}: {TRIES} tries failed, the last: {reason}. Run the same command again to go on.")


def _read_wait_s(error: Exception) -> float:
    """Return the seconds to wait that an answer asks for (Retry-After, a number or a date), at most MAX_WAIT_S.

    0 if it asks for none.
    """
    told = (error.headers.get("Retry-After") or "") if isinstance(error, urllib.error.HTTPError) else ""
    if re.fullmatch(r"[0-9]{1,9}", told):
        return min(float(told), MAX_WAIT_S)
    try:
        until = email.utils.parsedate_to_datetime(told).timestamp()
    except (ValueError, OverflowError):
        return 0.0
    return min(max(until - time.time(), 0.0), MAX_WAIT_S)


def _read_json(hub: Hub, url: str) -> tuple[Any, str]:
    """Return the JSON at an address and the Link header."""
    found: list[tuple[Any, str]] = []

    def attempt() -> bool:
        with _open(hub, url) as answer:
            content = answer.read(MAX_LISTING_BYTES + 1)
            if len(content) > MAX_LISTING_BYTES:
                raise StageError(f"{url} answers with more than {MAX_LISTING_BYTES:,} bytes: this is no listing.")
            found.append((_parse(content, url), answer.headers.get("Link") or ""))
        return True

    retry(hub, attempt, what=url)
    return found[-1]


def _parse(content: bytes, url: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise StageError(f"{url} does not answer in JSON ({error}). Is it the hub or a mirror of it?") from None


def find_commit(hub: Hub, repo: str, revision: str = "main") -> str:
    """Return the commit that a branch, tag or commit of a dataset repository stands for.  Raises StageError."""
    url = f"{hub.url('api/datasets', repo, 'revision')}/{urllib.parse.quote(revision, safe='')}"
    answer, _ = _read_json(hub, url)
    commit = answer.get("sha") if isinstance(answer, dict) else None
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise StageError(f"{url} names no commit. Is it the hub or a mirror of it?")
    return commit


def list_files(hub: Hub, repo: str, commit: str) -> list[HubFile]:
    """Return every file of a dataset repository at a commit.  Raises StageError for an answer that is no listing.

    Further pages are asked of the same endpoint, whatever host the Link header names.
    """
    files: list[HubFile] = []
    query = {"recursive": "1"}
    for _ in range(MAX_PAGES):
        url = hub.url("api/datasets", repo, "tree", commit, **query)
        page, link = _read_json(hub, url)
        files += _parse_page(page, url)
        cursor = _find_cursor(link)
        if not cursor:
            return files
        query["cursor"] = cursor
    raise StageError(f"{repo} has more than {MAX_PAGES} pages of files: this is no evaluation set.")


def _find_cursor(link: str) -> str | None:
    following = re.search(r'[?&]cursor=([^&>]+)[^>]*>\s*;\s*rel="?next"?', link)
    return urllib.parse.unquote_plus(following[1]) if following else None


def _parse_page(page: Any, url: str) -> Iterator[HubFile]:
    if not isinstance(page, list):
        raise StageError(f"{url} is no list of files. Is it the hub or a mirror of it?")
    for entry in page:
        try:
            if entry["type"] != "file":
                continue
            lfs = entry.get("lfs")
            size, algorithm = (lfs["size"], "sha256") if lfs else (entry["size"], "git")
            file = HubFile(str(entry["path"]), size, algorithm, str((lfs or entry)["oid"]).removeprefix("sha256:"))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StageError(f"{url}: {entry!r:.200} is no file entry ({error!r}).") from None
        whole = type(size) is int and 0 <= size <= MAX_FILE_BYTES
        if not whole or not (SHA256 if lfs else COMMIT).fullmatch(file.hash):
            raise StageError(f"{url}: {file.path!r} has size {file.size} and {algorithm} hash {file.hash!r}.")
        yield file


def fetch_file(
    hub: Hub,
    repo: str,
    commit: str,
    file: HubFile,
    target: Path,
    *,
    advance: Callable[[int], None] = lambda num_bytes: None,
    stop: threading.Event | None = None,
) -> None:
    """Fetch one file to `target`, which appears whole and proven or not at all.

    Bytes go to a hidden .part file beside it, and a later call, also of another process, goes on where it ends.
    `advance` is told of bytes won (fewer than nothing when some turn out to be wrong).
    Raises StageError when tries run out, the hash stays wrong, or `stop` was set.
    """
    url = hub.url("datasets", repo, "resolve", commit, file.path)
    part = target.with_name(f".{target.name}{PART_SUFFIX}")
    part.parent.mkdir(parents=True, exist_ok=True)
    if part.is_symlink():  # appending would write to whatever it points at
        part.unlink()
    told = 0

    def tell(now: int) -> None:
        nonlocal told
        advance(now - told)
        told = now

    def attempt() -> bool:
        found = _go_on(hub, url, file, part, tell, stop or threading.Event())
        if found == file.hash:
            part.replace(target)
            return True
        log.warning("%s: %s is %s where %s was promised; fetched anew", url, file.algorithm, found, file.hash)
        part.unlink()
        tell(0)
        return False

    retry(hub, attempt, what=f"{repo}/{file.path}", stop=stop, progress=lambda: told)


def _go_on(hub: Hub, url: str, file: HubFile, part: Path, tell: Callable[[int], None], stop: threading.Event) -> str:
    """Append to the part file what it lacks and return its hash.

    Raises OSError when the answer ends early, StageError while another process writes the same file.
    """
    digest = file.start_digest()
    with part.open("a+b") as out:
        _lock(out, part)
        if out.tell() > file.size:
            out.truncate(0)
        have = _hash_start(out, digest)
        tell(have)
        if have < file.size:
            with _open_at(hub, url, have, out) as answer:
                if have and not _goes_on(answer, have):
                    out.truncate(0)
                    digest, have = file.start_digest(), 0
                while not stop.is_set() and (piece := answer.read(min(CHUNK_BYTES, file.size - have + 1))):
                    have += len(piece)
                    if have > file.size:
                        out.truncate(0)
                        raise StageError(f"{url} sends more than the {file.size:,} bytes that were promised.")
                    out.write(piece)
                    digest.update(piece)
                    tell(have)
        out.flush()
        os.fsync(out.fileno())
    if have < file.size:
        raise OSError(f"the answer ended after {have:,} of {file.size:,} bytes")
    return str(digest.hexdigest())


def _lock(out: IO[bytes], part: Path) -> None:
    """Take the part file for this process until it is closed: two that append would mix their bytes.

    Raises StageError when another has it.  A file system that knows no locks is left without.
    """
    try:
        fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StageError(f"{part} is being written by another process. Wait for it, or end it.") from None
    except OSError as error:
        log.info("%s cannot be locked (%s): let only one process fetch it", part, error)


def _open_at(hub: Hub, url: str, have: int, out: IO[bytes]) -> Any:
    """Return the answer from byte `have` on.  A server that refuses the range is asked for the whole file next time."""
    try:
        return _open(hub, url, {"Range": f"bytes={have}-"} if have else {})
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            out.truncate(0)
        raise


def _hash_start(out: IO[bytes], digest: Any) -> int:
    out.seek(0)
    while piece := out.read(CHUNK_BYTES):
        digest.update(piece)
    return out.tell()


def _goes_on(answer: Any, have: int) -> bool:
    """Return whether an answer starts at byte `have`; a server may send the whole file instead."""
    starts = (answer.headers.get("Content-Range") or "").strip().startswith(f"bytes {have}-")
    return bool(answer.status == http.client.PARTIAL_CONTENT and starts)
