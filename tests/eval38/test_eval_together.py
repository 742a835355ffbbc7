"""Several models that see a set together, every checkpoint of a run, and two processes that share the work."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_evalsets import draw_picture, make_captioned_tars, write_tars
from open_clip.transform import CenterCropOrPad
from torchvision.transforms import Compose

from eval38.checkpoints import find_checkpoints
from eval38.config import EvalConfig
from eval38.curve import evaluate_checkpoints, format_curve
from eval38.embed import Encoder, Seen, see_images
from eval38.evaluate import describe_geometry, evaluate, evaluate_models
from eval38.rows import ImageRow
from jobs.eval_tasks import main, name_models
from jobs.recipes import Recipe
from jobs.run_recipe import evaluate_runs
from pipeline import lock
from pipeline.clip_model import open_model
from pipeline.errors import ConfigError, EvalError, ModelError, StageError
from pipeline.lock import hold_lock
from pipeline.manifest import Manifest, read_manifest
from training.config import TrainConfig
from training.run import train

MakeSet = Callable[..., Path]
ROOT = Path(__file__).parents[2]
FLICKR = "wds_retrieval-flickr_1k_test_image_text_retrieval_test"
TOY = EvalConfig(own=("toy",), batch_size=3)
PROGRAM = """
import sys, torch
from eval38.config import EvalConfig
from eval38.evaluate import evaluate_models
torch.set_num_threads(1)
data, out, *models = sys.argv[1:]
outs = {f"{out}/{n}": model for n, model in enumerate(models)}
keys = ("retrieval/flickr_1k_test_image_text_retrieval",)
config = EvalConfig(tasks=keys, own=("toy", "empty"), batch_size=3)
made = evaluate_models(config, outs, data=data, features=f"{out}/features", device="cpu", quiet=True)
print([type(one).__name__ for one in made.values()])
"""


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums of floats then have one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return two tiny models, and one between them that diverged."""
    folder, found = tmp_path_factory.mktemp("models"), []
    for n in range(3):
        weights = open_model("winnow-vit-tiny").model.state_dict()
        if n == 1:
            weights["visual.proj"] = torch.full_like(weights["visual.proj"], torch.nan)
        torch.save(weights, folder / f"{n}.pt")
        found.append(f"winnow-vit-tiny@{folder / f'{n}.pt'}")
    return found


def _read_all(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_image_is_decoded_once_for_all_encoders(models: list[str]) -> None:
    encoders = [Encoder(open_model(model), device="cpu", precision="fp32") for model in (models[0], models[2])]
    shape, decoded = encoders[0].geometry, []
    encoders[0].geometry = lambda image: decoded.append(image) or shape(image)  # type: ignore[func-returns-value]
    encoders[1].geometry = None  # type: ignore[assignment]
    rows = [ImageRow(str(n), draw_picture(n), n) for n in range(5)]
    together = see_images(rows, encoders, batch_size=3, name="toy", quiet=True)
    assert len(decoded) == len(rows)
    for encoder, seen in zip(encoders, together, strict=True):
        encoder.geometry = shape
        (alone,) = see_images(rows, [encoder], batch_size=3, name="toy", quiet=True)
        assert isinstance(seen, Seen) and isinstance(alone, Seen) and torch.equal(seen.image_ND, alone.image_ND)


def test_models_that_fill_borders_otherwise_do_not_share_pixels() -> None:
    opened = open_model("winnow-vit-tiny")

    def describe(fill: int) -> str:
        transform = Compose([CenterCropOrPad(32, fill=fill), *opened.eval_transform.transforms[-3:]])
        encoder = Encoder(replace(opened, eval_transform=transform), device="cpu", precision="fp32")
        return describe_geometry("winnow-vit-tiny", encoder)

    assert describe(0) == describe(0) != describe(255)


def test_models_together_have_the_results_of_each_alone(
    make_set: MakeSet, models: list[str], tmp_path: Path, one_thread: None
) -> None:
    data = str(make_set().parent)
    outs = {str(tmp_path / "together" / str(n)): model for n, model in enumerate(models)}
    made = evaluate_models(TOY, outs, data=data, device="cpu", quiet=True)
    assert [type(one) for one in made.values()] == [Manifest, ModelError, Manifest]
    for n in (0, 2):
        evaluate(TOY, model=models[n], data=data, out=str(tmp_path / "alone" / str(n)), device="cpu", quiet=True)
    assert _read_all(tmp_path / "together") == _read_all(tmp_path / "alone")
    one_by_one = evaluate_models(TOY, outs, data=data, device="cpu", quiet=True, at_once=1)
    assert list(map(str, one_by_one.values())) == list(map(str, made.values()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run with saves after steps 1 and 2 and weights after step 3."""
    folder = tmp_path_factory.mktemp("trained")
    write_tars(folder, [{"png": draw_picture(n), "txt": b"picture %d" % n} for n in range(16)])
    saves = {"checkpoint_every_steps": 1, "keep_checkpoints": 9, "log_every_steps": 1, "report_to": ()}
    config = TrainConfig(model="winnow-vit-tiny", samples=24, batch_size=8, warmup_steps=1, **saves)  # type: ignore[arg-type]
    train(config, data=str(folder / "test"), out=str(folder / "run"), device="cpu", quiet=True)
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> str:
    """Return a copy of the run that a test may change."""
    return str(shutil.copytree(trained, tmp_path / "run"))


def test_every_checkpoint_of_a_run(
    make_set: MakeSet, run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    found = find_checkpoints(run)
    assert [(one.step, one.samples) for one in found] == [(1, 8), (2, 16), (3, 24)] and found[-1].model == run
    data, out = str(make_set().parent), tmp_path / "out"
    words = ["--model", run, "--every", "--data", data, "--out", str(out), "--device", "cpu", "eval.own=[toy]"]
    assert main(words) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in table[:4]] == [["step", "samples"], ["1", "8"], ["2", "16"], ["3", "24"]]
    points = [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]
    made = [read_manifest(str(out / f"step-0000000{step}")) for step in (1, 2, 3)]
    assert [point["tasks"]["toy"] for point in points] == [one.facts["tasks"]["toy"]["value"] for one in made if one]
    before = _read_all(out)
    with pytest.raises(EvalError, match="holds the output of 'eval': name another --out"):
        evaluate_checkpoints(TOY, run=run, data=data, out=str(out / "step-00000001"))
    with pytest.raises(EvalError, match="holds the output of 'eval curve', which results would overwrite"):
        evaluate(TOY, model=run, data=data, out=str(out), device="cpu", quiet=True)
    assert _read_all(out) == before
    save = Path(run) / "resume-00000002.pt"
    shutil.copy(save, save.with_name("resume-00000009.pt"))
    foreign = torch.load(save, weights_only=True) | {"identity": "of another run"}
    torch.save(foreign, save.with_name("resume-00000001.pt"))
    save.with_name("resume-00000004.pt").write_bytes(b"PK half a save")
    assert [one.step for one in find_checkpoints(run)] == [2, 9, 3] and "resume-00000001.pt" in caplog.text
    (Path(run) / "resume-00000009.pt").unlink()
    again = evaluate_checkpoints(EvalConfig(own=("toy",)), run=run, data=data, out=str(out), device="cpu", quiet=True)
    assert [point["step"] for point in again] == [2, 3] and again == points[1:]
    assert {name: content for name, content in _read_all(out).items() if "/" in name} == {
        name: content for name, content in before.items() if "/" in name
    }


def test_a_curve_keeps_off_another_drivers_and_another_models_results(
    make_set: MakeSet, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    places = {"run": run, "data": str(make_set().parent), "out": str(tmp_path / "out"), "device": "cpu"}
    with hold_lock(places["out"], "eval curve"), pytest.raises(StageError, match=r"is at work here \(eval curve"):
        evaluate_checkpoints(TOY, **places, quiet=True)
    lines = tmp_path / "out" / "step-00000002" / "eval_results.jsonl"
    lines.parent.mkdir()
    lines.write_text('{"key": "mnist", "dataset": "MNIST", "metrics": {"main_metric": 0.5}}\n')
    with pytest.raises(ConfigError, match=r"holds 1 lines that were not made by winnow-vit-tiny .* Name another --out"):
        evaluate_checkpoints(TOY, **places, quiet=True)
    assert "MNIST" in lines.read_text() and not (tmp_path / "out" / "curve.jsonl").exists()


def test_a_run_that_is_not_finished(run: str, tmp_path: Path) -> None:
    for name in ("model.json", "manifest.json", "checkpoint.pt"):
        (Path(run) / name).unlink()
    with pytest.raises(ModelError, match="is not a finished run"):
        find_checkpoints(run)
    found = find_checkpoints(f"winnow-vit-tiny@{run}")
    assert [(one.step, one.samples) for one in found] == [(1, 8), (2, 16)]
    assert [one.model for one in found] == [f"winnow-vit-tiny@{run}/resume-0000000{n}.pt" for n in (1, 2)]
    for path in Path(run).glob("resume-*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"holds no checkpoint\. Train with keep_checkpoints above 1"):
        find_checkpoints(f"winnow-vit-tiny@{run}")
    with pytest.raises(ModelError, match="is no folder: --every takes a run folder"):
        find_checkpoints(str(tmp_path / "nowhere"))


def test_a_checkpoint_that_diverged_is_a_point_without_values(make_set: MakeSet, run: str, tmp_path: Path) -> None:
    save = Path(run) / "resume-00000001.pt"
    content = torch.load(save, weights_only=True)
    content["state_dict"]["visual.proj"].fill_(torch.nan)
    torch.save(content, save)
    points = evaluate_checkpoints(TOY, run=run, data=str(make_set().parent), out=str(tmp_path / "out"), device="cpu")
    assert "not finite" in points[0]["error"] and points[1]["tasks"]["toy"] is not None
    text = format_curve(points)
    assert "failed" in text.splitlines()[1] and "step 1 failed: the model gives vectors" in text
    assert points[1]["incomplete"] == [] and "Not every image" not in text
    assert "Not every image was evaluated of toy." in format_curve([points[1] | {"incomplete": ["toy"]}])


def test_a_recipes_models_are_evaluated_together(make_set: MakeSet, trained: Path, tmp_path: Path) -> None:
    data, out = str(make_set().parent), tmp_path / "out"
    config = TrainConfig(model="winnow-vit-tiny", samples=24, batch_size=8)
    recipe = Recipe(name="toy", subsets={"a": [], "b": []}, train=config, eval=TOY)
    for name in recipe.subsets:
        shutil.copytree(trained, out / "runs" / name)
    weights = torch.load(trained / "checkpoint.pt", weights_only=True)["state_dict"]
    weights["visual.proj"].fill_(torch.nan)
    torch.save({"state_dict": weights}, out / "runs" / "a" / "checkpoint.pt")
    with pytest.raises(EvalError, match=r"^a: the model gives vectors that are not finite"):
        evaluate_runs(recipe, data, str(out))
    assert read_manifest(str(out / "eval" / "b"))
    shutil.copy(trained / "checkpoint.pt", out / "runs" / "a")
    made = evaluate_runs(recipe, data, str(out))
    assert list(made) == ["a", "b"] and made["a"].identity == made["b"].identity
    assert evaluate_runs(replace(recipe, train=None), data, str(out)) == {}


def test_names_of_models(tmp_path: Path) -> None:
    models = ["base=ViT-B-32/openai", "far=s3://b/run", "runs/dfn/", "mine:make", "hf-hub:org/name", "ViT-B-32@a/b.pt"]
    assert name_models(models) == {
        "base": "ViT-B-32/openai",
        "far": "s3://b/run",
        "dfn": "runs/dfn/",
        "mine-make": "mine:make",
        "name": "hf-hub:org/name",
        "b.pt": "ViT-B-32@a/b.pt",
    }
    (tmp_path / "lr=1").mkdir()
    assert name_models([str(tmp_path / "lr=1")]) == {"lr-1": str(tmp_path / "lr=1")}
    for word in ("..", ".=a", "runs/..", "/"):
        with pytest.raises(ConfigError, match="names no folder: say LABEL="):
            name_models([word])
    with pytest.raises(ConfigError, match="two models are called 'dfn': give one of them another"):
        name_models(["a/dfn", "b/dfn"])


def test_several_models_on_the_command_line(
    make_set: MakeSet, models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", str(make_set().parent), "--out", str(tmp_path / "out"), "--device", "cpu", "eval.own=[toy]"]
    assert main(["--model", f"a={models[0]}", "--model", f"b={models[2]}", *words]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["%", "a", "b"]
    assert main(["--model", models[0], "--model", models[1], *words]) == EvalError.exit_code
    assert "1 of 2 models could not be evaluated:\n1.pt: the model gives vectors" in capsys.readouterr().err
    assert main(["--model", models[0], "--model", f"b=winnow-vit-tiny@{tmp_path}", *words]) == EvalError.exit_code
    assert "1 of 2 models could not be evaluated:\nb: " in capsys.readouterr().err  # a folder where a file is meant
    assert main(["--model", models[0], *words[:2], "--out", "", *words[4:]]) == ConfigError.exit_code
    assert main(["--model", models[0], "--model", models[1], "--every", *words]) == ConfigError.exit_code


def test_two_processes_give_the_bytes_of_one(
    make_set: MakeSet, models: list[str], tmp_path: Path, one_thread: None
) -> None:
    """Classification, retrieval, a set that breaks while it is read, a model that diverged, feature caches."""
    folder = make_set()
    broken = make_set("empty")
    for tar in (broken / "test").glob("*.tar"):
        tar.write_bytes(b"")
    make_captioned_tars(folder.parent / FLICKR)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", PROGRAM, str(folder.parent), str(tmp_path / "two"), *models]
    processes = [
        subprocess.Popen(command, env=os.environ | shared | {"RANK": rank}, stdout=subprocess.PIPE, text=True)
        for rank in ("0", "1")
    ]
    told = [process.communicate(timeout=600)[0] for process in processes]
    assert told == ["['Manifest', 'ModelError', 'Manifest']\n"] * 2
    config = EvalConfig(tasks=("retrieval/flickr_1k_test_image_text_retrieval",), own=("toy", "empty"), batch_size=3)
    for n in (0, 2):
        out, features = str(tmp_path / "one" / str(n)), str(tmp_path / "one" / "features")
        made = evaluate(
            config, model=models[n], data=str(folder.parent), out=out, features=features, device="cpu", quiet=True
        )
        assert made.facts["tasks"]["empty"]["status"] == "failed"
    assert _read_all(tmp_path / "two") == _read_all(tmp_path / "one")
