"""negCLIPLoss, measured: `python -m tests.bench.neg_clip_loss [--rows N --batch B --dim D --rounds R]`.

The time of filters.neg_clip_loss.compute_scores (one repeat) on float16 rows beside its arithmetic without the rest:
the bare matrix products of the same batches in the same blocks, and these with a logsumexp of both sides.  In turn, in
one process, by the clock and by CPU time, which neighbours disturb less.  Asserts nothing.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from filters.neg_clip_loss import CPU_BLOCK, GPU_BLOCK, Options, compute_scores
from pipeline.uid import UID_DTYPE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    image_ND, text_ND = (draw(rng, args.rows, args.dim) for _ in range(2))
    uids = rng.integers(0, 2**64, (args.rows, 2), dtype=np.uint64).view(UID_DTYPE)[:, 0]
    options = Options(image="i", text="t", batch=args.batch, repeats=1)
    batches = [
        (torch.from_numpy(i.astype(np.float32)).to(args.device), torch.from_numpy(t.astype(np.float32)).to(args.device))
        for i, t in (
            (image_ND[start : start + args.batch], text_ND[start : start + args.batch])
            for start in range(0, args.rows, args.batch)
        )
    ]
    work: dict[str, Callable[[], object]] = {
        "products": lambda: [multiply(i, t, args.device, sums=False) for i, t in batches],
        "products and logsumexp": lambda: [multiply(i, t, args.device, sums=True) for i, t in batches],
        "compute_scores": lambda: compute_scores(image_ND, text_ND, uids, options, args.device),
    }
    flops = 2 * args.dim * sum(len(i) ** 2 for i, _ in batches)
    print(f"{args.rows:,} rows, batches of {args.batch:,}, {args.dim} numbers, {torch.get_num_threads()} threads")
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    for _ in range(args.rounds):
        for name, call in work.items():
            start = time.perf_counter(), time.process_time()
            call()
            spent[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    for which, clock in enumerate(("clock", "CPU time")):
        for name, times in spent.items():
            mine = statistics.median(pair[which] for pair in times)
            ratios = (own[which] / bare[which] for own, bare in zip(times, spent["products"], strict=True))
            print(f"  {clock:9s} {name:23s} {mine:8.2f} s {flops / mine / 1e9:8.1f} GFLOP/s", end="")
            print(f" {statistics.median(ratios):6.2f} of the products")


def draw(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    """Return float16 unit vectors."""
    drawn_ND = rng.standard_normal((rows, dim), np.float32)
    return (drawn_ND / np.linalg.norm(drawn_ND, axis=1, keepdims=True)).astype(np.float16)


def multiply(image_BD: torch.Tensor, text_BD: torch.Tensor, device: str, *, sums: bool) -> float:
    """Return a number that hangs on every block's product, so that a GPU has to be waited for."""
    side = CPU_BLOCK if device == "cpu" else GPU_BLOCK
    last = torch.zeros((), device=device)
    for rows in image_BD.split(side):
        for columns in text_BD.split(side):
            s_nk = rows @ columns.T
            last += s_nk.logsumexp(dim=1)[0] + s_nk.logsumexp(dim=0)[0] if sums else s_nk[0, 0]
    return float(last)


if __name__ == "__main__":
    main()
