"""open_clip_train's own main loop against winnow's on the same weights and batches: is every step the same?

`python -m tests.parity.open_clip_train --python PEER_PYTHON [--model ViT-B-32] [--batch 8] [--steps 50] ...`

PEER_PYTHON is an environment with open_clip_torch 3.3.0 and webdataset 0.2.86.  Winnow trains on made shards; then
open_clip_train.main runs whole, with only its data answered: the uint8 crops, tokens and per-step seeds that winnow
used.  So the init, weight-decay groups, schedule, loss, clipping, accumulation and clamp are the peer's.  Compared:
loss, learning rates and decays of each step; optimiser groups by name, betas, eps, the logit scale at the end.
With --accum the peer adds the gradient of the logit scale (and bias) once per part, as its train.py calls backward on
the whole loss for each; `--scale-once` divides it by the parts before the peer clips.
`--freeze FILE` writes the peer's numbers for tests/training/test_train_parity.py.  Exit code 1 when something differs.
"""

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pipeline.clip_model import open_model
from training.config import TrainConfig
from training.data import open_batches
from training.images import read_crop
from training.index import list_tars, read_index
from training.optim import build_optimizer
from training.order import step_seed
from training.run import train

TOLERANCE = 1e-4
PEER = """
import importlib.util, json, sys
from types import SimpleNamespace
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
asked = torch.load(sys.argv[1], weights_only=True)
import open_clip
open_clip.add_model_config(asked["ours"] + "/clip_models")
spec = importlib.util.spec_from_file_location("tiny_vitamin", asked["ours"] + "/tiny_vitamin.py")
sys.modules["tiny_vitamin"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["tiny_vitamin"])
import open_clip_train.main as peer
from importlib.metadata import version
assert version("open_clip_torch") == "3.3.0", version("open_clip_torch")
assert version("webdataset") == "0.2.86" or asked["any_webdataset"], version("webdataset")
mean, std = (torch.tensor(asked[name])[:, None, None] for name in ("mean", "std"))
found = {"losses": [], "steps": []}
class Batches:
    num_batches, num_samples = len(asked["pixels"]), sum(map(len, asked["pixels"]))
    def __iter__(self):
        for seed, pixels, tokens in zip(asked["seeds"], asked["pixels"], asked["tokens"]):
            if seed is not None:
                torch.manual_seed(seed)
            yield (pixels.permute(0, 3, 1, 2).float().div(255) - mean) / std, tokens.long()
def get_data(*_, **__):
    return {"train": SimpleNamespace(dataloader=Batches(), set_epoch=lambda epoch: None)}
def note_step(optimizer, *_):
    found["optimizer"] = optimizer
    found["steps"].append([[group["lr"], group["weight_decay"]] for group in optimizer.param_groups])
register_optimizer_step_pre_hook(note_step)
clip = torch.nn.utils.clip_grad_norm_
def clip_once(*args, **kwargs):
    for name, parameter in found["model"].named_parameters():
        if name in ("logit_scale", "logit_bias"):
            parameter.grad /= asked["parts"]
    return clip(*args, **kwargs)
if asked["scale_once"]:
    torch.nn.utils.clip_grad_norm_ = clip_once
creating = peer.create_model_and_transforms
def create(*args, **kwargs):
    built = creating(*args, **kwargs)
    found["model"] = built[0]
    return built
class Recorded(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
    def forward(self, *args, **kwargs):
        losses = self.inner(*args, **kwargs)
        found["losses"].append(sum(losses.values()).item())
        return losses
losing = peer.create_loss
peer.get_data, peer.create_model_and_transforms = get_data, create
peer.create_loss = lambda args: Recorded(losing(args))
peer.main(asked["flags"])
names = {id(parameter): name for name, parameter in found["model"].named_parameters()}
groups = [
    {"names": sorted(names[id(p)] for p in group["params"]), "weight_decay": group["weight_decay"],
     "betas": list(group["betas"]), "eps": group["eps"]}
    for group in found["optimizer"].param_groups
]
scale = found["model"].logit_scale.item()
losses = found["losses"][:: asked["parts"]]  # each part's is that of the whole batch
answer = {"losses": losses, "steps": found["steps"], "groups": groups, "logit_scale": scale}
open(sys.argv[2], "w").write(json.dumps(answer))
"""


def write_shards(folder: Path, num: int, side: int) -> None:
    """Write `num` pictures of a random colour, shape and noise with a caption each into one tar."""
    folder.mkdir()
    draws = np.random.default_rng(0)
    words = ("red", "green", "blue", "dark", "pale", "grey")
    with tarfile.open(folder / "00000000.tar", "w") as tar:
        for number in range(num):
            colour, size = int(draws.integers(len(words))), int(draws.integers(side // 4, side))
            pixels = draws.integers(0, 120, (side, side, 3))
            pixels[:size, :size, colour % 3] += 30 * (1 + colour // 3)
            buffer = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
            caption = f"a {words[colour]} square of {size} px, number {number}"
            for name, content in ((f"{number:06d}.png", buffer.getvalue()), (f"{number:06d}.txt", caption.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def ask_peer(config: TrainConfig, data: Path, logs: Path, **said: bool) -> dict[str, Any]:
    """Return what the peer is told: the batches of every step, seeds for what is random in the model, and flags."""
    opened = open_model(config.model)
    crop = read_crop(opened.train_transform, config.augment)
    index = read_index(list_tars(str(data)), tokenize=opened.tokenize, quiet=True)
    steps = range(config.num_steps)
    batches = list(open_batches(index, crop=crop, batch_size=config.batch_size, seed=config.seed, steps=steps))
    parts = config.accum_freq
    seeds = [step_seed(config.seed, step) for step in steps]
    flags = {
        "model": config.model, "dataset-type": "synthetic", "precision": "fp32", "device": "cpu",
        "batch-size": config.batch_size // parts, "accum-freq": parts, "epochs": 1, "lr": config.learning_rate,
        "beta1": config.beta1, "beta2": config.beta2, "eps": config.eps, "wd": config.weight_decay,
        "warmup": config.warmup_steps, "seed": config.seed, "logs": str(logs), "name": "peer", "workers": 0,
    }  # fmt: skip
    if config.grad_clip_norm is not None:
        flags["grad-clip-norm"] = config.grad_clip_norm
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return {
        "ours": str(Path(__file__).parents[2] / "pipeline"),
        "flags": words + (["--siglip"] if config.loss == "siglip" else []),
        "pixels": [part for batch in batches for part in batch.pixel_BHWC.chunk(parts)],
        "tokens": [part for batch in batches for part in batch.token_BL.chunk(parts)],
        "seeds": [seed if part == 0 else None for seed in seeds for part in range(parts)],
        "mean": crop.mean,
        "std": crop.std,
        "parts": parts,
    } | said


def run_peer(python: str, asked: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the peer's losses, rates and decays of each step, groups and logit scale."""
    torch.save(asked, folder / "asked.pt")
    command = [python, "-c", PEER, str(folder / "asked.pt"), str(folder / "answer.json")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    answer: dict[str, Any] = json.loads((folder / "answer.json").read_text())
    return answer


def run_ours(config: TrainConfig, data: Path, out: Path) -> tuple[list[dict[str, Any]], list[list[list[float]]]]:
    """Return the lines of metrics.jsonl, and of each step each group's learning rate and weight decay."""
    steps = []

    def note_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        steps.append([[group["lr"], group["weight_decay"]] for group in optimizer.param_groups])

    noting = register_optimizer_step_pre_hook(note_step)
    train(config, data=str(data), out=str(out), quiet=True)
    noting.remove()
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()], steps


def describe_ours(config: TrainConfig) -> list[dict[str, Any]]:
    """Return winnow's optimiser groups in the peer's words."""
    model = open_model(config.model, init_logit_bias=-10.0 if config.loss == "siglip" else None).model
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        {"names": sorted(names[id(p)] for p in group["params"]), "weight_decay": group["weight_decay"],
         "betas": list(group["betas"]), "eps": group["eps"]}
        for group in build_optimizer(model, config).param_groups
    ]  # fmt: skip


def compare(
    config: TrainConfig, lines: list[dict[str, Any]], steps: list[list[list[float]]], peer: dict[str, Any]
) -> bool:
    """Print one row per thing compared and return whether all are equal."""
    losses = peer["losses"]
    gaps = [abs(line["loss"] - loss) for line, loss in zip(lines, losses, strict=True)]
    worst = f"max gap {max(gaps):.2e}, step {gaps.index(max(gaps)) + 1}"
    rows = [
        (f"loss of {len(losses)} steps, {losses[0]:.4f} -> {losses[-1]:.4f}", worst, max(gaps) <= TOLERANCE),
        ("learning rate and decay of each step and group", f"{len(steps)} steps", steps == peer["steps"]),
        ("optimiser groups, decay, betas, eps", "by name", describe_ours(config) == peer["groups"]),
        ("logit scale at the end", "", abs(lines[-1]["logit_scale"] - np.exp(peer["logit_scale"])) <= TOLERANCE),
    ]
    for what, how, is_same in rows:
        print(f"{config.model:22s} {what:48s} {how:26s} {'same' if is_same else 'DIFFERENT'}")
    return all(is_same for *_, is_same in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Train on both sides and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="the peer's Python (default: this one)")
    parser.add_argument("--any-webdataset", action="store_true", help="data is answered, so its version cannot matter")
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--accum", type=int, default=1)
    parser.add_argument("--loss", default="clip")
    parser.add_argument("--clip-norm", type=float)
    parser.add_argument("--scale-once", action="store_true", help="mend the peer's gradient of the logit scale")
    parser.add_argument("--side", type=int, default=256, help="px of the made pictures")
    parser.add_argument("--freeze", type=Path, help="write the peer's numbers here")
    args = parser.parse_args(argv)
    case = {
        "model": args.model, "samples": args.batch * args.steps, "batch_size": args.batch,
        "warmup_steps": args.steps // 5, "accum_freq": args.accum, "loss": args.loss, "grad_clip_norm": args.clip_norm,
    }  # fmt: skip
    config = TrainConfig(**case, log_every_steps=1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_shards(folder / "shards", min(config.samples, 256), args.side)
        said = {"any_webdataset": args.any_webdataset, "scale_once": args.scale_once}
        asked = ask_peer(config, folder / "shards", folder / "logs", **said)
        peer = run_peer(args.python, asked, folder)
        lines, steps = run_ours(config, folder / "shards", folder / "ours")
    if args.freeze:
        kept = {"losses": peer["losses"], "rates": [groups[0][0] for groups in peer["steps"]]}
        text = json.dumps({"config": case, "side": args.side} | kept | {"logit_scale": peer["logit_scale"]})
        args.freeze.write_text(text + "\n")
    return 0 if compare(config, lines, steps, peer) else 1


if __name__ == "__main__":
    sys.exit(main())
