import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from toy import render, toy_row, write_part

from pipeline.contract import Failure, Filter, Scored
from pipeline.ledger import Unit, identity_of
from pipeline.pool import Part, list_parts
from pipeline.schemas import IMAGE, IMAGE_ERROR, TEXT
from pipeline.score import score_part
from pipeline.select_table import ScoreTable

MakePool = Callable[..., Path]


def score_text(batch: pa.RecordBatch) -> Scored:
    return Scored((pa.array([len(t) for t in batch.column(TEXT).to_pylist()], pa.int32()),))


def score_image(batch: pa.RecordBatch) -> Scored:
    images = batch.column(IMAGE).to_pylist()
    failures = [
        Failure(n, why, "no image") for n, why in enumerate(batch.column(IMAGE_ERROR).to_pylist()) if why is not None
    ]
    return Scored((pa.array([len(i) if i else None for i in images], pa.float32()),), tuple(failures))


def load_text() -> Callable[[pa.RecordBatch], Scored]:
    return score_text


def load_image() -> Callable[[pa.RecordBatch], Scored]:
    return score_image


TEXT_FILTER = Filter(
    name="chars", needs=(TEXT,), makes=(("chars", pa.int32()),), version=1, settings={}, load=load_text
)
IMAGE_FILTER = Filter(
    name="bytes", needs=(IMAGE,), makes=(("num_bytes", pa.float32()),), version=1, settings={}, load=load_image
)
BOTH = [TEXT_FILTER, IMAGE_FILTER]


def part_with_a_gap(tmp_path: Path) -> Part:
    """Six rows, of which row 2 has no image, and whose tar is in another order than the parquet."""
    rows = [toy_row(n) for n in range(6)]
    images: dict[str, bytes | None] = {row["key"]: render("red", n) for n, row in enumerate(rows)}
    write_part(tmp_path / "p", "0", rows[::-1], images | {rows[2]["key"]: None})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p" / "0.parquet")
    return list_parts(str(tmp_path / "p"))[0]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_scores_are_in_pool_order_with_failures_counted(tmp_path: Path) -> None:
    part, out = part_with_a_gap(tmp_path), tmp_path / "out"
    result = score_part(Unit(part), filters=BOTH, out=str(out))
    assert result["counts"]["chars"] == {"read": 6, "kept": 6, "dropped": {}, "failed": {}}
    assert result["counts"]["bytes"] == {"read": 6, "kept": 5, "dropped": {}, "failed": {"missing_image": 1}}
    table = pq.read_table(out / "bytes" / "0.parquet")
    assert table["uid"].to_pylist() == [toy_row(n)["uid"] for n in range(6)]
    assert [v is None for v in table["num_bytes"].to_pylist()] == [False, False, True, False, False, False]
    failure = pq.read_table(out / "failures" / "0.parquet").to_pylist()[0]
    assert (failure["uid"], failure["reason"], failure["filter"]) == (toy_row(2)["uid"], "missing_image", "bytes")


def test_rerun_changes_nothing_and_redoes_only_what_changed(tmp_path: Path) -> None:
    part, out = part_with_a_gap(tmp_path), tmp_path / "out"
    score_part(Unit(part), filters=BOTH, out=str(out))
    before = bytes_of(out)
    again = score_part(Unit(part), filters=BOTH, out=str(out))
    assert (again["scored"], again["reused"]) == ({}, ["bytes", "chars"])
    (out / "chars" / "0.parquet").unlink()
    assert score_part(Unit(part), filters=BOTH, out=str(out))["scored"] == {"chars": []}
    assert bytes_of(out) == before


def test_what_changed_is_named_and_only_what_reads_it_is_done_again(tmp_path: Path) -> None:
    part, out = part_with_a_gap(tmp_path), tmp_path / "out"
    score_part(Unit(part), filters=BOTH, out=str(out))
    failures = bytes_of(out)["failures/0.parquet"]
    newer = replace(TEXT_FILTER, version=2, settings={"model": "b"})
    why = score_part(Unit(part), filters=[newer, IMAGE_FILTER], out=str(out))["scored"]
    assert list(why) == ["chars"]
    assert "filter.version changed from 1 to 2" in why["chars"]
    assert bytes_of(out)["failures/0.parquet"] == failures
    with Path(part.tar or "").open("ab") as file:
        file.write(bytes(512))
    why = score_part(Unit(part), filters=[newer, IMAGE_FILTER], out=str(out))["scored"]
    assert list(why) == ["bytes"] and any(reason.startswith("input.*.tar.digest changed") for reason in why["bytes"])


def test_a_copied_or_touched_pool_is_not_scored_again(tmp_path: Path) -> None:
    part, out = part_with_a_gap(tmp_path), tmp_path / "out"
    first = score_part(Unit(part), filters=BOTH, out=str(out))
    before = bytes_of(out)
    for url in (part.tar, part.table):
        os.utime(str(url), ns=(1, 1))
    second = score_part(Unit(part, tuple(first["inputs"])), filters=BOTH, out=str(out))
    assert second["scored"] == {}
    assert identity_of(second["inputs"]) == identity_of(first["inputs"]) and second["inputs"] != first["inputs"]
    assert bytes_of(out) == before


def test_files_known_by_size_and_time_are_not_read_again(tmp_path: Path) -> None:
    part, out = part_with_a_gap(tmp_path), tmp_path / "out"
    first = score_part(Unit(part), filters=BOTH, out=str(out))
    noted = tuple({**record, "digest": "as noted"} for record in first["inputs"])
    assert {r["digest"] for r in score_part(Unit(part, noted), filters=BOTH, out=str(out))["inputs"]} == {"as noted"}


def test_the_quarantine_names_the_row_and_its_place(tmp_path: Path) -> None:
    part, out = part_with_a_gap(tmp_path), tmp_path / "out"
    rows = pq.read_table(str(part.table)).to_pylist()
    rows[0]["status"], rows[1]["uid"] = "failed_to_download", "not a uid"
    pq.write_table(pa.Table.from_pylist(rows), part.table)
    result = score_part(Unit(part), filters=BOTH, out=str(out))
    assert result["counts"]["pool"]["failed"] == {"bad_uid": 1, "not_downloaded": 1}
    failures = pq.read_table(out / "failures" / "0.parquet").to_pylist()
    assert [(f["filter"], f["key"], f["reason"]) for f in failures] == [
        ("bytes", "000000002", "missing_image"),
        ("pool", "000000000", "not_downloaded"),
        ("pool", "000000001", "bad_uid"),
    ]
    assert failures[0]["__start__"] is None


def test_half_a_score_file_is_not_believed(tmp_path: Path) -> None:
    part, out = part_with_a_gap(tmp_path), tmp_path / "out"
    score_part(Unit(part), filters=BOTH, out=str(out))
    before = bytes_of(out)
    (out / "bytes" / "0.parquet").write_bytes(before["bytes/0.parquet"][:100])
    score_part(Unit(part), filters=BOTH, out=str(out))
    assert bytes_of(out) == before


def test_zipped_columns_stand_beside_their_uid(tmp_path: Path) -> None:
    part, out = part_with_a_gap(tmp_path), tmp_path / "out"
    score_part(Unit(part), filters=BOTH, out=str(out))
    owners = {"chars": "chars", "num_bytes": "bytes"}
    scores = ScoreTable({name: str(out / name) for name in owners.values()}, owners)
    table = pa.Table.from_batches(scores.read(part.name, owners, uids=True))
    assert sorted(table.column_names) == ["chars", "num_bytes", "uid"]
    assert table["uid"].to_pylist() == [toy_row(n)["uid"] for n in range(6)]
    assert table["chars"].to_pylist() == [len(toy_row(n)["text"]) for n in range(6)]


def test_part_that_cannot_be_read_is_reported(tmp_path: Path) -> None:
    (tmp_path / "0.parquet").write_bytes(b"nothing")
    result = score_part(Unit(list_parts(str(tmp_path))[0]), filters=[TEXT_FILTER], out=str(tmp_path / "out"))
    assert result["counts"] == {} and "cannot be read as parquet" in result["broken"]


def test_a_column_one_part_lacks_costs_only_its_own_scores(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([toy_row(0), toy_row(1)]), tmp_path / "0.parquet")
    result = score_part(Unit(list_parts(str(tmp_path))[0]), filters=BOTH, out=str(tmp_path / "out"))
    assert result["broken"] is None
    assert result["counts"]["chars"]["kept"] == result["counts"]["pool"]["read"] == 2
    assert result["counts"]["bytes"]["failed"] == {"missing_column": 2}
    assert pq.read_table(tmp_path / "out" / "bytes" / "0.parquet")["num_bytes"].null_count == 2


def test_a_clean_part_can_be_scored_again(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([toy_row(0)]), tmp_path / "0.parquet")
    part = list_parts(str(tmp_path))[0]
    for version, expected in ((1, {"chars": []}), (2, {"chars": ["filter.version changed from 1 to 2"]})):
        newer = replace(TEXT_FILTER, version=version)
        assert score_part(Unit(part), filters=[newer], out=str(tmp_path / "out"))["scored"] == expected


def test_empty_part(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([toy_row(0)]).slice(0, 0), tmp_path / "0.parquet")
    result = score_part(Unit(list_parts(str(tmp_path))[0]), filters=[TEXT_FILTER], out=str(tmp_path / "out"))
    assert result["counts"]["chars"]["read"] == 0
    assert pq.read_table(tmp_path / "out" / "chars" / "0.parquet").num_rows == 0


def test_model_opens_once_per_process(tmp_path: Path) -> None:
    opened: list[int] = []

    def load() -> Callable[[pa.RecordBatch], Scored]:
        opened.append(1)
        return score_text

    filter = replace(TEXT_FILTER, settings={"test": "opens once"}, load=load)
    for name in ("0", "1"):
        pq.write_table(pa.Table.from_pylist([toy_row(0)]), tmp_path / f"{name}.parquet")
    for part in list_parts(str(tmp_path)):
        score_part(Unit(part), filters=[filter], out=str(tmp_path / "out"))
    assert len(opened) == 1


def test_two_attempts_of_one_task_at_once_leave_the_bytes_of_one(tmp_path: Path) -> None:
    """What speculative execution does: both write, whole files only, and the same ones."""
    part = part_with_a_gap(tmp_path)
    score_part(Unit(part), filters=BOTH, out=str(tmp_path / "alone"))
    for number in range(5):
        out = tmp_path / f"both{number}"
        attempts = [
            threading.Thread(target=score_part, args=(Unit(part),), kwargs={"filters": BOTH, "out": str(out)})
            for _ in range(4)
        ]
        for attempt in attempts:
            attempt.start()
        for attempt in attempts:
            attempt.join()
        assert bytes_of(out) == bytes_of(tmp_path / "alone")
