"""Writing shards against `cp` of the same tars and against DataComp's resharder: tests/bench/shards.py --help.

Prints; asserts nothing.  Pairs run in turn; the median of the pairwise ratios is what counts (above 1: we are faster).
Both sides get the same processes, started before the clock: the peer's own "processed ... in" time leaves its start
out, and ours is plan and writing without Spark's.  Winnow syncs each shard to disk before it counts as written; `cp`
does not, so there is a row with `cp` and `sync` too.  The last column is the same ratio in CPU seconds (user and
system, the peer's imports taken off), which a busy machine distorts less.

`--growth` compares winnow with itself instead, on ten times the rows in shards of the same size.

The peer is DataComp's resharder.py (github.com/mlfoundations/datacomp), run by an interpreter that has what it imports:
    python tests/bench/shards.py --peer "peer-venv/bin/python resharder.py"
"""

import argparse
import json
import multiprocessing
import re
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.pool import list_parts
from pipeline.schemas import KEY
from pipeline.shard_folder import finish_folder, prepare_folder
from pipeline.shard_plan import plan_part, plan_shards
from pipeline.shards import write_shard
from pipeline.spans import write_spans
from pipeline.subset import write_subset
from pipeline.tars import read_rows
from pipeline.uid import parse_uids

PARTS, ROWS_PER_SHARD = 4, 5000


def make_row(number: int, rng: np.random.Generator) -> dict[str, Any]:
    uid = rng.bytes(16).hex()
    text = "a photo of a red house on a street " + rng.bytes(12).hex()
    return {
        "uid": uid,
        "url": f"https://example.org/{uid}.jpg",
        "text": text,
        "original_width": 512,
        "original_height": 400,
        "key": f"{number:09d}",
        "status": "success",
        "sha256": rng.bytes(32).hex(),
    }


def make_pool(folder: Path, *, num_rows: int, image_bytes: int) -> None:
    """What img2dataset would write, with random bytes for images, and the spans of a scoring pass in FOLDER/scores."""
    (folder / "pool").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, numbers in enumerate(np.array_split(np.arange(num_rows), PARTS)):
        rows = [make_row(int(n), rng) for n in numbers]
        stem = folder / "pool" / f"{part:08d}"
        with tarfile.open(f"{stem}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in rows:
                image = rng.bytes(image_bytes + int(rng.integers(-image_bytes // 5, image_bytes // 5)))
                contents = {"jpg": image, "json": json.dumps(row, indent=4).encode(), "txt": row["text"].encode()}
                for extension, content in contents.items():
                    info = tarfile.TarInfo(f"{row['key']}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, BytesIO(content))
        pq.write_table(pa.Table.from_pylist(rows), f"{stem}.parquet")
        Path(f"{stem}_stats.json").write_text(json.dumps({"successes": len(rows)}))
    for each in list_parts(str(folder / "pool")):
        place = {key: row for row, key in enumerate(pq.read_table(each.table)[KEY].to_pylist())}
        found = [(place[row.key], *row.span) for row in read_rows(each.tar or "", contents=False)]
        columns = zip(*found, strict=True)
        types = (pa.int32(), pa.int64(), pa.int64())
        write_spans(str(folder / "scores"), each, *(pa.array(c, t) for c, t in zip(columns, types, strict=True)))


Cost = tuple[float, float]
"""Seconds on the wall, and of CPU."""


def with_cpu(item: Any, work: Callable[[Any], Any]) -> tuple[Any, float]:
    """Return work(item) and the CPU seconds this process took for it."""
    start = time.process_time()
    return work(item), time.process_time() - start


def run_child(command: Sequence[str]) -> tuple[str, Cost]:
    """Return what a command says on stderr, and what it costs."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    return said, (wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def write_shards(folder: Path, workers: Any, *, keys: str, spans: bool, seed: int | None = None) -> Cost:
    """Return what plan and writing cost."""
    pool, subset, out = list_parts(str(folder / "pool")), str(folder / "subset.npy"), str(folder / "ours")
    shutil.rmtree(out, ignore_errors=True)
    start, driver = time.perf_counter(), time.process_time()
    prepare_folder(out, "bench")
    plan = partial(plan_part, subset_url=subset, out=out, scores=str(folder / "scores") if spans else None)
    planned = workers.map(partial(with_cpu, work=plan), pool, 1)
    told, num_uids = [part for part, _ in planned], len(np.load(subset))
    plans, _ = plan_shards(pool, told, ROWS_PER_SHARD, out=out, num_uids=num_uids)
    write = partial(write_shard, parts=pool, out=out, keys=keys, shuffle_seed=seed)
    written = workers.map(partial(with_cpu, work=write), plans, 1)
    finish_folder(out, [shard for shard, _ in written])
    cpu = time.process_time() - driver + sum(seconds for _, seconds in [*planned, *written])
    return time.perf_counter() - start, cpu


def copy(folder: Path, *, sync: bool) -> Cost:
    out = folder / "copied"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    tars = sorted(map(str, (folder / "pool").glob("*.tar")))
    script = 'cp "$@" && sync "$0"/*' if sync else 'cp "$@"'
    return run_child(["sh", "-c", script, str(out), *tars, str(out)])[1]


def reshard(folder: Path, peer: list[str], processes: int, imports_s: float) -> Cost:
    """Return the seconds that the peer says it worked, and its CPU seconds without its imports."""
    out = folder / "theirs"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    flags = ["-i", folder / "pool", "-o", out, "-s", folder / "subset.npy", "-n", PARTS, "-j", processes]
    said, (_, cpu) = run_child([*peer, *map(str, flags), "--shard-size", str(ROWS_PER_SHARD)])
    found = re.search(r"processed \d+ images in ([0-9.]+)s", said)
    if not found:
        raise SystemExit(said)
    return float(found[1]), cpu - imports_s


def compare(name: str, ours: Callable[[], Cost], peer: Callable[[], Cost], repeats: int) -> None:
    """Print the median seconds of both and the medians of peer / ours over pairs run in turn."""
    ours(), peer()
    pairs = [(ours(), peer()) for _ in range(repeats)]
    our_s, peer_s = (statistics.median(wall for wall, _ in column) for column in zip(*pairs, strict=True))
    wall, cpu = (statistics.median(theirs[n] / mine[n] for mine, theirs in pairs) for n in range(2))
    print(f"{name:66s}{our_s:8.3f} s {peer_s:8.3f} s {wall:8.2f}x {cpu:8.2f}x", flush=True)


def bench(folder: Path, workers: Any, image_bytes: int, args: argparse.Namespace) -> None:
    make_pool(folder, num_rows=args.rows, image_bytes=image_bytes)
    uids = np.concatenate([parse_uids(pq.read_table(p.table)["uid"]) for p in list_parts(str(folder / "pool"))])
    for share in args.shares:
        write_subset(str(folder / "subset.npy"), uids[np.random.default_rng(0).random(len(uids)) < share])
        for keys, spans, seed in (("uid", True, None), ("uid", False, None), ("source", True, None), ("uid", True, 0)):
            ours = partial(write_shards, folder, workers, keys=keys, spans=spans, seed=seed)
            how = ("spans" if spans else "headers") + ("" if seed is None else ", shuffled")
            name = f"{image_bytes // 1000} kB, keep {share:.0%}, keys={keys}, {how}"
            if args.peer:
                theirs = partial(reshard, folder, args.peer, args.processes, args.imports_s)
                compare(f"{name} / resharder", ours, theirs, args.repeats)
            for sync in (False, True) if share == 1 else ():
                compare(f"{name} / cp{' + sync' if sync else ''}", ours, partial(copy, folder, sync=sync), args.repeats)


def bench_growth(folder: Path, workers: Any, image_bytes: int, args: argparse.Namespace) -> None:
    """Print how many times as long ten times the rows take, by the clock and in CPU seconds."""
    folders = [folder / str(n) for n in (args.rows, 10 * args.rows)]
    for each, num_rows in zip(folders, (args.rows, 10 * args.rows), strict=True):
        make_pool(each, num_rows=num_rows, image_bytes=image_bytes)
        tables = [pq.read_table(p.table, columns=["uid"])["uid"] for p in list_parts(str(each / "pool"))]
        write_subset(str(each / "subset.npy"), np.concatenate([parse_uids(uids) for uids in tables]))
    small, large = (partial(write_shards, each, workers, keys="source", spans=True) for each in folders)
    compare(f"{image_bytes // 1000} kB, {10 * args.rows:,} rows / {args.rows:,} rows", small, large, args.repeats)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=shlex.split, help="command that runs DataComp's resharder.py")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--image-bytes", type=int, nargs="+", default=[10_000, 50_000])
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.3])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--growth", action="store_true", help="ROWS against ten times as many, and no peer")
    parser.add_argument("--folder", help="where to work (default: the temporary folder)")
    args = parser.parse_args()
    args.imports_s = run_child([*args.peer, "--help"])[1][1] if args.peer else 0.0
    print(f"{'peer / winnow':66s}{'winnow':>10s} {'peer':>10s} {'wall':>9s} {'CPU':>9s}")
    with multiprocessing.get_context("spawn").Pool(args.processes) as workers:
        for image_bytes in args.image_bytes:
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                (bench_growth if args.growth else bench)(Path(folder), workers, image_bytes, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
