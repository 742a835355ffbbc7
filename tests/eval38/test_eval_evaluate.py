import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eval38.config import EvalConfig
from eval38.evaluate import evaluate
from pipeline.errors import EvalError
from pipeline.manifest import Counts, Manifest, read_manifest

MakeSet = Callable[..., Path]
REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "eval"
DIGITS = "".join(f"{n}\n" for n in range(10))


@pytest.fixture
def run(tmp_path: Path, checkpoint: str) -> Callable[..., Manifest]:
    """Return a function that evaluates the checkpoint on data/ into out/."""

    def evaluate_toy(model: str = checkpoint, **choices: object) -> Manifest:
        config = EvalConfig(**choices)  # type: ignore[arg-type]
        places = {"data": str(tmp_path / "data"), "out": str(tmp_path / "out")}
        return evaluate(config, model=model, **places, parents={"train": "t"}, device="cpu", quiet=True)

    return evaluate_toy


def _lines(tmp_path: Path) -> dict[str, dict[str, object]]:
    rows = map(json.loads, (tmp_path / "out" / "eval_results.jsonl").read_text().splitlines())
    return {row["key"]: row for row in rows}


def test_every_task_with_data_is_evaluated_in_part(
    make_set: MakeSet, run: Callable[..., Manifest], tmp_path: Path
) -> None:
    make_set("mnist", classes=DIGITS)
    make_set("cifar10", classes=DIGITS)
    make_set("toy")
    make_set("wilds-fmow")
    manifest = run(own=("toy",))
    facts = manifest.facts
    assert facts["average"]["label"] == "partial average over 2 of 38 tasks" and facts["average"]["num_tasks"] == 2
    rows = _lines(tmp_path)
    mains = [rows[key]["metrics"]["main_metric"] for key in ("cifar10", "mnist")]  # type: ignore[index]
    assert facts["average"]["value"] == sum(mains) / 2
    states = {key: (task["status"], task["counted"], task["incomplete"]) for key, task in facts["tasks"].items()}
    assert states == {
        "cifar10": ("done", True, True),
        "mnist": ("done", True, True),
        "wilds/fmow": ("not implemented yet", True, False),
        "toy": ("done", False, False),
    }
    assert facts["tasks"]["mnist"]["images_expected"] == 10_000 and facts["tasks"]["mnist"]["images"] == 16
    assert len(facts["missing"]) == 37 and "vtab/caltech101" in facts["missing"] and not facts["not_asked"]
    assert manifest.counts["toy"] == Counts(read=16, kept=16)
    assert manifest.parents["train"] == "t" and set(manifest.parents) == {"train", "model", "data"}
    assert read_manifest(str(tmp_path / "out")) == manifest


def test_a_second_run_keeps_what_is_done_and_writes_the_same_bytes(
    make_set: MakeSet, run: Callable[..., Manifest], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_set("toy")
    make_set("mnist", classes=DIGITS)
    run(own=("toy",))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(before) == {"eval_results.jsonl", "manifest.json"}
    with caplog.at_level("INFO", "winnow"):
        run(own=("toy",))
    assert caplog.text.count("is kept") == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    caplog.clear()
    os.utime(folder / "classnames.txt", (1, 1))
    with caplog.at_level("INFO", "winnow"):
        run(own=("toy",))
    assert "toy is evaluated again because data_hash changed" in caplog.text and "mnist is kept" in caplog.text


def test_an_interrupted_run_goes_on_after_the_last_task(
    make_set: MakeSet, run: Callable[..., Manifest], tmp_path: Path
) -> None:
    make_set("toy")
    make_set("mnist", classes=DIGITS)
    whole = run(own=("toy",))
    lines = (tmp_path / "out" / "eval_results.jsonl").read_bytes()
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / "eval_results.jsonl").write_bytes(lines.splitlines(keepends=True)[0])
    (tmp_path / "out" / ".tmp-00000000000000000000000000000000-eval_results.jsonl").write_bytes(b"{")
    assert run(own=("toy",)) == whole
    assert (tmp_path / "out" / "eval_results.jsonl").read_bytes() == lines
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_another_model_or_precision_is_evaluated_again(
    make_set: MakeSet, run: Callable[..., Manifest], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_set("toy")
    make_set("mnist", classes=DIGITS)
    run(own=("toy",))
    run(tasks=("mnist",), precision="bf16")
    assert "mnist is evaluated again because precision changed from fp32 to bf16" in caplog.text
    assert "toy is dropped because precision changed from fp32 to bf16" in caplog.text
    assert list(_lines(tmp_path)) == ["mnist"]
    torch.manual_seed(0)
    run(tasks=("mnist",), precision="bf16", model="winnow-vit-tiny")
    assert "model_sha256 changed" in caplog.text


def test_a_task_asked_for_alone_leaves_the_others_results(
    make_set: MakeSet, run: Callable[..., Manifest], tmp_path: Path
) -> None:
    make_set("cifar10", classes=DIGITS)
    make_set("mnist", classes=DIGITS)
    run()
    manifest = run(tasks=("mnist",))
    assert list(_lines(tmp_path)) == ["cifar10", "mnist"]
    assert list(manifest.facts["tasks"]) == ["mnist"] and manifest.facts["average"]["num_tasks"] == 1
    assert manifest.facts["not_asked"] == ["cifar10"]


def test_a_broken_set_fails_alone(make_set: MakeSet, run: Callable[..., Manifest], tmp_path: Path) -> None:
    make_set("mnist", classes=DIGITS)
    make_set("cifar10")  # four classes instead of ten
    make_set("gtsrb", classes="".join(f"{n}\n" for n in range(43)))
    (tmp_path / "data" / "wds_gtsrb_test" / "test" / "nshards.txt").unlink()
    make_set("bad", classes="red\ngreen\n")  # labels go up to 3
    manifest = run(own=("bad",))
    tasks = manifest.facts["tasks"]
    assert {key: task["status"] for key, task in tasks.items()} == {
        "cifar10": "failed",
        "gtsrb": "failed",
        "mnist": "done",
        "bad": "failed",
    }
    assert "has 4 classes, but CIFAR-10 has 10" in tasks["cifar10"]["message"]
    assert "nshards.txt is missing" in tasks["gtsrb"]["message"] and "says label '2'" in tasks["bad"]["message"]
    assert list(manifest.counts) == ["mnist"] == list(_lines(tmp_path))


def test_a_set_that_broke_loses_its_old_result(make_set: MakeSet, run: Callable[..., Manifest], tmp_path: Path) -> None:
    make_set("mnist", classes=DIGITS)
    folder = make_set("toy")
    run(own=("toy",))
    (folder / "test" / "1.tar").unlink()
    assert run(own=("toy",)).facts["tasks"]["toy"]["status"] == "failed"
    assert list(_lines(tmp_path)) == ["mnist"]


def test_damage_is_counted_named_and_marks_the_task(
    make_set: MakeSet, run: Callable[..., Manifest], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_set("toy")
    tar = folder / "test" / "0.tar"
    content = tar.read_bytes()
    tar.write_bytes(content.replace(b"\x89PNG", b"\x89GNP", 1)[:9000])
    manifest = run(own=("toy",))
    counts = manifest.counts["toy"]
    assert dict(counts.failed) == {"truncated_tar": 1, "unreadable_image": 1} and counts.kept == counts.read - 2
    row = _lines(tmp_path)["toy"]
    assert row["incomplete"] and [str(lost).split(":")[0] for lost in row["lost"]] == ["0.tar"] * 2  # type: ignore[attr-defined]
    assert "toy is incomplete" in caplog.text


@pytest.mark.parametrize(
    ("made", "choices", "message"),
    [
        ([], {}, "holds no evaluation set: looked for wds_vtab-caltech101_test and 39 others"),
        (["toy"], {"tasks": ("food101",)}, "task 'food101' has no data: there is no folder .*data/wds_food101_test"),
        (["toy"], {"own": ("mine",)}, "there is no folder .*data/wds_mine_test"),
        (["mnist", "cifar10"], {}, "no task could be evaluated:\ncifar10: .*\nmnist: .*"),
        (["wilds-fmow"], {}, "wilds/fmow: kind 'wilds' is not implemented yet"),
    ],
)
def test_nothing_to_evaluate(
    make_set: MakeSet, run: Callable[..., Manifest], made: list[str], choices: dict[str, object], message: str
) -> None:
    for name in made:
        make_set(name)
    with pytest.raises(EvalError, match=message):
        run(**choices)


@pytest.mark.real
@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data is not here")
def test_mnist_with_fresh_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    (tmp_path / "data").mkdir()
    shutil.copytree(REAL / "wds_mnist_test", tmp_path / "data" / "wds_mnist_test", copy_function=os.symlink)
    places = {"data": str(tmp_path / "data"), "out": str(tmp_path / "out")}
    manifest = evaluate(EvalConfig(), model="winnow-vit-tiny", **places, device="cpu", quiet=True)
    assert manifest.counts == {"mnist": Counts(read=10_000, kept=10_000)}
    mnist = manifest.facts["tasks"]["mnist"]
    assert not mnist["incomplete"] and mnist["status"] == "done"
    assert 0.02 < mnist["value"] < 0.3  # a guess has 0.10
