"""A model of the user's own Python: --model MODULE:FUNCTION.

FUNCTION(device) returns (model, transform, tokenize): a torch module in eval mode on that device with
encode_image((N, 3, H, W) float32) -> (N, D) and encode_text(tokens) -> (N, D); a torchvision transform that ends in
ToTensor and Normalize; and a function from a list of M strings to M rows of tokens (a tensor).  A softmax temperature
or a SigLIP bias changes no ranking, so neither is asked for.  MODULE is imported as Python would, the current folder
first, which runs its code: name none that you do not trust.

The model's identity is its weights, the module's source and that of the modules loaded from the same folder.  Python
loads a module once, so a source that changes after that is refused until another process starts.
"""

import importlib
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from pipeline.clip_model import OpenedClip
from pipeline.code_zip import PACKAGES
from pipeline.errors import ConfigError, ModelError, WinnowError
from pipeline.timm_towers import TIMM_PREFIX

PYTHON_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", re.ASCII)
INSTALLED = "-packages"
"""In the path of what pip or a distribution installed: site-packages, dist-packages."""
_loaded: dict[str, bytes] = {}
"""By file: the source as it was when this process loaded it."""


def is_python_model(model: str) -> bool:
    """Return whether a model string is MODULE:FUNCTION."""
    return bool(PYTHON_NAME.fullmatch(model)) and not model.startswith(TIMM_PREFIX)


def open_python_model(model: str, *, device: str) -> OpenedClip:
    """Return what MODULE:FUNCTION makes, tried on a text and a grey image.

    Raises ModelError, with the line of the user's code, when it fails or makes something else; ConfigError when the
    code changed after this process loaded it.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return _call(model, device)
    except WinnowError:
        raise
    except Exception as error:  # whatever the user's code raises
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise ModelError(
            f"model {model!r}: {type(error).__name__}: {error} ({last.filename}, line {last.lineno}). "
            "MODULE:FUNCTION names a function of a module that Python finds here; it is called with the device."
        ) from error


def _call(model: str, device: str) -> OpenedClip:
    import torch

    module, _, name = model.partition(":")
    imported = importlib.import_module(module)
    read_code(model)  # now, before anybody edits it
    made = getattr(imported, name)(device)
    if not (isinstance(made, tuple) and len(made) == 3):
        raise ModelError(f"model {model!r} should return (model, transform, tokenize), not {type(made).__name__}.")
    net, transform, tokenize = made
    if not isinstance(made[0], torch.nn.Module) or any(not hasattr(net, of) for of in ("encode_image", "encode_text")):
        raise ModelError(f"model {model!r} returns {type(net).__name__}, no torch module that encodes images and text.")
    net.eval()
    with torch.inference_mode():
        tokens = tokenize(["a", "b"])
        if not isinstance(tokens, torch.Tensor) or len(tokens) != 2:
            raise ModelError(f"model {model!r}: tokenize makes {type(tokens).__name__} of two strings, no two rows.")
        text_2D = net.encode_text(tokens.to(device))
        pictures = [transform(Image.new("RGB", size)) for size in ((64, 48), (48, 64))]
        if any(picture.shape != (3, *pictures[0].shape[1:]) for picture in pictures):
            made_of = " and ".join(str(tuple(picture.shape)) for picture in pictures)
            raise ModelError(
                f"model {model!r}: transform makes {made_of} of 64 x 48 and 48 x 64 px, not one (3, H, W)."
            )
        image_2D = net.encode_image(torch.stack(pictures).to(device))
    shapes = tuple(text_2D.shape), tuple(image_2D.shape)
    if shapes[0] != shapes[1] or len(shapes[0]) != 2 or len(text_2D) != 2:
        raise ModelError(f"model {model!r} makes {shapes[0]} of two texts and {shapes[1]} of two images, not (2, D).")
    return OpenedClip(net, transform, transform, tokenize, text_2D.shape[1])


def read_code(model: str) -> bytes:
    """Return the source of the module and of its neighbours: the same weights give other vectors in other code.

    Neighbours are the modules loaded from its folder or below; Python's, installed ones and winnow's own are none.
    Raises ConfigError for a source that changed after this process loaded it: the old code would go by the new name.
    """
    module = model.partition(":")[0]
    file = sys.modules[module].__file__
    sources = {file, *_find_neighbours(Path(file).parent)} if file else set()
    for source in sources:
        if _loaded.setdefault(source, content := Path(source).read_bytes()) != content:
            raise ConfigError(
                f"{source} changed after this process loaded it, and Python would go on with the old code: start "
                f"another process to evaluate {model!r}."
            )
    return b"\0".join(_loaded[source] for source in sorted(sources))


def _find_neighbours(folder: Path) -> Iterator[str]:
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        foreign = name.partition(".")[0] in {*sys.stdlib_module_names, *PACKAGES, "__main__"}
        if file.endswith(".py") and Path(file).is_relative_to(folder) and not foreign and INSTALLED not in file:
            yield file
