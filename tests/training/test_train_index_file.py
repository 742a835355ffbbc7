import os

import numpy as np
import pytest

from pipeline.clip_model import open_model
from training.captioned import TrainSet, as_sets, read_sets
from training.index_file import ARRAYS, read_sets_once


@pytest.fixture(scope="module")
def opened():
    return open_model("winnow-vit-tiny")


def load(opened, sets, out):
    return read_sets_once(sets, opened, out=str(out), architecture="winnow-vit-tiny", quiet=True)


def assert_same(first, second):
    assert (first.urls, first.sets) == (second.urls, second.sets)
    for name in ARRAYS:
        one, two = getattr(first, name), getattr(second, name)
        assert one.dtype == two.dtype and np.array_equal(one, two)


def test_a_kept_index_is_used_without_reading_the_tars_again(opened, tmp_path, write_shards, square_rows):
    data = write_shards(tmp_path / "data", square_rows(20), per_tar=7)
    sets = as_sets(str(data))
    made = read_sets(sets, tokenize=opened.tokenize, quiet=True)
    assert_same(load(opened, sets, tmp_path), made)
    for tar in data.iterdir():  # emptied behind its back: name, size and time stay
        stat = tar.stat()
        tar.write_bytes(bytes(stat.st_size))
        os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert_same(load(opened, sets, tmp_path), made)


def test_other_data_and_damage_are_noticed(opened, tmp_path, write_shards, square_rows, caplog):
    rows = square_rows(6)
    data = write_shards(tmp_path / "data", rows, per_tar=3)
    sets, out = as_sets(str(data)), tmp_path / "out"
    assert load(opened, sets, out).num_rows == 6
    write_shards(data, rows[:5], per_tar=3)
    assert load(opened, sets, out).num_rows == 5
    assert load(opened, as_sets(str(data / "00000000.tar")), out).num_rows == 3
    whole = (out / "index.npz").read_bytes()
    for damaged in (whole[:-50], b"", whole.replace(b"twin_N", b"twin_M")):
        (out / "index.npz").write_bytes(damaged)
        assert load(opened, as_sets(str(data / "00000000.tar")), out).num_rows == 3
        assert "cannot be read" in caplog.text
        caplog.clear()
    assert (out / "index.npz").read_bytes() == whole
    labelled = (TrainSet("a", (str(data / "00000000.tar"),), 2.0), TrainSet("b", sets[0].urls, 1.0))
    assert [part.per_epoch for part in load(opened, labelled, out).sets] == [5, 3]
    assert_same(load(opened, labelled, out), read_sets(labelled, tokenize=opened.tokenize, quiet=True))
