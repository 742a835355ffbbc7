"""The folder that shards go into: whose it is, what may stay, what is missing."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from made_shards import contents_of, spans_of, uid, write_all
from toy import toy_row

from jobs.stage_shards import run_shards
from pipeline.errors import PoolError
from pipeline.manifest import Manifest, write_manifest
from pipeline.pool import Part, list_parts
from pipeline.shard_folder import (
    claim_folder,
    has_every_shard,
    prepare_folder,
    read_stats,
    remove_beyond,
)
from pipeline.shard_plan import find_gaps, plan_part, plan_shards
from pipeline.shards import ShardConfig, write_shard
from pipeline.subset import write_subset
from pipeline.tars import read_rows
from pipeline.uid import parse_uids

MakePool = Callable[..., Path]
TRAIN_MANIFEST = '{"identity": "x", "stage": "train", "config": {}, "parents": {}, "counts": {}, "facts": {}}'


def test_half_written_folder_goes_on_and_stale_shards_go_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "shards"
    prepare_folder(str(out), "one")
    (out / "00000000.tar").write_bytes(b"kept")
    prepare_folder(str(out), "one")
    assert (out / "00000000.tar").exists() and not caplog.records
    prepare_folder(str(out), "two", keep=True)
    assert (out / "00000000.tar").exists() and not caplog.records
    (out / ".winnow-lock").write_bytes(b"{}")
    prepare_folder(str(out), "three")
    assert not (out / "00000000.tar").exists() and (out / ".winnow-lock").exists()
    assert "1 tars of an earlier run" in caplog.text and "00000000.tar" in caplog.text


def test_tars_beyond_the_last_are_named_and_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("00000001.tar", "00000002.tar", "00000002.parquet", "00000010_stats.json", "sizes.json", "a.tar"):
        (tmp_path / name).write_bytes(b"")
    remove_beyond(str(tmp_path), 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000001.tar", "a.tar", "sizes.json"]
    assert "00000002.tar" in caplog.text and "00000001.tar" not in caplog.text


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-512])


@pytest.mark.parametrize(
    "damage",
    [
        lambda out: cut(out / "00000001.tar"),
        lambda out: cut(out / "00000001.parquet"),
        lambda out: (out / "00000001.tar").write_bytes(b"somebody else's"),
        lambda out: (out / "00000001.tar").unlink(),
        lambda out: (out / "00000001_stats.json").unlink(),
        lambda out: (out / "00000001_stats.json").write_text('{"successes": 5}'),
    ],
)
def test_a_shard_that_changed_is_found_and_made_again(
    make_pool: MakePool, tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    pool, uids, out = make_pool(12, 2), [uid(n) for n in range(12)], tmp_path / "out"
    facts = write_all(pool, uids, out, rows_per_shard=4)
    made = Manifest(stage="shards", config={}, parents={}, facts=facts | {"broken": {}})
    before = contents_of(out)
    untouched = (out / "00000000.tar").stat().st_mtime_ns
    assert has_every_shard(str(out), made) and read_stats(str(out), 1)
    damage(out)
    assert not has_every_shard(str(out), made) and read_stats(str(out), 1) is None
    prepare_folder(str(out), "identity", keep=True)
    write_all(pool, uids, out, rows_per_shard=4)
    assert contents_of(out) == before and (out / "00000000.tar").stat().st_mtime_ns == untouched


@pytest.mark.parametrize(
    ("name", "content"), [("00000003.tar", b""), ("sizes.json", b'{"00000000.tar": 12}'), ("sizes.json", b"{")]
)
def test_leftovers_and_another_runs_sizes_are_found(
    make_pool: MakePool, tmp_path: Path, name: str, content: bytes
) -> None:
    out = tmp_path / "out"
    facts = write_all(make_pool(12, 2), [uid(n) for n in range(12)], out, rows_per_shard=4)
    made = Manifest(stage="shards", config={}, parents={}, facts=facts | {"broken": {}})
    assert has_every_shard(str(out), made)
    (out / name).write_bytes(content)
    assert not has_every_shard(str(out), made)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["00000000", "00000001"], {}),
        (["00000000", "00000002"], {"00000001": 1}),
        (["00005", "00009", "00011"], {"00006 to 00008": 3, "00010": 1}),
        (["0-00000000", "1-00000002", "1-00000004", "0-00000001"], {"1-00000003": 1}),
        (["spring", "summer-2"], {}),
        (["0", "99999999"], {"1 to 99999998": 99999998}),
        ([], {}),
    ],
)
def test_gaps_in_the_pools_numbers(names: list[str], expected: dict[str, int]) -> None:
    assert find_gaps([Part(name, None, None) for name in names]) == expected


@pytest.mark.parametrize("name", ["thesis.txt", "00000000.tar", "sizes.json", "manifest.json"])
def test_nobody_elses_files_are_touched(make_pool: MakePool, tmp_path: Path, name: str) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / name).write_text("{}" if name != "manifest.json" else TRAIN_MANIFEST)
    with pytest.raises(PoolError, match="Name an empty folder"):
        claim_folder(str(out), [])
    pool = make_pool(4, 1)
    with pytest.raises(PoolError, match="Name an empty folder"):
        claim_folder(f"{pool}/", list_parts(str(pool)))
    assert [p.name for p in out.iterdir()] == [name] and (pool / "00000000.tar").exists()


def test_a_claimed_folder_may_be_written_again(tmp_path: Path) -> None:
    out = tmp_path / "shards"
    claim_folder(str(out), [])
    (out / "00000000.tar").write_bytes(b"killed here")
    claim_folder(str(out), [])
    assert (out / "00000000.tar").read_bytes() == b"killed here"


def test_the_stage_names_gaps_repairs_shards_and_replaces_another_runs(
    spark: Any, make_pool: MakePool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pool, out, subset = make_pool(24, 3), tmp_path / "out", str(tmp_path / "s.npy")
    for file in pool.glob("00000001.*"):
        file.unlink()
    write_subset(subset, parse_uids(pa.array([uid(n) for n in range(24)])))
    stage = partial(run_shards, lambda: spark, str(pool), subset, out=str(out), quiet=True)
    made = stage(ShardConfig(rows_per_shard=4))
    assert "1 parts are missing in the pool's numbering: 00000001" in caplog.text
    assert made.facts["missing_parts"] == 1 and made.facts["rows"] == 16 and made.facts["not_in_pool"] == 8
    before = contents_of(out)
    assert stage(ShardConfig(rows_per_shard=4)) == made

    cut(out / "00000002.tar")
    (out / "00000009.tar").write_bytes(b"left over")
    caplog.clear()
    spans_of(pool, tmp_path / "scores")
    assert stage(ShardConfig(rows_per_shard=4), scores=str(tmp_path / "scores")) == made
    assert contents_of(out) == before
    assert "written again: 00000002" in caplog.text and "removed from" in caplog.text and "00000009.tar" in caplog.text

    caplog.clear()
    fewer = stage(ShardConfig(rows_per_shard=8, shuffle_seed=0))
    assert fewer.facts["num_shards"] == 2 and len(list(out.glob("*.tar"))) == 2
    assert "config.rows_per_shard changed" in caplog.text and "4 tars of an earlier run are removed" in caplog.text
    (tmp_path / "scores" / "spans" / "00000002.parquet").unlink()
    stage(ShardConfig(rows_per_shard=5), scores=str(tmp_path / "scores"))
    assert "has no spans of 1 of 2 parts" in caplog.text


@pytest.mark.parametrize("spelling", ["{0}", "{0}/../pool", "{0}/."])
def test_the_pool_is_never_the_output_however_it_is_spelled(make_pool: MakePool, tmp_path: Path, spelling: str) -> None:
    pool = make_pool(8, 2)
    write_manifest(str(pool), Manifest(stage="shards", config={}, parents={}))  # the pool is itself shards of winnow
    before = {p.name for p in pool.iterdir()}
    (tmp_path / "link").symlink_to(pool)
    for out in (spelling.format(pool), str(tmp_path / "link")):
        with pytest.raises(PoolError, match="holds the pool itself"):
            claim_folder(out, list_parts(str(pool)))
    assert {p.name for p in pool.iterdir()} == before


def test_shards_of_a_plan_without_a_part_are_not_taken_for_the_whole(make_pool: MakePool, tmp_path: Path) -> None:
    pool, out = make_pool(12, 2), tmp_path / "out"
    hidden = (pool / "00000000.parquet").read_bytes()
    (pool / "00000000.parquet").write_bytes(b"away for a moment")
    parts, subset = list_parts(str(pool)), str(tmp_path / "s.npy")
    write_subset(subset, parse_uids(pa.array([toy_row(n)["uid"] for n in range(12)])))

    def write() -> list[str]:
        planned = [plan_part(part, subset_url=subset, out=str(out)) for part in parts]
        for plan in plan_shards(parts, planned, 3, out=str(out), num_uids=12)[0]:
            write_shard(plan, parts=parts, out=str(out), keys="source", shuffle_seed=None)
        return [row.key for tar in sorted(out.glob("*.tar")) for row in read_rows(str(tar))]

    assert len(write()) == 6
    (pool / "00000000.parquet").write_bytes(hidden)
    assert write() == [toy_row(n)["key"] for n in range(12)]
