"""Fits that are no k-means, through the stage and the verbs: what they read, reruns, kills, and chains of them."""

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from made_embeddings import draw, draw_uids, write_metadata
from toy import COLORS, render, toy_row, write_part

import jobs.stage_fit
from filters import build_filter
from jobs.fit_pool import main as fit
from jobs.fit_source import Rows, open_scores
from jobs.recipes import list_ready, load_recipe
from jobs.run_recipe import main as run
from jobs.run_recipe import naming_those_that_wait
from jobs.stage_fit import fit_rows, warn_if_other
from pipeline.clip_model import open_model
from pipeline.errors import ConfigError, PoolError
from pipeline.gather import gather_rows
from pipeline.manifest import Counts, Manifest, read_manifest
from pipeline.norm_sim_d import NormSimDConfig, fit_survivors, sum_moment
from pipeline.probe import ProbeConfig
from pipeline.semdedup import DedupConfig
from pipeline.subset import read_subset
from pipeline.uid import format_uids, sort_uids

UIDS, VECTORS = draw_uids(300), draw(300)
VECTORS[50:60] = VECTORS[40:50]
KINDS: dict[str, dict[str, Any]] = {
    "semdedup": {"clusters": 5, "iterations": 3},
    "norm_sim_d": {"rounds": 7},
    "probe": {"negatives": 100},
}
FILES = {"semdedup": ["centroids.npy", "table.npy"], "norm_sim_d": ["table.npy"], "probe": ["probe.npz"]}


def write_recipe(folder: Path, kind: str, **options: Any) -> str:
    np.save(folder / "clean.npy", draw(80, seed=3))
    places = {"positives": str(folder / "clean.npy")} if kind == "probe" else {}
    recipe = {"fit": {"it": {"kind": kind, "embedding": "l14_img"} | KINDS[kind] | places | options}}
    (folder / "my.yaml").write_text(yaml.safe_dump(recipe))
    return str(folder / "my.yaml")


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_pools_npz_becomes_a_filter(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    pool, out = write_metadata(tmp_path / "pool", UIDS, VECTORS), tmp_path / "fits" / "it"
    words = [write_recipe(tmp_path, kind), "--pool", str(pool), "--out", str(out.parent)]
    assert fit(words) == 0
    made = read_manifest(str(out))
    assert made and made.config["kind"] == kind and made.counts["rows"].read == 300
    assert sorted(p.name for p in out.iterdir()) == sorted([*FILES[kind], "ledger.json", "manifest.json"])
    told = {"semdedup": "10 to drop at eps 0.001", "norm_sim_d": "kept 60", "probe": "auroc 0."}
    assert f"fit it: {'5 clusters' if kind == 'semdedup' else ''}" in (printed := capsys.readouterr().out)
    assert told[kind] in printed
    place = {"weights": "probe.npz"} if kind == "probe" else {"table": "table.npy"}
    entry = {"filter": kind, **{option: str(out / file) for option, file in place.items()}}
    filter = build_filter(entry | ({"embedding": "l14_img"} if kind == "probe" else {}))
    columns = {"uid": format_uids(UIDS), "l14_img": pa.FixedSizeListArray.from_arrays(pa.array(VECTORS.ravel()), 16)}
    scored = filter.load()(pa.RecordBatch.from_pydict(columns))
    assert not scored.failures and not any(column.null_count for column in scored.columns)
    before = {file: (out / file).read_bytes() for file in FILES[kind]}
    times = [(out / file).stat().st_mtime_ns for file in FILES[kind]]
    assert fit(words) == 0
    assert [(out / file).stat().st_mtime_ns for file in FILES[kind]] == times
    assert fit([*words, "--fresh"]) == 0
    assert {file: (out / file).read_bytes() for file in FILES[kind]} == before
    assert [(out / file).stat().st_mtime_ns for file in FILES[kind]] != times


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_order_of_parts_does_not_matter(tmp_path: Path, kind: str) -> None:
    half = (
        write_metadata(tmp_path / "a", UIDS[:150], VECTORS[:150]),
        write_metadata(tmp_path / "b", UIDS[150:], VECTORS[150:]),
    )
    made = []
    for number, folders in enumerate(itertools.permutations(half)):
        recipe = write_recipe(tmp_path, kind, **({"first": "rows"} if kind == "norm_sim_d" else {}))
        pool = "::".join(map(str, folders))
        assert fit([recipe, "--pool", pool, "--out", str(tmp_path / str(number))]) == 0
        made.append([(tmp_path / str(number) / "it" / file).read_bytes() for file in FILES[kind]])
    assert made[0] == made[1]


def test_another_kind_leaves_nothing_of_the_last(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pool, out = write_metadata(tmp_path / "pool", UIDS, VECTORS), tmp_path / "fits"
    for kind in ("semdedup", "probe", "norm_sim_d"):
        assert fit([write_recipe(tmp_path, kind), "--pool", str(pool), "--out", str(out)]) == 0
        assert sorted(p.name for p in (out / "it").glob("*.np*")) == FILES[kind]
    assert "config.kind changed from probe to norm_sim_d" in caplog.text


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_fit_made_by_other_choices_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    pool, recipe = write_metadata(tmp_path / "pool", UIDS, VECTORS), write_recipe(tmp_path, kind)
    assert fit([recipe, "--pool", str(pool), "--out", str(tmp_path / "fits")]) == 0
    made = read_manifest(str(tmp_path / "fits" / "it"))
    assert made
    warn_if_other("it", load_recipe(recipe).fit["it"], made)
    assert not caplog.text
    warn_if_other("it", load_recipe(recipe, ["fit.it.embedding=b32_img"]).fit["it"], made)
    assert "fit it was made with embedding 'l14_img', and the recipe says 'b32_img'" in caplog.text


def test_other_positives_are_another_probe(tmp_path: Path) -> None:
    pool, out = write_metadata(tmp_path / "pool", UIDS, VECTORS), tmp_path / "fits"
    words = [write_recipe(tmp_path, "probe"), "--pool", str(pool), "--out", str(out)]

    def go() -> bytes:
        assert fit(words) == 0
        return (out / "it" / "probe.npz").read_bytes()

    first = go()
    os.utime(tmp_path / "clean.npy", (1, 1))
    assert go() == first
    np.save(tmp_path / "clean.npy", draw(80, seed=4))
    assert go() != first


def test_a_kill_leaves_no_manifest_and_the_next_run_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each write of a file in turn the process ends, as far as the folder can tell."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    config = DedupConfig(embedding="x", clusters=5, iterations=3)

    def go(folder: Path) -> list[bytes]:
        fit_rows(lambda: Rows([(UIDS, VECTORS)]), config, str(folder), parents={"pool": "x"})
        return [(folder / file).read_bytes() for file in (*FILES["semdedup"], "manifest.json")]

    wanted = go(whole)
    write = jobs.stage_fit.write_atomic
    for last in range(3):
        left = iter(range(last))

        def killed(url: str, left: Any = left) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return write(url)

        monkeypatch.setattr(jobs.stage_fit, "write_atomic", killed)
        if last < 2:
            with pytest.raises(KeyboardInterrupt):
                go(out)
            assert not (out / "manifest.json").exists()
    monkeypatch.setattr(jobs.stage_fit, "write_atomic", write)
    assert go(out) == wanted
    (out / "table.npy").write_bytes(wanted[1][:-1])
    assert go(out) == wanted


def test_norm_sim_d_starts_from_the_whole_pool_and_takes_a_share_of_it(tmp_path: Path) -> None:
    """The first moment is of rows that the steps left out, too; the share is of the pool, not of the steps' rows."""
    kept = np.arange(0, 300, 3)
    rows = Rows([(UIDS[kept], VECTORS[kept])], pool=lambda: [(UIDS, VECTORS)])
    made = fit_rows(lambda: rows, NormSimDConfig(embedding="x", count=60, rounds=9), str(tmp_path), parents={})
    total_DD, number = sum_moment([VECTORS])
    with gather_rows([(UIDS[kept], VECTORS[kept])]) as gathered:
        wanted = fit_survivors(gathered, 60, 9, total_DD / number)
        other = fit_survivors(gathered, 60, 9)
    table = np.load(tmp_path / "table.npy")
    np.testing.assert_array_equal(table, wanted)
    assert (wanted["round"] != other["round"]).any()
    assert (made.facts["wanted"], made.facts["kept"], made.facts["rounds"]) == (60, 60, 8)
    assert made.counts["rows"] == Counts(read=100, kept=100)


def test_rows_without_a_vector_are_counted(tmp_path: Path) -> None:
    vectors, uids = VECTORS.copy(), UIDS.copy()
    vectors[0], vectors[1], uids[3] = np.nan, 0, uids[2]
    for config in (DedupConfig(embedding="x", clusters=5), NormSimDConfig(embedding="x", first="rows")):
        out = str(tmp_path / config.kind)
        made = fit_rows(lambda: Rows([(uids, vectors)]), config, out, parents={})
        failed = {"missing_embedding": 2}
        assert made.counts["rows"] == Counts(read=300, kept=297, dropped={"repeated_uid": 1}, failed=failed)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("semdedub", {}, "unknown kind of fit 'it' 'semdedub': did you mean 'semdedup'?"),
        ("semdedup", {"cluster": 3}, "unknown field of recipe.fit.it 'cluster': did you mean 'clusters'"),
        ("semdedup", {"keep": "best"}, "recipe.fit.it.keep: Input should be 'hard', 'easy' or 'random'"),
        ("semdedup", {"rows": [{"name": "a", "where": "x > 1"}]}, "say where these are (--scores)"),
        ("norm_sim_d", {"count": 3, "fraction": 0.1}, "give either fraction or count"),
        ("probe", {"positives": "/no.npy"}, "no positives at '/no.npy'"),
        ("probe", {"embedding": ["l14_img", "b32_img"]}, "positives of 32 numbers and pool rows of 18"),
    ],
)
def test_wrong_wishes_are_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, options: Any, message: str
) -> None:
    KINDS.setdefault("semdedub", {})
    pool = write_metadata(tmp_path / "pool", UIDS, VECTORS)
    assert fit([write_recipe(tmp_path, kind, **options), "--pool", str(pool), "--out", str(tmp_path / "fits")]) == 2
    del KINDS["semdedub"]
    assert message in capsys.readouterr().err


def test_a_probe_of_columns_that_are_not_in_one_place() -> None:
    scored = Manifest(stage="score", config={}, parents={}, facts={"columns": {"clip_img": "clip"}})
    with pytest.raises(ConfigError, match=r"\['clip_img'\] are scores, and \['l14_img'\] are not"):
        open_scores("scores", scored, ["clip_img", "l14_img"])
    assert open_scores("scores", scored, ["l14_img"]) is None


def test_entries_say_which_fit_they_read(tmp_path: Path) -> None:
    recipe: dict[str, Any] = {"fit": {"a": {"kind": "probe", "embedding": ["i", "t"], "positives": "p.npy"}}}

    def load(**entry: Any) -> Any:
        (tmp_path / "my.yaml").write_text(yaml.safe_dump(recipe | {"score": [entry]}))
        return load_recipe(str(tmp_path / "my.yaml"))

    assert load(filter="probe", fit="a").score == [{"filter": "probe", "fit": "a", "embedding": ["i", "t"]}]
    assert load(filter="probe", fit="a").fit["a"] == ProbeConfig(embedding=["i", "t"], positives="p.npy")
    with pytest.raises(ConfigError, match="fit 'a' is of kind 'probe', for filter 'probe'"):
        load(filter="semdedup", fit="a")
    with pytest.raises(ConfigError, match="has embedding 'i', and fit 'a' has"):
        load(filter="probe", fit="a", embedding="i")
    with pytest.raises(ConfigError, match="unknown fit 'b'"):
        load(filter="probe", fit="b")


def test_the_rows_of_a_fit_may_use_a_subset(tmp_path: Path) -> None:
    steps = [{"name": "long", "where": "caption_words > 2"}]
    near = {"kind": "semdedup", "embedding": "i", "rows": [{"name": "start", "use": "clean"}]}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump({"subsets": {"clean": steps}, "fit": {"near": near}}))
    ((start,), subsets) = (recipe := load_recipe(str(tmp_path / "my.yaml"))).fit["near"].rows, recipe.subsets
    assert (start.name, start.use, start.cascade) == ("start", None, subsets["clean"])
    near["rows"] = [{"name": "start", "use": "claen"}]
    (tmp_path / "my.yaml").write_text(yaml.safe_dump({"subsets": {"clean": steps}, "fit": {"near": near}}))
    with pytest.raises(ConfigError, match="did you mean 'clean'"):
        load_recipe(str(tmp_path / "my.yaml"))


def test_filters_wait_for_their_own_fit_alone() -> None:
    entries = [{"filter": "x"}, {"filter": "semdedup", "fit": "a"}, {"filter": "probe", "name": "p", "fit": "b"}]
    assert list_ready(entries, ["a"]) == entries[:2]
    explained = (
        r"unknown 'p_score'. Filter 'p' waits for fit 'b', which is not made before fit 'a'. .* waits for itself"
    )
    with pytest.raises(ConfigError, match=explained), naming_those_that_wait("a", entries, entries[:2]):
        raise ConfigError("unknown 'p_score'.")
    with pytest.raises(PoolError, match=r"^no 'q_score'$"), naming_those_that_wait("a", entries, entries[:2]):
        raise PoolError("no 'q_score'")


def make_chain(folder: Path) -> list[str]:
    """A pool of 16 pictures, each twice, and a recipe whose second fit reads the scores of the first one's filter."""
    rows = [toy_row(n) for n in range(32)]
    images: dict[str, bytes | None] = {row["key"]: render(list(COLORS)[n % 4], n % 16) for n, row in enumerate(rows)}
    for part in range(2):
        write_part(folder / "pool", f"{part:08d}", rows[16 * part : 16 * part + 16], images)
    torch.manual_seed(0)
    torch.save(open_model("winnow-vit-tiny").model.state_dict(), folder / "clip.pt")
    np.save(folder / "clean.npy", draw(20, open_model("winnow-vit-tiny").model.visual.output_dim))
    recipe = {
        "fit": {
            "near": {"kind": "semdedup", "embedding": "clip_img", "clusters": 2},
            "core": {
                "kind": "norm_sim_d",
                "embedding": "clip_img",
                "rows": [{"name": "one of each", "where": "dedup_similarity < 0.999999"}],
                "fraction": 0.25,
            },
            "clean": {"kind": "probe", "embedding": ["clip_img"], "positives": str(folder / "clean.npy")},
        },
        "score": [
            {"filter": "norm_sim_d", "name": "nsd", "fit": "core"},
            {"filter": "clip_score", "name": "clip", "model": f"winnow-vit-tiny@{folder / 'clip.pt'}"},
            {"filter": "semdedup", "name": "dedup", "fit": "near"},
            {"filter": "probe", "fit": "clean"},
        ],
        "subsets": {
            "unique": [{"name": "one of each", "where": "dedup_similarity < 0.999999"}],
            "core": [{"name": "kept", "where": "nsd_kept"}],
            "last": [{"name": "last", "top": {"by": "nsd_round", "count": 8}}],
            "clean": [{"name": "half", "top": {"by": "probe_score", "fraction": 0.5}}],
        },
    }
    (folder / "my.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return [str(folder / "my.yaml"), "--pool", str(folder / "pool"), "--master", "local[1]", "--until", "select"]


@pytest.mark.spark
def test_a_run_makes_fits_that_need_fits(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words, out = make_chain(tmp_path), tmp_path / "out"
    assert run([*words, "--out", str(out)]) == 0
    subsets = {name: read_subset(str(out / "subsets" / f"{name}.npy")) for name in ("unique", "core", "last", "clean")}
    number = {row["uid"]: n for n, row in enumerate(map(toy_row, range(32)))}
    kept = {name: {number[uid] for uid in format_uids(uids).to_pylist()} for name, uids in subsets.items()}
    assert len(kept["unique"]) == 16 and {n % 16 for n in kept["unique"]} == set(range(16))
    assert len(kept["core"]) == 8 and kept["core"] == kept["last"] < kept["unique"]
    assert len(kept["clean"]) == 16
    made = read_manifest(str(out / "fits" / "core"))
    assert made and made.counts["rows"] == Counts(read=16, kept=16) and made.config["count"] == 8
    table = np.load(out / "fits" / "core" / "table.npy")
    np.testing.assert_array_equal(sort_uids(table[["f0", "f1"]].astype("u8,u8")), subsets["unique"])
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.np[yz]")}
    capfd.readouterr()
    assert run([*words, "--out", str(out)]) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.np[yz]")} == before
    assert "made again" not in capfd.readouterr().err
