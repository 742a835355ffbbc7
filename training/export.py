"""A model -> a folder in the Hugging Face hub's layout for open_clip: config, weights in two formats, model card.

`open_clip.create_model_and_transforms("local-dir:FOLDER")` opens it, as hf-hub:ORG/NAME does after an upload, and so
does every stage of winnow.  The folder needs nothing of winnow's, but for a backbone that only winnow has.
"""

import json
from typing import Any

import torch

from pipeline.clip_model import describe_architecture, find_clip, open_model
from pipeline.errors import ModelError
from pipeline.hub_files import HUB_CONFIG, HUB_WEIGHTS
from pipeline.manifest import Manifest, read_manifest
from pipeline.storage import is_folder, join, write_atomic, write_bytes

CARD = "README.md"
PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


def export_model(model: str, out: str) -> None:
    """Write the named model into the folder `out`.

    Raises ModelError for one that has a config of its own already, or fresh weights.
    """
    from safetensors.torch import save

    source = find_clip(model)
    if source.brings_config:
        raise ModelError(f"model {model!r} comes in the hub's layout already: copy its files.")
    if source.weights is None:
        raise ModelError(f"model {model!r} has fresh weights: name a run folder or a checkpoint.")
    module = open_model(model).model
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in module.state_dict().items()}
    write_bytes(join(out, HUB_WEIGHTS[0]), save(state))
    with write_atomic(join(out, HUB_WEIGHTS[1])) as file:
        torch.save(state, file)
    made = read_manifest(model) if is_folder(model) else None
    write_bytes(join(out, CARD), write_card(source.architecture, made).encode())
    settings = describe_architecture(source.architecture) | dict(source.settings)
    preprocessing = {name: module.visual.preprocess_cfg[name] for name in PREPROCESSING}
    config = {"model_cfg": settings, "preprocess_cfg": preprocessing}
    write_bytes(join(out, HUB_CONFIG), (json.dumps(config, indent=2) + "\n").encode())


def write_card(architecture: str, made: Manifest | None) -> str:
    """Return the model card, with the choices and facts of the run where it is winnow's."""
    head = "---\nlibrary_name: open_clip\npipeline_tag: zero-shot-image-classification\ntags: [clip]\n---\n"
    text = (
        f"# {architecture}\n\nA CLIP model in open_clip's layout.\n\n```python\nimport open_clip\n\n"
        'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")  # or "hf-hub:ORG/NAME"\n'
        'tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")\n```\n'
    )
    if made is None:
        return head + text
    rows = {name: f"{account.kept:,} of {account.read:,} rows" for name, account in made.counts.items()}
    return (
        head
        + text
        + "".join(
            f"\n## {title}\n\n| | |\n|---|---|\n"
            + "".join(f"| {name} | {_cell(value)} |\n" for name, value in values.items())
            for title, values in (("Training", made.config), ("Data", rows), ("Outcome", made.facts))
        )
    )


def _cell(value: Any) -> str:
    return (f"{value:g}" if isinstance(value, float) else json.dumps(value)).replace("|", "\\|").strip('"')
