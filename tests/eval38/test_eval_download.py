"""`winnow eval download` against the loopback server of made_hub."""

import email.message
import fcntl
import json
import os
import resource
import sys
import time
import urllib.error
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_hub import COMMIT, FILES, TAR, State, Web, serve

from eval38.download import fetch_sets, plan_set, plan_sets
from eval38.hub import Hub, Unreachable, _read_wait_s, find_commit, list_files
from eval38.rows import hash_files
from eval38.tasks import find_task
from jobs.download_eval import main
from pipeline.errors import ConfigError, StageError


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> State:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return State()


@pytest.fixture
def hub(state: State) -> Iterator[Hub]:
    for address in serve(state):
        yield Hub(address, first_wait_s=0.001)


def fetch(hub: Hub, out: Path, key: str = "mnist") -> list[str]:
    return fetch_sets(hub, [plan_set(hub, find_task(key), str(out))], quiet=True)


def listing(out: Path) -> dict[str, bytes]:
    return {str(f.relative_to(out)): f.read_bytes() for f in out.rglob("*") if f.is_file() and f.suffix != ".json"}


SET = {f"wds_mnist_test/{path}": content for path, content in FILES.items() if path.startswith(("test", "c", "z"))}


@pytest.mark.parametrize("page", [1, 3, 1000])
def test_only_what_evaluation_reads_is_fetched_and_nothing_twice(
    state: State, hub: Hub, tmp_path: Path, page: int
) -> None:
    state.page = page
    assert fetch(hub, tmp_path) == [] and listing(tmp_path) == SET
    source = json.loads((tmp_path / "wds_mnist_test/source.json").read_text())
    assert source["repo"] == "djghosh/wds_mnist_test" and source["commit"] == COMMIT and len(source["files"]) == 5
    before = state.asked.copy()
    assert fetch(hub, tmp_path) == [] and listing(tmp_path) == SET
    assert not [path for path in (state.asked - before) if "/resolve/" in path]


@pytest.mark.parametrize("fault", ["short", "503", "429", "wrong", "whole"])
def test_a_fault_that_passes(state: State, hub: Hub, tmp_path: Path, fault: str) -> None:
    state.ill = {"test/0.tar": ["short", fault, fault], "classnames.txt": [fault]}
    assert fetch(hub, tmp_path) == [] and listing(tmp_path) == SET
    assert f"bytes={len(TAR) // 2}-" in state.ranges


def test_a_fetched_set_is_the_same_set_everywhere(hub: Hub, tmp_path: Path) -> None:
    files = sorted(SET)
    hashes = []
    for where in ("here", "there"):
        assert fetch(hub, tmp_path / where) == []
        hashes.append(hash_files([str(tmp_path / where / file) for file in files]))
    assert hashes[0] == hashes[1]
    os.utime(tmp_path / "there" / files[0], (1, 1))
    assert hash_files([str(tmp_path / "there" / file) for file in files]) != hashes[0]
    (tmp_path / "here/wds_mnist_test/source.json").write_text("{}")
    assert hash_files([str(tmp_path / "here" / file) for file in files]) != hashes[0]


def test_a_server_that_refuses_the_range_is_asked_for_the_whole_file(state: State, hub: Hub, tmp_path: Path) -> None:
    state.ill = {"test/0.tar": ["short", "416"]}
    assert fetch(hub, tmp_path) == [] and listing(tmp_path) == SET and state.ranges == []


def test_a_server_says_how_long_to_wait(state: State, hub: Hub, tmp_path: Path) -> None:
    state.patient, state.ill = True, {"classnames.txt": ["429"]}
    start = time.monotonic()
    assert fetch(hub, tmp_path) == []
    assert time.monotonic() - start >= 1  # a lower bound: no slow machine breaks it


def test_a_date_to_wait_for_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_445_412_480.0)  # Wed, 21 Oct 2015 07:28:00 GMT
    for told, wait_s in (
        ("Wed, 21 Oct 2015 07:28:30 GMT", 30.0),
        ("Wed, 21 Oct 2015 07:27:00 GMT", 0.0),
        ("Thu, 22 Oct 2015 07:28:00 GMT", 300.0),
        ("7", 7.0),
        ("soon", 0.0),
        ("Wed, 99 Oct 99999 07:28:00 GMT", 0.0),
    ):
        headers = email.message.Message()
        headers["Retry-After"] = told
        with urllib.error.HTTPError("http://x", 503, "", headers, None) as error:
            assert _read_wait_s(error) == wait_s


def test_a_line_that_drops_often_is_no_failure_while_bytes_come(state: State, hub: Hub, tmp_path: Path) -> None:
    state.ill = {"test/0.tar": ["short"] * 12}
    assert fetch(hub, tmp_path) == [] and listing(tmp_path) == SET
    assert len(set(state.ranges)) == 12


def test_a_part_that_another_process_writes_is_left_alone(hub: Hub, tmp_path: Path) -> None:
    part = tmp_path / "wds_mnist_test/test/.0.tar.part"
    part.parent.mkdir(parents=True)
    with part.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        (failed,) = fetch(hub, tmp_path)
        assert "being written by another process" in failed and part.read_bytes() == b""
    assert fetch(hub, tmp_path) == [] and listing(tmp_path) == SET


def test_links_in_the_folder_are_replaced_not_written_through(hub: Hub, tmp_path: Path) -> None:
    folder, mine = tmp_path / "out/wds_mnist_test/test", tmp_path / "mine"
    folder.mkdir(parents=True)
    mine.write_bytes(b"precious")
    for name in ("0.tar", ".0.tar.part", ".1.tar.part"):
        (folder / name).symlink_to(mine)
    (folder / "1.tar").symlink_to(tmp_path / "nothing")
    assert fetch(hub, tmp_path / "out") == [] and listing(tmp_path / "out") == SET
    assert mine.read_bytes() == b"precious" and not (tmp_path / "nothing").exists()


def test_a_full_disk_ends_a_file_at_once(state: State, hub: Hub, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(TAR) // 2, limits[1]))
    try:
        failed = fetch(hub, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(failed) == 2 and all("File too large" in message and "Mend that" in message for message in failed)
    assert state.asked[f"/datasets/djghosh/wds_mnist_test/resolve/{COMMIT}/test/0.tar"] == 1
    assert fetch(hub, tmp_path) == [] and listing(tmp_path) == SET


@pytest.mark.parametrize("code", ["404", "403"])
def test_a_set_that_the_hub_refuses_does_not_stop_the_others(
    state: State, hub: Hub, tmp_path: Path, code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state.ill = {"/api/datasets/nlphuji/winogavil/revision/main": [code] * 9}
    words = ["misc/winogavil", "mnist", "--out", str(tmp_path), "--endpoint", hub.endpoint]
    assert main([*words, "--dry-run"]) == 1 and main([*words, "--yes"]) == 1 and listing(tmp_path) == SET
    assert f"misc/winogavil: {hub.endpoint}" in capsys.readouterr().err
    state.ill = {"/api/datasets/nlphuji/winogavil/revision/main": ["503"] * 9}
    with pytest.raises(Unreachable):
        plan_sets(hub, [find_task("misc/winogavil"), find_task("mnist")], str(tmp_path))
    assert state.asked["/api/datasets/djghosh/wds_mnist_test/revision/main"] == 2


def test_another_process_goes_on_where_one_stopped(state: State, hub: Hub, tmp_path: Path) -> None:
    state.ill = {"test/0.tar": ["short"] + ["503"] * 9}
    (failed,) = fetch(hub, tmp_path)
    assert "503" in failed and "again to go on" in failed
    assert "wds_mnist_test/test/0.tar" not in listing(tmp_path) and "wds_mnist_test/test/1.tar" in listing(tmp_path)
    state.ill = {}
    plan = plan_set(hub, find_task("mnist"), str(tmp_path))
    assert plan.missing == len(TAR) // 2
    assert fetch_sets(hub, [plan], quiet=True) == [] and listing(tmp_path) == SET
    assert state.ranges == [f"bytes={len(TAR) // 2}-"] * (len(state.ranges))


def test_a_hash_that_stays_wrong_is_never_a_file(state: State, hub: Hub, tmp_path: Path) -> None:
    state.ill = {"test/1.tar": ["wrong"] * 99, "classnames.txt": ["wrong"] * 99}
    failed = fetch(hub, tmp_path)
    assert len(failed) == 2 and all("hash is wrong" in message for message in failed)
    assert set(listing(tmp_path)) == set(SET) - {"wds_mnist_test/test/1.tar", "wds_mnist_test/classnames.txt"}


def test_a_part_of_another_version_is_fetched_anew(state: State, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "wds_mnist_test/test").mkdir(parents=True)
    (tmp_path / "wds_mnist_test/test/.0.tar.part").write_bytes(b"y" * 1000)
    (tmp_path / "wds_mnist_test/test/1.tar").write_bytes(b"z" * len(TAR))
    assert fetch(hub, tmp_path) == [] and listing(tmp_path) == SET


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("more", "sends more than"),
        ("404", "not there"),
        ("403", "HF_TOKEN"),
        ("to file:///etc/hostname", "not allowed"),
        ("to ftp://127.0.0.1/x", "not followed"),
        ("to http://[x", "Invalid IPv6 URL. Is it the hub"),
    ],
)
def test_a_fault_that_does_not_pass_ends_at_once(
    state: State, hub: Hub, tmp_path: Path, fault: str, message: str
) -> None:
    state.ill = {"test/0.tar": [fault] * 99}
    (failed,) = fetch(hub, tmp_path)
    assert message in failed and state.asked[f"/datasets/djghosh/wds_mnist_test/resolve/{COMMIT}/test/0.tar"] == 1
    assert not list(tmp_path.rglob("0.tar"))


def test_a_token_stays_with_the_endpoint(state: State, hub: Hub, tmp_path: Path) -> None:
    elsewhere = State()
    for address in serve(elsewhere):
        state.other = address
        assert fetch(Hub(hub.endpoint, "secret"), tmp_path) == []
    assert {token for _, token in state.tokens} == {"Bearer secret"}
    assert elsewhere.tokens and {token for _, token in elsewhere.tokens} == {None}


@pytest.mark.parametrize(
    "path",
    [
        "../../evil.tar",
        "/etc/evil.tar",
        "test/../../0.tar",
        "test/0.tar\n",
        "test\\0.tar",
        "C:0.tar",
        "test/00.tar",
        "",
    ],
)
@pytest.mark.parametrize("key", ["mnist", "misc/winogavil"])
def test_hostile_names_are_left_there(state: State, hub: Hub, tmp_path: Path, key: str, path: str) -> None:
    good = FILES if key == "mnist" else {"a.csv": b"cue\n", "b.zip": b"PK"}
    state.files = good | {path: b"evil", path + ".csv": b"evil", path + ".zip": b"evil"}
    out = tmp_path / "deep" / "out"
    fetch(hub, out, key)
    folder = out / ("wds_mnist_test" if key == "mnist" else "wds_misc-winogavil_test")
    assert all(f.is_relative_to(folder) for f in tmp_path.rglob("*") if f.is_file())
    assert {f.read_bytes() for f in tmp_path.rglob("*.tar")} <= {TAR, TAR[::-1]}


@pytest.mark.parametrize(
    ("lfs", "size", "oid"),
    [({"oid": "x", "size": 3}, 3, "1" * 40), (None, -1, "1" * 40), (None, 1, "zz"), (7, 1, "")]
    + [(None, size, "1" * 40) for size in (float("inf"), float("nan"), 10**400, True, 1.5, "1")],
)
def test_a_listing_that_is_none(state: State, hub: Hub, lfs: object, size: int, oid: str) -> None:
    state.answer = [{"type": "file", "path": "a", "size": size, "oid": oid, "lfs": lfs}]
    with pytest.raises(StageError, match=r"no file entry|has size"):
        list_files(hub, "a/b", COMMIT)


def test_a_listing_without_a_bottom(hub: Hub, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    def send_deep(self: Web, query: object) -> None:
        self.send(b"[" * 10 * sys.getrecursionlimit())

    monkeypatch.setattr(Web, "list", send_deep)
    with pytest.raises(StageError, match="does not answer in JSON"):
        list_files(hub, "a/b", COMMIT)


@pytest.mark.parametrize(("answer", "message"), [({"error": "x"}, "no list"), ("<html>", "no list"), ([7], "no file")])
def test_an_answer_of_another_kind(state: State, hub: Hub, answer: object, message: str) -> None:
    state.answer = answer
    with pytest.raises(StageError, match=message):
        list_files(hub, "a/b", COMMIT)


def test_a_set_that_lacks_a_tar_or_a_table(state: State, hub: Hub, tmp_path: Path) -> None:
    del state.files["test/0.tar"]
    with pytest.raises(StageError, match=r"lacks test/0.tar; it holds 'classnames.txt'"):
        plan_set(hub, find_task("mnist"), str(tmp_path))
    with pytest.raises(StageError, match="no table with a zip"):
        plan_set(hub, find_task("misc/winogavil"), str(tmp_path))
    with pytest.raises(ConfigError, match="local folder"):
        plan_set(hub, find_task("mnist"), "s3://bucket/x")


def test_a_revision_is_one_part_of_the_address(state: State, hub: Hub) -> None:
    assert find_commit(hub, "a/b", "refs/pr/1") == COMMIT
    assert list(state.asked) == ["/api/datasets/a/b/revision/refs/pr/1"]
    assert "secret" not in repr(Hub(hub.endpoint, "secret"))


def test_no_server_and_no_hub(tmp_path: Path, state: State) -> None:
    with pytest.raises(StageError, match="6 tries failed"):
        find_commit(Hub("http://127.0.0.1:9", first_wait_s=0.001), "a/b")
    for endpoint in ("ftp://x", "huggingface.co", "https://", "http://[x", "http://x:port"):
        with pytest.raises(ConfigError, match="should be an address"):
            Hub(endpoint)
    for token in ("secret\n", "sécret", "se cret"):
        with pytest.raises(ConfigError, match="token") as caught:
            Hub(token=token)
        assert "cret" not in str(caught.value)


def test_the_verb(
    state: State, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["mnist", "--out", str(tmp_path / "o")]
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    for more, code in ((["--dry-run"], 0), ([], 2), (["--max-gb", "0.001", "--yes"], 2), (["--all"], 2)):
        assert main(words + more) == code
        assert not (tmp_path / "o").exists()
    assert "is fetched without your consent" in capsys.readouterr().err
    assert main([*words, "--yes"]) == 0 and listing(tmp_path / "o") == SET
    assert "djghosh/wds_mnist_test" in (shown := capsys.readouterr().out) and "0.002" in shown
    assert main(words) == 0  # nothing is missing, so nothing is asked
    assert main(["mnisst", "--out", "x"]) == 2
    assert list_files(hub, "djghosh/wds_mnist_test", COMMIT)
