"""A model of the user's own Python: --model MODULE:FUNCTION.

FUNCTION(device) returns (model, transform, tokenize): a torch module in eval mode on that device with
encode_image((N, 3, H, W) float32) -> (N, D) and encode_text(tokens) -> (N, D); a torchvision transform that ends in
ToTensor and Normalize; and a function from a list of M strings to M rows of tokens (a tensor).  A softmax temperature
or a SigLIP bias changes no ranking, so neither is asked for.  MODULE is imported as Python would, the current folder
first, which runs its code: name none that you do not trust.
"""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.clip_model import OpenedClip
from pipeline.errors import ModelError
from pipeline.timm_towers import TIMM_PREFIX

PYTHON_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", re.ASCII)


def is_python_model(model: str) -> bool:
    """Return whether a model string is MODULE:FUNCTION."""
    return bool(PYTHON_NAME.fullmatch(model)) and not model.startswith(TIMM_PREFIX)


def open_python_model(model: str, *, device: str) -> OpenedClip:
    """Return what MODULE:FUNCTION makes.  Raises ModelError when it cannot be called or makes something else."""
    module, _, name = model.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ModelError(f"model {model!r}: {error}. Name a function of a module that Python finds here.") from error
    made = function(device)
    if not (isinstance(made, tuple) and len(made) == 3):
        raise ModelError(f"model {model!r} should return (model, transform, tokenize), not {type(made).__name__}.")
    net, transform, tokenize = made
    if not isinstance(net, torch.nn.Module) or any(not hasattr(net, of) for of in ("encode_image", "encode_text")):
        raise ModelError(f"model {model!r} returns {type(net).__name__}, no torch module that encodes images and text.")
    return OpenedClip(net.eval(), transform, transform, tokenize, _measure_dim(model, net, tokenize, device))


def read_code(model: str) -> bytes:
    """Return the source of the imported module: the same weights give other vectors in other code."""
    file = sys.modules[model.partition(":")[0]].__file__
    return Path(file).read_bytes() if file else b""


def _measure_dim(model: str, net: Any, tokenize: Any, device: str) -> int:
    tokens = tokenize(["a", "b"])
    if not isinstance(tokens, torch.Tensor) or len(tokens) != 2:
        raise ModelError(
            f"model {model!r}: tokenize makes {type(tokens).__name__} of two strings, no tensor of two rows."
        )
    with torch.inference_mode():
        text_MD = net.encode_text(tokens.to(device))
    if text_MD.ndim != 2 or len(text_MD) != 2:
        raise ModelError(f"model {model!r}: encode_text makes shape {tuple(text_MD.shape)} of two texts, not (2, D).")
    return int(text_MD.shape[1])
