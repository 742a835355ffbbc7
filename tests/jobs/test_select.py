"""The select stage from the command line: accounts, reruns, kills, thresholds; and DataComp's own sets."""

import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from made_scores import write_scores

from jobs.calibrate_dfn import main as calibrate
from jobs.select_subset import main as select
from jobs.stage_select import run_select
from pipeline.errors import StageError
from pipeline.manifest import Counts, Manifest, read_manifest, write_manifest
from pipeline.report import write_report
from pipeline.schemas import SCORE_COUNTS, SCORE_FILTER, SCORE_IDENTITY, SCORE_INPUTS, SCORE_POOL
from pipeline.select import AtLeast, Step, Top
from pipeline.subset import read_subset
from pipeline.subset_runs import write_run
from pipeline.uid import UID_DTYPE, format_uids

DATACOMP = json.loads((Path(__file__).parent / "datacomp_clip_score.json").read_text())
EDGES = json.loads((Path(__file__).parent / "datacomp_clip_score_edges.json").read_text())
COLUMN = "clip_l14_similarity_score"
OWNERS = {COLUMN: "clip_l14", "caption_words": "caption_length"}


def make_scores(folder: Path, num_rows: int = 1000, parts: int = 4) -> str:
    rng = np.random.default_rng(0)
    uids = np.zeros(num_rows, UID_DTYPE)
    uids["f0"], uids["f1"] = rng.integers(0, 2**64, (2, num_rows), dtype=np.uint64)
    score = rng.normal(0.25, 0.05, num_rows).astype(np.float16).astype(np.float32)
    words = pa.array(rng.integers(0, 9, num_rows), pa.int32())
    table = pa.table({"uid": format_uids(uids), "clip_l14_similarity_score": score, "caption_words": words})
    size = -(-num_rows // parts)
    return str(write_scores(folder, {f"{n:08d}": table[n * size : (n + 1) * size] for n in range(parts)}, OWNERS))


CASES = [(table, case) for table in (DATACOMP, EDGES) for case in table["cases"]]


@pytest.mark.parametrize(("table", "case"), CASES, ids=lambda value: str(value)[:20])
def test_same_uids_as_datacomp(tmp_path: Path, table: dict[str, Any], case: dict[str, Any]) -> None:
    """The uids that baselines/apply_filter.py (its function load_uids_with_clip_score) gave for the same rows."""
    uids = [row[0] for row in table["rows"]]
    scores = pa.array([math.nan if row[1] == "nan" else row[1] for row in table["rows"]], pa.float32())
    rows = pa.table({"uid": uids, COLUMN: scores})
    place = str(write_scores(tmp_path / "scores", {"a": rows[:7], "b": rows[7:]}, {COLUMN: "clip_l14"}))
    if "threshold" in case:
        step = Step(name="floor", at_least=AtLeast(by=COLUMN, value=case["threshold"]))
    else:
        step = Step(name="top", top=Top(by=COLUMN, fraction=case["fraction"], ties="datacomp"))
    run_select(lambda: pytest.fail("no Spark"), place, "s", [step], str(tmp_path))
    assert format_uids(read_subset(str(tmp_path / "s.npy"))).to_pylist() == case["uids"]


def test_select_says_where_rows_went(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = make_scores(tmp_path / "scores")
    top = {"by": "clip_l14_similarity_score", "fraction": 0.3}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump({"subsets": {"best": [{"name": "top", "top": top}], "all": []}}))
    words = [str(tmp_path / "my.yaml"), "--scores", scores, "--out", str(tmp_path / "out")]
    assert select(words) == 0
    assert "subset best: 300 rows" in capsys.readouterr().out
    made = read_manifest(str(tmp_path / "out"), name="best.json")
    assert made and made.facts["rows"] == made.facts["uids"] == 300
    assert made.counts["top"].dropped == {"top": 700}
    written = (tmp_path / "out" / "best.npy").read_bytes()
    assert made.facts["sha256"] == hashlib.sha256(written).hexdigest()
    assert len(read_subset(str(tmp_path / "out" / "all.npy"))) == 1000
    assert not list((tmp_path / "out").glob(".tmp*"))


RECIPE = f"""
subsets:
  best: [{{name: top, top: {{by: {COLUMN}, fraction: 0.3}}}}]
  mix:
    - name: either
      add:
        - [{{name: best, use: best}}]
        - [{{name: worst, top: {{by: {COLUMN}, count: 50, lowest: true}}}}, {{name: four, repeat: 4}}]
    - {{name: not a few, minus: [{{name: few, sample: {{count: 10}}}}]}}
train: {{model: winnow-vit-tiny, samples: 12800}}
"""
EXPLAINED = """\
subset mix: 340 rows, 340 uids, 484 copies, 26.45 epochs of 12,800 samples
                  read  kept  dropped  no score
├─ either        1,000   350      650         -  add
│  ├─ branch 1   1,000   300
│  │  └─ best    1,000   300      700         -  cascade
│  │     └─ top  1,000   300      700         -  top 30 % of pool by clip_l14_similarity_score: ≥ 0.27294922
│  └─ branch 2   1,000    50
│     ├─ worst   1,000    50      950         -  lowest 50 rows by clip_l14_similarity_score: ≤ 0.16870117
│     └─ four       50    50        0         -  repeat 4 times
└─ not a few       350   340       10         -  minus
   └─ few          350    10      340         -  sample 10 rows, seed 0

"""


def test_explain_prints_the_tree_and_reads_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores, recipe = make_scores(tmp_path / "scores"), tmp_path / "my.yaml"
    recipe.write_text(RECIPE)
    words = [str(recipe), "--scores", scores, "--subset", "mix", "--explain"]
    assert select(words) == 0
    assert capsys.readouterr().out == EXPLAINED
    out = tmp_path / "out"
    assert select([*words, "--out", str(out)]) == 0 and capsys.readouterr().out == EXPLAINED
    assert sorted(p.name for p in out.iterdir()) == ["mix.json", "mix.npy"]
    before = (out / "mix.npy").stat().st_mtime_ns
    assert select([*words, "--out", str(out)]) == 0 and capsys.readouterr().out == EXPLAINED
    assert (out / "mix.npy").stat().st_mtime_ns == before
    assert len(np.load(out / "mix.npy")) == 484


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "o", "--subset", "mxi"], "unknown subset of recipe 'my' 'mxi': did you mean 'mix'"),
        ([], "--out, or ask for --explain"),
        (["--out", "o", "subsets.mix.0.add.0.0.use=bset"], "unknown subset in step 'best' 'bset': did you mean 'best'"),
        (["--out", "o", "subsets.best.0.top.by=clip_l41_similarity_score"], f"did you mean '{COLUMN}'"),
        (["--out", "o", "subsets.mix.1.minus.0.sample.seeed=1"], "subsets.mix.1.minus.0.sample 'seeed': did you mean"),
    ],
)
def test_what_is_misspelt_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(RECIPE)
    make_scores(Path("scores"), 20, 1)
    overrides, flags = [w for w in words if "=" in w], [w for w in words if "=" not in w]
    assert select(["my.yaml", *overrides, "--scores", "scores", *flags]) == 2
    assert message in capsys.readouterr().err


def test_report_shows_steps_in_branches_and_copies(tmp_path: Path) -> None:
    """What the shards hold is the copies; each step of a branch read what entered its step."""
    scores, recipe = make_scores(tmp_path / "scores"), tmp_path / "my.yaml"
    recipe.write_text(RECIPE)
    assert select([str(recipe), "--scores", scores, "--out", str(tmp_path / "subsets"), "--subset", "mix"]) == 0
    counts = {"rows": Counts(read=484, kept=484)}
    (tmp_path / "shards" / "mix").mkdir(parents=True)
    made = Manifest(stage="shards", config={}, parents={}, counts=counts, facts={})
    write_manifest(str(tmp_path / "shards" / "mix"), made)
    page = re.sub(r"<[^>]*>|\s+", " ", Path(write_report(str(tmp_path))).read_text())
    text = re.sub(" +", " ", page)
    assert "either/1/best/top top 30 % of pool by clip_l14_similarity_score: ≥ 0.27294922 1,000 300 700 0 ✓" in text
    assert "not a few/few sample 10 rows, seed 0 350 10 340 0 ✓" in text
    assert "484 484 0 0 ✓" in text and "✗" not in text


def test_calibrate_finds_the_same_threshold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = make_scores(tmp_path / "scores")
    by = "clip_l14_similarity_score"
    assert calibrate(["--scores", scores, "--by", by, "--fraction", "0.25"]) == 0
    found = json.loads(capsys.readouterr().out)
    step = Step(name="top", top=Top(by=by, fraction=0.25))
    made = run_select(lambda: None, scores, "s", [step], str(tmp_path / "out"))
    assert found["threshold"] == made.facts["thresholds"]["top"]
    assert (found["wanted"], found["pool"], made.facts["rows"]) == (250, 1000, 250)
    assert found["kept_at_or_above"] >= 250
    assert calibrate(["--scores", scores, "--by", by, "--count", "2000"]) == 2
    assert "cannot keep 2,000 rows" in capsys.readouterr().err


def start_select(folder: Path, scores: str, out: str) -> subprocess.Popen[bytes]:
    words = [str(folder / "my.yaml"), "--scores", scores, "--out", str(folder / out), "--master", "local[2]"]
    return subprocess.Popen(
        [sys.executable, "-m", "jobs", "select", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def test_what_a_killed_run_left_changes_nothing(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores")
    step = Step(name="top", top=Top(by="clip_l14_similarity_score", fraction=0.4))
    run_select(lambda: None, scores, "s", [step], str(tmp_path / "whole"))
    left = tmp_path / "killed" / ".tmp-select-s" / "runs"
    strangers = np.zeros(3, UID_DTYPE)
    write_run(str(left), "000000-000000", strangers)
    write_run(str(left), "000099-000000", strangers)
    (tmp_path / "killed" / "s.npy").write_bytes(b"half a fi")
    run_select(lambda: None, scores, "s", [step], str(tmp_path / "killed"))
    for name in ("s.npy", "s.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == ["s.json", "s.npy"]


@pytest.mark.slow
@pytest.mark.spark
def test_killed_at_any_time_the_same_bytes_come_out(tmp_path: Path) -> None:
    """A run of two SQL blocks, two tops and an add, killed as each kind of file appears under its scratch folder."""
    scores = make_scores(tmp_path / "scores", 400_000)
    steps = [
        {"name": "words", "where": "caption_words > 2"},
        {"name": "half", "top": {"by": "clip_l14_similarity_score", "fraction": 0.5}},
        {"name": "even", "where": "caption_words % 2 = 0"},
        {"name": "few", "top": {"by": "caption_words", "count": 50_000}},
        {"name": "more", "add": [[], [{"name": "some", "sample": {"fraction": 0.1}}, {"name": "six", "repeat": 6}]]},
    ]
    (tmp_path / "my.yaml").write_text(yaml.safe_dump({"subsets": {"s": steps}}))
    whole = start_select(tmp_path, scores, "whole")
    _, said = whole.communicate(timeout=200)
    assert whole.returncode == 0, said.decode()[-2000:]
    expected = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    for sign in (
        ".tmp-select-s/masks-0/*",
        ".tmp-select-s/masks-1/*",
        ".tmp-select-s/masks-2/*.copies",
        ".tmp-select-s/runs/*",
    ):
        kill_when(tmp_path, scores, sign)
    final = start_select(tmp_path, scores, "killed")
    _, said = final.communicate(timeout=200)
    assert final.returncode == 0, said.decode()[-2000:]
    assert {p.name: p.read_bytes() for p in (tmp_path / "killed").iterdir()} == expected
    assert set(expected) == {"s.npy", "s.json"}


def kill_when(folder: Path, scores: str, sign: str) -> None:
    """Start select and kill all its processes as soon as a file matches."""
    process = start_select(folder, scores, "killed")
    shutil.rmtree(folder / "killed" / ".tmp-select-s", ignore_errors=True)
    deadline = time.monotonic() + 100
    while not list((folder / "killed").glob(sign)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    assert process.poll() is None, f"it ended before {sign} was seen"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)


def test_parts_scored_with_different_settings_are_not_selected_from(tmp_path: Path) -> None:
    table = pa.table({"uid": [f"{n:032x}" for n in range(4)], "a": pa.array([0.1, 0.2, 0.3, 0.4], pa.float32())})
    scores = write_scores(tmp_path / "scores", {"0": table[:2], "1": table[2:]}, {"a": "of a"})
    for number in range(2):
        url = scores / "of a" / f"{number}.parquet"
        packed = {SCORE_FILTER: f'{{"settings": {number}}}', SCORE_INPUTS: "[]", SCORE_COUNTS: "{}", SCORE_POOL: "{}"}
        metadata = packed | {SCORE_IDENTITY: f"{number}"}
        pq.write_table(pq.read_table(url).replace_schema_metadata(metadata), url)
    with pytest.raises(StageError, match=r"'of a' .* different settings"):
        run_select(lambda: None, str(scores), "best", [], str(tmp_path / "subsets"))


def test_many_small_parts_in_random_order(tmp_path: Path) -> None:
    """More parts than a group: which part a row is in changes nothing."""
    scores = make_scores(tmp_path / "scores", 1000, parts=200)
    manifest = json.loads((tmp_path / "scores" / "manifest.json").read_text())
    random.Random(0).shuffle(manifest["facts"]["parts"])
    (tmp_path / "scores" / "manifest.json").write_text(json.dumps(manifest))
    step = Step(name="top", top=Top(by="clip_l14_similarity_score", fraction=0.123))
    few = make_scores(tmp_path / "few", 1000, parts=1)
    for place, out in ((scores, "a"), (few, "b")):
        run_select(lambda: None, place, "s", [step], str(tmp_path / out))
    assert (tmp_path / "a" / "s.npy").read_bytes() == (tmp_path / "b" / "s.npy").read_bytes()
