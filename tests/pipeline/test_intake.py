"""Tars without parquet and folders of images as pools: same bytes, same rows, every loss named."""

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy import render, tar_row, toy_row

from pipeline.batches import read_batches
from pipeline.errors import ConfigError, PoolError
from pipeline.intake.image_folder import Captions, import_images
from pipeline.intake.own_tars import import_tars
from pipeline.pool import Part, list_parts, read_part
from pipeline.tars import TarRow, make_member, write_rows
from pipeline.uid import derive_uid

ADDED = ("uid", "key", "text", "url", "original_width", "original_height")


def run(work: Callable[[Any], dict[str, Any]], items: Sequence[Any]) -> list[dict[str, Any]]:
    """As run_each, in this process: results are JSON."""
    return [json.loads(json.dumps(work(item))) for item in items]


def write_tar(file: Path, rows: Sequence[TarRow]) -> bytes:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as opened:
        write_rows(opened, rows)
    return file.read_bytes()


def bare_row(key: str, **members: bytes) -> TarRow:
    return TarRow(key, tuple(make_member(f"{key}.{extension}", content) for extension, content in members.items()))


def read_rows_of(pool: Path, *, alone: bool = False) -> list[dict[str, Any]]:
    """What later stages read of every part: the added columns and the image."""
    rows = []
    for part in list_parts(str(pool)):
        part = Part(part.name, part.tar, None) if alone else part
        for batch in read_batches(part, read_part(part), images=True):
            rows += batch.select([*ADDED, "image"]).to_pylist()
    return rows


def hash_files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("copy", [False, True])
def test_tars_become_a_pool_of_the_same_bytes_and_rows(copy: bool, tmp_path: Path) -> None:
    source, out = tmp_path / "tars", tmp_path / "pool"
    image, other = render("red", 1), render("blue", 2, kind="PNG")
    write_tar(source / "train-0.tar", [tar_row(toy_row(n), render("green", n)) for n in range(3)])
    rows = [
        bare_row("a/x", jpg=image, txt=b"ein Bild"),
        bare_row("a/y", json=b'{"uid": "not a uid", "caption": "from json", "url": "http://x"}', png=other),
        bare_row("a/z", txt=b"no image"),
        bare_row("b", jpg=image, json=b"[broken"),
    ]
    write_tar(source / "train-1.tar", rows)
    before = hash_files(source)
    manifest = import_tars(run, str(source), str(out), copy=copy)
    assert hash_files(source) == before
    for name in before:
        assert (out / name).read_bytes() == before[name]
        assert (out / name).samefile(source / name) is not copy
    assert (manifest.counts["rows"].read, manifest.counts["rows"].kept) == (7, 7)
    assert manifest.facts["noted"] == {"missing_image": 1, "null_caption": 1}
    assert [part.table is not None for part in list_parts(str(out))] == [True, True]
    assert read_rows_of(out) == read_rows_of(out, alone=True)
    found = {row["key"]: row for row in read_rows_of(out)}
    assert found["000000001"]["uid"] == toy_row(1)["uid"] and found["000000001"]["original_width"] == 201
    assert found["a/x"]["uid"] == derive_uid(image, "ein Bild")
    assert found["a/y"]["uid"] == derive_uid(other, "from json") and found["a/y"]["url"] == "http://x"
    stats = json.loads((out / "train-1_stats.json").read_bytes())
    assert stats["count"] == stats["successes"] == 4


def test_tars_of_several_folders_are_numbered(tmp_path: Path) -> None:
    for name, color in [("b/x.tar", "red"), ("a/x.tar", "blue")]:
        write_tar(tmp_path / name, [bare_row("1", jpg=render(color), txt=color.encode())])
    import_tars(run, f"{tmp_path}/b::{tmp_path}/a/*.tar", str(tmp_path / "pool"))
    assert [
        (part.name, row["text"])
        for part, row in zip(list_parts(str(tmp_path / "pool")), read_rows_of(tmp_path / "pool"), strict=True)
    ] == [("00000000", "red"), ("00000001", "blue")]


def test_broken_tars_are_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    source, out = tmp_path / "tars", tmp_path / "pool"
    rows = [bare_row(str(n), jpg=render("red", n), txt=b"red") for n in range(4)]
    whole = write_tar(source / "0.tar", rows)
    (source / "1.tar").write_bytes(whole[: len(whole) // 2])
    (source / "2.tar").write_bytes(b"this is no tar" * 100)
    manifest = import_tars(run, str(source), str(out))
    kept = manifest.counts["rows"].kept
    assert 4 < kept < 8
    assert manifest.facts["parts"] == ["0", "1"] and not (out / "2.tar").exists()
    assert "cut short" in manifest.facts["broken"]["1"] and "no tar header" in manifest.facts["broken"]["2"]
    assert len([row for row in read_rows_of(out) if row["image"]]) == kept
    with pytest.raises(PoolError, match=r"nothing was imported.*no tar header"):
        import_tars(run, str(source / "2.tar"), str(tmp_path / "none"))


def test_a_parquet_beside_a_tar_is_used_when_it_can_be(tmp_path: Path) -> None:
    source, out = tmp_path / "tars", tmp_path / "pool"
    for name in "ab":
        write_tar(source / f"{name}.tar", [bare_row("1", jpg=render("red"), txt=b"in the tar")])
    good = {"key": "1", "url": "http://x/1.jpg", "caption": "in the table", "similarity": 0.25}
    pq.write_table(pa.Table.from_pylist([good]), source / "a.parquet")
    pq.write_table(pa.table({"key": ["1"], "similarity": [0.5]}), source / "b.parquet")
    manifest = import_tars(run, str(source), str(out))
    first, second = (read_part(part).table.to_pylist()[0] for part in list_parts(str(out)))
    assert first["text"] == "in the table" and first["uid"] == derive_uid("http://x/1.jpg", "in the table")
    assert pq.read_table(out / "a.parquet")["similarity"].to_pylist() == [0.25]
    assert second["text"] == "in the tar"
    assert "neither a 'text' nor a 'caption'" in manifest.facts["unused_tables"]["b"]


def test_import_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    source, out, other = tmp_path / "tars", tmp_path / "pool", tmp_path / "other"
    for n in range(3):
        write_tar(source / f"{n}.tar", [bare_row(str(n), jpg=render("red", n), txt=b"red")])
    import_tars(run, str(source), str(other))

    def killed(work: Callable[[Any], dict[str, Any]], items: Sequence[Any]) -> list[dict[str, Any]]:
        run(work, items[:2])
        (out / "1_stats.json").unlink()  # the second was being written
        (out / "1.parquet").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_tars(killed, str(source), str(out))
    first = (out / "0.parquet").stat().st_mtime_ns
    manifest = import_tars(run, str(source), str(out))
    assert hash_files(out) == hash_files(other)
    assert (out / "0.parquet").stat().st_mtime_ns == first, "what is done is not made again"

    def refuse(work: object, items: object) -> list[dict[str, Any]]:
        raise AssertionError("all is done")

    assert import_tars(refuse, str(source), str(out)) == manifest
    write_tar(source / "3.tar", [bare_row("3", jpg=render("red"), txt=b"red")])
    with pytest.raises(ConfigError, match=r"begun by another `winnow import`: config\.names\.3 is new"):
        import_tars(run, str(source), str(out))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "x.txt").touch()
    with pytest.raises(PoolError, match=r"files that it did not write \(x.txt"):
        import_tars(run, str(source), str(tmp_path / "foreign"))


def test_names_in_a_tar_are_never_paths(tmp_path: Path) -> None:
    source = tmp_path / "tars" / "evil.tar"
    source.parent.mkdir()
    with tarfile.open(source, "w") as tar:
        for name in ("../../escaped.jpg", "../../escaped.txt", "/tmp/absolute.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    import_tars(run, str(source), str(tmp_path / "pool"))
    files = {p.relative_to(tmp_path).parts[0] for p in tmp_path.rglob("*")}
    assert files == {"tars", "pool"}
    assert [row["key"] for row in read_rows_of(tmp_path / "pool")] == ["../../escaped", "/tmp/absolute"]


@pytest.fixture
def photos(tmp_path: Path) -> Iterator[Path]:
    """A folder with one of everything; beside it a file that must not be read."""
    folder = tmp_path / "photos"
    (folder / "cats" / "old").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (tmp_path / "secret.jpg").write_bytes(render("red", 99))
    (tmp_path / "secret.txt").write_text("secret")
    for name, content in {
        "b.jpg": render("red", 1),
        "b.txt": "rot \U0001f642\n".encode(),
        "cats/a.PNG": render("green", 2, kind="PNG"),
        "cats/a.txt": b"\xef\xbb\xbfa cat",
        "cats/old/c.webp": render("blue", 3, kind="WEBP"),
        "cats/old/c.txt": b"an old cat",
        "d.jpeg": render("yellow", 4),  # no caption
        "e.jpg": b"no image",
        "e.txt": b"e",
        "f.jpg": render("red", 5),
        "f.txt": b"  \n",  # a caption of nothing
        "g.jpg": render("red", 6),
        "g.png": render("red", 7, kind="PNG"),  # whose is g.txt?
        "g.txt": b"g",
        "notes.md": b"passed over",
        ".hidden/h.jpg": b"passed over",
        "._b.jpg": b"passed over",
        "k.jpg": render("red", 8),  # its caption leads out
    }.items():
        (folder / name).write_bytes(content)
    (folder / "k.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "link.txt").write_text("leads out")
    (folder / "same.jpg").symlink_to(folder / "b.jpg")  # stays inside
    (folder / "same.txt").write_text("rot, too")
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "gone.txt").write_text("gone")
    (folder / "linked").symlink_to(tmp_path)
    (folder / os.fsdecode(b"\xff.jpg")).write_bytes(b"")
    yield folder


def test_folder_of_images_with_txt(photos: Path, tmp_path: Path) -> None:
    before, out = hash_files(photos), tmp_path / "pool"
    manifest = import_images(run, str(photos), Captions(), str(out), rows_per_tar=4)
    assert hash_files(photos) == before
    counts = manifest.counts["rows"]
    assert dict(counts.failed) == {
        "duplicate_name": 1,
        "link_out_of_folder": 1,
        "name_is_not_text": 1,
        "null_caption": 3,
        "unreadable_file": 1,
        "unreadable_image": 1,
    }
    assert (counts.read, counts.kept) == (13, 5)
    assert manifest.facts["links_not_followed"] == ["linked"]
    rows = read_rows_of(out)
    assert rows == read_rows_of(out, alone=True)
    by_path = {r["path"]: r for f in sorted(out.glob("*.parquet")) for r in pq.read_table(f).to_pylist()}
    captions = {
        "b.jpg": "rot \U0001f642",
        "cats/a.PNG": "a cat",
        "cats/old/c.webp": "an old cat",
        "g.jpg": "g",
        "same.jpg": "rot, too",
    }
    assert {path: row["text"] for path, row in by_path.items()} == captions
    assert [row["image"] for row in rows] == [(photos / path).read_bytes() for path in captions]
    assert all(row["original_width"] == row["original_height"] == 40 for row in rows)
    assert {row["uid"] for row in rows} == {derive_uid((photos / p).read_bytes(), t) for p, t in captions.items()}
    keys = [row["key"] for row in rows]
    assert Counter(key[:8] for key in keys) == {"00000000": 3, "00000001": 1, "00000002": 1}
    assert keys == sorted(keys) and keys[:3] == ["000000000", "000000001", "000000002"]


def test_folder_names_as_captions(photos: Path, tmp_path: Path) -> None:
    manifest = import_images(run, str(photos), Captions(source="folder"), str(tmp_path / "pool"))
    assert sorted(row["text"] for row in read_rows_of(tmp_path / "pool")) == ["cats", "old"]
    assert manifest.counts["rows"].failed["null_caption"] == 9  # those not in a folder


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_captions_from_a_table(kind: str, photos: Path, tmp_path: Path) -> None:
    lines = [
        ("b.jpg", "one, two"),
        ("./b.jpg", "another caption"),
        ("b.jpg", "one, two"),
        ("cats/a.PNG", "007"),
        ("../secret.jpg", "secret"),
        ("d.jpeg", ""),
        ("linked/secret.jpg", "secret"),
    ]
    table = pa.table({"image": [path for path, _ in lines], "said": [text for _, text in lines]})
    file = tmp_path / f"captions.{kind}"
    if kind == "parquet":
        pq.write_table(table, file)
    elif kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    else:
        text = "".join(f"{path}\t{said}\n" if kind == "tsv" else f'{path},"{said}"\n' for path, said in lines)
        file.write_text(("image\tsaid\n" if kind == "tsv" else "image,said\n") + text)
    captions = Captions(source=str(file), file_column="image", caption_column="said")
    manifest = import_images(run, str(photos), captions, str(tmp_path / "pool"))
    assert [row["text"] for row in read_rows_of(tmp_path / "pool")] == ["one, two", "another caption", "007"]
    failed = manifest.counts["rows"].failed
    assert (failed["duplicate_row"], failed["missing_image"]) == (1, 2)
    with pytest.raises(ConfigError, match="did you mean 'said'"):
        wrong = Captions(source=str(file), file_column="image", caption_column="sad")
        import_images(run, str(photos), wrong, str(tmp_path / "other"))


def test_packing_goes_on_and_gives_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    def fresh(out: str, work: Any = run) -> Any:
        return import_images(work, str(photos), Captions(), str(tmp_path / out), rows_per_tar=2)

    def killed(work: Callable[[Any], dict[str, Any]], items: Sequence[Any]) -> list[dict[str, Any]]:
        run(work, items[:2])
        (tmp_path / "pool" / "00000001_stats.json").unlink(missing_ok=True)
        raise KeyboardInterrupt

    fresh("other")
    with pytest.raises(KeyboardInterrupt):
        fresh("pool", killed)
    fresh("pool")
    assert hash_files(tmp_path / "pool") == hash_files(tmp_path / "other")
    (photos / "b.txt").write_text("changed")
    with pytest.raises(ConfigError, match=r"parents\.folder changed"):
        fresh("pool")


@pytest.mark.parametrize(
    ("folder", "source", "out", "message"),
    [
        ("photos", "txt", "photos/pool", "lies in the folder of the images"),
        ("photos", "captions.xls", "pool", "neither 'txt' nor 'folder' nor a table"),
        ("nowhere", "txt", "pool", "no folder of this machine"),
        ("empty", "txt", "pool", "nothing was imported"),
    ],
)
def test_mistakes_are_explained(folder: str, source: str, out: str, message: str, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises((ConfigError, PoolError), match=message):
        import_images(run, str(tmp_path / folder), Captions(source=source), str(tmp_path / out))
