"""Pool to report on a CPU, through the command line, on a toy pool; then again, and again after a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from toy import COLORS, render, toy_row, write_part

from pipeline.manifest import read_manifest
from pipeline.schemas import TENSORBOARD_FOLDER
from pipeline.tars import TarRow, make_member, write_rows

pytestmark = pytest.mark.spark

TRAIN = {"model": "winnow-vit-tiny", "samples": 256, "batch_size": 32, "warmup_steps": 2}
RECIPE = {
    "networks": {"dfn": {"data": "clean", "train": TRAIN}},
    "score": [{"filter": "caption_length"}, {"filter": "clip_score", "name": "dfn", "model": "network:dfn"}],
    "subsets": {
        "none": [],
        "dfn": [
            {"name": "words", "where": "caption_words > 2"},
            {"name": "top half", "top": {"by": "dfn_similarity_score", "fraction": 0.5}},
        ],
    },
    "shards": {"rows_per_shard": 20},
    "train": TRAIN,
    "eval": {"own": ["colors"]},
}
BAD_ROWS = 5


def write_pool(folder: Path, num_rows: int, *, spoil: bool) -> None:
    """Two parts; a spoiled pool has null captions, unreadable bytes and rows missing from the tar."""
    for part in range(2):
        rows = [toy_row(n) for n in range(part, num_rows, 2)]
        images: dict[str, bytes | None] = {
            row["key"]: render(list(COLORS)[n % 4], n) for row, n in zip(rows, range(part, num_rows, 2), strict=True)
        }
        if spoil and part == 1:
            rows[0]["text"] = rows[1]["text"] = None
            images |= {rows[2]["key"]: b"no image", rows[3]["key"]: b"", rows[4]["key"]: None}
        write_part(folder, f"{part:08d}", rows, images)


def write_task(folder: Path) -> None:
    """Eight images of four classes in the hub's layout."""
    task = folder / "wds_colors_test"
    (task / "test").mkdir(parents=True)
    (task / "classnames.txt").write_text("".join(f"{c}\n" for c in COLORS))
    (task / "zeroshot_classification_templates.txt").write_text("a {c} square\n")
    (task / "test" / "nshards.txt").write_text("1")
    with (task / "test" / "0.tar").open("wb") as file:
        for_each = [(n, color) for n in range(2) for color in COLORS]
        rows = (
            TarRow(
                f"s{i:07d}",
                (make_member(f"s{i:07d}.cls", str(i % 4).encode()), make_member(f"s{i:07d}.jpg", render(c, i))),
            )
            for i, (_, c) in enumerate(for_each)
        )
        write_rows(file, rows)


def make_places(folder: Path) -> list[str]:
    write_pool(folder / "pool", 64, spoil=True)
    write_pool(folder / "clean", 32, spoil=False)
    write_task(folder / "evalsets")
    (folder / "toy.yaml").write_text(yaml.safe_dump(RECIPE))
    truth = [{"uid": toy_row(n)["uid"], "kind": "good" if n % 2 else "bad"} for n in range(64)]
    pq.write_table(pa.Table.from_pylist(truth), folder / "truth.parquet")
    words = ["run", str(folder / "toy.yaml"), "--pool", str(folder / "pool"), "--clean", str(folder / "clean")]
    words += ["--eval-data", str(folder / "evalsets"), "--master", "local[2]"]
    return [*words, "--truth", str(folder / "truth.parquet"), "--right-kinds", "good"]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
"""Sums of floats depend on the number of threads, so runs that must be equal need the same."""


def winnow(words: list[str], *, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=ENVIRONMENT)


def artifacts(out: Path) -> dict[str, bytes]:
    """Every file but the log of wall times, the training rates, TensorBoard's and the report that shows them."""
    left_out = {"events.jsonl", "metrics.jsonl", "report.html"}
    files = sorted(p for p in out.rglob("*") if p.is_file() and p.name not in left_out)
    files = [p for p in files if p.parent.name != TENSORBOARD_FOLDER]  # named after the time and the host
    return {str(p.relative_to(out)): p.read_bytes().replace(bytes(out), b"OUT") for p in files}  # request.json names it


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("chain")
    words = make_places(folder)
    return words, folder / "out", winnow([*words, "--out", str(folder / "out")])


def facts(out: Path, *names: str) -> dict[str, Any]:
    *folders, name = names
    found = read_manifest(str(out.joinpath(*folders)), name=name)
    assert found
    return {"counts": found.counts, **found.facts}


def test_it_ends_well_and_shows_the_table(finished: tuple[list[str], Path, subprocess.CompletedProcess[str]]) -> None:
    _, out, done = finished
    assert done.returncode == 0, done.stderr[-3000:]
    assert "colors" in done.stdout and "network-dfn" in done.stdout
    assert (out / "report.html").stat().st_size > 5000


def test_every_row_is_accounted_for(finished: tuple[list[str], Path, subprocess.CompletedProcess[str]]) -> None:
    _, out, _ = finished
    scored = facts(out, "scores", "manifest.json")["counts"]
    assert scored["pool"].read == 64
    assert scored["caption_length"].failed == {"null_caption": 2}
    assert scored["dfn"].failed == {"null_caption": 2, "missing_image": 1, "unreadable_image": 2}
    selected = facts(out, "subsets", "dfn.json")
    assert selected["counts"]["words"].dropped == {"no_score": 2}
    assert selected["rows"] == 32
    everything = facts(out, "shards", "none", "manifest.json")
    assert everything["counts"]["rows"].failed == {"missing_image": 1}
    assert everything["rows"] == 63


def test_same_samples_seen_for_every_subset(finished: tuple[list[str], Path, subprocess.CompletedProcess[str]]) -> None:
    _, out, _ = finished
    assert {facts(out, "runs", name, "manifest.json")["samples_seen"] for name in ("none", "dfn")} == {256}


def test_results_are_datacomps_form(finished: tuple[list[str], Path, subprocess.CompletedProcess[str]]) -> None:
    _, out, _ = finished
    for line in (out / "eval" / "dfn" / "eval_results.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert {"key", "dataset", "metrics"} <= row.keys() and "main_metric" in row["metrics"]


def test_second_run_makes_nothing_new(finished: tuple[list[str], Path, subprocess.CompletedProcess[str]]) -> None:
    words, out, _ = finished
    before = artifacts(out)
    times = {name: (out / name).stat().st_mtime_ns for name in before if name != "recipe.json"}
    assert winnow([*words, "--out", str(out)]).returncode == 0
    assert artifacts(out) == before
    assert {name: (out / name).stat().st_mtime_ns for name in times} == times


@pytest.mark.slow
@pytest.mark.parametrize(
    "after", ["networks/dfn/metrics.jsonl", "scores/dfn", "subsets/none.npy", "shards/dfn", "runs/none"]
)
def test_killed_anywhere_it_ends_with_the_same_bytes(
    finished: tuple[list[str], Path, subprocess.CompletedProcess[str]], tmp_path: Path, after: str
) -> None:
    words, out, _ = finished
    command = [sys.executable, "-m", "jobs", *words, "--out", str(tmp_path / "out")]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, start_new_session=True, env=ENVIRONMENT, **quiet)
    deadline = time.monotonic() + 200
    while not (tmp_path / "out" / after).exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert winnow([*words, "--out", str(tmp_path / "out")]).returncode == 0
    here, there = artifacts(tmp_path / "out"), artifacts(out)
    assert here.keys() == there.keys()
    assert [name for name in here if here[name] != there[name]] == []
    shutil.rmtree(tmp_path / "out")
