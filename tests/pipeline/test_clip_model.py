import pytest

from pipeline.clip_model import find_clip


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
