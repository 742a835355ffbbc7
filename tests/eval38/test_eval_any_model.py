"""Models that are no CLIP of open_clip's: a SigLIP-like folder, and a function of the user's own."""

import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval38 import python_model
from eval38.embed import Encoder
from eval38.python_model import is_python_model, open_python_model
from eval38.results import ModelIdentity, build_provenance, identify_model
from pipeline.clip_model import open_model
from pipeline.errors import ConfigError, ModelError

SIGLIP = {
    "model_cfg": {
        "embed_dim": 32,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 1,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
        },
    },
    "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"},
}
"""The shape of open_clip's SigLIP configs, but for size, image tower and tokenizer (theirs comes from the hub)."""
OWN = """
import torch
from torchvision.transforms import CenterCrop, Compose, Grayscale, Normalize, Resize, ToTensor

class Colours(torch.nn.Module):
    def encode_image(self, image):
        return image.mean(dim=(2, 3))

    def encode_text(self, tokens):
        return torch.eye(3)[tokens[:, 0]]

def make(device):
    transform = Compose([Resize(8), CenterCrop(8), ToTensor(), Normalize((0.0,) * 3, (1.0,) * 3)])
    words = ("red", "green", "blue")
    find = lambda text: [n for n, word in enumerate(words) if word in text] or [0]
    return Colours(), transform, lambda texts: torch.tensor([find(text) for text in texts])

def wrong(device):
    return None

def no_module(device):
    return object(), None, None

def no_tokens(device):
    return Colours(), None, lambda texts: texts

def no_transform(device):
    return (*make(device)[:1], None, make(device)[2])

def grey(device):
    colours, transform, tokenize = make(device)
    colours.encode_image = lambda image: image.mean(dim=(1, 2, 3))[:, None]
    return colours, transform, tokenize

def no_words():
    return make("cpu")

def no_crop(device):
    colours, transform, tokenize = make(device)
    return colours, Compose([transform.transforms[0], *transform.transforms[2:]]), tokenize

def grey_pictures(device):
    colours, transform, tokenize = make(device)
    return colours, Compose([*transform.transforms[:2], Grayscale(), ToTensor(), Normalize((0.0,), (1.0,))]), tokenize

def small_batches(device):
    colours, transform, tokenize = make(device)
    colours.encode_image = lambda image: image.mean(dim=(2, 3)) if len(image) < 3 else fail()
    return colours, transform, tokenize

def fail():
    raise RuntimeError("out of memory\\n and so on")

def missing(device):
    return {}["weights"]

value = 3
"""


def test_a_siglip_folder_is_read_squashed_and_unmasked(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps(SIGLIP))
    torch.manual_seed(0)
    import open_clip

    fresh = open_clip.create_model(f"local-dir:{tmp_path}", load_weights=False)
    torch.save(fresh.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    opened = open_model(str(tmp_path))
    encoder = Encoder(opened, device="cpu", precision="fp32")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 90, 3), dtype=np.uint8)
    squashed = np.array(encoder.geometry(Image.fromarray(pixels)))
    assert squashed.shape == (32, 32, 3)
    np.testing.assert_array_equal(
        squashed, np.array(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC))
    )
    text_MD = encoder.encode_prompts(["a cat", "a dog"], quiet=True)
    with torch.inference_mode():
        wanted = fresh.eval().encode_text(open_clip.get_tokenizer(f"local-dir:{tmp_path}")(["a cat", "a dog"]))
    assert torch.allclose(text_MD, torch.nn.functional.normalize(wanted, dim=-1), atol=1e-6)
    image_ND = encoder.encode_images(torch.from_numpy(squashed)[None])
    logits = fresh.logit_scale.exp() * image_ND @ text_MD.T + fresh.logit_bias
    assert logits.argmax() == (image_ND @ text_MD.T).argmax()


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Return a function that gives the model string of one of OWN's functions."""
    name = f"own_{tmp_path.name}".replace("[", "_").replace("]", "_").replace("-", "_")
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return lambda function: f"{name}:{function}"


def test_a_function_of_ones_own(own: Callable[[str], str]) -> None:
    opened = open_python_model(own("make"), device="cpu")
    assert opened.embed_dim == 3
    encoder = Encoder(opened, device="cpu", precision="fp32")
    image = np.array(encoder.geometry(Image.new("RGB", (20, 30), (0, 250, 5))))
    best = (
        encoder.encode_images(torch.from_numpy(image)[None])
        @ encoder.encode_prompts(["red", "a green one"], quiet=True).T
    )
    assert best.argmax().item() == 1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nothing", "has no attribute"),
        ("wrong", r"should return \(model, transform, tokenize\), not NoneType"),
        ("no_module", "no torch module"),
        ("no_tokens", "tokenize makes list of two strings"),
        ("no_transform", "'NoneType' object is not callable"),
        ("no_crop", r"transform makes \(3, 8, 10\) and \(3, 10, 8\) of 64 x 48 and 48 x 64 px"),
        ("grey_pictures", r"transform makes \(1, 8, 8\) and \(1, 8, 8\) of"),
        ("grey", r"makes \(2, 3\) of two texts and \(2, 1\) of two images"),
        ("no_words", "takes 0 positional arguments but 1 was given"),
        ("missing", r"KeyError: 'weights' \(.*own_.*\.py, line \d+\)"),
        ("value", "'int' object is not callable"),
    ],
)
def test_a_function_that_makes_no_model(own: Callable[[str], str], function: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        open_python_model(own(function), device="cpu")


def test_a_batch_that_a_model_cannot_take(own: Callable[[str], str]) -> None:
    encoder = Encoder(open_python_model(own("small_batches"), device="cpu"), device="cpu", precision="fp32")
    with pytest.raises(
        ModelError, match=r"fails on 3 inputs of shape \(3, 8, 8\) on cpu: out of memory. If memory ran"
    ):
        encoder.encode_images(torch.zeros(3, 8, 8, 3, dtype=torch.uint8))


def test_other_code_with_the_same_weights_is_another_model(
    own: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = own("make")
    name = model.partition(":")[0]
    before, _ = identify_model(model, device="cpu")
    assert identify_model(model, device="cpu")[0] == before
    path = Path(f"{name}.py")
    path.write_text(path.read_text().replace("Normalize((0.0,)", "Normalize((0.5,)"))
    with pytest.raises(ConfigError, match=rf"{path.name} changed after this process loaded it.*start another process"):
        identify_model(model, device="cpu")
    monkeypatch.delitem(sys.modules, name)  # as in another process
    monkeypatch.setattr(python_model, "_loaded", {})
    assert identify_model(model, device="cpu")[0].sha256 != before.sha256


def test_a_module_it_imports_is_part_of_it(own: Callable[[str], str]) -> None:
    model = own("make")
    path, neighbour = Path(f"{model.partition(':')[0]}.py"), Path(f"beside_{model.partition(':')[0]}.py")
    neighbour.write_text("SIZE = 8")
    path.write_text(f"from {neighbour.stem} import SIZE\n" + path.read_text())
    identify_model(model, device="cpu")
    assert b"SIZE = 8\0" in python_model.read_code(model)
    neighbour.write_text("SIZE = 9")
    with pytest.raises(ConfigError, match=rf"{neighbour.name} changed after"):
        identify_model(model, device="cpu")


def test_the_config_of_a_hub_model_is_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "models--org--net"
    (folder / "refs").mkdir(parents=True)

    def identify(commit: str, mean: float) -> ModelIdentity:
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "open_clip_pytorch_model.bin").write_bytes(b"the same weights")
        config = {**SIGLIP, "preprocess_cfg": {"mean": [mean] * 3}}
        (snapshot / "open_clip_config.json").write_text(json.dumps(config))
        (folder / "refs" / "main").write_text(commit)
        return identify_model("hf-hub:org/net", device="cpu")[0]

    one, other = identify("a" * 40, 0.5), identify("b" * 40, 0.4)
    assert one.sha256 == other.sha256 and one.name == other.name == "hf-hub:org/net"
    old, new = (build_provenance("mnist", of, data_hash="d", precision="fp32") for of in (one, other))
    assert old["model_config"] != new["model_config"] and old | {"model_config": new["model_config"]} == new
    assert new["timm"] == importlib.metadata.version("timm")


def test_a_module_that_is_not_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("half_written.py").write_text("def make(device:\n")
    with pytest.raises(ModelError, match=r"SyntaxError: .*half_written.py, line 1"):
        open_python_model("half_written:make", device="cpu")


def test_a_module_that_is_not_there() -> None:
    with pytest.raises(ModelError, match="No module named 'nowhere_at_all'"):
        open_python_model("nowhere_at_all:make", device="cpu")


@pytest.mark.parametrize(
    ("model", "is_one"),
    [
        ("mine:make", True),
        ("a.b.c:make", True),
        ("hf-hub:org/name", False),
        ("timm:volo_d1_224", False),
        ("ViT-B-32/openai", False),
        ("ViT-B-32@a:b.pt", False),
        ("mine:make()", False),
        ("s3://bucket/x", False),
    ],
)
def test_which_strings_name_a_function(model: str, is_one: bool) -> None:
    assert is_python_model(model) == is_one
