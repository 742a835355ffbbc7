"""ViT against ViTamin (arXiv:2404.02132) at equal parameters and samples seen, on a filtered pool's shards.

python -m tests.findings.towers --data out/shards/dfn --eval-data eval --out DIR

Image towers of the same size to 1 %, the same text tower, samples, batches and schedule.  Each tower takes the learning
rate that is best with a seed of its own, then trains with the seeds that are reported.  Every piece is skipped when it
is done.  Prints the tables of docs/FINDINGS.md and writes them to DIR/towers.md.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from pipeline.clip_model import open_model
from tests.findings.work import describe, in_processes, judge, read_accuracy
from training.config import TrainConfig
from training.flops import count_flops
from training.loss import contrastive_loss
from training.optim import build_optimizer
from training.run import train

TOWERS = {
    "winnow-vit-tiny": "ViT, patches of 8 px",
    "winnow-vit-tiny-16": "ViT, patches of 16 px",
    "winnow-vitamin-tiny-deep": "ViTamin, stride 16",
}
"""The last two make 4 tokens of 32 px; the first makes 16."""
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)
TUNING_SEED = 100
SAMPLES, BATCH = 16_000, 64
POINT = 50
"""Steps between the points of a curve."""
TIMED_ROUNDS = 15


class Work(NamedTuple):
    """One model to train and judge."""

    model: str
    rate: float
    seed: int

    @property
    def run(self) -> str:
        """Its folder's name."""
        return f"{self.model}-{self.rate}-{self.seed}"


class Size(NamedTuple):
    """What a model holds and costs."""

    image_parameters: int
    parameters: int
    image_flops: float
    """Of training on one image."""
    flops: float
    """Of training on one pair."""


def train_tower(work: Work, data: str, eval_data: str, out: Path) -> None:
    """Train one model and judge it at its end, and with a reported seed at each point of its curve."""
    run, points = out / "runs" / work.run, work.seed != TUNING_SEED
    config = TrainConfig(
        model=work.model,
        samples=SAMPLES,
        batch_size=BATCH,
        learning_rate=work.rate,
        seed=work.seed,
        checkpoint_every_steps=POINT,
        keep_checkpoints=SAMPLES // BATCH if points else 1,
    )
    train(config, data=data, out=str(run), device="cpu", quiet=True)
    judge(str(run), eval_data=eval_data, out=place_eval(out, work, config.num_steps))
    for step in range(POINT, config.num_steps, POINT) if points else ():
        judge(f"{work.model}@{run}/resume-{step:08d}.pt", eval_data=eval_data, out=place_eval(out, work, step))


def place_eval(out: Path, work: Work, step: int) -> Path:
    """Return the folder of what a model reached after `step` steps."""
    return out / "eval" / f"{work.run}-{step}"


def measure_size(model: str) -> Size:
    """Return the parameters and FLOP of a model."""
    module = open_model(model).model
    num_all, num_image = (sum(p.numel() for p in part.parameters()) for part in (module, module.visual))
    length = module.context_length
    image, both = (count_flops(module, context_length=length, token_share=share) for share in (0.0, 1.0))
    assert image and both
    return Size(num_image, num_all, image, both)


def measure_speeds(models: Sequence[str]) -> dict[str, float]:
    """Return pairs trained per second of processor time: medians of steps taken in turn, one thread, data in memory."""
    torch.set_num_threads(1)
    opened = {name: open_model(name).model.train() for name in models}
    optimizers = {name: build_optimizer(opened[name], TrainConfig(model=name, samples=BATCH)) for name in models}
    image_BCHW, token_BL = torch.rand(BATCH, 3, 32, 32), torch.randint(1, 49_000, (BATCH, 16))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(TIMED_ROUNDS):
        for name, model in opened.items():
            start = time.process_time()
            features = model.encode_image(image_BCHW, normalize=True), model.encode_text(token_BL, normalize=True)
            optimizers[name].zero_grad()
            contrastive_loss(*features, model.logit_scale.exp()).backward()  # type: ignore[no-untyped-call]
            optimizers[name].step()
            seconds[name].append(time.process_time() - start)
    return {name: BATCH / statistics.median(times) for name, times in seconds.items()}


def format_towers(found: dict[Work, float], tuned: dict[str, float], seeds: range) -> list[str]:
    """Return the table of the towers, one row each."""
    speeds = measure_speeds(list(TOWERS))
    lines = ["| image tower | its parameters | all | MFLOP, image | both | pairs/s | rate | accuracy | sd | each |"]
    lines.append("|" + "---|" * 10)
    for model, label in TOWERS.items():
        size, values = measure_size(model), [found[Work(model, tuned[model], seed)] for seed in seeds]
        cells = [f"{label}: `{model}`", f"{size.image_parameters:,}", f"{size.parameters:,}"]
        cells += [f"{size.image_flops / 1e6:.1f}", f"{size.flops / 1e6:.1f}", f"{speeds[model]:.0f}"]
        cells += [f"{tuned[model]:g}", describe(values), f"{100 * statistics.stdev(values):.1f}"]
        lines.append("| " + " | ".join([*cells, ", ".join(f"{100 * value:.1f}" for value in values)]) + " |")
    return lines


def format_rates(found: dict[Work, float]) -> list[str]:
    """Return the table of what each rate reached with the seed that chose it."""
    lines = ["| image tower | " + " | ".join(f"{rate:g}" for rate in RATES) + " |", "|" + "---|" * (1 + len(RATES))]
    for model, label in TOWERS.items():
        values = [f"{100 * found[Work(model, rate, TUNING_SEED)]:.1f}" for rate in RATES]
        lines.append(f"| {label} | " + " | ".join(values) + " |")
    return lines


def format_curves(out: Path, tuned: dict[str, float], seeds: range) -> list[str]:
    """Return loss (mean since the point before) and accuracy by samples seen, means over the seeds."""
    lines = ["| samples seen | " + " | ".join(f"{name}: loss | accuracy" for name in TOWERS.values()) + " |"]
    lines.append("|" + "---|" * (1 + 2 * len(TOWERS)))
    for step in range(POINT, SAMPLES // BATCH + 1, POINT):
        cells = [f"{step * BATCH:,}"]
        for model in TOWERS:
            works = [Work(model, tuned[model], seed) for seed in seeds]
            losses = [loss for work in works for loss in read_losses(out / "runs" / work.run, step)]
            values = [read_accuracy(place_eval(out, work, step)) for work in works]
            cells += [f"{statistics.mean(losses):.3f}", f"{100 * statistics.mean(values):.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def read_losses(run: Path, step: int) -> list[float]:
    """Return the logged losses of the POINT steps up to `step`."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if step - POINT < line["step"] <= step]


def main() -> None:
    """Parse, try the rates, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of shards")
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    out, seeds, last = args.out.absolute(), range(args.seeds), SAMPLES // BATCH
    do = partial(train_tower, data=args.data, eval_data=args.eval_data, out=out)
    tried = [Work(model, rate, TUNING_SEED) for model in TOWERS for rate in RATES]
    in_processes(do, tried)
    found = {work: read_accuracy(place_eval(out, work, last)) for work in tried}
    tuned = {model: max(RATES, key=lambda rate: found[Work(model, rate, TUNING_SEED)]) for model in TOWERS}
    reported = [Work(model, rate, seed) for seed in seeds for model, rate in tuned.items()]
    in_processes(do, reported)
    found |= {work: read_accuracy(place_eval(out, work, last)) for work in reported}
    tables = [format_towers(found, tuned, seeds), format_rates(found), format_curves(out, tuned, seeds)]
    text = "\n\n".join("\n".join(lines) for lines in tables) + "\n"
    (out / "towers.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
