"""Recipes of the later filters on a small pool of captions and stored embeddings."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_embeddings import draw, draw_uids

from jobs.recipes import load_recipe
from jobs.run_recipe import run_recipe
from pipeline.manifest import Manifest, read_manifest
from pipeline.select import find_columns
from pipeline.subset import read_subset
from pipeline.uid import format_uids, parse_uids

NUM, TWINS = 60, 10
ENDINGS = ("_similarity_score", "_score")
CAPTIONS = (
    "a brown dog runs on the green grass",
    "the cat sleeps on a warm chair",
    "ein Hund läuft über die Wiese",
    None,
)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two parts of NUM rows; the image vectors of the last TWINS rows are those of the first."""
    folder = tmp_path_factory.mktemp("pool")
    uids, image_ND, text_ND = draw_uids(NUM), draw(NUM), draw(NUM, seed=1)
    image_ND[-TWINS:] = image_ND[:TWINS]
    scores = np.linspace(0, 1, NUM, dtype=np.float32)
    for number, rows in enumerate(np.split(np.arange(NUM), [35])):
        columns = {"uid": format_uids(uids[rows]), "text": [CAPTIONS[n % 4] for n in rows]}
        table = pa.table(columns | {"clip_l14_similarity_score": scores[rows]})
        pq.write_table(table, folder / f"{number}.parquet")
        np.savez(folder / f"{number}.npz", l14_img=image_ND[rows], l14_txt=text_ND[rows])
    np.save(folder.parent / "targets.npy", draw(9, seed=2))
    return folder


def select(name: str, pool: Path, out: Path, *overrides: str) -> tuple[Manifest, np.ndarray]:
    """Return the only subset of a recipe, run up to its selection."""
    recipe = load_recipe(name, overrides)
    run_recipe(recipe, pool=str(pool), out=str(out), until="select", master="local[1]")
    (subset,) = recipe.subsets
    made = read_manifest(str(out / "subsets"), name=f"{subset}.json")
    assert made
    return made, read_subset(str(out / "subsets" / f"{subset}.npy"))


def read_column(out: Path, filter: str, column: str) -> dict[int, Any]:
    """Return uid -> score of all parts."""
    table = pa.concat_tables(pq.read_table(file) for file in sorted((out / "scores" / filter).glob("*.parquet")))
    return dict(zip(map(tuple, parse_uids(table["uid"])), table[column].to_pylist(), strict=True))


def top(scores: dict[int, Any], number: int) -> set[Any]:
    return set(sorted(scores, key=lambda uid: -scores[uid])[:number])


@pytest.mark.spark
def test_neg_clip_loss_then_norm_sim_are_shares_of_the_pool(pool: Path, tmp_path: Path) -> None:
    targets = f"score.1.targets={pool.parent}/targets.npy"
    _, kept = select("neg-clip-loss-norm-sim", pool, tmp_path / "out", targets)
    ncl = read_column(tmp_path / "out", "ncl", "ncl_score")
    near = read_column(tmp_path / "out", "norm_sim", "norm_sim_score")
    first = top(ncl, 18)
    assert set(map(tuple, kept.tolist())) == {tuple(map(int, uid)) for uid in top({u: near[u] for u in first}, 12)}


@pytest.mark.spark
def test_norm_sim_d_starts_from_neg_clip_loss(pool: Path, tmp_path: Path) -> None:
    made, kept = select("norm-sim-d", pool, tmp_path / "out", "fit.nsd.rounds=3")
    first = {tuple(map(int, uid)) for uid in top(read_column(tmp_path / "out", "ncl", "ncl_score"), 18)}
    assert len(kept) == 12 and set(map(tuple, kept.tolist())) < first
    assert made.counts["kept"].read == 18


@pytest.mark.spark
def test_semdedup_drops_a_twin_before_quotas_count(pool: Path, tmp_path: Path) -> None:
    words = ("fit.duplicates.clusters=1", "fit.duplicates.levels=1", "fit.density.clusters=3")
    made, kept = select("semdedup-quotas", pool, tmp_path / "out", *words)
    assert (made.counts["deduplicated"].kept, len(kept)) == (NUM - TWINS, 12)


@pytest.mark.spark
def test_metaclip_keeps_english_captions_with_words_of_wordnet(pool: Path, tmp_path: Path) -> None:
    made, kept = select("metaclip", pool, tmp_path / "out")
    assert len(kept) == NUM // 2 and made.counts["english"].kept == NUM // 2


COLUMNS = ("dfn_similarity_score", "hype_score", "ncl_score", "norm_sim_score")


@pytest.mark.parametrize("name", ["dfn", "dfn-public", "soft-cap", "dfn-union-hype"])
def test_recipes_of_networks_read_columns_that_their_filters_make(name: str) -> None:
    recipe = load_recipe(name)
    made = {f"{entry.get('name', entry['filter'])}{end}" for entry in recipe.score for end in ENDINGS}
    made |= {column for entry in recipe.score for column in entry.get("columns", ())}
    for steps in recipe.subsets.values():
        assert set(find_columns(steps, COLUMNS)) <= made
