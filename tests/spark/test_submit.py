"""The jobs on clusters: Spark standalone and local-cluster, by spark-submit and by the plain verbs.

What proves that winnow's code is shipped: the executors' Python has no winnow (conftest.py checks that), so a task that
runs at all has it from the zip, and a probe says where from.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pyspark
import pytest
from toy import render, toy_row, write_part

from jobs.recipes import load_recipe
from jobs.stage_score import run_score
from jobs.stage_select import run_select
from jobs.stage_shards import run_shards
from jobs.zip_code import write_zip
from pipeline.manifest import read_manifest

SHORT_PARTS, SLOW_ROWS = 10, 2000
ROOT = Path(__file__).parent.parent.parent
SUBMIT = Path(pyspark.__file__).parent / "bin" / "spark-submit"
RECIPE = """
score: [{{filter: caption_length}}, {{filter: image_size}}, {{filter: clip_score, model: "{model}", device: cpu}}]
subsets:
  odd: [{{name: words, where: "caption_words + 0 > 2"}}, {{name: top, top: {{by: image_min_side_px, fraction: 0.25}}}}]
shards: {{rows_per_shard: 3}}
"""
PROBE = """
import json, os, sys
from pipeline.spark import run_each
from pipeline.spark_session import open_session

def look(number):
    import pipeline.score
    from pyspark import SparkFiles
    found = {"file": os.path.abspath(pipeline.score.__file__), "root": os.path.abspath(SparkFiles.getRootDirectory())}
    return found | {"endpoint": os.environ.get("AWS_ENDPOINT_URL")}

with open_session(sys.argv[1] if sys.argv[1:] else None) as session:
    print(json.dumps({"found": run_each(session, look, range(4), what="probe", quiet=True), "path": sys.path}))
"""

SPECULATION = """spark.speculation true
spark.speculation.interval 50ms
spark.speculation.multiplier 1.01
spark.speculation.quantile 0.1
spark.speculation.efficiency.enabled false
"""

pytestmark = pytest.mark.spark


def run(place: Any, command: list[str], **environment: str) -> str:
    """Run a driver from a folder that holds nothing of winnow, and return what it printed."""
    done = subprocess.run(
        command,
        cwd=place.folder,
        env=place.environment | environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def submit(place: Any, master: str, job: Path, *words: str) -> str:
    """Run one file by spark-submit; the driver's Python has no winnow either."""
    write_zip(str(place.folder / "code.zip"))
    (place.folder / job.name).write_bytes(job.read_bytes())
    command = [str(SUBMIT), "--master", master, "--py-files", "code.zip", job.name]
    return run(place, [*command, *words], PYSPARK_DRIVER_PYTHON=place.environment["PYSPARK_PYTHON"])


def submit_stages(place: Any, master: str, recipe: Path, pool: Path, out: Path) -> None:
    """Score, select and write shards, each by its own spark-submit."""
    jobs, subset = ROOT / "jobs", out / "subsets" / "odd.npy"
    where = ["--pool", str(pool)]
    submit(place, master, jobs / "score_pool.py", str(recipe), *where, "--out", str(out / "scores"))
    submit(
        place,
        master,
        jobs / "select_subset.py",
        str(recipe),
        "--scores",
        str(out / "scores"),
        "--out",
        str(out / "subsets"),
    )
    submit(
        place,
        master,
        jobs / "write_shards.py",
        str(recipe),
        *where,
        "--subset",
        str(subset),
        "--out",
        str(out / "shards"),
    )


def run_stages(session: Any, recipe: Path, pool: Path, out: Path) -> None:
    """The same three stages in this process, on the session of the tests, local[2]."""
    chosen = load_recipe(str(recipe), [])
    run_score(lambda: session, str(pool), chosen.score, str(out / "scores"), quiet=True)
    run_select(lambda: session, str(out / "scores"), "odd", chosen.subsets["odd"], str(out / "subsets"))
    subset = str(out / "subsets" / "odd.npy")
    run_shards(lambda: session, str(pool), subset, chosen.shards, str(out / "shards"), quiet=True)


def files_of(folder: Path) -> dict[str, bytes]:
    """Path -> bytes of everything under a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def recipe(tmp_path: Path, tiny_clip: str) -> Path:
    path = tmp_path / "toy.yaml"
    path.write_text(RECIPE.format(model=tiny_clip))
    return path


def test_jobs_on_a_standalone_cluster(
    standalone: Any, spark: Any, recipe: Path, make_pool: Callable[..., Path], tmp_path: Path
) -> None:
    pool, local, cluster = make_pool(32, 4), tmp_path / "local", tmp_path / "cluster"
    run_stages(spark, recipe, pool, local)
    submit_stages(standalone, standalone.master, recipe, pool, cluster)
    assert files_of(cluster) == files_of(local)
    manifest = read_manifest(str(cluster / "shards"))
    assert manifest and manifest.facts["rows"] == 8
    score, _, shards = standalone.executors_of_tasks(3)
    assert score == shards == {"0", "1"}, "both workers did tasks"


def test_a_plain_verb_ships_its_code(
    standalone: Any, spark: Any, make_pool: Callable[..., Path], tmp_path: Path
) -> None:
    (standalone.folder / "probe.py").write_text(PROBE)
    pool, local, cluster = make_pool(32, 4), tmp_path / "local", tmp_path / "cluster"
    recipe = tmp_path / "cheap.yaml"
    recipe.write_text("score: [{filter: caption_length}, {filter: image_size}]")
    score = ["-m", "jobs", "score", str(recipe), "--pool", str(pool), "--out", str(cluster)]
    run(standalone, [sys.executable, *score, "--master", standalone.master])
    run_score(lambda: spark, str(pool), load_recipe(str(recipe), []).score, str(local), quiet=True)
    assert files_of(cluster) == files_of(local)
    probe = [sys.executable, "probe.py", standalone.master]
    said = json.loads(run(standalone, probe, AWS_ENDPOINT_URL="http://127.0.0.1:9"))
    for found in said["found"]:
        assert found["file"] == f"{found['root']}/winnow.zip/pipeline/score.py"
        assert str(standalone.folder) in found["root"], "the worker's own folder"
        assert found["endpoint"] == "http://127.0.0.1:9"
    assert not [path for path in said["path"] if path.endswith(".zip") and "winnow" in path]
    assert standalone.executors_of_tasks(2) == [{"0", "1"}] * 2


@pytest.mark.slow
def test_jobs_on_a_local_cluster(
    spark_site: Any, spark: Any, recipe: Path, make_pool: Callable[..., Path], tmp_path: Path
) -> None:
    pool, local, cluster = make_pool(32, 4), tmp_path / "local", tmp_path / "cluster"
    run_stages(spark, recipe, pool, local)
    submit_stages(spark_site, "local-cluster[2,1,1024]", recipe, pool, cluster)
    assert files_of(cluster) == files_of(local)
    score, _, shards = spark_site.executors_of_tasks(3)
    assert score == shards == {"0", "1"}


@pytest.mark.slow
def test_two_attempts_of_one_task_at_once_leave_the_same_bytes(
    standalone: Any, spark: Any, recipe: Path, tmp_path: Path
) -> None:
    """The last part takes far longer than most: when they are done, Spark starts it a second time elsewhere."""
    pool, local, cluster, conf = (tmp_path / name for name in ("pool", "local", "cluster", "conf"))
    numbers = count()
    for part, num_rows in enumerate([*[2] * SHORT_PARTS, SLOW_ROWS]):
        rows = [toy_row(next(numbers)) for _ in range(num_rows)]
        write_part(pool, f"{part:08d}", rows, {row["key"]: render("red") for row in rows})
    conf.mkdir()
    defaults = (standalone.folder / "conf" / "spark-defaults.conf").read_text()
    (conf / "spark-defaults.conf").write_text(defaults + SPECULATION)
    words = ["score", str(recipe), "--pool", str(pool), "--out", str(cluster), "--master", standalone.master]
    run(standalone, [sys.executable, "-m", "jobs", *words], SPARK_CONF_DIR=str(conf))
    run_score(lambda: spark, str(pool), load_recipe(str(recipe), []).score, str(local), quiet=True)
    assert files_of(cluster) == files_of(local)
    started = standalone.tasks_of(standalone.logs()[-1], "SparkListenerTaskStart")
    assert any(task["Speculative"] for task in started)
