"""Weight ensembling: theta = (1 - a) * weights before fine-tuning + a * weights after (WiSE-FT, arXiv:2109.01903).

DFN fine-tunes this way and does not publish its a (Fang et al. 2023, arXiv:2309.17425, section 4), so it is a parameter
here.  Every floating-point tensor is mixed, the logit scale (a logarithm) and batch-norm statistics included; others
are taken from after.  a = 0 and a = 1 give the weights before and after, value for value.
"""

from collections.abc import Mapping

import torch

from pipeline.clip_model import open_model
from pipeline.errors import ModelError
from training.checkpoint import save_weights

State = Mapping[str, torch.Tensor]


def interpolate(before: State, after: State, share: float) -> dict[str, torch.Tensor]:
    """Return (1 - share) * before + share * after, tensor by tensor, computed in float32 or wider.

    Raises ModelError for states that are not of one architecture.
    """
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (before, after)]
    if shapes[0] != shapes[1]:
        names = sorted(name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name))
        raise ModelError(f"weights of two architectures cannot be mixed; they differ in {', '.join(names[:5])}.")
    return {name: _mix(before[name], after[name], share) for name in before}


def _mix(before: torch.Tensor, after: torch.Tensor, share: float) -> torch.Tensor:
    if not after.is_floating_point() or share in (0, 1):
        return before if share == 0 else after
    wide = torch.promote_types(after.dtype, torch.float32)
    return ((1 - share) * before.to(wide) + share * after.to(wide)).to(after.dtype)


def write_ensemble(out: str, *, before: str, after: str, share: float, architecture: str) -> None:
    """Write checkpoint and architecture of the mixture of two runs into the folder `out`; no manifest."""
    model = open_model(after).model
    mixed = interpolate(open_model(before).model.state_dict(), model.state_dict(), share)
    model.load_state_dict(mixed)
    save_weights(out, model, architecture=architecture)
