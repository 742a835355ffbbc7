"""winnow dfn evaluate: score measures against the definitions, the induced test against scipy, both resumable."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_scores import write_scores
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score
from toy import COLORS, render

from eval38.results import read_results
from filters import build_filter
from jobs.evaluate_dfn import main as evaluate_dfn
from jobs.recipes import Recipe, load_recipe
from jobs.stage_agreement import measure_scores
from jobs.stage_induced import compare_seeds, list_measures, run_induced
from pipeline.config import read_config
from pipeline.contract import Filter
from pipeline.errors import ConfigError, EvalError
from pipeline.manifest import Manifest, read_manifest, write_manifest
from pipeline.report import write_report
from pipeline.select import Step
from pipeline.target_aware import find_target_aware, is_target_aware, list_target_aware
from pipeline.tars import TarRow, make_member, write_rows

NUM, POOL = 400, 440
A, B, C = "a_similarity_score", "b_similarity_score", "caption_words"
KINDS = ("clean", "mismatched", "web")


def uid(n: int) -> str:
    return f"{(n * 0x9E3779B97F4A7C15F39CC0605CEDC835 + 5) % (1 << 128):032x}"


def make_columns() -> dict[str, list[Any]]:
    rng = np.random.default_rng(1)
    first = rng.normal(0, 1, NUM).round(1)
    second = (first + rng.normal(0, 1, NUM)).round(1)
    return {
        A: [None if n % 13 == 0 else float(v) for n, v in enumerate(first)],
        B: [math.nan if n % 17 == 0 else float(v) for n, v in enumerate(second)],
        C: rng.integers(0, 9, NUM).tolist(),
    }


@pytest.fixture
def scores(tmp_path: Path) -> str:
    columns = make_columns()
    types = {A: pa.float64(), B: pa.float64(), C: pa.int32()}
    table = pa.table({"uid": [uid(n) for n in range(NUM)]} | {c: pa.array(v, types[c]) for c, v in columns.items()})
    parts = {"0": table.slice(0, 150), "1": table.slice(150)}
    folder = str(write_scores(tmp_path / "scores", parts, {A: "a", B: "b", C: "length"}, num_pool=POOL))
    made = read_manifest(folder)
    assert made
    write_manifest(folder, replace(made, config={"filters": {"a": {"target_aware": True}, "b": {}, "length": {}}}))
    return folder


@pytest.fixture
def truth(tmp_path: Path) -> str:
    """Kinds of most rows, of a row that has no scores, and one row twice: its first line counts."""
    rows = [n for n in range(NUM + 1) if n % 9]
    lines = [(uid(n), KINDS[n % 3]) for n in rows] + [(uid(rows[0]), KINDS[(rows[0] + 1) % 3])]
    url = tmp_path / "truth.parquet"
    pq.write_table(pa.table({"uid": [u for u, _ in lines], "kind": [k for _, k in lines]}), url)
    return str(url)


def test_scores_against_the_truth_and_each_other(scores: str, truth: str) -> None:
    fractions = (0.1, 0.5, 1.0)
    found = measure_scores(scores, [A, B, C], truth=truth, right_kinds=["clean", "web"], fractions=fractions)
    columns = {name: np.array([math.nan if v is None else v for v in vs], float) for name, vs in make_columns().items()}
    known = {n for n in range(NUM) if n % 9}
    right = {n for n in known if KINDS[n % 3] != "mismatched"}
    assert (found["truth"]["rows_named"], found["truth"]["rows_right"]) == (len(known), len(right))

    def best(name: str, fraction: float) -> list[int]:
        rows = [n for n in range(NUM) if not math.isnan(columns[name][n])]
        return sorted(rows, key=lambda n: (-columns[name][n], uid(n)))[: math.floor(fraction * POOL + 1e-9)]

    for name, one in found["columns"].items():
        scored = [n for n in sorted(known) if not math.isnan(columns[name][n])]
        labels, values = [n in right for n in scored], columns[name][scored]
        assert one["truth"]["auroc"] == pytest.approx(roc_auc_score(labels, values))
        assert one["truth"]["average_precision"] == pytest.approx(average_precision_score(labels, values))
        assert one["null"] == int(np.isnan(columns[name]).sum()) and one["target_aware"] == (name == A)
        assert one["truth"]["right_without_score"] == sum(math.isnan(columns[name][n]) for n in right)
        for fraction, kept in zip(fractions, one["truth"]["kept"], strict=True):
            rows = best(name, fraction)
            hits = len(right.intersection(rows))
            assert kept["rows"] == len(rows) and kept["precision"] == hits / len(known.intersection(rows))
            assert kept["recall"] == hits / len(right)
    assert [(pair["first"], pair["second"]) for pair in found["pairs"]] == [(A, B), (A, C), (B, C)]
    for pair in found["pairs"]:
        one, two = columns[pair["first"]], columns[pair["second"]]
        both = ~(np.isnan(one) | np.isnan(two))
        assert pair["common_rows"] == both.sum()
        assert pair["spearman"] == pytest.approx(stats.spearmanr(one[both], two[both]).statistic)
        for fraction, shared in zip(fractions, pair["overlap"], strict=True):
            first, second = set(best(pair["first"], fraction)), set(best(pair["second"], fraction))
            assert shared["of_first"] == len(first & second) / len(first)
            assert shared["jaccard"] == len(first & second) / len(first | second)


def test_the_command_on_scores_alone(
    scores: str, truth: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--scores", scores, "--by", f"{A},{C}", "--truth", truth, "--right-kinds", "clean"]
    assert evaluate_dfn([*words, "--out", str(tmp_path / "one")]) == 0
    page = capsys.readouterr().out
    assert evaluate_dfn([*words, "--out", str(tmp_path / "two")]) == 0
    for name in ("evaluation.json", "evaluation.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert page == (tmp_path / "one/evaluation.md").read_text() and "Induced" not in page
    assert f"| {A} † |" in page and f"| {C} " in page and "† target-aware" in page
    found = json.loads((tmp_path / "one/evaluation.json").read_text())
    assert found["induced"] is None and str(tmp_path) not in json.dumps(found)
    assert [kept["fraction"] for kept in found["scores"]["columns"][A]["truth"]["kept"]] == [
        0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6,
    ]  # fmt: skip
    capsys.readouterr()
    assert evaluate_dfn(["--scores", scores, "--by", B, "--out", str(tmp_path / "one")]) == 0
    assert "truth" not in capsys.readouterr().out
    assert evaluate_dfn([*words, "--fractions", "0.005,0.125,0.29", "--out", str(tmp_path / "two")]) == 0
    assert "| 0.5 % | 12.5 % | 29 % |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--by", "a_similarity"], 2, "did you mean 'a_similarity_score'"),
        (["--by", f"{A},{A}"], 2, "is named twice"),
        (["--by", A, "--truth", "{truth}"], 2, "name the kinds that are right"),
        (["--by", A, "--truth", "{truth}", "--right-kinds", "Clean"], 2, "did you mean 'clean'"),
        (["--by", A, "--truth", "nowhere.parquet", "--right-kinds", "clean"], 1, "nowhere.parquet"),
        (["--by", A, "--truth", "{truth}", "--right-kinds", "clean", "--fractions", "1.5"], 2, "not in"),
        (["--by", A, "--fractions", "some"], 2, "--fractions 'some' should be numbers"),
        (["--by", A, "--fractions", ","], 2, "--fractions ',' should be numbers"),
        (["--by", A, "--fractions", "nan"], 2, "nan is not in"),
        (["--by", A, "--right-kinds", "clean"], 2, "say which with --truth"),
        (["dfn-tiny", "--by", A], 2, "recipe 'dfn-tiny' is for induced models"),
        (["dfn-tiny", "--pool", "p", "--eval-data", "e", "--truth", "{truth}"], 2, "name those with --by"),
        (["dfn-tiny", "--pool", "p", "--eval-data", "e", "--seeds", "inf"], 2, "should be whole numbers"),
        (["dfn-tiny", "--pool", "p", "--eval-data", "e", "--seeds", "0,-1"], 2, "should be whole numbers"),
        (["dfn-tiny", "--pool", "p", "--eval-data", "e", "--seeds", f"{2**63}"], 2, "seed is 9223372036854775808"),
        (["--by", A, "--scores", "nowhere"], 1, "holds no finished scores"),
        ([], 2, "say what to judge"),
        (["--pool", "pool"], 2, "need both --pool and --eval-data"),
        (["dfn-tiny", "--pool", "p", "--eval-data", "e", "--seeds", "0,1.5"], 2, "should be whole numbers"),
        (["dfn-tiny", "--pool", "p", "--eval-data", "e", "--seeds", "1,1"], 2, "should be different numbers"),
        (["dfn-tiny", "--pool", "p", "--eval-data", "e", "--subsets", "nne"], 2, "did you mean 'none'"),
        (
            ["dfn-tiny", "--pool", "p", "--eval-data", "e", "--subsets", "dfn"],
            2,
            "unknown subset to compare with 'none'",
        ),
        (["dfn-tiny", "--pool", "p", "--eval-data", "e", "--confidence", "95"], 2, "confidence 95.0"),
        (["dfn-tiny", "train=null", "--pool", "p", "--eval-data", "e"], 2, "does not train"),
    ],
)
def test_what_cannot_be_judged_says_why(
    scores: str,
    truth: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    message: str,
) -> None:
    named = [] if "--scores" in words else ["--scores", scores]
    given = [word.format(truth=truth) for word in words]
    assert evaluate_dfn([*given, *named, "--out", str(tmp_path / "out")]) == code
    assert message in capsys.readouterr().err and not (tmp_path / "out/evaluation.json").exists()


def test_scores_of_no_row_are_no_numbers(tmp_path: Path) -> None:
    empty = pa.table({"uid": pa.array([], pa.string()), A: pa.array([], pa.float32()), B: pa.array([], pa.float32())})
    folder = str(write_scores(tmp_path / "scores", {"0": empty}, {A: "a", B: "b"}))
    found = measure_scores(folder, [A, B])
    assert found["pairs"][0]["spearman"] is None and found["columns"][A]["rows"] == 0


def test_a_mark_reaches_what_reads_marked_scores() -> None:
    def make(name: str, needs: tuple[str, ...] = (), *, aware: bool = False) -> Filter:
        settings: dict[str, Any] = {"settings": {}, "load": lambda: None, "target_aware": aware}
        return Filter(name=name, needs=needs, makes=((f"{name}_s", pa.float32()),), version=1, **settings)

    filters = [make("a", aware=True), make("b"), make("mix", ("a_s", "b_s")), make("more", ("mix_s",))]
    assert list_target_aware(filters) == ["a", "mix", "more"] and list_target_aware(filters[1:2]) == []
    assert make("a", aware=True).identity == make("a").identity  # a mark decides no value
    owners = {f"{f.name}_s": f.name for f in filters}
    config = {"filters": {name: {"target_aware": True} for name in ("a", "mix")} | {"b": {}}}
    scored = Manifest(stage="score", config=config, parents={}, facts={"columns": owners})
    assert find_target_aware(scored) == {"a_s", "mix_s"}

    def aware(step: dict[str, Any]) -> bool:
        return is_target_aware([read_config(Step, {"name": "s"} | step, where="")], scored)

    assert aware({"top": {"by": "a_s", "count": 1}}) and not aware({"top": {"by": "b_s", "count": 1}})
    assert aware({"where": "b_s > 1 AND mix_s < 2"}) and not aware({"where": "b_s > 1 OR foreign = 'a_s'"})
    assert aware({"union": [[], [{"name": "in", "at_least": {"by": "a_s", "value": 0}}]]}) and not aware({"repeat": 2})
    assert aware({"balance": {"entries": "mix_s"}}) and not aware({"balance": {"entries": "b_s"}})


def test_a_score_entry_may_say_that_it_is_target_aware() -> None:
    entry = {"filter": "caption_length"}
    assert build_filter(entry | {"target_aware": True}).target_aware and not build_filter(entry).target_aware
    with pytest.raises(ConfigError, match="say true or false"):
        build_filter(entry | {"target_aware": "yes"})


def test_differences_are_paired_by_seed() -> None:
    values, base = [{"t": 0.50}, {"t": 0.61}, {"t": 0.55}], [{"t": 0.40}, {"t": 0.52}, {"t": 0.44}]
    found = compare_seeds(values, base, 0.9, is_baseline=False)["t"]
    mean, half = found["difference_and_half_width"]
    low, high = stats.t.interval(0.9, 2, np.mean([0.10, 0.09, 0.11]), stats.sem([0.10, 0.09, 0.11]))
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert found["mean_and_half_width"][1] > 4 * half  # what seeds share is no part of the difference
    assert compare_seeds(base, base, 0.9, is_baseline=True)["t"]["difference_and_half_width"] is None


def test_tasks_that_some_model_lacks_are_not_compared() -> None:
    def make(**values: float | None) -> Manifest:
        tasks = {k: {"name": k.upper(), "value": v, "counted": k != "own"} for k, v in values.items()}
        return Manifest(stage="eval", config={}, parents={}, facts={"tasks": tasks})

    assert list_measures([make(a=0.1, own=0.2), make(a=0.3, own=0.1)]) == {"a": "A", "own": "OWN"}
    assert list(list_measures([make(a=0.1, b=0.2, c=0.1), make(a=0.3, b=0.1, c=None)])) == ["average", "a", "b"]
    with pytest.raises(EvalError, match="nothing to compare"):
        list_measures([make(a=0.1), make(a=None)])


TRAIN = {"model": "winnow-vit-tiny", "samples": 64, "batch_size": 32, "warmup_steps": 2}
RECIPE = {
    "networks": {"half": {"data": "pool", "train": TRAIN}},
    "score": [
        {"filter": "caption_length"},
        {"filter": "clip_score", "name": "half", "model": "network:half", "target_aware": True},
    ],
    "subsets": {
        "none": [],
        "half": [{"name": "top", "top": {"by": "half_similarity_score", "fraction": 0.5}}],
        "twice": [{"name": "again", "repeat": 2}],
    },
    "shards": {"rows_per_shard": 20},
    "train": TRAIN,
    "eval": {"own": ["colors"]},
}


def write_task(folder: Path) -> None:
    task = folder / "wds_colors_test"
    (task / "test").mkdir(parents=True)
    (task / "classnames.txt").write_text("".join(f"{c}\n" for c in COLORS))
    (task / "zeroshot_classification_templates.txt").write_text("a {c} square\n")
    (task / "test/nshards.txt").write_text("1")
    images = [(f"{n}", render(list(COLORS)[n % 4], 900 + n), str(n % 4).encode()) for n in range(16)]
    rows = [TarRow(key, (make_member(f"{key}.jpg", i), make_member(f"{key}.cls", c))) for key, i, c in images]
    with (task / "test/0.tar").open("wb") as file:
        write_rows(file, rows)


@pytest.mark.spark
def test_the_induced_test(make_pool: Any, tmp_path: Path, spark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pool, out = make_pool(32), tmp_path / "out"
    write_task(tmp_path / "eval")
    (tmp_path / "small.yaml").write_text(json.dumps(RECIPE))
    words = [
        str(tmp_path / "small.yaml"),
        "--pool",
        str(pool),
        "--eval-data",
        str(tmp_path / "eval"),
        "--out",
        str(out),
    ]
    words += ["--seeds", "0,5", "--subsets", "none,half,none", "--by", "half_similarity_score,caption_words"]
    assert evaluate_dfn(words) == 0
    page, first = capsys.readouterr().out, (out / "evaluation.json").read_bytes()
    found = json.loads(first)["induced"]
    assert found["samples_seen"] == 64 and found["measures"] == {"colors": "colors"}
    none, half = found["subsets"]
    assert (none["rows"], half["rows"], none["own"], half["epochs"]) == (32, 16, None, 4.0)
    assert half["target_aware"] and not none["target_aware"] and "| half † |" in page and "Agreement" in page
    for one in (none, half):
        folders = [out / "induced" / one["subset"] / f"seed-{seed}" for seed in (0, 5)]
        values = [read_results(str(f / "eval"))["colors"]["metrics"]["main_metric"] for f in folders]
        assert one["measures"]["colors"]["values"] == values
        made = [read_manifest(str(f / "run")) for f in folders]
        assert [m.config["seed"] for m in made if m] == [0, 5] and all(
            m and m.facts["samples_seen"] == 64 for m in made
        )
    own = read_results(str(out / "eval/network-half"))["colors"]["metrics"]["main_metric"]
    assert half["own"] == {"colors": own}
    a, b = (one["measures"]["colors"]["values"] for one in (half, none))
    mean, width = half["measures"]["colors"]["difference_and_half_width"]
    assert mean == pytest.approx(np.mean(np.subtract(a, b)))
    assert width == pytest.approx(stats.t.ppf(0.975, 1) * stats.sem(np.subtract(a, b)))
    assert "half †" in write_report(str(out)) or "half †" in (out / "report.html").read_text()

    times = {p: p.stat().st_mtime_ns for p in out.rglob("checkpoint.pt")}
    lost = out / "induced/half/seed-5"
    shutil.rmtree(lost)
    assert evaluate_dfn(words) == 0 and (out / "evaluation.json").read_bytes() == first
    again = {p: p.stat().st_mtime_ns for p in out.rglob("checkpoint.pt")}
    assert {p for p in times if again[p] != times[p]} == {lost / "run/checkpoint.pt"} and len(times) == 5


@pytest.mark.spark
def test_copies_count_as_such(make_pool: Any, tmp_path: Path, spark: Any) -> None:
    write_task(tmp_path / "eval")
    recipe: Recipe = replace(read_config(Recipe, {"name": "r"} | RECIPE, where=""), networks={})
    recipe = replace(recipe, score=recipe.score[:1])
    places = {"pool": str(make_pool(16)), "eval_data": str(tmp_path / "eval"), "out": str(tmp_path / "out")}
    found = run_induced(recipe, **places, seeds=[3], baseline="none", subsets=["none", "twice"])
    none, twice = found["subsets"]
    assert (twice["rows"], twice["copies"], twice["epochs"], none["epochs"]) == (16, 32, 2.0, 4.0)
    assert twice["measures"]["colors"]["difference_and_half_width"][1] is None  # one seed tells no interval


def test_the_built_in_recipe_can_be_evaluated() -> None:
    assert "none" in load_recipe("dfn-tiny").subsets
