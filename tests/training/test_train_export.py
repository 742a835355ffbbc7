import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from jobs.__main__ import main
from pipeline.clip_model import open_model
from training.config import TrainConfig
from training.run import train

PLAIN = """
import sys, torch, open_clip
from PIL import Image
model, _, transform = open_clip.create_model_and_transforms("local-dir:" + sys.argv[1])
tokens = open_clip.get_tokenizer("local-dir:" + sys.argv[1])(["a red square"])
model.eval()
pixels = transform(Image.new("RGB", (40, 50), "red"))
torch.save([model.encode_text(tokens).detach(), model.logit_bias.detach(), pixels], sys.argv[2])
"""


@pytest.fixture(scope="module")
def exported(squares, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    config = TrainConfig(model="winnow-vit-tiny", samples=64, batch_size=32, loss="siglip")
    train(config, data=str(squares), out=str(folder / "run"), quiet=True)
    assert main(["export", str(folder / "run"), "--to", str(folder / "hub")]) == 0
    return folder


def test_open_clip_alone_opens_it(exported, tmp_path):
    """In a process that never saw winnow, so that the architecture comes from the folder."""
    command = [sys.executable, "-W", "ignore", "-c", PLAIN, str(exported / "hub"), str(tmp_path / "seen.pt")]
    subprocess.run(command, check=True, cwd=tmp_path)
    features, bias, pixels = torch.load(tmp_path / "seen.pt", weights_only=True)
    ours = open_model(str(exported / "run"))
    assert torch.equal(features, ours.model.encode_text(ours.tokenize(["a red square"])).detach())
    assert torch.equal(bias, ours.model.logit_bias)
    assert torch.equal(pixels, ours.eval_transform(Image.new("RGB", (40, 50), "red")))


def test_winnow_opens_it_and_both_formats_hold_the_same(exported):
    image = Image.new("RGB", (40, 50), "red")
    run, hub = (open_model(str(exported / name)) for name in ("run", "hub"))
    for ours, theirs in zip(run.model.state_dict().values(), hub.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(run.eval_transform(image), hub.eval_transform(image))
    pickled = torch.load(exported / "hub" / "open_clip_pytorch_model.bin", weights_only=True)
    stored = load_file(exported / "hub" / "open_clip_model.safetensors")
    assert pickled.keys() == stored.keys() and all(torch.equal(pickled[name], stored[name]) for name in stored)


def test_the_card_says_how_it_was_trained(exported):
    card = (exported / "hub" / "README.md").read_text()
    for line in ("library_name: open_clip", "| loss | siglip |", "| samples_seen | 64 |", "| rows | 256 of 256 rows |"):
        assert line in card


@pytest.mark.parametrize(("model", "message"), [("winnow-vit-tiny", "fresh weights"), ("absent/run", "neither")])
def test_what_cannot_be_exported_is_named(model, message, tmp_path, capsys):
    assert main(["export", model, "--to", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
