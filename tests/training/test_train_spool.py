"""Remote shards brought whole, against an S3 server on loopback that counts requests."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from made_s3 import other_client, serve_s3

from pipeline.clip_model import open_model
from training.config import TrainConfig
from training.data import open_batches
from training.images import read_crop
from training.index import TarReader, list_tars, read_index
from training.run import plan_run
from training.spool import LOCK, PREFIX, Spool, SpoolReader, _open_folder
from training.world import World

ROWS, PER_TAR = 240, 20
"""Of 12 shards."""


@pytest.fixture(scope="module")
def server():
    with serve_s3() as server:
        yield server


@pytest.fixture(scope="module")
def opened():
    return open_model("winnow-vit-tiny")


@pytest.fixture(scope="module")
def both(server, opened, tmp_path_factory, square_rows, write_shards):
    """The same shards here and on the server -> their indexes."""
    folder = write_shards(tmp_path_factory.mktemp("here"), square_rows(ROWS), per_tar=PER_TAR)
    other_client().mkdir("shards")
    for tar in folder.iterdir():
        other_client().pipe_file(f"shards/{tar.name}", tar.read_bytes())
    return [read_index(list_tars(p), tokenize=opened.tokenize, quiet=True) for p in (str(folder), "s3://shards")]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    assert not list(tmp_path.glob(f"{PREFIX}*"))


def load(opened, index, **settings):
    settings = {"batch_size": 16, "seed": 1, "steps": range(ROWS // 16), "window_shards": 4} | settings
    return list(open_batches(index, crop=read_crop(opened.train_transform), **settings))


def gets_of(server):
    return Counter(path for method, path, _ in server.requests if method == "GET" and path.endswith(".tar"))


def assert_equal(first, second):
    assert len(first) == len(second)
    assert all(torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_asks_for_each_shard_once(server, opened, both, num_workers):
    here, there = both
    server.requests.clear()
    batches = load(opened, there, num_workers=num_workers)
    assert set(gets_of(server).values()) == {1} and len(gets_of(server)) == 12
    assert_equal(batches, load(opened, here))
    assert_equal(load(opened, there, steps=range(7, 12), num_workers=num_workers), batches[7:12])


def test_without_a_window_every_image_is_asked_for_and_a_warning_says_so(server, opened, both, caplog):
    server.requests.clear()
    batches = load(opened, both[1], window_shards=0, steps=range(4))
    assert_equal(batches, load(opened, both[0], window_shards=0, steps=range(4)))
    tars = [path for path in gets_of(server).elements()]
    sent = sum(size for method, path, size in server.requests if method == "GET" and path in tars)
    assert 64 <= len(tars) < 70 and "window_shards=8" in caplog.text
    assert sent < 1.1 * sum(int(both[1].size_N[batch.row_B].sum()) for batch in batches)


def test_datacomp_asks_once_for_a_shard_of_its_window(server, opened, both):
    server.requests.clear()
    there, here = (load(opened, index, sampler="datacomp", window_shards=0) for index in reversed(both))
    assert_equal(there, here)
    assert gets_of(server).total() <= 2 * 12


def test_each_process_brings_its_own_part(server, opened, both):
    server.requests.clear()
    parts = [load(opened, both[1], window_shards=12, world=World(rank, 4)) for rank in range(4)]
    whole = load(opened, both[0], window_shards=12)
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[step].row_B for part in parts]), batch.row_B)
    assert gets_of(server).total() < 2.5 * 12  # not 4 x 12


def test_about_two_windows_are_here_at_a_time(both, tmp_path):
    index = both[1]
    rows = [np.arange(step * 10, step * 10 + 10) for step in range(24)]  # two steps a shard
    spool = Spool(index, rows.__getitem__, steps=range(24), ahead=4)
    spool.start()
    for step in range(24):
        spool.go_on(step)
        held = [int(path.stem) for kind in ("pending", "tar") for path in Path(spool.folder).glob(f"*.{kind}")]
        assert set(held) == set(range(step // 2, min(12, (step + 5) // 2)))
    spool.close()


def test_a_shard_that_finds_no_room_is_read_row_by_row(server, both, caplog):
    index = both[1]
    spool = Spool(index, lambda step: np.arange(PER_TAR), steps=range(1), ahead=1)
    (Path(spool.folder) / "0.part").symlink_to("/dev/full")
    server.requests.clear()
    spool.start()
    reader, plain = SpoolReader(index.urls, spool.folder), TarReader(both[0].urls)
    for row in (3, 7):
        place = [int(a[row]) for a in (index.tar_N, index.offset_N, index.size_N)]
        assert reader.read(*place) == plain.read(*place)
    assert "row by row" in caplog.text and "No space left" in caplog.text
    assert gets_of(server).total() == 3
    reader.close()
    plain.close()
    spool.close()


def test_a_run_asks_for_one_listing_to_identify_its_data(server, both):
    config = TrainConfig(model="winnow-vit-tiny", samples=2, batch_size=2)
    server.requests.clear()
    assert plan_run(config, "s3://shards").parents["data"]
    assert not [path for _, path, _ in server.requests if path.endswith(".tar")]
    server.requests.clear()
    plan_run(config, "s3://shards", parents={"data": "known"})
    assert len(server.requests) <= 2  # which files there are


def test_processes_that_start_together_leave_each_other_their_folders():
    def open_some(_):
        return [_open_folder() for _ in range(50)]

    with ThreadPoolExecutor(4) as threads:
        opened = [one for some in threads.map(open_some, range(4)) for one in some]
    assert len(opened) == 200 and all((Path(folder) / LOCK).exists() for folder, _ in opened)
    for folder, lock in opened:
        os.close(lock)
        shutil.rmtree(folder)


HOLD = """
import os, signal, sys, tempfile
import numpy as np
tempfile.tempdir = sys.argv[1]
from training.spool import _open_folder
print(_open_folder()[0], flush=True)
signal.pause()
"""


def test_what_a_killed_process_left_is_deleted(tmp_path, both):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        left = Path(process.stdout.readline().strip())
        Spool(both[1], lambda step: both[1].tar_N[:0], steps=range(0), ahead=1).close()
        assert left.is_dir()  # it lives
        os.kill(process.pid, signal.SIGKILL)
    Spool(both[1], lambda step: both[1].tar_N[:0], steps=range(0), ahead=1).close()
    assert not left.exists()
