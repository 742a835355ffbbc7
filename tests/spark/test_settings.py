"""What the user tells Spark goes before what winnow would have."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.spark_session import _list_chosen, _settings

LOOK = """
import json
from pipeline.spark_session import open_session
with open_session("local[1]") as session:
    beans = session._jvm.java.lang.management.ManagementFactory.getGarbageCollectorMXBeans()
    found = {"gc": [bean.getName() for bean in beans]}
    found["heap"] = session._jvm.java.lang.Runtime.getRuntime().maxMemory() >> 20
    found |= {name: session.conf.get(name) for name in ("spark.sql.shuffle.partitions", "spark.sql.session.timeZone")}
    print(json.dumps(found))
"""
DEFAULTS = """# mine
spark.driver.memory 600m
  spark.sql.shuffle.partitions=7
spark.sql.session.timeZone America/New_York
"""


@pytest.fixture
def submit_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "spark-defaults.conf").write_text(DEFAULTS)
    words = "--conf 'spark.driver.extraJavaOptions=-XX:+UseParallelGC' pyspark-shell"
    monkeypatch.setenv("SPARK_CONF_DIR", str(tmp_path))
    monkeypatch.setenv("PYSPARK_SUBMIT_ARGS", words)
    monkeypatch.delenv("SPARK_ENV_LOADED", raising=False)
    return words


def test_what_the_user_chose_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, submit_words: str) -> None:
    in_file = {"spark.driver.memory", "spark.sql.shuffle.partitions", "spark.sql.session.timeZone"}
    assert _list_chosen() == {*in_file, "spark.driver.extraJavaOptions"}
    settings = _settings("local[2]", _list_chosen())
    assert settings["spark.sql.session.timeZone"] == "UTC" and settings["spark.ui.enabled"] == "false"
    assert not settings.keys() & {"spark.driver.memory", "spark.driver.extraJavaOptions"}
    (tmp_path / "other.conf").write_text("spark.ui.enabled true")
    monkeypatch.setenv("PYSPARK_SUBMIT_ARGS", f"--driver-memory 1g --properties-file {tmp_path}/other.conf")
    assert _list_chosen() == {"spark.driver.memory", "spark.ui.enabled"}
    monkeypatch.setenv("SPARK_CONF_DIR", str(tmp_path / "absent"))
    monkeypatch.delenv("PYSPARK_SUBMIT_ARGS")
    assert _list_chosen() == set() and _settings("local[2]", set())["spark.driver.memory"] == "2g"


@pytest.mark.spark
def test_the_jvm_has_what_the_user_chose(submit_words: str) -> None:
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=True, env=os.environ)
    found = json.loads(done.stdout)
    assert 500 < found["heap"] < 601 and all(name.startswith("PS ") for name in found["gc"])
    assert (found["spark.sql.shuffle.partitions"], found["spark.sql.session.timeZone"]) == ("7", "UTC")
