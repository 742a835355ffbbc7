"""Storage and the three Spark stages against an S3 server on loopback (moto's), which counts what it is asked for."""

import os
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from made_s3 import Server, other_client, serve_s3

from pipeline.clip_model import open_model
from pipeline.errors import PoolError
from pipeline.filesystem import StorageError
from pipeline.ranges import read_ranges
from pipeline.storage import (
    exists,
    expand,
    fingerprint,
    fingerprint_all,
    is_folder,
    list_folder,
    open_file,
    read_bytes,
    remove,
    write_atomic,
    write_bytes,
    write_new,
)

ROOT = Path(__file__).parent.parent.parent
PART_BYTES = 50 << 20
"""s3fs starts a multipart upload above this."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve_s3() as server:
        yield server


@pytest.fixture
def bucket(server: Server, request: pytest.FixtureRequest) -> str:
    """s3://... of a new empty bucket, made by another client than the one under test."""
    name = f"test-{abs(hash(request.node.name))}"
    other_client().mkdir(name)
    server.requests.clear()
    return f"s3://{name}"


def uploads(bucket: str) -> list[Any]:
    """Multipart uploads that were begun and neither completed nor given up."""
    found: list[Any] = (
        other_client().call_s3("list_multipart_uploads", Bucket=bucket.removeprefix("s3://")).get("Uploads", [])
    )
    return found


@pytest.mark.parametrize("size", [3, PART_BYTES + 7], ids=["one put", "multipart"])
def test_a_failed_write_leaves_nothing_and_the_old_object(bucket: str, size: int) -> None:
    url = f"{bucket}/run/a"
    for old in (None, b"old"):
        if old:
            write_bytes(url, old)
        with pytest.raises(KeyError), write_atomic(url) as file:
            file.write(bytes(size))
            raise KeyError
        del file  # nor does the garbage collector complete it
        assert (other_client().cat_file(url) if exists(url) else None) == old
        assert uploads(bucket) == []
    with write_atomic(url) as file:
        file.write(bytes(size))
        assert read_bytes(url) == b"old"
    assert other_client().info(url)["size"] == size
    assert [entry["name"].rsplit("/")[-1] for entry in other_client().ls(f"{bucket}/run", detail=True)] == ["a"], (
        "no temporary key"
    )


def test_an_object_is_written_with_one_put_and_no_copy(server: Server, bucket: str) -> None:
    write_bytes(f"{bucket}/run/deep/a", b"1")
    write_bytes(f"{bucket}/run/empty", b"")
    assert [method for method, *_ in server.requests] == ["PUT", "PUT"]
    assert read_bytes(f"{bucket}/run/empty") == b""


def test_what_others_wrote_is_seen_at_once(bucket: str) -> None:
    other = other_client()
    folder, url = f"{bucket}/pool", f"{bucket}/pool/0.tar"
    assert not exists(folder) and not is_folder(folder) and list_folder(folder) == [] and not exists(url)
    other.pipe_file(url, b"1")
    assert exists(folder) and is_folder(folder) and exists(url) and not is_folder(url)
    assert list_folder(folder) == expand(folder) == expand(f"{folder}/*.tar") == [url]
    before = fingerprint(url)
    assert before == fingerprint_all([url])[0]
    assert before["modified"] == other.info(url)["ETag"] and before["size"] == 1
    other.pipe_file(url, b"2")
    assert fingerprint(url) != before and fingerprint_all([url]) == [fingerprint(url)]
    other.rm_file(url)
    assert not exists(url) and list_folder(folder) == []
    with pytest.raises(FileNotFoundError, match=r"0\.tar"):
        fingerprint_all([url])


def test_expand_lists_a_folder_once(server: Server, bucket: str) -> None:
    other = other_client()
    urls = [f"{bucket}/pool/{n:03d}.tar" for n in range(40)]
    for url in [*urls, f"{bucket}/pool-2/000.tar", f"{bucket}/pool/stats/x.json"]:
        other.pipe_file(url, url.encode())
    other.pipe_file(f"{bucket}/pool/", b"")  # the mark of a folder that consoles leave
    assert expand(f"{bucket}/pool") == urls
    server.requests.clear()
    assert expand(f"{bucket}/pool/{{000..039}}.tar") == urls
    assert [found["name"] for found in fingerprint_all(urls)] == [url.rsplit("/", 1)[1] for url in urls]
    assert len(server.requests) <= 5
    assert expand(f"{bucket}/pool/00?.tar::{bucket}/pool-2") == [*urls[:10], f"{bucket}/pool-2/000.tar"]
    with pytest.raises(PoolError, match=r"040\.tar' does not exist"):
        expand(f"{bucket}/pool/{{000..040}}.tar")
    remove(f"{bucket}/pool")
    remove(f"{bucket}/pool")
    assert [entry["name"] for entry in other.ls(bucket, detail=True)] == [f"{bucket[5:]}/pool-2"]


def test_ranges_are_all_that_is_read(server: Server, bucket: str) -> None:
    content = os.urandom(3 << 20)
    url, path = f"{bucket}/a.tar", f"/{bucket[5:]}/a.tar"
    other_client().pipe_file(url, content)
    spans = [(2_000_000, 2_000_500), (0, 10), (0, 10), (512, 512), (len(content) - 1, len(content))]
    assert list(read_ranges(url, spans)) == [content[a:b] for a, b in spans]
    assert server.bytes_sent(path) == 521
    assert list(read_ranges(url, [])) == []
    for beyond in [(len(content) - 1, len(content) + 1), (len(content) + 5, len(content) + 9)]:
        with pytest.raises(PoolError, match="shorter"):
            list(read_ranges(url, [beyond]))


def test_one_writer_of_a_name_wins(bucket: str, tmp_path: Path) -> None:
    for url in (f"{bucket}/run/lock", str(tmp_path / "run" / "lock")):
        won: list[int] = []
        gate = threading.Barrier(8)

        def claim(number: int, url: str = url, won: list[int] = won, gate: threading.Barrier = gate) -> None:
            gate.wait()
            if write_new(url, str(number).encode()):
                won.append(number)

        threads = [threading.Thread(target=claim, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [str(n).encode() for n in won] == [read_bytes(url)]
        assert len(list_folder(url.rsplit("/", 1)[0])) == 1


def test_refusals_are_one_line(bucket: str) -> None:
    for ask in (expand, list_folder, lambda url: write_bytes(url, b"1"), lambda url: write_new(url, b"1")):
        with pytest.raises(StorageError, match=r"'s3://no-such-bucket/a': .*bucket does not exist\. Create") as caught:
            ask("s3://no-such-bucket/a")
        assert "\n" not in str(caught.value)
    assert not other_client().exists("no-such-bucket"), "a typing error makes no bucket"
    with pytest.raises(FileNotFoundError, match="absent"), open_file(f"{bucket}/absent"):
        pass
    with pytest.raises(StorageError, match="fsspec knows"):
        exists("nosuchscheme://a")


def test_without_the_driver_the_remedy_is_named() -> None:
    ask = "import sys; sys.modules['s3fs'] = None; from pipeline.storage import exists; exists('s3://bucket/a')"
    done = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True, check=False)
    assert re.search(r"StorageError: 's3://bucket/a' needs .*pip install 'winnow\[s3\]'", done.stderr)


def test_wrong_credentials_say_so(server: Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes(f"{bucket}/a", b"1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    post(f"{server.endpoint}/moto-api/reset-auth", b"0")  # from now on keys are checked, and nobody has one
    try:
        for ask in (exists, read_bytes, expand, lambda url: write_bytes(url, b"2")):
            with pytest.raises(StorageError, match=r"/a' is refused: .* Check the credentials .*AWS_ACCESS_KEY_ID"):
                ask(f"{bucket}/a")
    finally:
        post(f"{server.endpoint}/moto-api/reset-auth", b"Infinity")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    with pytest.raises(StorageError, match=r"Unable to locate credentials"):
        read_bytes(f"{bucket}/a")
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def post(url: str, content: bytes) -> None:
    with urllib.request.urlopen(
        urllib.request.Request(url, content, {"Content-Type": "text/plain"}, method="POST")
    ) as answer:
        assert answer.status == 200


RECIPE = """
score: [{{filter: caption_length}}, {{filter: image_size}}, {{filter: clip_score, model: "{model}", device: cpu}}]
subsets: {{few: [{{name: top, top: {{by: image_min_side_px, fraction: 0.25}}}}]}}
shards: {{rows_per_shard: 3}}
"""
STAGES = """
import sys
from jobs import score_pool, select_subset, write_shards
recipe, pool, out = sys.argv[1:]
for main, words in (
    (score_pool.main, [recipe, "--pool", pool, "--out", f"{out}/scores"]),
    (select_subset.main, [recipe, "--scores", f"{out}/scores", "--out", f"{out}/subsets"]),
    (write_shards.main, [recipe, "--pool", pool, "--subset", f"{out}/subsets/few.npy", "--scores", f"{out}/scores",
                         "--out", f"{out}/shards"]),
):
    if main([*words, "--master", "local[2]"]):
        sys.exit(1)
"""


def run_stages(folder: Path, *words: str) -> str:
    """Score, select and write shards in one process, as the verbs do, and return what they printed."""
    done = subprocess.run(
        [sys.executable, "-c", STAGES, *words], cwd=folder, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def objects_under(url: str) -> dict[str, tuple[str, bytes]]:
    """Key below `url` -> (when it was written, content)."""
    client = other_client()
    found = client.find(url, detail=True)
    start = len(url.removeprefix("s3://")) + 1
    return {key[start:]: (str(info["LastModified"]), client.cat_file(key)) for key, info in found.items()}


def upload(folder: Path, url: str) -> None:
    for file in folder.iterdir():
        other_client().pipe_file(f"{url}/{file.name}", file.read_bytes())


@pytest.mark.spark
def test_the_stages_on_s3(server: Server, bucket: str, make_pool: Callable[..., Path], tmp_path: Path) -> None:
    """Pool and output on s3; the Python workers of Spark find the server by the environment they inherit."""
    weights = tmp_path / "tiny.pt"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        torch.save(open_model("winnow-vit-tiny").model.state_dict(), weights)
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(RECIPE.format(model=f"winnow-vit-tiny@{weights}"))
    pool, out, local = f"{bucket}/pool", f"{bucket}/out", tmp_path / "out"
    upload(make_pool(64, 2), pool)
    run_stages(tmp_path, str(recipe), pool, out)
    asked = list(server.requests)
    made = objects_under(out)
    assert not [key for key in made if ".tmp-" in key] and uploads(bucket) == []

    selected = next(n for n, (method, path, _) in enumerate(asked) if method == "PUT" and path.endswith("few.npy"))
    tars = [f"/{bucket[5:]}/pool/0000000{n}.tar" for n in (0, 1)]
    read = [sum(size for method, path, size in asked[selected:] if (method, path) == ("GET", tar)) for tar in tars]
    kept = sum(len(content) for key, (_, content) in made.items() if key.endswith(".tar"))
    assert read[0] == 0, "no row of the first tar is kept"
    assert 0 < read[1] < kept < other_client().info(f"{pool}/00000001.tar")["size"], "the kept rows, by range"

    run_stages(tmp_path, str(recipe), pool, str(local))
    assert {key: content for key, (_, content) in made.items()} == {
        str(p.relative_to(local)): p.read_bytes() for p in local.rglob("*") if p.is_file()
    }

    server.requests.clear()
    run_stages(tmp_path, str(recipe), pool, out)
    assert not [path for method, path, _ in server.requests if method == "GET" and path in tars]
    assert objects_under(out) == made, "no object was written again"
