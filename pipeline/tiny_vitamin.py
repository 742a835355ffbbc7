"""Registers small ViTamins for 32 px images with timm (Chen et al. 2024, arXiv:2404.02132), for open_clip to name.

Two convolution stages of MBConv-LN blocks, then transformer blocks with GeGLU over stride-16 tokens, as
timm/models/vitamin.py builds the real sizes.  open_clip configs cannot pass such a layout, hence the timm entry points.
"""

from typing import Any

from timm.models import register_model
from timm.models.vitamin import GeGluMlp, VitCfg, VitConvCfg, _create_vitamin

WIDTH = 128
"""Of the transformer blocks."""


@register_model  # type: ignore[untyped-decorator]
def winnow_vitamin_tiny_32(pretrained: bool = False, **kwargs: Any) -> Any:
    """Return the smallest: one block of 16 and one of 32 channels, then 3 transformer blocks."""
    return _create("winnow_vitamin_tiny_32", pretrained, kwargs, channels=16, conv_depths=(1, 1), depth=3)


@register_model  # type: ignore[untyped-decorator]
def winnow_vitamin_tiny_deep_32(pretrained: bool = False, **kwargs: Any) -> Any:
    """Return one as large as winnow-vit-tiny: 2 and 4 conv blocks as the real sizes have, then 4 transformer blocks."""
    return _create("winnow_vitamin_tiny_deep_32", pretrained, kwargs, channels=24, conv_depths=(2, 4), depth=4)


def _create(
    name: str, pretrained: bool, kwargs: dict[str, Any], *, channels: int, conv_depths: tuple[int, int], depth: int
) -> Any:
    layout = VitCfg(
        embed_dim=(channels, 2 * channels, WIDTH),
        depths=(*conv_depths, 1),
        stem_width=channels,
        conv_cfg=VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6),
        head_type="1d",
    )
    settings: dict[str, Any] = {"embed_dim": WIDTH, "depth": depth, "num_heads": 4, "img_size": 32, "mlp_ratio": 2.0}
    settings |= {"mlp_layer": GeGluMlp, "class_token": False, "global_pool": "avg", "embed_cfg": layout}
    return _create_vitamin(name, pretrained=pretrained, **(settings | kwargs))
