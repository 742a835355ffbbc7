from pathlib import Path

import pytest
import torch

from pipeline.clip_model import find_clip, open_model


@pytest.mark.parametrize(
    ("model", "architecture"),
    [
        ("ViT-B-32/openai", "ViT-B-32-quickgelu"),
        ("ViT-L-14/openai", "ViT-L-14-quickgelu"),
        ("ViT-L-14-quickgelu/openai", "ViT-L-14-quickgelu"),
        ("ViT-H-14/dfn5b", "ViT-H-14-quickgelu"),
        ("ViT-B-32/laion2b_s34b_b79k", "ViT-B-32"),
        ("ViT-B-32", "ViT-B-32"),
    ],
)
def test_pretrained_weights_get_the_activation_they_were_trained_with(model: str, architecture: str) -> None:
    assert find_clip(model).architecture == architecture


def test_the_image_towers_that_are_compared_are_of_one_size() -> None:
    sizes = {}
    for name in ("winnow-vit-tiny", "winnow-vit-tiny-16", "winnow-vitamin-tiny-deep"):
        opened = open_model(name)
        sizes[name] = sum(parameter.numel() for parameter in opened.model.visual.parameters())
        with torch.no_grad():
            assert opened.model.encode_image(torch.zeros(1, 3, 32, 32)).shape == (1, 128)
    assert max(sizes.values()) < 1.01 * min(sizes.values())


def test_a_checkpoint_file_tells_whether_it_has_siglips_bias(tmp_path: Path) -> None:
    weights = open_model("winnow-vit-tiny", init_logit_bias=-3.0).model.state_dict()
    spread = {f"module.{name}": tensor for name, tensor in weights.items()}
    plain = {name: tensor for name, tensor in weights.items() if name != "logit_bias"}
    for content, bias in (({"state_dict": spread, "step": 1}, -3.0), (plain, None)):
        torch.save(content, tmp_path / "file.pt")
        found = open_model(f"winnow-vit-tiny@{tmp_path / 'file.pt'}").model.logit_bias
        assert (None if found is None else found.item()) == bias
