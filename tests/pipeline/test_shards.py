import io
import json
import os
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_shards import contents_of, keys_of, spans_of, uid, write_all
from toy import render, toy_row, write_part

from pipeline.errors import ConfigError, PoolError
from pipeline.pool import list_parts
from pipeline.shard_folder import (
    drop_plan,
    finish_folder,
)
from pipeline.shard_plan import plan_part, plan_shards
from pipeline.shards import ShardConfig, write_shard
from pipeline.spans import write_spans
from pipeline.tars import read_rows

MakePool = Callable[..., Path]
TRAIN_MANIFEST = '{"identity": "x", "stage": "train", "config": {}, "parents": {}, "counts": {}, "facts": {}}'


def test_bytes_captions_keys_and_json_pass_untouched(make_pool: MakePool, tmp_path: Path) -> None:
    pool, out = make_pool(20, 3), tmp_path / "shards"
    kept = [1, 2, 7, 8, 13, 19]
    facts = write_all(pool, [uid(n) for n in kept], out, rows_per_shard=4)
    assert facts["rows"] == 6 and facts["not_in_pool"] == 0 and facts["num_shards"] == 2
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


def test_repeats_get_keys_and_shards_of_their_own(make_pool: MakePool, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    write_all(make_pool(6, 2), [uid(1), uid(1), uid(1), uid(2), uid(4), uid(5)], out, rows_per_shard=2)
    assert sorted(keys_of(out)) == [
        ["000000001", "000000005"],
        ["000000001-1", "000000004"],
        ["000000001-2", "000000002"],
    ]
    images = {row.key: row.find(["jpg"]) for tar in sorted(out.glob("*.tar")) for row in read_rows(str(tar))}
    assert images["000000001"] == images["000000001-2"] == render("green", 1)


def test_more_copies_than_shards_stand_far_apart(make_pool: MakePool, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    write_all(make_pool(10, 1), [uid(3)] * 4 + [uid(n) for n in range(10) if n != 3], out, rows_per_shard=100)
    places = [n for n, key in enumerate(keys_of(out)[0]) if key.startswith("000000003")]
    assert len(places) == 4 and min(np.diff(places)) >= 3


def test_keys_as_datacomps_resharder_writes_them(make_pool: MakePool, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    write_all(make_pool(4, 1), [uid(1), uid(1), uid(3)], out, rows_per_shard=10, keys="uid")
    assert keys_of(out) == [[f"{uid(1)}-0", f"{uid(1)}-1", f"{uid(3)}-0"]]


DATACOMPS_KEYS = [
    "538454127b096499a94942a28a807973-0",
    "6a99b4b1f77dd1076b5904845b25627c-0",
    "6a99b4b1f77dd1076b5904845b25627c-1",
    "78dde6e5fd29f057ce73018173b720d4-0",
    "9e3779b97f4a7c15f39cc0605cedc835-0",
    "9e3779b97f4a7c15f39cc0605cedc835-1",
    "9e3779b97f4a7c15f39cc0605cedc835-2",
    "be1e08c4728735a114a24726e5a5dbef-0",
]
"""What DataComp's resharder.py (mlfoundations/datacomp, webdataset 0.2.86) wrote for this pool and subset: it puts the
three copies of 9e37... side by side in one shard, and every member's bytes are its source's."""


def test_members_are_those_of_datacomps_resharder(make_pool: MakePool, tmp_path: Path) -> None:
    pool, out = make_pool(20, 2), tmp_path / "shards"
    write_all(pool, [uid(n) for n in (1, 1, 1, 4, 7, 12, 12, 19)], out, rows_per_shard=4, keys="uid")
    written = [row for tar in sorted(out.glob("*.tar")) for row in read_rows(str(tar))]
    assert sorted(row.key for row in written) == DATACOMPS_KEYS
    tars = [read_rows(str(tar)) for tar in sorted(pool.glob("*.tar"))]
    source = {json.loads(row.find(["json"]) or b"")["uid"]: row for rows in tars for row in rows}
    for row in written:
        members = source[row.key[:-2]].members
        assert [(m.name, m.content) for m in row.members] == [(f"{row.key}.{m.extension}", m.content) for m in members]


@pytest.mark.parametrize("keys", ["source", "uid"])
def test_odd_headers_come_through(tmp_path: Path, keys: str) -> None:
    """Names that need a long-name or pax header, a ./ in front, folders between: copied, or named anew."""
    stems = ["plain", "./dotted", "deep/" + "x" * 120, "ключ", "y" * 96]
    rows = [toy_row(n) | {"key": stem.removeprefix("./")} for n, stem in enumerate(stems)]
    for name, kind in (("0", tarfile.GNU_FORMAT), ("1", tarfile.PAX_FORMAT)):
        (tmp_path / name).mkdir()
        with tarfile.open(tmp_path / name / f"{name}.tar", "w", format=kind) as archive:
            for stem in stems:
                folder = tarfile.TarInfo("between/")
                folder.type = tarfile.DIRTYPE
                archive.addfile(folder)
                for extension in ("jpg", "txt"):
                    info = tarfile.TarInfo(f"{stem}.{extension}")
                    info.size, info.mtime = len(stem), 1.5
                    archive.addfile(info, io.BytesIO(stem.encode()[: info.size]))
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name / f"{name}.parquet")
        out = tmp_path / f"out{name}"
        write_all(tmp_path / name, [uid(n) for n in range(5)], out, rows_per_shard=10, keys=keys)
        with tarfile.open(out / "00000000.tar") as archive:
            files = [member for member in archive if member.isreg()]
            read = [archive.extractfile(member).read() for member in files]  # type: ignore[union-attr]
        expected = [f"{uid(n)}-0" if keys == "uid" else stem.removeprefix("./") for n, stem in enumerate(stems)]
        assert [m.name.removeprefix("./") for m in files] == [f"{key}.{e}" for key in expected for e in ("jpg", "txt")]
        assert read == [stem.encode()[: len(stem)] for stem in stems for _ in range(2)]
        assert keys_of(out) == [expected] == [pq.read_table(out / "00000000.parquet")["key"].to_pylist()]


def test_lost_images_are_counted_and_the_rest_written(tmp_path: Path) -> None:
    rows = [toy_row(n) for n in range(8)]
    images: dict[str, bytes | None] = {row["key"]: render("red", n) for n, row in enumerate(rows)}
    write_part(tmp_path / "p", "0", rows, images | {rows[3]["key"]: None})
    facts = write_all(tmp_path / "p", [uid(n) for n in range(8)], tmp_path / "a", rows_per_shard=10)
    assert facts["counts"] == [{"read": 8, "kept": 7, "dropped": {"not_in_subset": 0}, "failed": {"missing_image": 1}}]
    tar = tmp_path / "p" / "0.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    facts = write_all(tmp_path / "p", [uid(n) for n in range(8)], tmp_path / "b", rows_per_shard=10)
    (counts,) = facts["counts"]
    assert counts["failed"]["truncated_tar"] + counts["kept"] == 8
    assert len(keys_of(tmp_path / "b")[0]) == counts["kept"] > 0


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("keys", ["source", "uid"])
def test_shards_do_not_depend_on_who_writes_them(
    make_pool: MakePool, tmp_path: Path, seed: int | None, keys: str
) -> None:
    pool, scores = make_pool(30, 3), tmp_path / "scores"
    uids = sorted([uid(n) for n in range(30) if n % 3] + [uid(4), uid(4), uid(28)])
    spans_of(pool, scores)
    write = partial(write_all, pool, uids, rows_per_shard=6, keys=keys, seed=seed)
    write(tmp_path / "a")
    assert write(tmp_path / "b", backwards=True)["spans"] == [False] * 3
    assert write(tmp_path / "c", scores=scores)["spans"] == [True] * 3
    assert contents_of(tmp_path / "a") == contents_of(tmp_path / "b") == contents_of(tmp_path / "c")


def test_shuffle_moves_every_row_and_loses_none(make_pool: MakePool, tmp_path: Path) -> None:
    pool, uids = make_pool(60, 3), [uid(n) for n in range(60)]
    orders = {}
    for seed in (None, 0, 1):
        out = tmp_path / str(seed)
        write_all(pool, uids, out, rows_per_shard=20, seed=seed)
        orders[seed] = [key for shard in keys_of(out) for key in shard]
        assert sorted(orders[seed]) == [f"{n:09d}" for n in range(60)]
        tables = [pq.read_table(path) for path in sorted(out.glob("*.parquet"))]
        assert [key for table in tables for key in table["key"].to_pylist()] == orders[seed]
        assert all(set(table["source_part"].to_pylist()) == {f"{n:08d}" for n in range(3)} for table in tables if seed)
    assert orders[None] == sorted(orders[None])
    assert len({tuple(order) for order in orders.values()}) == 3


def test_same_uid_in_rows_of_several_parts_is_kept_apart(tmp_path: Path) -> None:
    for part in range(3):
        rows = [toy_row(part * 4 + n) for n in range(4)]
        rows[1]["uid"] = uid(99)
        write_part(tmp_path / "p", str(part), rows, {row["key"]: render("red", n) for n, row in enumerate(rows)})
    uids = [uid(n) for n in range(12) if n % 4 != 1] + [uid(99)]
    write_all(tmp_path / "p", uids, tmp_path / "out", rows_per_shard=4)
    tables = [pq.read_table(path)["uid"].to_pylist() for path in sorted((tmp_path / "out").glob("*.parquet"))]
    assert [table.count(uid(99)) for table in tables] == [1, 1, 1]
    assert [len(table) for table in tables] == [4, 4, 4]


@pytest.mark.parametrize("seed", [None, 3])
def test_on_a_remote_store_the_same_bytes_come_out(make_pool: MakePool, tmp_path: Path, seed: int | None) -> None:
    pool, store = make_pool(20, 3), fsspec.filesystem("memory")
    uids = sorted([uid(n) for n in range(0, 20, 3)] + [uid(6), uid(6)])
    for file in pool.iterdir():
        store.pipe(f"/{tmp_path.name}{seed}/pool/{file.name}", file.read_bytes())
    url = f"memory://{tmp_path.name}{seed}"
    write_all(pool, uids, tmp_path / "here", rows_per_shard=3, seed=seed)
    subset, out, parts = str(tmp_path / "subset.npy"), f"{url}/out", list_parts(f"{url}/pool")
    planned = [plan_part(part, subset_url=subset, out=out) for part in parts]
    plans, _ = plan_shards(parts, planned, 3, out=out, num_uids=len(uids))
    finish_folder(out, [write_shard(p, parts=parts, out=out, keys="source", shuffle_seed=seed) for p in plans])
    drop_plan(out)
    there = {name.rsplit("/", 1)[1]: store.cat(name) for name in store.ls(f"/{tmp_path.name}{seed}/out", detail=False)}
    assert there == contents_of(tmp_path / "here")


def test_a_row_without_a_span_is_lost_for_the_reason_scoring_saw(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(4, 1)
    (part,) = list_parts(str(pool))
    start, end = next(iter(read_rows(part.tar or ""))).span
    edges = [pa.array([edge], pa.int64()) for edge in (start, end)]
    for broken, reason in ((None, "missing_image"), ("cut short", "truncated_tar")):
        write_spans(str(tmp_path / "scores"), part, pa.array([0], pa.int32()), *edges, broken=broken)
        out = tmp_path / reason
        facts = write_all(pool, [uid(n) for n in range(4)], out, rows_per_shard=4, scores=tmp_path / "scores")
        assert facts["counts"][0]["failed"] == {reason: 3} and facts["broken"] == [broken]


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


def test_a_uid_of_two_parts_hides_none_that_is_absent(tmp_path: Path) -> None:
    """Rows without an image are in the pool too; each entry of a uid that stands in the subset twice counts."""
    images = {"0": {toy_row(0)["key"]: render("red"), toy_row(1)["key"]: None}, "1": {toy_row(0)["key"]: render("red")}}
    for name, of_part in images.items():
        write_part(tmp_path / "p", name, [toy_row(n) for n in range(len(of_part))], of_part)
    uids = [uid(n) for n in (0, 0, 1, 1, 2, 2, 2, 3)]
    facts = write_all(tmp_path / "p", uids, tmp_path / "out", rows_per_shard=10)
    assert facts["not_in_pool"] == 4 and facts["rows"] == 4
    assert [counts["failed"] for counts in facts["counts"]] == [{"missing_image": 2}, {}]


def test_rows_that_were_not_downloaded_are_in_the_pool_too(tmp_path: Path) -> None:
    rows = [toy_row(n) | {"status": "failed_to_download" if n else "success"} for n in range(3)]
    write_part(tmp_path / "p", "0", rows[:1], {rows[0]["key"]: render("red")})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p" / "0.parquet")
    facts = write_all(tmp_path / "p", [uid(n) for n in (0, 1, 3)], tmp_path / "out", rows_per_shard=10)
    assert (facts["rows"], facts["not_in_pool"]) == (1, 1)  # 3 is in no part, 1 was not downloaded


@pytest.mark.parametrize("keys", ["source", "uid"])
def test_a_tar_of_other_rows_in_the_same_size_and_time_is_noticed(
    make_pool: MakePool, tmp_path: Path, keys: str
) -> None:
    pool, scores = make_pool(6, 1), tmp_path / "scores"
    spans_of(pool, scores)
    tar = pool / "00000000.tar"
    before, patched = tar.stat(), bytearray(tar.read_bytes())
    with tarfile.open(tar) as archive:
        for member in [member for member in archive if member.name.startswith("000000004.")]:
            member.name = member.name.replace("4", "7")
            patched[member.offset : member.offset + 512] = member.tobuf(tarfile.GNU_FORMAT)
    tar.write_bytes(patched)
    os.utime(tar, ns=(before.st_atime_ns, before.st_mtime_ns))
    write = partial(write_all, pool, out=tmp_path / "out", rows_per_shard=10, keys=keys, scores=scores)
    assert write([uid(n) for n in range(6) if n != 4])["rows"] == 5
    with pytest.raises(PoolError, match=r"does not have row '000000004'"):
        write([uid(n) for n in range(6)])
    assert not list((tmp_path / "out").glob(".tmp-*"))


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
