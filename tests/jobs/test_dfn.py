"""winnow dfn train: two phases and the mixture of their weights, exact after a kill, usable as any run."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from jobs.network_sets import open_sets
from jobs.recipes import Network, Recipe, load_recipe
from jobs.run_recipe import run_recipe
from jobs.stage_networks import format_sweep, run_network
from jobs.train_dfn import add_sweep
from jobs.train_dfn import main as train_dfn
from pipeline.clip_model import find_clip
from pipeline.config import read_config
from pipeline.errors import ConfigError, PoolError
from pipeline.manifest import read_manifest
from pipeline.tars import TarRow, make_member, write_rows
from training.config import SetConfig, TrainConfig
from training.ensemble import interpolate

ROOT = Path(__file__).parents[2]
COLOURS = ("red", "green", "blue", "yellow")
PROGRAM = """
import json, sys
from jobs.recipes import Network
from jobs.stage_networks import run_network
from pipeline.config import read_config
run_network(read_config(Network, json.loads(sys.argv[1]), where=""), data=sys.argv[2], out=sys.argv[3], quiet=True)
"""


def png(colour: str, shade: int) -> bytes:
    buffer = io.BytesIO()
    image = Image.new("RGB", (32, 32), colour)
    image.paste((shade, shade, shade), (0, 0, 8 + shade % 16, 8))
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, texts: list[str], extension: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        TarRow(
            f"{n:04d}", (make_member(f"{n:04d}.png", png(COLOURS[n % 4], n)), make_member(f"{n:04d}.{extension}", t))
        )
        for n, t in enumerate(map(str.encode, texts))
    ]
    with path.open("wb") as file:
        write_rows(file, rows)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clean pairs, a hub classification set with a train split, and a folder of class folders; names in classnames."""
    folder = tmp_path_factory.mktemp("places")
    write_tar(folder / "clean/00000000.tar", [f"picture {n} of {COLOURS[n % 4]} paper" for n in range(60)], "txt")
    hub = folder / "wds_paper_train"
    write_tar(hub / "train/0.tar", [str(n % 4) for n in range(20)], "cls")
    write_tar(hub / "train/1.tar", [str(n % 4) for n in range(12)], "cls")
    (hub / "train/nshards.txt").write_text("2")
    (hub / "classnames.txt").write_text("\n".join(COLOURS))
    (hub / "zeroshot_classification_templates.txt").write_text("a {c} sheet\n{c} paper\n")
    for number, colour in enumerate(("yellow", "red", "Blue paper")):
        (folder / "images" / colour).mkdir(parents=True)
        for n in range(number + 1):
            (folder / "images" / colour / f"{n}.PNG").write_bytes(png(colour.split()[0].lower(), n))
    return folder


def list_choices(places: Path, **finetune: Any) -> dict[str, Any]:
    return {
        "data": "clean",
        "train": {"model": "winnow-vit-tiny", "samples": 160, "batch_size": 16, "checkpoint_every_steps": 3},
        "augment": {"flip_prob": 0.5},
        "finetune": {"sets": [{"classes": str(places / "wds_paper_train")}], "train": {"samples": 96}} | finetune,
    }


def make_network(places: Path, **finetune: Any) -> Network:
    return read_config(Network, list_choices(places, **finetune), where="network")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / "checkpoint.pt", weights_only=True)["state_dict"]
    return state


def run(network: Network, places: Path, out: Path) -> Any:
    return run_network(network, data=str(places / "clean"), out=str(out), quiet=True)


@pytest.fixture(scope="module")
def finished(places: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    run(make_network(places, ensemble=0.3), places, out)
    return out


def test_the_network_is_the_mixture_and_looks_like_a_run(finished: Path, places: Path) -> None:
    manifest = read_manifest(str(finished))
    assert manifest and set(manifest.parents) == {"data", "finetune.wds_paper_train"}
    assert manifest.counts["pretrained rows"].kept == 60 and manifest.counts["finetuned wds_paper_train"].kept == 32
    assert (manifest.facts["finetuned_share"], manifest.facts["samples_seen"]) == (0.3, 256)
    second = manifest.config["finetuned"]
    assert (second["samples"], second["batch_size"], second["augment"]["flip_prob"]) == (96, 16, 0.5)
    assert find_clip(str(finished)).architecture == "winnow-vit-tiny"
    before, after = weights(finished / "pretrained"), weights(finished / "finetuned")
    assert not torch.equal(before["logit_scale"], after["logit_scale"])
    wanted = interpolate(before, after, 0.3)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in weights(finished).items())
    assert str(places) not in (finished / "manifest.json").read_text()


def test_a_finished_network_is_not_made_again_even_without_its_phases(
    finished: Path, places: Path, tmp_path: Path
) -> None:
    made = (finished / "checkpoint.pt").stat().st_mtime_ns
    (finished / "pretrained").rename(tmp_path / "pretrained")
    manifest = run(make_network(places, ensemble=0.3), places, finished)
    (tmp_path / "pretrained").rename(finished / "pretrained")
    assert manifest == read_manifest(str(finished)) and (finished / "checkpoint.pt").stat().st_mtime_ns == made


def test_a_mistake_leaves_a_finished_network_as_it_was(finished: Path, places: Path, tmp_path: Path) -> None:
    out, network = tmp_path / "out", make_network(places, ensemble=0.3)
    shutil.copytree(finished, out)
    mistaken = replace(network, train=replace(network.train, heldout=300))
    with pytest.raises(ConfigError, match="heldout is 300, but there are 60"):
        run(mistaken, places, out)
    for name in ("checkpoint.pt", "manifest.json", "model.json", "pretrained/manifest.json"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()


def test_another_share_trains_nothing_again(finished: Path, places: Path, tmp_path: Path) -> None:
    times = {p: p.stat().st_mtime_ns for p in finished.glob("*/checkpoint.pt")}
    before = (finished / "manifest.json").read_bytes()
    assert run(make_network(places, ensemble=1.0), places, finished).facts["finetuned_share"] == 1
    assert all(torch.equal(t, weights(finished / "finetuned")[name]) for name, t in weights(finished).items())
    run(make_network(places, ensemble=0.3), places, finished)
    assert times == {p: p.stat().st_mtime_ns for p in finished.glob("*/checkpoint.pt")} and len(times) == 2
    assert (finished / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("phase", ["pretrained", "finetuned"])
def test_killed_in_either_phase_it_ends_with_the_same_bytes(
    finished: Path, places: Path, tmp_path: Path, phase: str
) -> None:
    values = list_choices(places, ensemble=0.3)
    command = [sys.executable, "-c", PROGRAM, json.dumps(values), str(places / "clean"), str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        while process.poll() is None and not list((tmp_path / "out" / phase).glob("resume-*.pt")):
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "out/manifest.json").exists()
    run(make_network(places, ensemble=0.3), places, tmp_path / "out")
    for name in ("checkpoint.pt", "model.json", "manifest.json"):
        for folder in (".", "pretrained", "finetuned"):
            assert (finished / folder / name).read_bytes() == (tmp_path / "out" / folder / name).read_bytes(), folder
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in finished.iterdir())


def test_a_sweep_keeps_every_share_and_takes_the_best(places: Path, tmp_path: Path) -> None:
    network = add_sweep(make_network(places), "0,0.5,1")
    network = replace(network, train=replace(network.train, heldout=12))
    manifest = run(network, places, tmp_path)
    means = {
        float(share): (r["image_to_text"] + r["text_to_image"]) / 2 for share, r in manifest.facts["heldout"].items()
    }
    assert list(means) == [0, 0.5, 1] and means[manifest.facts["finetuned_share"]] == max(means.values())
    assert manifest.counts["pretrained rows"].dropped == {"heldout": 12}
    assert sorted(p.name for p in (tmp_path / "sweep").iterdir()) == ["0", "0.5", "1"]
    chosen = weights(tmp_path / "sweep" / f"{manifest.facts['finetuned_share']:g}")
    assert all(torch.equal(tensor, chosen[name]) for name, tensor in weights(tmp_path).items())
    table = format_sweep(manifest)
    assert table.count("\n") == 4 and "12 pairs" in table and table.count("<") == 1


@pytest.mark.parametrize("by", ["init", "model"])
def test_winnow_run_makes_a_network_from_given_weights(finished: Path, places: Path, tmp_path: Path, by: str) -> None:
    values = list_choices(places, train={"samples": 16}, ensemble=1.0)
    values["train"] |= {"samples": 16}
    if by == "init":
        values["init"] = str(finished)
    else:
        values["train"]["model"] = f"winnow-vit-tiny@{finished}/checkpoint.pt"
    recipe = Recipe(name="x", networks={"dfn": read_config(Network, values, where="network")})
    run_recipe(recipe, pool="none", clean=str(places / "clean"), out=str(tmp_path), until="networks")
    manifest = read_manifest(str(tmp_path / "networks/dfn"))
    assert manifest and set(manifest.parents) == {"clean", "weights", "finetune.wds_paper_train"}
    assert manifest.config["model"] == "winnow-vit-tiny" == find_clip(str(tmp_path / "networks/dfn")).architecture
    start, end = weights(finished), weights(tmp_path / "networks/dfn")
    assert max(float((end[name] - start[name]).abs().max()) for name in start) < 0.01


@pytest.mark.parametrize("spelled", ["clean", "images/../clean", "link"])
def test_held_out_pairs_are_not_fine_tuned_on(places: Path, tmp_path: Path, spelled: str) -> None:
    if spelled == "link":
        (tmp_path / "clean").symlink_to(places / "clean")
    folder = tmp_path / "clean" if spelled == "link" else Path(f"{places}/{spelled}")
    network = make_network(places, sets=[{"pairs": str(folder)}])
    network = replace(network, train=replace(network.train, heldout=12))
    with pytest.raises(ConfigError, match=r"'clean' has .*00000000.tar.* holds rows out"):
        run(network, places, tmp_path)


def test_a_hub_set_and_class_folders_become_captions(places: Path, tmp_path: Path) -> None:
    hub, folders = open_sets(
        [
            SetConfig(classes=str(places / "wds_paper_train"), share=2.0),
            SetConfig(classes=str(places / "images"), templates=["one {c}"], name="sheets"),
        ]
    )
    assert (hub.name, hub.share, len(hub.urls)) == ("wds_paper_train", 2, 2)
    assert hub.classes and hub.classes.captions[1] == ("a green sheet", "green paper")
    assert folders.name == "sheets" and folders.classes
    assert folders.classes.captions == (("one Blue paper",), ("one red",), ("one yellow",))
    assert folders.classes.sizes == (3, 2, 1) and [Path(url).parent.name for url in folders.urls][2:4] == [
        "Blue paper",
        "red",
    ]


def test_sets_that_cannot_be_read_say_why(places: Path, tmp_path: Path) -> None:
    images = str(places / "images")
    with pytest.raises(ConfigError, match="give the set templates"):
        open_sets([SetConfig(classes=images)])
    with pytest.raises(ConfigError, match=r"has no \{c\}"):
        open_sets([SetConfig(classes=images, templates=["paper"])])
    (tmp_path / "set/test").mkdir(parents=True)
    (tmp_path / "set/test/nshards.txt").write_text("1")
    with pytest.raises(ConfigError, match="test split only"):
        open_sets([SetConfig(classes=str(tmp_path / "set"))])
    (tmp_path / "few/a").mkdir(parents=True)
    (tmp_path / "few/a/0.png").write_bytes(png("red", 1))
    (tmp_path / "few/classnames.txt").write_text("a\nb\n")
    with pytest.raises(PoolError, match="has 2 names, but 1 folders"):
        open_sets([SetConfig(classes=str(tmp_path / "few"), templates=["{c}"])])
    with pytest.raises(PoolError, match="holds no CLASS/IMAGE"):
        open_sets([SetConfig(classes=str(places / "wds_paper_train" / ".."), templates=["{c}"])])


@pytest.mark.parametrize(
    ("finetune", "message"),
    [
        ({"sets": []}, "sets is empty"),
        ({"sets": [{}]}, "either pairs or classes"),
        ({"sets": [{"pairs": "p", "classes": "c"}]}, "either pairs or classes"),
        ({"sets": [{"pairs": "p", "templates": ["{c}"]}]}, "captions of its own"),
        ({"sets": [{"pairs": "p", "share": 0}]}, "share is 0"),
        ({"ensemble": 1.5}, "is 1.5; it must be at least 0 and at most 1"),
        ({"sweep": [0, -1]}, "is -1"),
        ({"train": {"sampels": 3}}, "did you mean 'samples'"),
        ({"train": {"samples": 100}}, "take 96 or 112"),
        ({"train": {"model": "winnow-vit-small"}}, "set train.model instead"),
    ],
)
def test_choices_that_do_not_go_together_are_named(places: Path, finetune: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_network(places, **finetune)


def test_the_command_trains_a_recipes_network(places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        "networks: {dfn: {data: clean, train: {model: winnow-vit-tiny, samples: 32, batch_size: 16, heldout: 8}, "
        f"finetune: {{sets: [{{classes: '{places}/wds_paper_train'}}], train: {{samples: 32}}}}}}}}\n"
    )
    assert load_recipe(str(recipe)).networks["dfn"].train == TrainConfig(
        model="winnow-vit-tiny", samples=32, batch_size=16, heldout=8
    )
    where = ["--clean", str(places / "clean"), "--out", str(tmp_path / "out")]
    assert train_dfn([str(recipe), *where, "--sweep", "0,1"]) == 0
    assert "8 pairs, 8 different captions" in capsys.readouterr().out
    assert train_dfn(["dfn-tiny", *where, "--sweep", "0,1"]) == 2
    assert "no finetune block" in capsys.readouterr().err
    assert train_dfn([str(recipe), *where, "--sweep", "0;1"]) == 2
