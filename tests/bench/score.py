"""Scoring a part against the bare model: `python -m tests.bench.score [MODEL:POOL:ROWS:BATCH:PAIRS ...]`, two minutes.
And ten times the rows: `python -m tests.bench.score growth:ROWS:PAIRS`.

What `winnow score` does with one part (read, decode, tokenise, both encoders, write the parquet) against both encoders
alone on tensors that are ready: same process, same batch size, same thread, one core for everything, as a task of
local[N] on N cores has it.  Pairs run in turn; the medians of the pairwise ratios are printed, by the clock and by the
CPU time of the process, which neighbours on the machine disturb less.  POOL is `rendered` (64 px) or one of
../shared/data/pools, where that is there.  Prints; asserts nothing.

`growth` runs the whole stage on Spark, started before the clock, over ROWS rows of metadata and over ten times as many,
10,000 a part, with the filters that read no image, and prints how many times as long the larger pool takes.
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from filters import build_filter
from jobs.stage_score import run_score
from pipeline.batches import read_batches
from pipeline.clip_model import open_model
from pipeline.devices import CPU, Seat, take_seat
from pipeline.images import open_image
from pipeline.ledger import Unit
from pipeline.pool import Part, list_parts, read_part
from pipeline.scenes import write_demo_clean
from pipeline.schemas import IMAGE, KEY, ORIGINAL_HEIGHT, ORIGINAL_WIDTH, PARQUET_SUFFIX, TEXT, UID
from pipeline.score import score_part
from pipeline.spark_session import open_session
from pipeline.tars import read_rows, write_rows

REAL = Path(__file__).parent.parent.parent.parent / "shared" / "data" / "pools"
RENDERED = "rendered"
DEFAULT = (
    "ViT-B-32:openstax:96:32:3",
    "winnow-vit-small:rendered:2000:256:5",
    "winnow-vit-tiny:rendered:2000:256:5",
    "winnow-vit-tiny:cifar-web:2000:256:5",
)
"""openstax: real JPEGs of about 130 x 190 px; cifar-web: real ones of 32 x 32 px."""
CHEAP = [{"filter": "caption_length"}, {"filter": "caption_language"}, {"filter": "image_size"}]
GROWTH_PART_ROWS = 10_000


def cut_part(pool: str, folder: Path, num_rows: int) -> Part:
    """The first rows of a pool's first part, as a pool of its own."""
    source = list_parts(pool)[0]
    assert source.tar and source.table
    rows = list(islice(read_rows(source.tar), num_rows))
    folder.mkdir()
    with (folder / "0.tar").open("wb") as file:
        write_rows(file, rows)
    table = pq.read_table(source.table)
    named = pc.is_in(table[KEY], pc.cast([row.key for row in rows], table.schema.field(KEY).type))
    pq.write_table(table.filter(named), folder / f"0{PARQUET_SUFFIX}")
    return list_parts(str(folder))[0]


def prepare(clip: Any, part: Part, batch_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the bare model is fed: pixels and tokens by open_clip's own transform and tokenizer."""
    batches = list(read_batches(part, read_part(part), images=True))
    images = [clip.eval_transform(open_image(i)) for b in batches for i in b.column(IMAGE).to_pylist()]
    tokens = clip.tokenize([text for b in batches for text in b.column(TEXT).to_pylist()])
    return list(zip(torch.stack(images).split(batch_size), tokens.split(batch_size), strict=True))


def measure(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock and of CPU."""
    clock, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - cpu


def compare(pool: str, scratch: Path, model: str, *, num_rows: int, batch_size: int, num_pairs: int) -> None:
    """Print one line."""
    weights = scratch / f"{model}.pt"
    torch.manual_seed(0)
    torch.save(open_model(model).model.state_dict(), weights)
    named = f"{model}@{weights}"
    part = cut_part(pool, scratch / "cut", num_rows)
    filter = build_filter({"filter": "clip_score", "model": named, "batch_size": batch_size})
    clip = open_model(named)
    ready = prepare(clip, part, batch_size)

    def score() -> None:
        shutil.rmtree(scratch / "scores", ignore_errors=True)
        done = score_part(Unit(part, ()), filters=[filter], out=str(scratch / "scores"))
        assert done["counts"]["clip_score"]["kept"] == num_rows, done

    def forward() -> None:
        with torch.inference_mode():
            for pixels, tokens in ready:
                clip.model.encode_image(pixels, normalize=True), clip.model.encode_text(tokens, normalize=True)

    score(), forward()
    pairs = [(measure(score), measure(forward)) for _ in range(num_pairs)]
    clock, cpu = (statistics.median(bare[n] / ours[n] for ours, bare in pairs) for n in (0, 1))
    ours_s, bare_s = (statistics.median(pair[n][0] for pair in pairs) for n in (0, 1))
    shutil.rmtree(scratch / "cut")
    what = f"{model}, {num_rows} rows of {Path(pool).name}"
    rates = f"{num_rows / ours_s:12.1f}/s{num_rows / bare_s:12.1f}/s"
    print(f"{what:48s}{rates}{clock:10.2f}{cpu:10.2f}", flush=True)


def make_metadata(folder: Path, num_rows: int) -> str:
    """Parquets as of CommonPool, without tars; return the pool."""
    folder.mkdir()
    for start in range(0, num_rows, GROWTH_PART_ROWS):
        numbers = range(start, min(start + GROWTH_PART_ROWS, num_rows))
        columns = {
            UID: [f"{n:032x}" for n in numbers],
            KEY: [f"{n:09d}" for n in numbers],
            TEXT: [f"{n} pictures of a red bridge over a quiet river in winter" for n in numbers],
            ORIGINAL_WIDTH: [400 + n % 999 for n in numbers],
            ORIGINAL_HEIGHT: [300 + n % 777 for n in numbers],
        }
        pq.write_table(pa.table(columns), folder / f"{start // GROWTH_PART_ROWS:08d}{PARQUET_SUFFIX}")
    return str(folder)


def compare_growth(scratch: Path, *, num_rows: int, num_pairs: int) -> None:
    """Print one line."""
    pools = [make_metadata(scratch / f"rows{n}", n) for n in (num_rows, 10 * num_rows)]
    with open_session() as session:

        def score(pool: str) -> None:
            shutil.rmtree(scratch / "scores", ignore_errors=True)
            run_score(lambda: session, pool, CHEAP, str(scratch / "scores"), quiet=True)

        score(pools[0])
        pairs = [[measure(partial(score, pool))[0] for pool in pools] for _ in range(num_pairs)]
    times = statistics.median(large / small for small, large in pairs)
    small_s, large_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{num_rows:,} rows {small_s:.2f} s, {10 * num_rows:,} rows {large_s:.2f} s: {times:.1f} times as long")


def main(words: Sequence[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        for word in (word for word in words if word.startswith("growth:")):
            rows, pairs = map(int, word.split(":")[1:])
            compare_growth(Path(folder), num_rows=rows, num_pairs=pairs)
    models = [word for word in words if not word.startswith("growth:")]
    return compare_models(models) if models or not words else 0


def compare_models(words: Sequence[str]) -> int:
    """Print a line for each."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    take_seat(Seat(CPU, 1))
    with tempfile.TemporaryDirectory() as folder:
        rendered = str(Path(folder) / RENDERED)
        write_demo_clean(rendered, seed=0, num_rows=2000, rows_per_part=2000)
        print(f"{'images a second':48s}{'winnow':>14s}{'bare model':>14s}{'by clock':>10s}{'by CPU':>10s}")
        for word in words or DEFAULT:
            model, name, *numbers = word.split(":")
            pool = rendered if name == RENDERED else str(REAL / name)
            if not Path(pool).is_dir():
                print(f"{model}: there is no pool {pool}")
                continue
            rows, batch, pairs = map(int, numbers)
            compare(pool, Path(folder), model, num_rows=rows, batch_size=batch, num_pairs=pairs)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
