"""The jobs as spark-submit targets, with winnow's code shipped as code.zip."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pyspark
import pytest

from jobs.zip_code import write_zip
from pipeline.java import find_java
from pipeline.manifest import read_manifest

ROOT = Path(__file__).parent.parent.parent
RECIPE = """
score: [{filter: caption_length}, {filter: image_size}]
subsets: {odd: [{name: words, where: "caption_words > 2"}, {name: top, top: {by: image_min_side_px, fraction: 0.25}}]}
shards: {rows_per_shard: 3}
"""

pytestmark = pytest.mark.spark


def submit(folder: Path, master: str, job: str, *words: str) -> None:
    """Run one job by spark-submit, from a folder that holds nothing of winnow but code.zip and the job's file."""
    home = Path(pyspark.__file__).parent
    write_zip(str(folder / "code.zip"))
    (folder / "toy.yaml").write_text(RECIPE)
    (folder / f"{job}.py").write_bytes((ROOT / "jobs" / f"{job}.py").read_bytes())
    command = [
        str(home / "bin" / "spark-submit"),
        "--master",
        master,
        "--py-files",
        "code.zip",
        f"{job}.py",
        "toy.yaml",
    ]
    environment = os.environ | {"SPARK_HOME": str(home), "JAVA_HOME": find_java().home}
    environment |= {"PYSPARK_PYTHON": sys.executable, "PYTHONPATH": ""}
    done = subprocess.run(
        [*command, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def test_score_on_a_cluster_of_two_executors(make_pool: Callable[..., Path], tmp_path: Path) -> None:
    pool, out = make_pool(32, 4), str(tmp_path / "scores")
    submit(tmp_path, "local-cluster[2,1,1024]", "score_pool", "--pool", str(pool), "--out", out)
    manifest = read_manifest(out)
    assert manifest and manifest.counts["caption_length"].kept == 32


@pytest.mark.slow
@pytest.mark.parametrize("master", ["local[2]", "local-cluster[2,1,1024]"])
def test_score_select_and_shards(master: str, make_pool: Callable[..., Path], tmp_path: Path) -> None:
    pool, out = str(make_pool(32, 4)), str(tmp_path / "out")
    submit(tmp_path, master, "score_pool", "--pool", pool, "--out", f"{out}/scores")
    submit(tmp_path, master, "select_subset", "--scores", f"{out}/scores", "--out", f"{out}/subsets")
    subset = f"{out}/subsets/odd.npy"
    submit(tmp_path, master, "write_shards", "--pool", pool, "--subset", subset, "--out", f"{out}/shards")
    manifest = read_manifest(f"{out}/shards")
    assert manifest and manifest.facts["rows"] == 8
    kept = [key for n in range(3) for key in pq.read_table(f"{out}/shards/{n:08d}.parquet")["key"].to_pylist()]
    assert kept == [f"{n:09d}" for n in range(24, 32)]
