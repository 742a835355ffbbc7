"""docs/SELECT.md does what it says: every recipe in it is run, and the trees printed there are what comes out."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from made_scores import write_scores

from jobs.select_subset import main as select
from pipeline.uid import UID_DTYPE, format_uids

DOCS = Path(__file__).parents[2] / "docs" / "SELECT.md"
NUM_ROWS = 10_000


def make_table() -> pa.Table:
    """Invented rows: similarities with a common part, 1 in 100 without a score, 1 in 20 of the user's own data."""
    rng = np.random.default_rng(0)
    uids = np.zeros(NUM_ROWS, UID_DTYPE)
    uids["f0"], uids["f1"] = rng.integers(0, 2**64, (2, NUM_ROWS), dtype=np.uint64)
    quality = rng.normal(0, 1, NUM_ROWS)

    def score(mean: float, spread: float) -> pa.Array:
        values = mean + spread * (quality + rng.normal(0, 1, NUM_ROWS)) / 2**0.5
        return pa.array(values.astype(np.float16).astype(np.float32), mask=rng.random(NUM_ROWS) < 0.01)

    similarities = {name: score(0.24, 0.05) for name in ("clip_b32", "clip_l14", "dfn", "masked")}
    others = {name: score(0, 1) for name in ("ncl_l14", "normsim_inf", "hype", "sieve")}
    columns = {f"{name}_similarity_score": values for name, values in similarities.items()} | others
    columns |= {"itm": score(60, 20), "odf": score(25, 15)}
    columns |= {"caption_language": pa.array(rng.choice(["en", "de", "fr"], NUM_ROWS, p=[0.5, 0.3, 0.2]))}
    columns |= {"caption_words": pa.array(rng.integers(0, 20, NUM_ROWS), pa.int32())}
    columns |= {"near_imagenet": pa.array(rng.random(NUM_ROWS) < 0.4)}
    columns |= {"source": pa.array(rng.choice(["own", "commonpool"], NUM_ROWS, p=[0.05, 0.95]))}
    return pa.table({"uid": format_uids(uids)} | columns | make_joint_columns(quality, rng))


def make_joint_columns(quality: np.ndarray, rng: np.random.Generator) -> dict[str, pa.Array]:
    """Scores of another filter, ten clusters of unlike size and spread, and lists of entries, few of them frequent."""
    cluster, num_entries = np.minimum(rng.geometric(0.2, NUM_ROWS) - 1, 9), rng.integers(0, 6, NUM_ROWS)
    entries = np.minimum(rng.geometric(0.05, num_entries.sum()), 99)
    lists = [np.unique(some) for some in np.split(entries, np.cumsum(num_entries)[:-1])]
    return {
        "flyt_score": pa.array(quality + rng.normal(0, 1, NUM_ROWS), pa.float32(), mask=rng.random(NUM_ROWS) < 0.01),
        "dedup_cluster": pa.array(cluster, pa.int32()),
        "dedup_distance": pa.array(rng.beta(2 + cluster, 9), pa.float32()),
        "dedup_isolation": pa.array(0.3 + cluster / 20, pa.float32()),
        "dedup_similarity": pa.array(rng.beta(9, 2, NUM_ROWS), pa.float32()),
        "metaclip_entries": pa.array(lists, pa.list_(pa.int32())),
    }


def read_blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", DOCS.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.spark
def test_recipes_of_the_docs_give_the_trees_of_the_docs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = make_table()
    scores = write_scores(tmp_path / "scores", {"a": table}, dict.fromkeys(table.column_names[1:], "all"))
    recipes, trees = read_blocks("yaml"), read_blocks("text")
    assert len(recipes) == len(trees) == 3
    for recipe, tree in zip(recipes, trees, strict=True):
        (tmp_path / "docs.yaml").write_text(recipe)
        assert select([str(tmp_path / "docs.yaml"), "--scores", str(scores), "--explain", "--master", "local[2]"]) == 0
        assert capsys.readouterr().out == tree + "\n"
