"""Mixtures, quotas, balancing and caps from a recipe to a subset and a report, over score files with lists."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from made_scores import write_scores

from jobs.select_subset import main as select
from pipeline.manifest import read_manifest
from pipeline.report import write_report
from pipeline.subset import read_subset
from pipeline.uid import UID_DTYPE, format_uids

NUM_ROWS = 3000
RECIPE = """
subsets:
  mixed: [{name: both, top: {mix: {clip: 0.5, logit: 0.5}, norm: minmax, fraction: 0.2}}]
  flat: [{name: flat, balance: {entries: words_entries, t: 90}}]
  dbp: [{name: quotas, quota: {cluster: near_cluster, distance: clip, isolation: logit, fraction: 0.3}}]
  soft: [{name: scs, soft_cap: {by: logit, fraction: 2.0, batch: 100}}, {name: twice, repeat: 2}]
  hard: [{name: hcs, hard_cap: {by: logit, fraction: 2.0, cap: 4}}]
"""


def make_scores(folder: Path) -> str:
    rng = np.random.default_rng(0)
    uids = np.zeros(NUM_ROWS, UID_DTYPE)
    uids["f0"] = rng.integers(0, 2**64, NUM_ROWS, dtype=np.uint64)
    lists = [np.unique(rng.geometric(0.1, rng.integers(0, 4))) for _ in range(NUM_ROWS)]
    columns = {
        "clip": pa.array(rng.random(NUM_ROWS), pa.float32()),
        "logit": pa.array(rng.normal(0, 1, NUM_ROWS), pa.float32()),
        "near_cluster": pa.array(rng.integers(0, 7, NUM_ROWS), pa.int32()),
        "words_entries": pa.array(lists, pa.list_(pa.int32())),
        "clip_img": pa.array(list(rng.random((NUM_ROWS, 2))), pa.list_(pa.float16())),
    }
    table = pa.table({"uid": format_uids(uids)} | columns)
    owners = {"clip": "clip", "clip_img": "clip", "logit": "flyt", "near_cluster": "near", "words_entries": "words"}
    return str(write_scores(folder, {"a": table[:1000], "b": table[1000:]}, owners))


def test_from_a_recipe_to_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores, out = make_scores(tmp_path / "scores"), tmp_path / "subsets"
    (tmp_path / "r.yaml").write_text(RECIPE)
    command = [str(tmp_path / "r.yaml"), "--scores", scores, "--out", str(out), "--explain"]
    assert select(command) == 0
    first, files = capsys.readouterr().out, {f.name: f.read_bytes() for f in out.glob("*.*")}
    sizes = {name: len(read_subset(str(out / f"{name}.npy"))) for name in ("mixed", "dbp", "soft", "hard")}
    assert sizes == {"mixed": 600, "dbp": 900, "soft": 12_000, "hard": 6000}
    found = {name: json.loads(files[f"{name}.json"])["facts"]["found"] for name in ("mixed", "dbp", "hard", "flat")}
    assert found["hard"] == {"hcs": {"draws": 6000, "most": 4}} and found["dbp"]["quotas"]["clusters"] == 7
    assert found["flat"]["flat"].keys() == {"entries", "frequent", "without_entry"}
    assert [len(numbers) for numbers in found["mixed"]["both"].values()] == [2, 2]
    assert "hard cap 200 % of pool by logit, at most 4 each, seed 0: draws 6,000, most 4" in first
    assert select([*command, "--fresh"]) == 0
    assert capsys.readouterr().out == first
    assert {f.name: f.read_bytes() for f in out.glob("*.*")} == files
    write_report(str(tmp_path))
    page = (tmp_path / "report.html").read_text()
    assert "draws 6,000, most 4" in page and "0.5 clip + 0.5 logit (minmax)" in page


def test_a_plain_subset_says_nothing_new(tmp_path: Path) -> None:
    """Its manifest has the bytes that it had before there were mixtures and caps."""
    recipe, out = tmp_path / "r.yaml", tmp_path / "subsets"
    recipe.write_text("subsets: {top: [{name: t, top: {by: clip, fraction: 0.1}}]}")
    assert select([str(recipe), "--scores", make_scores(tmp_path / "scores"), "--out", str(out)]) == 0
    manifest = read_manifest(str(out), name="top.json")
    assert manifest is not None
    top = {"by": "clip", "fraction": 0.1, "count": None, "of": "pool", "ties": "exact"}
    assert manifest.config == {"steps": [{"name": "t", "where": None, "top": top}]}
    assert manifest.facts.keys() == {"rows", "uids", "copies", "sha256", "thresholds"}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("balance: {entries: word_entries}", "did you mean 'words_entries'"),
        ("balance: {entries: clip}", "'clip' is float; balance needs lists of whole numbers"),
        ("balance: {entries: clip_img}", "unknown score column in step 's' 'clip_img'"),
        ("top: {by: words_entries, count: 1}", "'words_entries' holds lists, and top needs numbers"),
        ("top: {mix: {clip: 1, logits: 1}, norm: z, count: 1}", "did you mean 'logit'"),
        (
            "quota: {cluster: clip, distance: clip, isolation: clip, count: 1}",
            "'clip' is float; the clusters of a quota",
        ),
        ("soft_cap: {by: logi, count: 1}", "did you mean 'logit'"),
        ('where: "words_entries > 3"', "cannot be selected by"),
    ],
)
def test_columns_that_do_not_fit_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rule: str, message: str
) -> None:
    (tmp_path / "r.yaml").write_text(f"subsets: {{s: [{{name: s, {rule}}}]}}")
    places = ["--scores", make_scores(tmp_path / "scores"), "--out", str(tmp_path / "subsets")]
    assert select([str(tmp_path / "r.yaml"), *places]) == 2
    assert message in capsys.readouterr().err
