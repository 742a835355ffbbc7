"""The embedded pool: same seed, same bytes; every kind of row there; readable as img2dataset's and the hub's files."""

import hashlib
import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.errors import ConfigError
from pipeline.pool import list_parts, read_part
from pipeline.scene_captions import COLORS, KIND_FRACTIONS, OBJECTS, RIGHT_KINDS, SHAPES
from pipeline.scenes import (
    POOL_SCHEMA,
    TASKS,
    TRUTH_SCHEMA,
    truth_url,
    write_demo_clean,
    write_demo_pool,
    write_demo_tasks,
)
from pipeline.schemas import CAPTION, IMAGE_EXTENSIONS, TEXT
from pipeline.tars import TarRow, read_rows

NUM_ROWS, PART_ROWS = 600, 250


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_all(folder, seed=7)
    return folder


def write_all(folder: Path, *, seed: int) -> None:
    write_demo_pool(str(folder / "pool"), seed=seed, num_rows=NUM_ROWS, rows_per_part=PART_ROWS)
    write_demo_clean(str(folder / "clean"), seed=seed, num_rows=120, rows_per_part=100)
    write_demo_tasks(str(folder / "tasks"), seed=seed, num_images=700)


def hash_files(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def read_pool(folder: Path) -> list[tuple[dict[str, Any], TarRow]]:
    """Return (parquet row, tar row) of a whole pool."""
    pairs = []
    for part in list_parts(str(folder)):
        assert part.tar and part.table
        pairs += zip(pq.read_table(part.table).to_pylist(), read_rows(part.tar), strict=True)
    return pairs


def read_truth(demo: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(truth_url(str(demo / "pool"))).to_pylist()
    return rows


def open_image(row: TarRow) -> Image.Image:
    image = Image.open(io.BytesIO(row.find(IMAGE_EXTENSIONS) or b""))
    image.load()
    return image


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(demo: Path, tmp_path: Path) -> None:
    write_all(tmp_path / "again", seed=7)
    first = hash_files(demo)
    assert hash_files(tmp_path / "again") == first
    write_demo_pool(str(tmp_path / "pool"), seed=8, num_rows=NUM_ROWS, rows_per_part=PART_ROWS)
    other = hash_files(tmp_path)
    changed = [name for name in first if name.startswith("pool/") and name.endswith((".tar", ".parquet"))]
    assert len(changed) == 6
    assert all(other[name] != first[name] for name in changed)


def test_a_pool_holds_what_img2dataset_writes_and_nothing_else(demo: Path) -> None:
    names = [f"{part:08d}{suffix}" for part in range(3) for suffix in (".parquet", ".tar", "_stats.json")]
    assert sorted(path.name for path in (demo / "pool").iterdir()) == sorted(names)
    assert (demo / "truth.parquet").exists()
    counts = [json.loads(path.read_text())["successes"] for path in sorted((demo / "pool").glob("*_stats.json"))]
    assert counts == [250, 250, 100]
    table = read_part(list_parts(str(demo / "pool"))[0]).table
    assert table.num_rows == 250


def test_parquet_tar_json_and_txt_agree(demo: Path) -> None:
    assert pq.read_schema(demo / "pool" / "00000000.parquet").equals(POOL_SCHEMA)
    for place, (columns, row) in enumerate(read_pool(demo / "pool")):
        assert row.key == columns["key"] == f"{place // PART_ROWS * 10_000 + place % PART_ROWS:012d}"
        details = json.loads(row.find(["json"]) or b"")
        assert details.pop("exif") == "{}"
        assert details.pop(CAPTION) == columns[TEXT]
        assert details == {name: value for name, value in columns.items() if name != TEXT}
        assert (row.find(["txt"]) or b"").decode() == (columns[TEXT] or "")
        assert columns["sha256"] == hashlib.sha256(row.find(IMAGE_EXTENSIONS) or b"").hexdigest()
        assert [m.extension for m in row.members] == sorted(m.extension for m in row.members)


def test_python_tarfile_reads_every_tar(demo: Path) -> None:
    for path in sorted(demo.rglob("*.tar")):
        with tarfile.open(path) as tar:
            names = [member.name for member in tar if member.isfile()]
        assert names == [member.name for row in read_rows(str(path)) for member in row.members]


def test_every_kind_is_there_as_often_as_it_should_be(demo: Path) -> None:
    counts = Counter(row["kind"] for row in read_truth(demo))
    assert set(counts) == set(KIND_FRACTIONS)
    for kind, share in KIND_FRACTIONS.items():
        assert counts[kind] / NUM_ROWS == pytest.approx(share, abs=0.01)


def test_the_truth_names_every_row_once_in_the_pools_order(demo: Path) -> None:
    truth, pool = read_truth(demo), read_pool(demo / "pool")
    assert pq.read_schema(demo / "truth.parquet").equals(TRUTH_SCHEMA)
    assert [row["uid"] for row in truth] == [columns["uid"] for columns, _ in pool]
    assert len({row["uid"] for row in truth}) == len({columns["url"] for columns, _ in pool}) == NUM_ROWS
    assert all(row["caption_is_right"] == (row["kind"] in RIGHT_KINDS) for row in truth)


def test_sizes_are_true_and_only_unreadable_images_do_not_open(demo: Path) -> None:
    for truth, (columns, row) in zip(read_truth(demo), read_pool(demo / "pool"), strict=True):
        if truth["kind"] == "unreadable":
            with pytest.raises(OSError):
                open_image(row)
            continue
        image = open_image(row)
        short, long = sorted((columns["original_width"], columns["original_height"]))
        assert image.size == (columns["width"], columns["height"])
        assert min(image.size) == min(short, 64)
        assert (image.width > image.height) <= (columns["original_width"] > columns["original_height"])
        assert (short < 200) == (truth["kind"] == "too_small")
        assert (long / short > 3) == (truth["kind"] == "extreme_aspect")


def test_captions_are_what_their_kind_says(demo: Path) -> None:
    captions: dict[str, list[Any]] = {kind: [] for kind in KIND_FRACTIONS}
    for truth, (columns, _) in zip(read_truth(demo), read_pool(demo / "pool"), strict=True):
        captions[truth["kind"]].append(columns[TEXT])
    assert set(captions["null_caption"]) == {None}
    for kind in RIGHT_KINDS:
        assert all(names_a_scene(caption) for caption in captions[kind])
    assert not any(names_a_scene(c) for kind in ("unrelated_text", "boilerplate", "foreign") for c in captions[kind])
    honest = "".join(captions["honest"])
    assert "\n" in honest and any(ord(letter) > 0x1F000 for letter in honest)
    assert any("А" <= letter <= "я" for letter in "".join(captions["foreign"]))


def names_a_scene(caption: str) -> bool:
    return any(
        word in SHAPES + COLORS for word in caption.lower().replace("「", " ").replace("」", " ").strip(".").split()
    )


def test_a_duplicate_repeats_an_honest_row_under_its_own_uid(demo: Path) -> None:
    truth, pool = read_truth(demo), read_pool(demo / "pool")
    rows = [(t["kind"], columns["sha256"], columns[TEXT]) for t, (columns, _) in zip(truth, pool, strict=True)]
    honest = {(sha, text) for kind, sha, text in rows if kind == "honest"}
    assert all((sha, text) in honest for kind, sha, text in rows if kind == "duplicate")
    others = [sha for kind, sha, _ in rows if kind not in ("duplicate", "unreadable")]
    assert len(set(others)) == len(others)


def test_images_come_in_three_formats(demo: Path) -> None:
    extensions = Counter(m.extension for _, row in read_pool(demo / "pool") for m in row.members)
    assert extensions["jpg"] > 500 and extensions["png"] > 0 and extensions["webp"] > 0


def test_the_clean_pool_is_honest_and_disjoint_from_pool_and_tasks(demo: Path) -> None:
    clean, pool = read_pool(demo / "clean"), read_pool(demo / "pool")
    for name in ("uid", "url", "sha256"):
        assert not {columns[name] for columns, _ in clean} & {columns[name] for columns, _ in pool}
    assert len(clean) == 120
    assert all(names_a_scene(columns[TEXT]) and open_image(row) for columns, row in clean)
    tasks = {hashlib.sha256(row.find(IMAGE_EXTENSIONS) or b"").hexdigest() for row in read_task(demo, TASKS[0])}
    assert not tasks & {columns["sha256"] for columns, _ in clean + pool}


def read_task(demo: Path, task: str) -> list[TarRow]:
    test = demo / "tasks" / f"wds_{task}_test" / "test"
    return [row for shard in range(int((test / "nshards.txt").read_text())) for row in read_rows(f"{test}/{shard}.tar")]


@pytest.mark.parametrize(("task", "classes"), [*zip(TASKS, (SHAPES, COLORS, OBJECTS), strict=True)])
def test_a_task_is_complete_in_the_hubs_layout(demo: Path, task: str, classes: tuple[str, ...]) -> None:
    root = demo / "tasks" / f"wds_{task}_test"
    assert tuple((root / "classnames.txt").read_text().splitlines()) == classes
    templates = (root / "zeroshot_classification_templates.txt").read_text().splitlines()
    assert templates and all("{c}" in template for template in templates)
    assert sorted(path.name for path in (root / "test").iterdir()) == ["0.tar", "1.tar", "nshards.txt"]
    rows = read_task(demo, task)
    assert [row.key for row in rows] == [f"s{number:07d}" for number in range(700)]
    assert all(min(open_image(row).size) == 64 for row in rows[:50])
    counts = Counter(int(row.find(["cls"]) or b"") for row in rows)
    assert set(counts) == set(range(len(classes)))
    assert max(counts.values()) - min(counts.values()) <= 64 // len(classes)


def test_labels_of_the_three_tasks_agree(demo: Path) -> None:
    shapes, colors, objects = ([int(row.find(["cls"]) or b"") for row in read_task(demo, task)] for task in TASKS)
    for shape, color, label in zip(shapes, colors, objects, strict=True):
        assert OBJECTS[label] == f"{COLORS[color]} {SHAPES[shape]}"


@pytest.mark.parametrize(("num_rows", "rows_per_part"), [(99, 50), (200, 0), (200, 10_001)])
def test_a_pool_too_small_or_parts_out_of_range_are_refused(tmp_path: Path, num_rows: int, rows_per_part: int) -> None:
    with pytest.raises(ConfigError):
        write_demo_pool(str(tmp_path / "pool"), seed=0, num_rows=num_rows, rows_per_part=rows_per_part)


def test_a_task_with_fewer_images_than_objects_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        write_demo_tasks(str(tmp_path), seed=0, num_images=63)
