import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy import render, toy_row, write_part

from pipeline.errors import ConfigError, PoolError
from pipeline.pool import Part, list_parts
from pipeline.shards import (
    ShardConfig,
    claim_folder,
    drop_plan,
    finish_folder,
    plan_part,
    plan_shards,
    prepare_folder,
    write_shard,
)
from pipeline.subset import write_subset
from pipeline.tars import read_rows
from pipeline.uid import parse_uids

MakePool = Callable[..., Path]
TRAIN_MANIFEST = '{"identity": "x", "stage": "train", "config": {}, "parents": {}, "counts": {}, "facts": {}}'


def write_all(
    pool: Path, uids: list[str], out: Path, *, rows_per_shard: int, keys: str = "source"
) -> dict[str, object]:
    """What the shards stage does, without Spark."""
    subset = str(out.parent / "subset.npy")
    write_subset(subset, parse_uids(pa.array(uids)))
    parts = list_parts(str(pool))
    prepare_folder(str(out), "identity")
    planned = [plan_part(part, subset_url=subset, out=str(out)) for part in parts]
    plans = plan_shards(parts, [p["lines"] for p in planned], rows_per_shard)
    written = [write_shard(plan, out=str(out), keys=keys) for plan in plans]
    facts = finish_folder(str(out), [w["rows"] for w in written])
    drop_plan(str(out))
    return facts | {"counts": [p["counts"] for p in planned], "broken": [p["broken"] for p in planned]}


def uid(number: int) -> str:
    return str(toy_row(number)["uid"])


def keys_of(out: Path) -> list[list[str]]:
    return [[row.key for row in read_rows(str(tar))] for tar in sorted(out.glob("*.tar"))]


@pytest.mark.parametrize(
    ("lines", "size", "expected"),
    [
        ([10, 10], 7, [6, 7, 7]),
        ([5], 5, [5]),
        ([0, 3, 0, 4], 3, [2, 2, 3]),
        ([0], 3, []),
        ([], 3, []),
        ([1], 100, [1]),
    ],
)
def test_sizes_differ_by_at_most_one(lines: list[int], size: int, expected: list[int]) -> None:
    parts = [Part(str(n), None, None) for n in range(len(lines))]
    plans = plan_shards(parts, lines, size)
    assert [sum(p.last - p.first for p in plan.pieces) for plan in plans] == expected
    covered = [(p.part.name, n) for plan in plans for p in plan.pieces for n in range(p.first, p.last)]
    assert covered == [(str(part), n) for part, count in enumerate(lines) for n in range(count)]


def test_bytes_captions_keys_and_json_pass_untouched(make_pool: MakePool, tmp_path: Path) -> None:
    pool, out = make_pool(20, 3), tmp_path / "shards"
    kept = [1, 2, 7, 8, 13, 19]
    facts = write_all(pool, [uid(n) for n in kept], out, rows_per_shard=4)
    assert facts["rows"] == 6 and facts["num_shards"] == 2
    source = {row.key: row for tar in sorted(pool.glob("*.tar")) for row in read_rows(str(tar))}
    written = [row for tar in sorted(out.glob("*.tar")) for row in read_rows(str(tar))]
    assert [row.key for row in written] == [f"{n:09d}" for n in kept]
    for row in written:
        assert [(m.name, m.content) for m in row.members] == [(m.name, m.content) for m in source[row.key].members]


def test_sidecars(make_pool: MakePool, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    write_all(make_pool(20, 2), [uid(n) for n in range(0, 20, 2)], out, rows_per_shard=5)
    assert json.loads((out / "sizes.json").read_text()) == {"00000000.tar": 5, "00000001.tar": 5}
    assert json.loads((out / "00000001_stats.json").read_text())["successes"] == 5
    table = pq.read_table(out / "00000001.parquet")
    assert table["uid"].to_pylist() == [uid(n) for n in range(10, 20, 2)]
    assert table["source_part"].to_pylist() == ["00000001"] * 5
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == []


def test_repeats_get_keys_of_their_own(make_pool: MakePool, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    write_all(make_pool(4, 1), [uid(1), uid(1), uid(1), uid(2)], out, rows_per_shard=10)
    assert keys_of(out) == [["000000001", "000000001-1", "000000001-2", "000000002"]]
    rows = list(read_rows(str(out / "00000000.tar")))
    assert rows[0].find(["jpg"]) == rows[2].find(["jpg"]) == render("green", 1)


def test_keys_as_datacomps_resharder_writes_them(make_pool: MakePool, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    write_all(make_pool(4, 1), [uid(1), uid(1), uid(3)], out, rows_per_shard=10, keys="uid")
    assert keys_of(out) == [[f"{uid(1)}-0", f"{uid(1)}-1", f"{uid(3)}-0"]]


def test_lost_images_are_counted_and_the_rest_written(tmp_path: Path) -> None:
    rows = [toy_row(n) for n in range(8)]
    images: dict[str, bytes | None] = {row["key"]: render("red", n) for n, row in enumerate(rows)}
    write_part(tmp_path / "p", "0", rows, images | {rows[3]["key"]: None})
    facts = write_all(tmp_path / "p", [uid(n) for n in range(8)], tmp_path / "a", rows_per_shard=10)
    assert facts["counts"] == [{"read": 8, "kept": 7, "dropped": {"not_in_subset": 0}, "failed": {"missing_image": 1}}]
    tar = tmp_path / "p" / "0.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    facts = write_all(tmp_path / "p", [uid(n) for n in range(8)], tmp_path / "b", rows_per_shard=10)
    (counts,) = facts["counts"]  # type: ignore[misc]
    assert counts["failed"]["truncated_tar"] + counts["kept"] == 8
    assert len(keys_of(tmp_path / "b")[0]) == counts["kept"] > 0


def test_shards_do_not_depend_on_who_writes_them(make_pool: MakePool, tmp_path: Path) -> None:
    pool, out = make_pool(30, 3), tmp_path / "shards"
    uids = [uid(n) for n in range(30) if n % 3]
    write_all(pool, uids, out, rows_per_shard=6)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    subset, parts = str(tmp_path / "subset.npy"), list_parts(str(pool))
    prepare_folder(str(out), "other")
    lines = [plan_part(part, subset_url=subset, out=str(out))["lines"] for part in reversed(parts)][::-1]
    plans = plan_shards(parts, lines, 6)
    written = [w["rows"] for w in map(partial(write_shard, out=str(out), keys="source"), reversed(plans))]
    finish_folder(str(out), written[::-1])
    drop_plan(str(out))
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_half_written_folder_goes_on_and_stale_shards_go(make_pool: MakePool, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    prepare_folder(str(out), "one")
    (out / "00000000.tar").write_bytes(b"kept")
    prepare_folder(str(out), "one")
    assert (out / "00000000.tar").exists()
    prepare_folder(str(out), "two")
    assert not (out / "00000000.tar").exists()


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


def test_pool_of_tars_alone_and_our_own_shards_can_be_sharded(make_pool: MakePool, tmp_path: Path) -> None:
    pool, uids = make_pool(8, 1), [uid(n) for n in range(8)]
    (pool / "00000000.parquet").unlink()
    assert write_all(pool, uids, tmp_path / "one", rows_per_shard=3)["rows"] == 8
    assert write_all(tmp_path / "one", uids[:5], tmp_path / "two", rows_per_shard=3)["rows"] == 5
    assert pq.read_table(tmp_path / "two" / "00000000.parquet")["source_part"].to_pylist()[0] == "00000000"


def test_rows_of_two_sources_with_equal_keys_stay_apart(make_pool: MakePool, tmp_path: Path) -> None:
    one, two = make_pool(4, 1, "one"), make_pool(4, 1, "two")
    table = pq.read_table(two / "00000000.parquet")
    others = [f"{n:032x}" for n in range(4)]
    pq.write_table(table.set_column(table.column_names.index("uid"), "uid", pa.array(others)), two / "00000000.parquet")
    out = tmp_path / "shards"
    write_all(Path(f"{one}::{two}"), [uid(2), others[2]], out, rows_per_shard=10)
    assert keys_of(out) == [["000000002", "000000002-1"]]
    assert len(list_parts(str(out))) == 1 and len(list(read_rows(str(out / "00000000.tar")))) == 2


def test_uid_of_several_rows_is_written_once_for_each(tmp_path: Path) -> None:
    rows = [toy_row(n) for n in range(3)]
    rows[1]["uid"] = rows[0]["uid"]
    write_part(tmp_path / "p", "0", rows, {row["key"]: render("red", n) for n, row in enumerate(rows)})
    write_all(tmp_path / "p", [uid(0)], tmp_path / "out", rows_per_shard=10)
    assert keys_of(tmp_path / "out") == [["000000000", "000000001"]]


def test_columns_of_types_that_do_not_mix_become_text(tmp_path: Path) -> None:
    for name, width in (("0", 200), ("1", "200px")):
        row = toy_row(int(name)) | {"original_width": width}
        write_part(tmp_path / "p", name, [row], {row["key"]: render("red")})
    write_all(tmp_path / "p", [uid(0), uid(1)], tmp_path / "out", rows_per_shard=10)
    assert pq.read_table(tmp_path / "out" / "00000000.parquet")["original_width"].to_pylist() == ["200", "200px"]


def test_rows_per_shard_is_positive() -> None:
    with pytest.raises(ConfigError, match="rows_per_shard"):
        ShardConfig(rows_per_shard=0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its files open
def test_open_clips_own_loader_reads_them(make_pool: MakePool, tmp_path: Path) -> None:
    """open_clip_train's size lookup, and the webdataset pipeline its train loader is made of."""
    import webdataset
    from open_clip_train.data import filter_no_caption_or_no_image, get_dataset_size
    from PIL import Image

    out = tmp_path / "shards"
    write_all(make_pool(20, 2), [uid(n) for n in range(20) if n != 4], out, rows_per_shard=10)
    pattern = f"{out}/{{00000000..00000001}}.tar"
    assert get_dataset_size(pattern) == (19, 2)
    rows = webdataset.WebDataset(pattern, shardshuffle=False, empty_check=False)
    rows = rows.select(filter_no_caption_or_no_image).decode("pilrgb").rename(image="jpg;png;jpeg;webp", text="txt")
    loaded = list(rows.to_tuple("image", "text", "json"))
    numbers = [n for n in range(20) if n != 4]
    assert [text for _, text, _ in loaded] == [toy_row(n)["text"] for n in numbers]
    assert [details["uid"] for _, _, details in loaded] == [uid(n) for n in numbers]
    expected = Image.open(io.BytesIO(render("green", 1))).convert("RGB")
    assert (np.asarray(loaded[1][0]) == np.asarray(expected)).all()
