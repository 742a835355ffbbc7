"""Ratios against the plain way of doing the same work, measured in one run: `make bench`.

Prints; asserts nothing.  Each pair is run in turn several times, and the median of the pairwise ratios is what counts.
"""

import io
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from filters import build_filter
from pipeline.clip_model import open_model
from pipeline.pool import list_parts, read_batches, read_part
from pipeline.scenes import write_demo_clean
from pipeline.schemas import IMAGE, TEXT, UID
from pipeline.score import score_part
from pipeline.shards import plan_part, plan_shards, prepare_folder, write_shard
from pipeline.subset import write_subset
from pipeline.uid import parse_uids

ROWS, REPEATS, BATCH_ROWS = 4000, 5, 256


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(name: str, ours: Callable[[], object], peer: Callable[[], object]) -> None:
    """Print the median of peer time / our time over pairs run in turn (above 1: we are faster)."""
    ours(), peer()
    pairs = [(seconds(ours), seconds(peer)) for _ in range(REPEATS)]
    ratio = statistics.median(peer_s / our_s for our_s, peer_s in pairs)
    our_s, peer_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{name:58s}{our_s:8.3f} s {peer_s:8.3f} s {ratio:8.2f}x")


def make_model(folder: Path, name: str) -> str:
    folder.mkdir()
    torch.save({"state_dict": open_model(name).model.state_dict()}, folder / "checkpoint.pt")
    (folder / "model.json").write_text(f'{{"architecture": "{name}"}}')
    return str(folder)


def bench_scoring(pool: str, scratch: Path, name: str) -> None:
    """The scoring of a part (read, decode, score, write) against the model's forward alone on ready tensors."""
    model = make_model(scratch / name, name)
    part, filter = list_parts(pool)[0], build_filter({"filter": "clip_score", "model": model, "batch_size": BATCH_ROWS})
    clip, rows = open_model(model), read_part(part)
    ready = []
    for batch in read_batches(part, rows, images=True):
        images = [clip.eval_transform(Image.open(io.BytesIO(i))) for i in batch.column(IMAGE).to_pylist()]
        ready.append((torch.stack(images), clip.tokenize(batch.column(TEXT).to_pylist())))

    def score() -> None:
        shutil.rmtree(scratch / "scores", ignore_errors=True)
        score_part(part, filters=[filter], out=str(scratch / "scores"))

    def forward() -> None:
        with torch.inference_mode():
            for pixels, tokens in ready:
                clip.model.encode_image(pixels, normalize=True), clip.model.encode_text(tokens, normalize=True)

    compare(f"score {rows.table.num_rows} rows, {name} / forward alone", score, forward)


def bench_shards(pool: str, scratch: Path) -> None:
    """Writing every row of the pool as shards (plan included) against copying the same tars."""
    parts, subset, out = list_parts(pool), str(scratch / "all.npy"), str(scratch / "shards")
    write_subset(subset, parse_uids(read_part(parts[0]).table[UID]))

    def write() -> None:
        shutil.rmtree(out, ignore_errors=True)
        prepare_folder(out, "bench")
        lines = [plan_part(part, subset_url=subset, out=out)["lines"] for part in parts]
        list(map(partial(write_shard, out=out, keys="source"), plan_shards(parts, lines, ROWS // 4)))

    def copy() -> None:
        shutil.copy(parts[0].tar or "", scratch / "copy.tar")

    compare(f"write {ROWS} rows as shards / cp of the tar", write, copy)


def main() -> int:
    torch.set_num_threads(1)
    print(f"{'':58s}{'winnow':>10s} {'peer':>10s} {'peer/winnow':>9s}")
    with tempfile.TemporaryDirectory() as folder:
        pool = str(Path(folder) / "pool")
        write_demo_clean(pool, seed=0, num_rows=ROWS, rows_per_part=ROWS)
        for name in ("winnow-vit-tiny", "winnow-vit-small"):
            bench_scoring(pool, Path(folder), name)
        bench_shards(pool, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
