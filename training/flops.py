"""What a sample costs and what a GPU could do, for the share that is used (MFU).

The forward pass of each tower is counted by torch on tensors without data, attention included; the backward pass counts
twice that, and nothing for a locked tower.  Recomputation by checkpointing or caching is no useful work: not counted.
"""

import logging
import re
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

log = logging.getLogger("winnow")
PEAK_TFLOP_PER_S = {
    "B200": 2250.0, "H200": 989.0, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "L40S": 362.0, "L4": 121.0,
    "A100": 312.0, "A10G": 70.0, "A10": 125.0, "V100": 125.0,
}  # fmt: skip
"""Dense bf16 (V100: fp16) of NVIDIA's data sheets, by a part of the device's name; the first that fits counts."""
NUM_COUNTED = 2
"""Samples counted at once, as batch norm refuses one."""


def count_flops(model: Any, *, context_length: int, token_share: float = 1.0) -> float | None:
    """Return the operations of training on one sample, in FLOP; None, with a warning, where they cannot be counted.

    `token_share` is the share of its tokens that the text tower is run on.
    """
    image = torch.empty(NUM_COUNTED, 3, *_image_size(model), device="meta")
    tokens = torch.zeros(NUM_COUNTED, context_length, dtype=torch.long, device="meta")
    is_text_trained = any(p.requires_grad for name, p in model.named_parameters() if _is_text(name))
    try:
        image_flops, text_flops = (_count_forward(model, pair) for pair in ((image, None), (None, tokens)))
    except Exception as error:  # a backbone may look at its data, which here is none
        log.warning("train: no MFU, as the model's work cannot be counted: %s", " ".join(str(error).split())[:200])
        return None
    return (3 * image_flops + (3 if is_text_trained else 1) * token_share * text_flops) / NUM_COUNTED


def find_peak(device: torch.device, num_devices: int = 1) -> float | None:
    """Return the peak of so many GPUs in FLOP/s, None for a CPU or one that is not in the table."""
    if device.type != "cuda":
        return None
    peak = peak_of(torch.cuda.get_device_name(device))
    return None if peak is None else num_devices * peak


def peak_of(name: str) -> float | None:
    """Return the peak in FLOP/s of the GPU that calls itself that; an A1000 is no A100."""
    peaks = PEAK_TFLOP_PER_S.items()
    return next((peak * 1e12 for part, peak in peaks if re.search(rf"\b{part}\b", name)), None)


def _count_forward(model: Any, inputs: tuple[Any, Any]) -> int:
    weights = {name: tensor.detach().to("meta") for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(model, weights, inputs)
    return int(counter.get_total_flops())


def _image_size(model: Any) -> tuple[int, int]:
    size = model.visual.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def _is_text(name: str) -> bool:
    return not name.startswith(("visual.", "logit_"))
