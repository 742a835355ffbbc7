"""`timm:NAME` -> an open_clip config with that timm backbone as image tower, so that any of timm's can be trained.

The backbone pools as timm made it; a linear layer takes it to 512 dims.  The text tower is that of ViT-B-32 and
ViTamin-B: 12 layers of 512, 8 heads, 77 tokens.  Images have the size of the backbone's pretrained weights.
"""

from typing import Any

from pipeline.errors import ConfigError, check_name

TIMM_PREFIX = "timm:"
EMBED_DIM = 512
DEFAULT_SIDE_PX = 224


def describe_timm(model: str) -> dict[str, Any]:
    """Return the open_clip config of timm:NAME.  Raises ConfigError (with near names) for a backbone timm has not."""
    import timm

    name = model.removeprefix(TIMM_PREFIX)
    try:
        check_name(name, timm.list_models(), kind="timm backbone")
    except ConfigError as error:  # timm has over a thousand
        raise ConfigError(str(error).split("Known:")[0] + "timm.list_models() has them all.") from None
    settings = timm.get_pretrained_cfg(name)
    side = settings.input_size[-1] if settings else DEFAULT_SIDE_PX
    image = {"timm_model_name": name, "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear"}
    text = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
    return {
        "embed_dim": EMBED_DIM,
        "vision_cfg": image | {"image_size": side},
        "text_cfg": text,
        "custom_text": True,
    }
