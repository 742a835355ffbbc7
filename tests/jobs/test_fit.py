"""The fit stage and its verb: a pool's npz or stored scores -> centroids and targets; reruns, accounts."""

import itertools
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from made_embeddings import draw, draw_uids, write_metadata

from filters import build_filter
from jobs.fit_kinds import FIT_KINDS
from jobs.fit_pool import main as fit
from jobs.fit_source import Rows
from jobs.score_pool import main as score
from jobs.stage_fit import fit_rows, run_fit
from pipeline.contract import Filter
from pipeline.errors import ConfigError, PoolError, StageError
from pipeline.kmeans import FitConfig, fit_centroids, is_sampled
from pipeline.manifest import Counts, Manifest, read_manifest, write_manifest
from pipeline.nearest import assign, place_centroids
from pipeline.pool import Part
from pipeline.schemas import ROW
from pipeline.score_files import write_scores
from pipeline.uid import format_uids

UIDS, VECTORS = draw_uids(900), draw(900)


KMEANS_IDENTITY = "d72d61e6e9c9827e0fe8566a8c6a641a5ad1645627f6ae41f062a60d11448169"
"""Of a fit made before there were other kinds: it is not made again."""


def write_recipe(folder: Path, **config: Any) -> str:
    recipe = {"fit": {"small": {"embedding": "l14_img", "clusters": 20, "iterations": 5} | config}}
    (folder / "my.yaml").write_text(yaml.safe_dump(recipe))
    return str(folder / "my.yaml")


def save_targets(folder: Path) -> str:
    torch.save({"image_features": torch.from_numpy(draw(6, seed=7))}, folder / "in1k.pt")
    return str(folder / "in1k.pt")


def test_a_pools_npz_becomes_a_filter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool = write_metadata(tmp_path / "pool", UIDS, VECTORS)
    recipe = write_recipe(tmp_path, sample=0.5, targets=save_targets(tmp_path))
    words = [recipe, "--pool", str(pool), "--out", str(tmp_path / "fits")]
    assert fit(words) == 0
    made = read_manifest(str(tmp_path / "fits" / "small"))
    chosen = is_sampled(UIDS, 0.5, 0)
    num = int(chosen.sum())
    assert made and made.counts["rows"] == Counts(read=900, kept=num, dropped={"sample": 900 - num})
    assert made.counts["targets"] == Counts(read=6, kept=6)
    centroid_KD = np.load(tmp_path / "fits" / "small" / "centroids.npy")
    config = FitConfig(embedding="l14_img", clusters=20, iterations=5)
    np.testing.assert_array_equal(centroid_KD, fit_centroids(VECTORS[chosen], config).centroid_KD)
    ids = np.load(tmp_path / "fits" / "small" / "targets.npy")
    wanted = assign(draw(6, seed=7), place_centroids(centroid_KD, "dot")).id_N
    np.testing.assert_array_equal(ids, np.unique(wanted))
    assert f"20 clusters of 16 numbers, {len(ids)} of them targets" in capsys.readouterr().out
    places = {name: str(tmp_path / "fits" / "small" / f"{name}.npy") for name in ("centroids", "targets")}
    filter = build_filter({"filter": "image_cluster", "embedding": "l14_img", **places})
    rows = pa.RecordBatch.from_pydict({"l14_img": pa.FixedSizeListArray.from_arrays(pa.array(VECTORS.ravel()), 16)})
    cluster, inside = (column.to_numpy(zero_copy_only=False) for column in filter.load()(rows).columns)
    np.testing.assert_array_equal(inside, np.isin(cluster, ids))
    assert 0 < inside.sum() < 900
    assert sorted(p.name for p in (tmp_path / "fits" / "small").iterdir()) == [
        "centroids.npy",
        "ledger.json",
        "manifest.json",
        "targets.npy",
    ]


def write_filters(folder: Path, columns: Mapping[str, pa.Array], **versions: int) -> str:
    """Scores of 900 rows in three parts, one filter per column of the same name, as `winnow score` leaves them."""
    common: dict[str, Any] = {"needs": (), "settings": {}, "load": list}
    makes = {
        name: Filter(name=name, makes=((name, column.type),), version=versions.get(name, 1), **common)
        for name, column in columns.items()
    }
    pool = {"counts": asdict(Counts(read=300, kept=300)), "broken": None}
    for number, (name, column) in itertools.product(range(3), columns.items()):
        rows = slice(300 * number, 300 * number + 300)
        uids = pa.array(format_uids(UIDS[rows]))
        table = pa.table({ROW: pa.array(range(300), pa.int32()), "uid": uids, name: column[rows]})
        part = Part(f"{number:08d}", None, None)
        write_scores(str(folder), part, makes[name], [table], Counts(read=300, kept=300), pool, [])
    facts = {"columns": {name: name for name in columns}, "types": {n: str(c.type) for n, c in columns.items()}}
    facts |= {"parts": [f"{n:08d}" for n in range(3)], "broken": {}}
    config = {"filters": {name: {"version": f.version} for name, f in makes.items()}}
    counts = {name: Counts(read=900, kept=900) for name in ("pool", *columns)}
    parents = {"pool": f"all that {sorted(columns)} read"}
    made = Manifest(stage="score", config=config, parents=parents, counts=counts, facts=facts)
    write_manifest(str(folder), made)
    return str(folder)


VECTOR_COLUMN = pa.FixedSizeListArray.from_arrays(pa.array(VECTORS.ravel()), 16)
WORDS = pa.array([3] * 900)


def test_a_score_is_clustered_and_other_scores_do_not_matter(tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path, embedding="clip_img"), tmp_path / "fits"

    def go(folder: str, columns: Mapping[str, pa.Array], **versions: int) -> int:
        scores = write_filters(tmp_path / folder, columns, **versions)
        assert fit([recipe, "--scores", scores, "--out", str(out)]) == 0
        return (out / "small" / "centroids.npy").stat().st_mtime_ns

    first = go("one", {"clip_img": VECTOR_COLUMN})
    assert go("two", {"clip_img": VECTOR_COLUMN, "caption_words": WORDS}) == first
    assert go("three", {"clip_img": VECTOR_COLUMN}, clip_img=2) > first
    config = FitConfig(embedding="clip_img", clusters=20, iterations=5)
    wanted = fit_centroids(VECTORS, config).centroid_KD
    np.testing.assert_array_equal(np.load(out / "small" / "centroids.npy"), wanted)
    assert fit([recipe, "--scores", str(tmp_path), "--out", str(out)]) == StageError.exit_code


def test_a_pool_that_was_touched_is_not_clustered_again(tmp_path: Path) -> None:
    pool, out = write_metadata(tmp_path / "pool", UIDS, VECTORS), tmp_path / "fits" / "small"
    words = [write_recipe(tmp_path), "--pool", str(pool), "--out", str(out.parent)]

    def go() -> tuple[int, int]:
        assert fit(words) == 0
        return (out / "centroids.npy").stat().st_mtime_ns, (out / "ledger.json").stat().st_mtime_ns

    first = go()
    assert go() == first
    for file in pool.iterdir():
        os.utime(file, (1, 1))
    touched = go()
    assert touched[0] == first[0] and touched[1] > first[1]
    np.savez(pool / "00000001.npz", l14_img=VECTORS[300:600][::-1])
    assert go()[0] > first[0]


@pytest.mark.parametrize("fault", ["no npz", "no parquet", "cut npz"])
def test_a_part_that_cannot_be_read_is_left_out(tmp_path: Path, fault: str) -> None:
    pool, out = write_metadata(tmp_path / "pool", UIDS, VECTORS), tmp_path / "fits"
    words = [write_recipe(tmp_path), "--pool", str(pool), "--out", str(out)]
    for number in ("00000001", "00000000", "00000002"):
        file = pool / f"{number}.{'parquet' if fault == 'no parquet' else 'npz'}"
        if fault == "no npz":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:99])
        assert fit(words) == (PoolError.exit_code if number == "00000002" else 0)
        made = read_manifest(str(out / "small"))
        if number == "00000001":
            assert made and list(made.facts["broken"]) == [number]
            assert made.counts["rows"] == Counts(read=600, kept=600)
            wanted = fit_centroids(VECTORS[np.r_[:300, 600:900]], FitConfig(embedding="x", clusters=20, iterations=5))
            np.testing.assert_array_equal(np.load(out / "small" / "centroids.npy"), wanted.centroid_KD)
    assert made is None


def test_a_part_that_was_not_scored_is_left_out(tmp_path: Path) -> None:
    scores = write_filters(tmp_path / "scores", {"clip_img": VECTOR_COLUMN})
    whole = read_manifest(scores)
    assert whole
    write_manifest(scores, replace(whole, facts={**whole.facts, "parts": ["00000000"], "broken": {"00000001": "cut"}}))
    made = run_fit(no_session, FitConfig(embedding="clip_img", clusters=20), str(tmp_path / "out"), scores=scores)
    assert made.counts["rows"] == Counts(read=300, kept=300) and made.facts["broken"] == {"00000001": "cut"}


def no_session() -> Any:
    raise AssertionError("no Spark is needed")


def test_rules_over_scores_say_which_rows_are_clustered(tmp_path: Path) -> None:
    pool = str(write_metadata(tmp_path / "pool", UIDS, VECTORS))
    scores = write_filters(tmp_path / "scores", {"caption_words": WORDS})
    half = {"name": "half", "top": {"by": "caption_words", "fraction": 0.5}}  # equal scores, so the smaller uids
    recipe = write_recipe(tmp_path, rows=[half])
    assert fit([recipe, "--pool", pool, "--scores", scores, "--out", str(tmp_path / "fits")]) == 0
    kept = np.isin(np.arange(900), np.lexsort((UIDS["f1"], UIDS["f0"]))[:450])
    config = FitConfig(embedding="l14_img", clusters=20, iterations=5)
    centroid_KD = np.load(tmp_path / "fits" / "small" / "centroids.npy")
    np.testing.assert_array_equal(centroid_KD, fit_centroids(VECTORS[kept], config).centroid_KD)
    made = read_manifest(str(tmp_path / "fits" / "small"))
    assert made and made.counts["rows/half"] == Counts(read=900, kept=450, dropped={"half": 450})
    assert made.counts["rows"] == Counts(read=450, kept=450)

    def go(columns: Mapping[str, pa.Array], **versions: int) -> list[int]:
        write_filters(tmp_path / "scores", columns, **versions)
        assert fit([recipe, "--pool", pool, "--scores", scores, "--out", str(tmp_path / "fits")]) == 0
        files = [tmp_path / "fits" / "small" / name for name in ("rows.npy", "centroids.npy")]
        return [file.stat().st_mtime_ns for file in files]

    first = go({"caption_words": WORDS})
    assert go({"caption_words": WORDS, "cluster": WORDS}) == first
    again = go({"caption_words": WORDS}, caption_words=2)
    assert again[0] > first[0] and again[1] == first[1]  # the same rows are the same embeddings


def test_published_centroids_need_no_pool(tmp_path: Path) -> None:
    centroid_KD = draw(30, seed=1, dtype=np.float32)
    torch.save(centroid_KD, tmp_path / "small.pt", pickle_protocol=4)
    recipe = write_recipe(tmp_path, centroids=str(tmp_path / "small.pt"), targets=save_targets(tmp_path))
    assert fit([recipe, "--out", str(tmp_path / "fits")]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "fits" / "small" / "centroids.npy"), centroid_KD)
    ids = np.load(tmp_path / "fits" / "small" / "targets.npy")
    np.testing.assert_array_equal(ids, np.unique((draw(6, seed=7).astype(np.float32) @ centroid_KD.T).argmax(1)))


def test_other_targets_with_the_centroids_that_are_there(tmp_path: Path) -> None:
    pool, out = write_metadata(tmp_path / "pool", UIDS, VECTORS), tmp_path / "fits" / "small"
    assert fit([write_recipe(tmp_path), "--pool", str(pool), "--out", str(tmp_path / "fits")]) == 0
    before = (out / "centroids.npy").read_bytes()
    recipe = write_recipe(tmp_path, centroids=str(out / "centroids.npy"), targets=save_targets(tmp_path))
    for _ in range(2):
        assert fit([recipe, "--out", str(tmp_path / "fits")]) == 0
        assert (out / "centroids.npy").read_bytes() == before and len(np.load(out / "targets.npy"))


@pytest.mark.parametrize(
    ("words", "config", "code", "message"),
    [
        ([], {}, 2, "say where its rows are (--pool)"),
        (["--pool", "POOL"], {"rows": [{"name": "a", "where": "x > 1"}]}, 2, "say where these are (--scores)"),
        (["--pool", "POOL"], {"rows": [{"name": "a"}]}, 2, "it has none"),
        (["--pool", "POOL"], {"clusters": 901}, 2, "901 clusters cannot be made of 900 embeddings"),
        (["--pool", "POOL"], {"embedding": "l14_im"}, 1, "no column 'l14_im'"),
        (["--pool", "POOL"], {"targets": "/no.pt"}, 2, "no targets at '/no.pt'"),
        (["--pool", "POOL"], {"centroids": "/no.npy"}, 2, "no centroids at '/no.npy'"),
        (["--pool", "POOL"], {"embeding": "x"}, 2, "unknown field of recipe.fit.small 'embeding'"),
        (["--pool", "POOL"], {"levels": 3}, 2, "levels"),
    ],
)
def test_wrong_wishes_are_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], config: Any, code: int, message: str
) -> None:
    pool = write_metadata(tmp_path / "pool", UIDS, VECTORS)
    words = [str(pool) if word == "POOL" else word for word in words]
    assert fit([write_recipe(tmp_path, **config), *words, "--out", str(tmp_path / "fits")]) == code
    assert message in capsys.readouterr().err


def test_a_recipe_without_a_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(["datacomp-basic", "--out", str(tmp_path)]) == ConfigError.exit_code
    assert "its `fit` section is empty" in capsys.readouterr().err


def test_scores_that_all_wait_for_a_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {"fit": {"a": {"embedding": "l14_img", "targets": "t.npy"}}}
    recipe |= {"score": [{"filter": "image_cluster", "fit": "a"}]}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(recipe))
    words = [str(tmp_path / "my.yaml"), "--pool", str(tmp_path), "--out", str(tmp_path / "scores")]
    assert score(words) == ConfigError.exit_code
    assert "Run `winnow fit` with --out FITS" in capsys.readouterr().err


def test_rows_that_steps_left(tmp_path: Path) -> None:
    """What a rule kept comes in as it is, with the rule's account."""
    vectors = VECTORS[:300].copy()
    vectors[5] = np.nan
    rule = Counts(read=900, kept=300, dropped={"english": 600})
    rows = Rows(iter([(UIDS[:100], vectors[:100]), (UIDS[100:300], vectors[100:])]), {"english": rule})
    config = FitConfig(embedding="l14_img", clusters=10, levels=2)
    made = fit_rows(lambda: rows, config, str(tmp_path), parents={"pool": "x"})
    assert made.counts == {"english": rule, "rows": Counts(read=300, kept=299, failed={"missing_embedding": 1})}
    whole = np.delete(vectors, 5, axis=0)
    centroid_KD = np.load(tmp_path / "centroids.npy")
    np.testing.assert_array_equal(centroid_KD, fit_centroids(whole, config).centroid_KD)
    assert 0 < made.facts["mean_squared_distance"] < 1 and not (tmp_path / "targets.npy").exists()
    assert made.identity == KMEANS_IDENTITY


def test_a_rerun_makes_again_what_changed_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []

    def open_rows() -> Rows:
        opened.append(1)
        return Rows([(UIDS, VECTORS)])

    def go(**config: Any) -> int:
        wanted = FitConfig(**{"embedding": "l14_img", "clusters": 10, "iterations": 2, **config})
        fit_rows(open_rows, wanted, str(tmp_path / "out"), parents={"pool": "x"}, fresh=fresh)
        return len(opened)

    fresh = False
    targets = save_targets(tmp_path)
    assert [go(), go(), go(targets=targets), go(targets=targets)] == [1, 1, 1, 1]  # centroids do not depend on targets
    anew = FitConfig(embedding="l14_img", clusters=10, iterations=2, targets=targets)
    whole = fit_rows(lambda: Rows([(UIDS, VECTORS)]), anew, str(tmp_path / "anew"), parents={"pool": "x"})
    assert read_manifest(str(tmp_path / "out")) == whole
    Path(targets).rename(tmp_path / "moved.pt")
    assert go(targets=str(tmp_path / "moved.pt")) == 1
    first, ids = ((tmp_path / "out" / f"{name}.npy").read_bytes() for name in ("centroids", "targets"))
    (tmp_path / "out" / "targets.npy").write_bytes(b"cut")
    assert go(targets=str(tmp_path / "moved.pt")) == 1 and (tmp_path / "out" / "targets.npy").read_bytes() == ids
    assert go() == 1 and not (tmp_path / "out" / "targets.npy").exists()
    (tmp_path / "out" / "centroids.npy").write_bytes(b"cut")
    assert go(targets=str(tmp_path / "moved.pt")) == 2
    assert (tmp_path / "out" / "centroids.npy").read_bytes() == first
    assert go(seed=1) == 3 and (tmp_path / "out" / "centroids.npy").read_bytes() != first
    monkeypatch.setitem(FIT_KINDS, "kmeans", replace(FIT_KINDS["kmeans"], version=2))
    assert [go(seed=1), go(seed=1)] == [4, 4]
    fresh = True
    assert go(seed=1) == 5
