"""Broken input, one fault at a time: the line ends, the reason is counted, every good row is there, bytes untouched."""

import io
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from toy import render, tar_row, toy_row, write_part

from jobs.stage_score import run_score
from jobs.stage_select import run_select
from jobs.stage_shards import run_shards
from pipeline.clip_model import open_model
from pipeline.errors import StageError, WinnowError
from pipeline.shards import ShardConfig
from pipeline.tars import BLOCK_BYTES, TarRow, make_member, pack_row, read_rows, write_end, write_rows

pytestmark = pytest.mark.spark
ROWS = 8
"""Rows of each part; the fault is in part 1 of 0, 1, 2, and row 3 of it is the bad one."""
BAD = 3


class Fault(NamedTuple):
    name: str
    spoil: Callable[[Path], None]
    """Changes part 1 of the pool in this folder."""
    clip_failed: dict[str, int]
    """Failures of the CLIP score, by reason."""
    lost: int = 0
    """Rows without an image that can be written to a shard."""
    pool_failed: dict[str, int] = {}  # noqa: RUF012 (a NamedTuple's default)
    """Failures of the pool's own account."""
    broken: bool = False
    """Whether the part is named as broken."""


def numbers(part: int) -> range:
    return range(part * ROWS, (part + 1) * ROWS)


def part_rows(part: int) -> list[dict[str, Any]]:
    return [toy_row(n) for n in numbers(part)]


def part_images(part: int) -> dict[str, bytes | None]:
    return {toy_row(n)["key"]: render("red", n) for n in numbers(part)}


def with_image(content: bytes | None) -> Callable[[Path], None]:
    """Row BAD of part 1 gets these bytes."""

    def spoil(pool: Path) -> None:
        rows = part_rows(1)
        write_part(pool, "00000001", rows, part_images(1) | {rows[BAD]["key"]: content})

    return spoil


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb() -> bytes:
    """A 30,000 x 30,000 PNG of one colour: 110 kB that decode to 900 MB."""
    return encode(Image.new("1", (30_000, 30_000), 1), "PNG")


def animated() -> bytes:
    frames = [Image.new("RGB", (40, 40), color) for color in ("red", "blue", "green")]
    return encode(frames[0], "PNG", save_all=True, append_images=frames[1:])


def sixteen_bit() -> bytes:
    return encode(Image.fromarray((np.arange(1600).reshape(40, 40) * 40).astype(np.uint16)), "PNG")


def cut_tar(pool: Path) -> None:
    """End the tar in the middle of row BAD's image."""
    tar = pool / "00000001.tar"
    rows = list(read_rows(str(tar)))
    tar.write_bytes(tar.read_bytes()[: rows[BAD].members[0].offset + 10])


def lie_about_size(pool: Path) -> None:
    """Row BAD's first header speaks of a terabyte, checksum and all."""
    tar = pool / "00000001.tar"
    start = next(row for number, row in enumerate(read_rows(str(tar))) if number == BAD).span[0]
    content = bytearray(tar.read_bytes())
    header = content[start : start + BLOCK_BYTES]
    header[124:136] = b"77777777777\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content[start : start + BLOCK_BYTES] = header
    tar.write_bytes(bytes(content))


def rewrite_tar(change: Callable[[list[TarRow]], list[TarRow]]) -> Callable[[Path], None]:
    def spoil(pool: Path) -> None:
        tar = pool / "00000001.tar"
        rows = change(list(read_rows(str(tar))))
        with tar.open("wb") as file:
            position = sum(file.write(pack_row(row)) for row in rows)
            write_end(file, position)

    return spoil


def climb(rows: list[TarRow]) -> list[TarRow]:
    """Add members whose names lead out of any folder they would be extracted to."""
    names = ("../../../../tmp/winnow-climbed.jpg", "/tmp/winnow-climbed.jpg")
    return [*rows, *(TarRow(name[:-4], (make_member(name, render("blue")),)) for name in names)]


def repeat_key(rows: list[TarRow]) -> list[TarRow]:
    return [*rows[: BAD + 1], rows[0], *rows[BAD + 1 :]]


def drop_json(rows: list[TarRow]) -> list[TarRow]:
    return [TarRow(r.key, tuple(m for m in r.members if m.extension != "json")) for r in rows]


def repeat_uid(pool: Path) -> None:
    """Row BAD says it is row BAD - 1."""
    rows = part_rows(1)
    rows[BAD]["uid"] = rows[BAD - 1]["uid"]
    write_part(pool, "00000001", rows, part_images(1))


def drop_parquet(pool: Path) -> None:
    (pool / "00000001.parquet").unlink()


def foreign_bytes(pool: Path) -> None:
    """No parquet, and a caption that is no UTF-8."""
    drop_parquet(pool)
    rows = [tar_row(row, part_images(1)[row["key"]] or b"") for row in part_rows(1)]
    members = [m if m.extension != "txt" else make_member(m.name, b"caf\xe9 \xff") for m in rows[BAD].members]
    rows[BAD] = TarRow(rows[BAD].key, tuple(members))
    with (pool / "00000001.tar").open("wb") as file:
        write_rows(file, rows)


def repeat_key_alone(pool: Path) -> None:
    """No parquet, and a key that comes twice: the tar lists nine rows."""
    drop_parquet(pool)
    rewrite_tar(repeat_key)(pool)


def mix_parquet(pool: Path) -> None:
    (pool / "00000001.parquet").write_bytes(b"PAR1 this is none PAR1")


UNREADABLE = {"unreadable_image": 1}
FAULTS = [
    Fault("truncated tar", cut_tar, {"truncated_tar": ROWS - BAD}, ROWS - BAD),
    Fault("header lies about size", lie_about_size, {"truncated_tar": ROWS - BAD}, ROWS - BAD),
    Fault("members named ../ and /", rewrite_tar(climb), {}, 0),
    Fault("duplicate key in a tar", rewrite_tar(repeat_key), {}, 0),
    Fault("duplicate key and no parquet", repeat_key_alone, {}, pool_failed={"duplicate_key": 1}),
    Fault("duplicate uid", repeat_uid, {}, 0),
    Fault("missing parquet", drop_parquet, {}, 0),
    Fault("missing json", rewrite_tar(drop_json), {}, 0),
    Fault("caption not UTF-8", foreign_bytes, {}, 0),
    Fault("parquet that is none", mix_parquet, {}, ROWS, broken=True),
    Fault("missing image", with_image(None), {"missing_image": 1}, 1),
    Fault("zero-byte image", with_image(b""), UNREADABLE, 0),
    Fault("30,000 x 30,000 px", with_image(bomb()), {"oversized_image": 1}, 0),
    Fault("animated PNG", with_image(animated()), {}, 0),
    Fault("CMYK JPEG", with_image(encode(Image.new("CMYK", (40, 40), (10, 90, 0, 0)), "JPEG")), {}, 0),
    Fault("16-bit PNG", with_image(sixteen_bit()), {}, 0),
    Fault("GIF called .jpg", with_image(encode(Image.new("P", (40, 40)), "GIF")), UNREADABLE, 0),
]


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A recipe's score section with a tiny CLIP."""
    weights = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.manual_seed(0)
    torch.save(open_model("winnow-vit-tiny").model.state_dict(), weights)
    clip = {"filter": "clip_score", "name": "clip", "model": f"winnow-vit-tiny@{weights}", "device": "cpu"}
    return [{"filter": "caption_length"}, clip]


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    for part in range(3):
        write_part(tmp_path / "pool", f"{part:08d}", part_rows(part), part_images(part))
    return tmp_path / "pool"


def run_line(spark: Any, pool: Path, entries: list[dict[str, Any]], out: Path) -> tuple[Any, Any]:
    """Score, keep everything, write shards."""
    scored = run_score(lambda: spark, str(pool), entries, str(out / "scores"), quiet=True)
    run_select(lambda: spark, str(out / "scores"), "all", [], str(out / "subsets"))
    config = ShardConfig(rows_per_shard=5)
    subset = str(out / "subsets" / "all.npy")
    shards = run_shards(
        lambda: spark, str(pool), subset, config, str(out / "shards"), scores=str(out / "scores"), quiet=True
    )
    return scored, shards


def written_rows(out: Path) -> Iterator[TarRow]:
    for tar in sorted((out / "shards").glob("*.tar")):
        yield from read_rows(str(tar))


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_one_fault_costs_what_it_must_and_no_more(
    spark: Any, pool: Path, entries: list[dict[str, Any]], tmp_path: Path, fault: Fault
) -> None:
    originals = {f"{key}.jpg": image for part in range(3) for key, image in part_images(part).items()}
    fault.spoil(pool)
    scored, shards = run_line(spark, pool, entries, tmp_path)
    assert scored.counts["clip"].failed == fault.clip_failed
    assert scored.counts["pool"].failed == fault.pool_failed
    assert scored.counts["pool"].kept == 3 * ROWS - (ROWS if fault.broken else 0)
    assert bool(scored.facts["broken"]) == fault.broken
    images = {m.name: m.content for row in written_rows(tmp_path) for m in row.members if m.extension == "jpg"}
    good = {name for name in originals if name not in {f"{row['key']}.jpg" for row in part_rows(1)[BAD:]}}
    if fault.broken:
        good -= {f"{row['key']}.jpg" for row in part_rows(1)}
    assert {name: images.get(name) for name in good} == {name: originals[name] for name in good}
    assert len(images) == shards.facts["rows"] == 3 * ROWS - fault.lost
    failures = pq.ParquetDataset(tmp_path / "scores" / "failures").read().to_pylist()
    assert [f["reason"] for f in failures if f["filter"] == "clip"] == [
        reason for reason, number in fault.clip_failed.items() for _ in range(number)
    ]
    assert all(f["key"] and f["part"] == "00000001" and f["message"] for f in failures)
    assert not Path("/tmp/winnow-climbed.jpg").exists()


def test_clock_skew_between_runs_changes_nothing(
    spark: Any, pool: Path, entries: list[dict[str, Any]], tmp_path: Path
) -> None:
    """A pool and results whose files are from the future, or all from 1970."""
    run_line(spark, pool, entries, tmp_path)
    before = {p: p.read_bytes() for p in sorted((tmp_path / "scores").rglob("*.parquet")) if "spans" not in p.parts}
    for seconds in (4_000_000_000, 0):
        for file in [*pool.iterdir(), *(p for p in (tmp_path / "scores").rglob("*") if p.is_file())]:
            os.utime(file, (seconds, seconds))
        run_line(spark, pool, entries, tmp_path)
        assert {p: p.read_bytes() for p in before} == before


def test_output_that_cannot_be_written_is_an_error_and_not_a_bad_part(
    spark: Any, pool: Path, entries: list[dict[str, Any]]
) -> None:
    with pytest.raises((WinnowError, OSError), match="/proc/winnow"):
        run_line(spark, pool, entries, Path("/proc/winnow"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB; needs the right to mount, which containers of a CI seldom have."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk_stops_with_a_word_and_going_on_gives_the_same_bytes(
    spark: Any, pool: Path, entries: list[dict[str, Any]], tmp_path: Path, small_disk: Path
) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(990 << 10))
    with pytest.raises(StageError, match="No space left"):
        run_line(spark, pool, entries, small_disk)
    assert not list(small_disk.rglob("manifest.json"))
    ballast.unlink()
    run_line(spark, pool, entries, small_disk)
    run_line(spark, pool, entries, tmp_path / "undisturbed")
    for name in ("scores", "subsets", "shards"):
        here, there = small_disk / name, tmp_path / "undisturbed" / name
        assert {p.relative_to(here): p.read_bytes() for p in here.rglob("*") if p.is_file()} == {
            p.relative_to(there): p.read_bytes() for p in there.rglob("*") if p.is_file()
        }


def test_read_only_pool_is_enough(spark: Any, pool: Path, entries: list[dict[str, Any]], tmp_path: Path) -> None:
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in pool.iterdir()}
    run_line(spark, pool, entries, tmp_path)
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in pool.iterdir()} == before


def test_nothing_readable_at_all_is_an_error(spark: Any, entries: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "0.tar").write_bytes(b"")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "pool" / "1.parquet")
    with pytest.raises(WinnowError):
        run_line(spark, tmp_path / "pool", entries, tmp_path)
    assert not (tmp_path / "scores" / "manifest.json").exists()
