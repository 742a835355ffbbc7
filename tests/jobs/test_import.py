"""`winnow import` as a user starts it: on Spark, and its mistakes."""

import subprocess
import sys
from pathlib import Path

import pytest
from toy import render

from pipeline.manifest import read_manifest
from pipeline.pool import list_parts, read_part

ROOT = Path(__file__).parent.parent.parent


def run_import(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs", "import", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.spark
def test_folder_of_images_becomes_a_pool_on_spark(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for n in range(5):
        (tmp_path / "photos" / f"{n}.jpg").write_bytes(render("red", n))
        (tmp_path / "photos" / f"{n}.txt").write_text(f"picture {n}" if n else "")
    packed = str(tmp_path / "packed")
    words = ["--images", str(tmp_path / "photos"), "--out", packed, "--rows-per-tar", "2", "--master", "local[2]"]
    done = run_import(*words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{'null_caption':24s}{1:12,}" in done.stdout
    manifest = read_manifest(packed, name="import.json")
    assert manifest and (manifest.counts["rows"].read, manifest.counts["rows"].kept) == (5, 4)
    again = run_import(*words, "--master", "local[no such thing]")
    assert again.returncode == 0, "what is done starts no Spark"
    captions = [text for part in list_parts(packed) for text in read_part(part).table["text"].to_pylist()]
    assert captions == ["picture 1", "picture 2", "picture 3", "picture 4"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--tars", "nowhere"], 1, "'nowhere' does not exist"),
        (["--images", "."], 1, "which is left as it is"),
        ([], 2, "one of the arguments --tars --images is required"),
    ],
)
def test_mistakes_are_explained(words: list[str], code: int, message: str) -> None:
    done = run_import(*words, "--out", "./pool")
    assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr
