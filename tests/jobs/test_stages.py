"""The score stage over its folder: what is reused, named, started over, shown and retried."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy import tar_row, toy_row

from jobs.show_status import describe_scores
from jobs.stage_score import run_retry, run_score
from pipeline.errors import ConfigError, StageError
from pipeline.lock import hold_lock
from pipeline.manifest import Manifest, read_manifest, write_manifest
from pipeline.tars import write_rows

pytestmark = pytest.mark.spark
MakePool = Callable[..., Path]
ENTRIES = [{"filter": "caption_length"}, {"filter": "image_size"}]


def artifacts(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def score(spark: Any, pool: Path, out: Path, entries: Any = ENTRIES, **options: Any) -> Any:
    return run_score(lambda: spark, str(pool), entries, str(out), quiet=True, **options)


def set_caption(table: Path, caption: str | None) -> None:
    """Change the first row's caption."""
    rows = pq.read_table(table).to_pylist()
    rows[0]["text"] = caption
    pq.write_table(pa.Table.from_pylist(rows), table)


def never() -> Any:
    raise AssertionError("Spark was started for finished work")


def test_finished_work_needs_no_spark(spark: Any, make_pool: MakePool, tmp_path: Path) -> None:
    pool, out = make_pool(12, 3), tmp_path / "out"
    made = score(spark, pool, out)
    before = artifacts(out)
    assert run_score(never, str(pool), ENTRIES, str(out), quiet=True) == made
    assert artifacts(out) == before


def test_a_damaged_score_file_is_found_and_made_again(spark: Any, make_pool: MakePool, tmp_path: Path) -> None:
    pool, out = make_pool(12, 3), tmp_path / "out"
    score(spark, pool, out)
    before = artifacts(out)
    for damage in (before["image_size/00000001.parquet"][:-40], b""):
        (out / "image_size" / "00000001.parquet").write_bytes(damage)
        score(spark, pool, out)
        assert artifacts(out) == before


def test_a_changed_part_is_named_and_only_it_is_scored(
    spark: Any, make_pool: MakePool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pool, out = make_pool(12, 3), tmp_path / "out"
    score(spark, pool, out)
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*.parquet")}
    set_caption(pool / "00000001.parquet", "another caption altogether")
    with caplog.at_level(logging.WARNING, logger="winnow"):
        score(spark, pool, out)
    assert "1 of 3 parts are new or touched" in caplog.text
    assert "1 of 3 parts by caption_length again: input.*.parquet.digest changed" in caplog.text
    changed = {p.relative_to(out).as_posix() for p, then in times.items() if p.stat().st_mtime_ns != then}
    assert {"caption_length/00000001.parquet", "image_size/00000001.parquet"} <= changed
    assert not [name for name in changed if "00000001" not in name]


def test_fresh_starts_over_and_keeps_what_it_did_not_make(spark: Any, make_pool: MakePool, tmp_path: Path) -> None:
    pool, out = make_pool(12, 3), tmp_path / "out"
    score(spark, pool, out)
    before = artifacts(out)
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*.parquet")}
    (out / "notes.txt").write_text("mine")
    score(spark, pool, out, fresh=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert artifacts(out) == before | {"notes.txt": b"mine"}
    assert all(p.stat().st_mtime_ns != then for p, then in times.items())


def test_two_drivers_do_not_work_on_one_folder(spark: Any, make_pool: MakePool, tmp_path: Path) -> None:
    with hold_lock(str(tmp_path / "out"), "score"), pytest.raises(StageError, match="is at work here"):
        score(spark, make_pool(4, 1), tmp_path / "out")


def test_status_shows_done_failed_and_left(spark: Any, make_pool: MakePool, tmp_path: Path) -> None:
    pool, out = make_pool(12, 3), tmp_path / "out"
    set_caption(pool / "00000000.parquet", None)
    score(spark, pool, out)
    lines = [line.split() for line in describe_scores(str(out))]
    assert [line[:4] for line in lines] == [
        ["score", "caption_length", "3", "0"],
        ["score", "image_size", "3", "0"],
    ]
    assert lines[0][4:] == ["parts;", "null_caption", "1"]
    (out / "image_size" / "00000002.parquet").unlink()
    (out / "manifest.json").unlink()
    lines = [line.split() for line in describe_scores(str(out))]
    assert lines[1][:4] == ["score", "image_size", "2", "1"]
    assert "goes on" in " ".join(lines[2])


def test_retry_tells_what_can_be_retried(spark: Any, make_pool: MakePool, tmp_path: Path) -> None:
    pool, out = make_pool(12, 3), tmp_path / "out"
    set_caption(pool / "00000000.parquet", None)
    score(spark, pool, out)
    before = artifacts(out)
    with pytest.raises(ConfigError, match="did you mean 'null_caption'"):
        run_retry(lambda: spark, str(out), "null_captoin", quiet=True)
    manifest, done = run_retry(lambda: spark, str(out), "null_caption", quiet=True)
    assert done == {"tried": 1, "mended": 0} and manifest == read_manifest(str(out))
    assert artifacts(out) == before


def test_request_says_what_was_asked(spark: Any, make_pool: MakePool, tmp_path: Path) -> None:
    pool, out = make_pool(4, 1), tmp_path / "out"
    score(spark, pool, out)
    asked = json.loads((out / "request.json").read_text())
    assert (asked["pool"], asked["entries"], asked["parts"]) == (str(pool), ENTRIES, ["00000000"])


def test_text_filters_do_not_mind_the_tars(spark: Any, make_pool: MakePool, tmp_path: Path) -> None:
    pool, out = make_pool(4, 1), tmp_path / "out"
    made = score(spark, pool, out)
    with (pool / "00000000.tar").open("wb") as file:
        write_rows(file, [tar_row(toy_row(0), b"other bytes")])
    assert run_score(never, str(pool), ENTRIES, str(out), quiet=True) == made


def test_scores_are_not_written_over_the_pool(spark: Any, make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(4, 1, name="caption_length")
    before = artifacts(pool)
    with pytest.raises(ConfigError, match="lies where scores would be written"):
        score(spark, pool, tmp_path, fresh=True)
    assert artifacts(pool) == before


def test_two_filters_of_one_name_are_refused(spark: Any, make_pool: MakePool, tmp_path: Path) -> None:
    entries = [{"filter": "caption_length"}, {"filter": "image_size", "name": "caption_length"}]
    with pytest.raises(ConfigError, match="two filters are called 'caption_length'"):
        score(spark, make_pool(4, 1), tmp_path / "out", entries)


def test_the_folder_of_another_stage_is_left_alone(spark: Any, make_pool: MakePool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_manifest(str(out), Manifest(stage="shards", config={}, parents={}))
    for fresh in (False, True):
        with pytest.raises(StageError, match="holds the output of 'shards'"):
            score(spark, make_pool(4, 1), out, fresh=fresh)
    assert read_manifest(str(out))


def test_another_pool_with_the_same_names_sizes_and_times_is_read(
    spark: Any, make_pool: MakePool, tmp_path: Path
) -> None:
    first, second, out = make_pool(4, 1, name="a"), make_pool(4, 1, name="b"), tmp_path / "out"
    for folder, old in ((first, "picture"), (second, "pic ure")):
        rows = [row | {"text": row["text"].replace("picture", old)} for row in map(toy_row, range(4))]
        plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        pq.write_table(pa.Table.from_pylist(rows), folder / "00000000.parquet", **plain)
    for file in [*first.iterdir(), *second.iterdir()]:
        os.utime(file, (0, 0))
    assert (first / "00000000.parquet").stat().st_size == (second / "00000000.parquet").stat().st_size
    score(spark, first, out)
    before = pq.read_table(out / "caption_length" / "00000000.parquet")
    score(spark, second, out)
    assert pq.read_table(out / "caption_length" / "00000000.parquet") != before


def test_a_lost_quarantine_is_made_again(spark: Any, make_pool: MakePool, tmp_path: Path) -> None:
    pool, out = make_pool(12, 3), tmp_path / "out"
    set_caption(pool / "00000000.parquet", None)
    score(spark, pool, out)
    before = artifacts(out)
    (out / "failures" / "00000000.parquet").unlink()
    score(spark, pool, out)
    assert artifacts(out) == before


def test_retry_of_a_touched_pool_asks_for_a_look_first(spark: Any, make_pool: MakePool, tmp_path: Path) -> None:
    pool, out = make_pool(12, 3), tmp_path / "out"
    set_caption(pool / "00000000.parquet", None)
    score(spark, pool, out)
    os.utime(pool / "00000000.parquet", (0, 0))
    with pytest.raises(StageError, match="Run `winnow score`, then retry"):
        run_retry(lambda: spark, str(out), "null_caption", quiet=True)
    assert read_manifest(str(out))
    score(spark, pool, out)
    assert run_retry(lambda: spark, str(out), "null_caption", quiet=True)[1] == {"tried": 1, "mended": 0}
