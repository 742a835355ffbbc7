"""Recipes of DataComp's baselines on a small metadata pool; tests/parity/datacomp.py runs DataComp's own code too."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.recipes import follow_fit, load_recipe
from jobs.run_recipe import main, run_recipe
from jobs.show_status import describe_run
from pipeline.errors import ConfigError
from pipeline.kmeans import FitConfig
from pipeline.subset import read_subset
from pipeline.uid import format_uids

NUM_ROWS, DIM = 40, 4
CAPTIONS = ("a brown dog runs on the green grass", "ein brauner Hund läuft über die grüne Wiese", "dog", None)


def make_metadata(folder: Path) -> Path:
    """Two files; row n has caption n % 4, score n / 100 (NaN for 39), and lies nearest to axis n % 3."""
    folder.mkdir()
    vectors = np.eye(DIM, dtype=np.float16)[np.arange(NUM_ROWS) % 3]
    scores = np.arange(NUM_ROWS, dtype=np.float32) / 100
    scores[-1] = np.nan
    table = pa.table(
        {
            "uid": [f"{n:032x}" for n in range(NUM_ROWS)],
            "text": [CAPTIONS[n % 4] for n in range(NUM_ROWS)],
            "clip_l14_similarity_score": scores,
        }
    )
    for number, rows in enumerate((slice(0, 25), slice(25, NUM_ROWS))):
        pq.write_table(table.slice(rows.start, rows.stop - rows.start), folder / f"{number}.parquet")
        np.savez(folder / f"{number}.npz", l14_img=vectors[rows], l14_txt=vectors[rows])
    return folder


def make_assets(folder: Path) -> list[str]:
    """Centroids on the axes, of which only the second is near a target."""
    np.save(folder / "centroids.npy", np.eye(3, DIM, dtype=np.float32))
    np.save(folder / "targets.npy", np.array([[0, 1, 0.1, 0]], np.float32))
    return [f"fit.in1k.centroids={folder}/centroids.npy", f"fit.in1k.targets={folder}/targets.npy"]


@pytest.mark.spark
def test_datacomp_1b_from_metadata_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pool, assets, out = make_metadata(tmp_path / "metadata"), make_assets(tmp_path), tmp_path / "out"
    words = [
        "datacomp-1b",
        "--pool",
        str(pool),
        "--out",
        str(out),
        "--until",
        "select",
        "--master",
        "local[1]",
        *assets,
    ]
    assert main(words) == 0
    # 30 % of 40 rows: index 12 of the descending sort is row 26, for the NaN of row 39 sorts last
    expected = [n for n in range(26, NUM_ROWS - 1) if n % 4 == 0 and n % 3 == 1]
    found = format_uids(read_subset(str(out / "subsets" / "datacomp_1b.npy"))).to_pylist()
    assert found == [f"{n:032x}" for n in expected] and expected
    lines = "\n".join(describe_run(str(out)))
    assert "fit in1k" in lines and "null_caption 10" in lines and "no_value 1" in lines
    capfd.readouterr()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.npy")}
    assert main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.npy")} == before
    assert "made again" not in capfd.readouterr().err


def test_files_that_a_fit_lacks_are_named_before_anything_is_scored(tmp_path: Path) -> None:
    recipe = load_recipe("datacomp-1b")
    with pytest.raises(ConfigError, match=r"no targets at 'in1k_clip.*fit\.in1k\.targets=PATH"):
        run_recipe(recipe, pool=str(tmp_path), out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["datacomp-image-based", "datacomp-1b"])
def test_a_filter_follows_its_fit(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, ["fit.in1k.assign=l2", "fit.in1k.embedding=b32_img"])
    entry = recipe.score[-1]
    assert (entry["assign"], entry["embedding"]) == ("l2", "b32_img")
    recipe = load_recipe(name)
    entry = recipe.score[-1]
    assert (entry["assign"], entry["embedding"]) == ("dot", "l14_img")
    with pytest.raises(ConfigError, match=r"needs the targets of fit 'in1k'\. Say fit\.in1k\.targets=PATH"):
        load_recipe(name, ["fit.in1k.targets=null"])
    entry = {"filter": "image_cluster", "fit": "in1k", "targets": "mine.npy"}
    assert follow_fit(entry, {"in1k": FitConfig(embedding="x")})["embedding"] == "x"
    with pytest.raises(ConfigError, match="has assign 'l2', and fit 'in1k' has 'dot'"):
        follow_fit(entry | {"assign": "l2"}, {"in1k": FitConfig(embedding="x")})


@pytest.mark.parametrize("what", ["centroids", "targets"])
def test_fresh_does_not_delete_what_a_fit_reads(tmp_path: Path, what: str) -> None:
    make_assets(tmp_path)
    (tmp_path / "out" / "fits").mkdir(parents=True)
    (tmp_path / "out" / "recipe.json").write_text("{}")
    mine = (tmp_path / f"{what}.npy").rename(tmp_path / "out" / "fits" / "mine.npy")
    recipe = load_recipe("datacomp-1b", [f"fit.in1k.targets={tmp_path}/targets.npy", f"fit.in1k.{what}={mine}"])
    with pytest.raises(ConfigError, match="that --fresh would delete"):
        run_recipe(recipe, pool=str(make_metadata(tmp_path / "metadata")), out=str(tmp_path / "out"), fresh=True)
    assert mine.exists()


INPUTS: dict[str, dict[str, Any]] = {
    "fine-tuning pairs": {"networks": {"dfn": {"finetune": {"sets": [{"pairs": "MINE"}], "train": {}}}}},
    "fine-tuning classes": {"networks": {"dfn": {"finetune": {"sets": [{"classes": "MINE"}], "train": {}}}}},
    "weights to start from": {"networks": {"dfn": {"init": "tiny@MINE"}}},
    "positives": {"fit": {"it": {"kind": "probe", "embedding": "l14_img", "positives": "MINE"}}},
    "a glob": {"fit": {"it": {"kind": "probe", "embedding": "l14_img", "positives": "GLOB"}}},
    "targets of a filter": {"score": [{"filter": "norm_sim", "embedding": "l14_img", "targets": "MINE"}]},
    "a text detector": {
        "score": [{"filter": "clip_score", "model": "ViT-B-32/openai", "view": "masked", "detector": "MINE"}]
    },
}


@pytest.mark.parametrize("what", list(INPUTS))
def test_fresh_does_not_delete_what_a_recipe_names(tmp_path: Path, what: str) -> None:
    out = tmp_path / "out"
    (out / "runs" / "a").mkdir(parents=True)
    (out / "recipe.json").write_text("{}")
    (out / "runs" / "a" / "mine.npy").write_text("")
    content: dict[str, Any] = copy.deepcopy(INPUTS[what])
    for network in content.get("networks", {}).values():
        network |= {"data": "clean", "train": {"model": "tiny", "samples": 64}}
    spelled = json.dumps(content).replace("MINE", f"{out}/runs/a/mine.npy").replace("GLOB", f"{out}/*/a/mine*")
    (tmp_path / "my.yaml").write_text(spelled)
    recipe = load_recipe(str(tmp_path / "my.yaml"))
    with pytest.raises(ConfigError, match="that --fresh would delete"):
        run_recipe(recipe, pool=str(tmp_path), out=str(out), fresh=True)
    assert (out / "runs" / "a" / "mine.npy").exists()
