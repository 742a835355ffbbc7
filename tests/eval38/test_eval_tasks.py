import json
from collections import Counter
from pathlib import Path

import pytest

from eval38.config import EvalConfig
from eval38.tasks import NUM_COUNTED, TASKS, find_task, folder_of, own_task
from pipeline.config import read_config
from pipeline.errors import ConfigError

DATACOMP = json.loads((Path(__file__).parent / "datacomp_tasklist.json").read_text())["tasks"]


def test_table_is_datacomps() -> None:
    """Every fact of DataComp's tasklist.yml, in its order."""
    ours = [(t.key, t.name, t.images, t.classes, t.random_baseline) for t in TASKS]
    theirs = [(t["key"], t["name"], t["size"], t["num_classes"], t["random_score"]) for t in DATACOMP]
    assert ours == theirs
    for task, row in zip(TASKS, DATACOMP, strict=True):
        assert task.metric == (row["main_metric"] or "acc1" if task.counted else None)


def test_numbers_of_tasks() -> None:
    assert len(TASKS) == len({task.key for task in TASKS}) == len({folder_of(task) for task in TASKS}) == 40
    assert NUM_COUNTED == 38
    assert [task.name for task in TASKS if not task.counted] == ["FairFace", "UTKFace"]
    assert sum(task.images or 0 for task in TASKS) == 732_026
    groups = Counter(task.group for task in TASKS)
    assert groups == {"imagenet": 1, "imagenet_shift": 6, "vtab": 13, "retrieval": 3, "other": 17}
    assert find_task("sun397").group == "vtab"


@pytest.mark.parametrize(
    ("key", "folder"),
    [
        ("cifar10", "wds_cifar10_test"),
        ("imagenet-a", "wds_imagenet-a_test"),
        ("vtab/caltech101", "wds_vtab-caltech101_test"),
        ("wilds/fmow", "wds_wilds-fmow_test"),
        ("fairness/geode", "wds_geode_test"),
    ],
)
def test_folder(key: str, folder: str) -> None:
    assert folder_of(find_task(key)) == folder


def test_unknown_task_has_a_hint() -> None:
    with pytest.raises(ConfigError, match="did you mean 'vtab/caltech101'"):
        find_task("vtab/caltech-101")


def test_own_task() -> None:
    task = own_task("street-signs", classes=5)
    assert (task.metric, task.group, task.counted, folder_of(task)) == ("acc1", "own", False, "wds_street-signs_test")


@pytest.mark.parametrize("name", ["mnist", "vtab/caltech101", "vtab-caltech101", "geode"])
def test_own_task_does_not_hide_the_table(name: str) -> None:
    with pytest.raises(ConfigError, match="list it under tasks"):
        own_task(name)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tasks": ["cifar1"]}, "did you mean 'cifar10'"),
        ({"tasks": ["mnist", "mnist"]}, "more than once"),
        ({"own": ["a", "a"]}, "more than once"),
        ({"own": [" "]}, "empty name"),
        ({"own": ["a/b", "c", "a-b"]}, "own sets 'a/b' and 'a-b' would both be wds_a-b_test: rename one"),
        ({"own": ["fairness/x", "x"]}, "would both be wds_x_test"),
        ({"tasks": "cifar10"}, r"valid tuple \(got 'cifar10'; write \[cifar10\]"),
        ({"own": ["mnist"]}, "list it under tasks"),
        ({"batch_size": 0}, "at least 1"),
        ({"precision": "fp16"}, "fp32"),
        ({"taks": []}, "did you mean 'tasks'"),
    ],
)
def test_bad_config(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(EvalConfig, values, where="eval")


def test_good_config() -> None:
    config = read_config(EvalConfig, {"tasks": ["mnist"], "own": ["mine"], "precision": "bf16"}, where="eval")
    assert config == EvalConfig(tasks=("mnist",), own=("mine",), precision="bf16")
