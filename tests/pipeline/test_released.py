"""Released networks: by hub id from the hub's own cache, from a folder, and what is said when they are not there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from filters import build_filter
from jobs.list_networks import main as list_networks
from pipeline.clip_model import embed_dim_of, find_clip, find_hub_id, list_pretrained, open_model, sha256_of_model
from pipeline.errors import ModelError
from pipeline.released import RELEASED, find_released, spell_licence
from pipeline.storage import sha256_of_file

HUB = "apple/DFN-public"
PROGRAM = """
import json, sys, logging
logging.basicConfig(level=logging.WARNING)
from filters import build_filter
from pipeline.clip_model import find_hub_id, open_model
from pipeline.errors import ModelError
for model in sys.argv[1:]:
    try:
        made = build_filter({"filter": "clip_score", "name": "dfn", "model": model})
        settings = dict(made.settings)
        opened = open_model(model)
        total = float(sum(p.detach().double().abs().sum() for p in opened.model.parameters()))
        print(json.dumps([settings, total, find_hub_id(model)]))
    except ModelError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture(scope="module")
def hub_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a hub model has: open_clip's config and weights, and weights in transformers' names."""
    folder = tmp_path_factory.mktemp("files")
    import open_clip

    open_model("winnow-vit-tiny")
    module: Any = open_clip.create_model("winnow-vit-tiny")
    config = {"model_cfg": open_clip.get_model_config("winnow-vit-tiny"), "preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(module.state_dict(), folder / "open_clip_pytorch_model.bin")
    torch.save({"vision_model.embeddings.class_embedding": torch.zeros(3)}, folder / "model.pth")
    return folder


@pytest.fixture(scope="module")
def cache(hub_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hub's cache with two models: one whole, one without weights."""
    folder = tmp_path_factory.mktemp("cache")
    for name, whole in (("DFN-public", True), ("DFN2B-CLIP-ViT-B-16", False)):
        model, revision = folder / f"models--apple--{name}", "a" * 40
        (model / "snapshots").mkdir(parents=True)
        shutil.copytree(hub_files, model / "snapshots" / revision)
        if not whole:
            (model / "snapshots" / revision / "open_clip_pytorch_model.bin").unlink()
        (model / "refs").mkdir()
        (model / "refs/main").write_text(revision)
    return folder


def sum_weights(model: str) -> float:
    return float(sum(p.detach().double().abs().sum() for p in open_model(model).model.parameters()))


def test_a_hub_id_opens_from_the_hubs_cache_and_its_licence_is_told(cache: Path, hub_files: Path) -> None:
    names = [
        HUB,
        f"hf-hub:{HUB}",
        "apple/DFN2B-CLIP-ViT-B-16",
        "hf-hub:nobody/nothing",
        "ViT-B-32/datacomp_m_s128m_b4k",
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    bare, prefixed, no_weights, nowhere, tag = [json.loads(line) for line in done.stdout.splitlines()]
    settings = {
        "architecture": f"hf-hub:{HUB}",
        "sha256": sha256_of_file(str(hub_files / "open_clip_pytorch_model.bin")),
    }
    assert bare == prefixed == [settings, sum_weights(str(hub_files)), HUB]
    assert f"filter dfn uses the weights of {HUB}, licence: apple-amlr" in done.stderr
    assert "hf download apple/DFN2B-CLIP-ViT-B-16 --local-dir FOLDER" in no_weights
    assert "hf download nobody/nothing --local-dir FOLDER" in nowhere and "not on this machine" in nowhere
    assert "hf download laion/CLIP-ViT-B-32-DataComp.M-s128M-b4K" in tag


def test_a_folder_with_a_hub_models_files_is_a_model(hub_files: Path) -> None:
    model = str(hub_files)
    source = find_clip(model)
    assert source.brings_config and model not in source.name and source.name.startswith("config:")
    assert embed_dim_of(model) == open_model(model).embed_dim
    assert sha256_of_model(model) == sha256_of_file(str(hub_files / "open_clip_pytorch_model.bin"))
    saved = torch.load(hub_files / "open_clip_pytorch_model.bin", weights_only=True)
    opened = open_model(model)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in opened.model.state_dict().items())
    normalise = opened.eval_transform.transforms[-1]
    assert np.allclose(normalise.mean, 0.5)  # the preprocessing is the config's own


def test_identity_is_that_of_the_files_not_of_the_place(hub_files: Path, tmp_path: Path) -> None:
    copy = tmp_path / "DFN-public"
    shutil.copytree(hub_files, copy)
    first, second = (build_filter({"filter": "clip_score", "name": "d", "model": str(f)}) for f in (hub_files, copy))
    assert first.identity == second.identity
    (copy / "open_clip_config.json").write_text((copy / "open_clip_config.json").read_text() + " ")
    assert build_filter({"filter": "clip_score", "name": "d", "model": str(copy)}).identity != first.identity


def test_a_folders_name_tells_the_hub_id_and_nothing_else_does(
    hub_files: Path, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(hub_files, tmp_path / "DFN-public")
    assert find_hub_id(str(tmp_path / "DFN-public")) == HUB
    assert find_hub_id(str(cache / "models--apple--DFN-public/snapshots" / ("a" * 40))) == HUB
    assert find_hub_id(str(hub_files)) is None
    build_filter({"filter": "clip_score", "model": str(tmp_path / "DFN-public")})
    assert "licence: apple-amlr" in caplog.text


def test_a_folder_that_lacks_something_says_what(hub_files: Path, tmp_path: Path) -> None:
    shutil.copytree(hub_files, tmp_path / "half")
    (tmp_path / "half/open_clip_pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"neither open_clip_model.safetensors nor open_clip_pytorch_model.bin"):
        find_clip(str(tmp_path / "half"))
    with pytest.raises(ModelError, match=r"winnow dfn list"):
        find_clip("apple/DFN-secret")


def test_tags_lead_to_the_same_licence() -> None:
    assert find_hub_id("ViT-H-14-378/dfn5b") == "apple/DFN5B-CLIP-ViT-H-14-378"
    assert find_hub_id("ViT-B-16/dfn2b") == "apple/DFN2B-CLIP-ViT-B-16"
    assert find_hub_id("ViT-B-32") is None
    by_tag = {find_hub_id(model) for model in list_pretrained()}
    assert {row.hub for row in RELEASED} - by_tag == {HUB}  # open_clip has no tag for it


def test_an_unlisted_network_has_an_unknown_licence_not_a_free_one() -> None:
    assert spell_licence("someone/else") == "unknown to winnow; read https://huggingface.co/someone/else"
    assert spell_licence("laion/CLIP-ViT-B-32-laion2B-s34B-b79K").startswith("mit, not verified; ")
    assert len({row.hub for row in RELEASED}) == len(RELEASED) and find_released("x/y") is None


def test_the_list_names_every_network_with_its_licence(capsys: pytest.CaptureFixture[str]) -> None:
    assert list_networks([]) == 0
    short = capsys.readouterr().out
    assert all(row.hub in short and row.licence in short for row in RELEASED)
    assert list_networks(["--all"]) == 0
    long = capsys.readouterr().out
    assert all(f"{model} " in long for model in list_pretrained())
    assert "ViT-B-32/openai" in long and len(long.splitlines()) == len(short.splitlines()) + len(list_pretrained())
