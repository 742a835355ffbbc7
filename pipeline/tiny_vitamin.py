"""Registers `winnow_vitamin_tiny_32` with timm: ViTamin's stages (Chen et al. 2024, arXiv:2404.02132) at toy width.

Two convolution stages of MBConv-LN blocks, then transformer blocks with GeGLU, as timm/models/vitamin.py builds the
real sizes.  open_clip configs cannot pass such a layout, so it needs a timm entry point.
"""

from typing import Any

from timm.models import register_model
from timm.models.vitamin import GeGluMlp, VitCfg, VitConvCfg, _create_vitamin


@register_model  # type: ignore[untyped-decorator]
def winnow_vitamin_tiny_32(pretrained: bool = False, **kwargs: Any) -> Any:
    """Return a ViTamin trunk for 32 px images: 16 and 32 conv channels, then 3 blocks of 128 over stride-16 tokens."""
    layout = VitCfg(
        embed_dim=(16, 32, 128),
        depths=(1, 1, 1),
        stem_width=16,
        conv_cfg=VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6),
        head_type="1d",
    )
    settings: dict[str, Any] = {"embed_dim": 128, "depth": 3, "num_heads": 4, "img_size": 32, "mlp_ratio": 2.0}
    settings |= {"mlp_layer": GeGluMlp, "class_token": False, "global_pool": "avg", "embed_cfg": layout}
    return _create_vitamin("winnow_vitamin_tiny_32", pretrained=pretrained, **(settings | kwargs))
