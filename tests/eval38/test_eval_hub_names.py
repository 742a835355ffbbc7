"""What is asked of the hub: which repository holds a task, and which of its files are read."""

import pytest

from eval38.download import choose_files, plan_set, repo_of
from eval38.hub import Hub, HubFile
from eval38.tasks import TASKS, find_task
from pipeline.errors import ConfigError


def test_parquet_is_preferred_to_a_table() -> None:
    names = ["a.csv", "b.zip", "data/test-00000-of-00001.parquet", "data/train-00000-of-00001.parquet"]
    found = choose_files(find_task("misc/winogavil"), [HubFile(name, 1, "git", "0" * 40) for name in names])
    assert list(found) == ["test/test-00000-of-00001.parquet"]


def test_repositories_are_datacomps() -> None:
    repos = {task.key: repo_of(task) for task in TASKS}
    assert repos["vtab/caltech101"] == "djghosh/wds_vtab-caltech101_test"
    assert repos["fairness/dollar_street"] == "djghosh/wds_dollar_street_test"
    assert repos["misc/winogavil"] == "nlphuji/winogavil"
    assert len(set(repos.values())) == 40


def test_no_folder_is_not_the_root() -> None:
    with pytest.raises(ConfigError, match="--out '' should be a local folder"):
        plan_set(Hub("http://127.0.0.1:9"), find_task("mnist"), "")
