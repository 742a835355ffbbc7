import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from made_evalsets import NUM_PICTURES, make_captioned_tars, make_labelled

from eval38.config import EvalConfig
from eval38.evaluate import evaluate
from eval38.ranks import join_ranks
from eval38.tasks import find_task
from pipeline.errors import ConfigError, EvalError, ModelError
from pipeline.manifest import Counts, Manifest, read_manifest

MakeSet = Callable[..., Path]
REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "eval"
DIGITS = "".join(f"{n}\n" for n in range(10))


@pytest.fixture
def run(tmp_path: Path, checkpoint: str) -> Callable[..., Manifest]:
    """Return a function that evaluates the checkpoint on data/ into out/."""

    def evaluate_toy(model: str = checkpoint, *, replace: bool = False, **choices: object) -> Manifest:
        config = EvalConfig(**choices)  # type: ignore[arg-type]
        places = {"data": str(tmp_path / "data"), "out": str(tmp_path / "out"), "device": "cpu"}
        return evaluate(config, model=model, **places, parents={"train": "t"}, quiet=True, replace=replace)

    return evaluate_toy


COLOURS_BY_NAME = """
import torch
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

COLOURS = {"red": (200, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 200), "yellow": (200, 200, 20)}

class Colours(torch.nn.Module):
    def encode_image(self, image):
        return image.mean(dim=(2, 3))

    def encode_text(self, tokens):
        return tokens.float()

def make(device):
    transform = Compose([Resize(8), CenterCrop(8), ToTensor(), Normalize((0.0,) * 3, (1.0,) * 3)])
    return Colours(), transform, tokenize

def tokenize(texts):
    return torch.tensor([next((c for w, c in COLOURS.items() if w in t), (1, 1, 1)) for t in texts])
"""


def _read_all(folder: Path) -> dict[str, bytes]:
    """Return every file under a folder by name."""
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _lines(tmp_path: Path) -> dict[str, dict[str, object]]:
    rows = map(json.loads, (tmp_path / "out" / "eval_results.jsonl").read_text().splitlines())
    return {row["key"]: row for row in rows}


def test_every_task_with_data_is_evaluated_in_part(
    make_set: MakeSet, run: Callable[..., Manifest], tmp_path: Path
) -> None:
    make_set("mnist", classes=DIGITS)
    make_set("cifar10", classes=DIGITS)
    make_set("toy")
    manifest = run(own=("toy",))
    facts = manifest.facts
    assert facts["average"]["label"] == "partial average over 2 of 38 tasks" and facts["average"]["num_tasks"] == 2
    rows = _lines(tmp_path)
    mains = [rows[key]["metrics"]["main_metric"] for key in ("cifar10", "mnist")]  # type: ignore[index]
    assert facts["average"]["value"] == sum(mains) / 2 and facts["average_corrected"] == facts["average"]
    states = {key: (task["status"], task["counted"], task["incomplete"]) for key, task in facts["tasks"].items()}
    assert states == {
        "cifar10": ("done", True, True),
        "mnist": ("done", True, True),
        "toy": ("done", False, False),
    }
    assert facts["tasks"]["mnist"]["images_expected"] == 10_000 and facts["tasks"]["mnist"]["images"] == 16
    assert len(facts["missing"]) == 38 and "vtab/caltech101" in facts["missing"] and not facts["not_asked"]
    assert manifest.counts["toy"] == Counts(read=16, kept=16)
    assert manifest.parents["train"] == "t" and set(manifest.parents) == {"train", "model", "data"}
    assert read_manifest(str(tmp_path / "out")) == manifest


def test_captions_are_enough(run: Callable[..., Manifest], tmp_path: Path) -> None:
    """A task without class names has no prompts to be read beforehand."""
    make_captioned_tars(tmp_path / "data" / "wds_retrieval-flickr_1k_test_image_text_retrieval_test")
    facts = run().facts
    (task,) = facts["tasks"].values()
    assert task["name"] == "Flickr" and task["images"] == NUM_PICTURES and 0 <= task["value"] <= 1


def test_a_corrected_value_that_is_null_has_no_interval(run: Callable[..., Manifest], tmp_path: Path) -> None:
    """FMoW with four images: its one region is as small as Other."""
    make_labelled(tmp_path / "data" / "wds_wilds-fmow_test", find_task("wilds/fmow"), [0] * 4)
    facts = run().facts
    assert facts["tasks"]["wilds/fmow"]["value"] is not None is facts["tasks"]["wilds/fmow"]["value_corrected"]
    assert [set(facts["intervals"][column]["tasks"]) for column in ("compat", "corrected")] == [{"wilds/fmow"}, set()]


def test_a_second_run_keeps_what_is_done_and_writes_the_same_bytes(
    make_set: MakeSet, run: Callable[..., Manifest], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_set("toy")
    make_set("mnist", classes=DIGITS)
    run(own=("toy",))
    before = _read_all(tmp_path / "out")
    assert set(before) == {"eval_results.jsonl", "manifest.json", "wds_mnist_test.npz", "wds_toy_test.npz"}
    with caplog.at_level("INFO", "winnow"):
        run(own=("toy",))
    assert caplog.text.count("is kept") == 2
    assert _read_all(tmp_path / "out") == before
    caplog.clear()
    os.utime(folder / "classnames.txt", (1, 1))
    with caplog.at_level("INFO", "winnow"):
        run(own=("toy",))
    assert "toy is evaluated again because data_hash changed" in caplog.text and "mnist is kept" in caplog.text


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda file: file.write_bytes(b""), lambda file: os.truncate(file, 99)]
)
def test_a_task_whose_outcomes_are_gone_or_damaged_is_evaluated_again(
    damage: Callable[[Path], object],
    make_set: MakeSet,
    run: Callable[..., Manifest],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make_set("toy")
    whole = run(own=("toy",))
    intervals = whole.facts["intervals"]
    low, high = intervals["compat"]["tasks"]["toy"]
    assert 0 <= low <= whole.facts["tasks"]["toy"]["value"] <= high <= 1
    assert (
        intervals["corrected"] == intervals["compat"] and intervals["compat"]["average"] is None
    )  # toy is not counted
    damage(tmp_path / "out" / "outcomes" / "wds_toy_test.npz")
    assert run(own=("toy",)) == whole
    assert "toy is evaluated again because what the model made of each image is gone or damaged" in caplog.text
    assert len(_read_all(tmp_path / "out")) == 3


def test_kept_vectors_need_no_image(
    make_set: MakeSet, checkpoint: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_set("toy")

    def run_toy(out: str, features: str | None = str(tmp_path / "kept")) -> Manifest:
        places = {"data": str(tmp_path / "data"), "out": str(tmp_path / out), "features": features}
        return evaluate(EvalConfig(own=("toy",)), model=checkpoint, **places, device="cpu", quiet=True)

    plain, first = run_toy("plain", None), run_toy("a")
    assert first == plain and _read_all(tmp_path / "a") == _read_all(tmp_path / "plain")
    for tar in (folder / "test").glob("*.tar"):  # other bytes of the same size and time: nothing reads them
        stat = tar.stat()
        tar.write_bytes(b"\0" * stat.st_size)
        os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert _read_all(run_toy("b") and tmp_path / "b") == _read_all(tmp_path / "a")
    (folder / "zeroshot_classification_templates.txt").write_text("other words about {c}\n")
    assert run_toy("c").counts["toy"].kept == 16
    os.utime(folder / "test" / "0.tar")
    with pytest.raises(EvalError, match=r"none of 0 images could be read"):
        run_toy("d")


def test_a_model_of_ones_own(
    make_set: MakeSet, run: Callable[..., Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_set("toy")
    (tmp_path / "colours_by_name.py").write_text(COLOURS_BY_NAME)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    manifest = run("colours_by_name:make", own=("toy",))
    assert manifest.facts["tasks"]["toy"]["value"] == 1.0 and manifest.config["model"] == "colours_by_name:make"


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
    assert len(_read_all(tmp_path / "out")) == 4


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


def test_a_manifest_that_tells_of_other_lines_goes_first(
    make_set: MakeSet, run: Callable[..., Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second model that fails after the first set leaves its lines, and no manifest of the first model's."""
    make_set("mnist", classes=DIGITS)
    make_set("cifar10", classes=DIGITS)
    run()
    code = COLOURS_BY_NAME.replace("image.mean", "next(SCALE) * image.mean") + "import itertools\n"
    (tmp_path / "fails_later.py").write_text(code + "SCALE = itertools.chain([1, 1], itertools.repeat(float('nan')))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModelError, match="not finite"):
        run(model="fails_later:make", replace=True)
    assert list(_lines(tmp_path)) == ["cifar10"] and read_manifest(str(tmp_path / "out")) is None


@pytest.mark.parametrize("place", ["out", "features"])
def test_a_file_where_a_folder_is_meant_is_told_before_work(
    make_set: MakeSet, checkpoint: str, tmp_path: Path, place: str
) -> None:
    data = str(make_set().parent)
    (tmp_path / "file").touch()
    places = {"out": str(tmp_path / "new")} | {place: str(tmp_path / "file")}
    with pytest.raises(EvalError, match="file' is a file: name a folder"):
        evaluate(EvalConfig(own=("toy",)), model=checkpoint, data=data, **places, device="cpu", quiet=True)
    assert not (tmp_path / "new").exists()


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
    tar = make_set("stl10", classes=DIGITS) / "test" / "0.tar"
    tar.unlink()
    tar.mkdir()
    manifest = run(own=("bad",))
    tasks = manifest.facts["tasks"]
    assert {key: task["status"] for key, task in tasks.items()} == {
        "cifar10": "failed",
        "gtsrb": "failed",
        "mnist": "done",
        "stl10": "failed",
        "bad": "failed",
    }
    assert "has 4 classes, but CIFAR-10 has 10" in tasks["cifar10"]["message"]
    assert "nshards.txt is missing" in tasks["gtsrb"]["message"] and "says label '2'" in tasks["bad"]["message"]
    assert "Is a directory" in tasks["stl10"]["message"]
    assert list(manifest.counts) == ["mnist"] == list(_lines(tmp_path))


def test_a_set_that_broke_keeps_its_old_line_and_is_no_part_of_the_evaluation(
    make_set: MakeSet, run: Callable[..., Manifest], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_set("mnist", classes=DIGITS)
    tar = make_set("toy") / "test" / "1.tar"
    before, lines = run(own=("toy",)), _lines(tmp_path)
    tar.rename(tmp_path / "gone")
    made = run(own=("toy",))
    assert made.facts["tasks"]["toy"]["status"] == "failed" and list(made.counts) == ["mnist"]
    assert _lines(tmp_path) == lines and "toy cannot be read now; its line of before stays" in caplog.text
    (tmp_path / "gone").rename(tar)
    with caplog.at_level("INFO", "winnow"):
        assert run(own=("toy",)) == before
    assert "toy is kept, nothing changed" in caplog.text
    tar.rename(tmp_path / "gone")
    run(own=("toy",), precision="bf16")
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
        (["wilds-fmow"], {}, "wilds/fmow: .*has 4 classes, but FMoW has 62"),
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


def test_an_environment_that_contradicts_itself_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="WORLD_SIZE is two"), join_ranks():
        pass
