"""Select against DataComp's clip_score on the same rows: `python tests/bench/selecting.py [--rows N] [--peer DIR]`.

Makes N rows (default 1,000,000; a tenth of a million a part) of real captions where --text names parquet files with a
`text` column, else of made-up words, with invented uids and scores, in two forms: what `winnow score` leaves, and
CommonPool metadata.  Then `winnow select` (top 30 % by DataComp's rule) and, when --peer names a DataComp checkout, its
baselines.py, run in turn, each in processes of its own.  Prints seconds, the peak of the sum of PSS over the process
tree (sampled every 50 ms), the ratios, and whether the uids are the same.  Asserts nothing.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.manifest import Counts, Manifest, write_manifest
from pipeline.storage import expand
from pipeline.subset import read_subset
from pipeline.uid import UID_DTYPE, format_uids

PART_ROWS, CYCLE_ROWS = 100_000, 500_000
FILTER, COLUMN = "clip_l14", "clip_l14_similarity_score"
FRACTION = 0.3
TOP_10 = f"{{name: best, top: {{by: {COLUMN}, fraction: 0.1}}}}"
LOW_10 = f"{{name: worst, top: {{by: {COLUMN}, fraction: 0.1, lowest: true}}}}"
RECIPES = {
    "datacomp": f"{{name: top, top: {{by: {COLUMN}, fraction: {FRACTION}, ties: datacomp}}}}",
    "exact": f"{{name: top, top: {{by: {COLUMN}, fraction: {FRACTION}}}}}",
    "sample": "{name: tenth, sample: {fraction: 0.1}}",
    "union": f"{{name: ends, union: [[{TOP_10}], [{LOW_10}]]}}",
    "repeat": f"{TOP_10}, {{name: thrice, repeat: 3}}",
    "where": f'{{name: sql, where: "{COLUMN} > 0.2"}}, {{name: top, top: {{by: {COLUMN}, fraction: {FRACTION}}}}}',
}
PEER = """
import sys, types
for name in ("gcld3", "nltk", "nltk.corpus"):  # imported at its head, unused by clip_score
    try:
        __import__(name)
    except ImportError:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].wordnet = None
import fasttext
if not hasattr(fasttext, "FastText"):
    fasttext.FastText = types.SimpleNamespace()
from types import SimpleNamespace
from baselines.apply_filter import apply_filter
if __name__ == "__main__":
    metadata, out, fraction, workers = sys.argv[1:]
    apply_filter(SimpleNamespace(name="clip_score", arch="l14", threshold=None, fraction=float(fraction),
                                 metadata_dir=metadata, save_path=out, num_workers=int(workers)))
"""


class Measured(NamedTuple):
    seconds: float
    peak_mib: float
    cpu_seconds: float


def read_captions(text: str | None) -> pa.Array:
    """Return at most CYCLE_ROWS captions."""
    if text is None:
        return pa.array([f"picture {n} of a red bridge over a quiet river in winter" for n in range(20_000)])
    tables = [pq.read_table(url, columns=["text"])["text"] for url in expand(text)]
    return pa.concat_arrays([chunk.cast(pa.string()) for t in tables for chunk in t.chunks])[:CYCLE_ROWS]


def make_rows(folder: Path, num_rows: int, text: str | None) -> None:
    """Write FOLDER/scores and FOLDER/metadata."""
    captions, rng = read_captions(text), np.random.default_rng(0)
    (folder / "scores" / FILTER).mkdir(parents=True)
    (folder / "metadata").mkdir()
    names = []
    for start in range(0, num_rows, PART_ROWS):
        num = min(PART_ROWS, num_rows - start)
        words = rng.integers(0, 2**64, (2, num), dtype=np.uint64)
        uids = np.empty(num, UID_DTYPE)
        uids["f0"], uids["f1"] = words
        scores = rng.normal(0.24, 0.05, num).astype(np.float16).astype(np.float32)  # CommonPool's are fp16-rounded
        places = pa.array((start + np.arange(num)) % len(captions))
        texts = captions.take(places)
        urls = pa.array([f"https://example.org/{start + n}.jpg" for n in range(num)])
        table = pa.table({"uid": format_uids(uids), "url": urls, "text": texts, COLUMN: scores})
        names.append(f"{start // PART_ROWS:08d}")
        pq.write_table(table, folder / "metadata" / f"{names[-1]}.parquet")
        pq.write_table(
            table.select(["uid", COLUMN]), folder / "scores" / FILTER / f"{names[-1]}.parquet", compression="zstd"
        )
    facts = {"columns": {COLUMN: FILTER}, "types": {COLUMN: "float"}, "parts": names, "broken": {}}
    counts = {name: Counts(read=num_rows, kept=num_rows) for name in ("pool", FILTER)}
    manifest = Manifest(stage="score", config={"filters": {FILTER: {}}}, parents={}, counts=counts, facts=facts)
    write_manifest(str(folder / "scores"), manifest)


def measure(command: list[str], cwd: Path | None = None, every: float = 0.05) -> Measured:
    """Run a command to its end; return wall seconds, and of its process tree the largest sum of PSS and CPU seconds."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(cwd or Path.cwd()), environment.get("PYTHONPATH", "")])}
    start, peak = time.perf_counter(), 0
    ticks: dict[int, int] = {}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=log, stderr=log)
        while process.poll() is None:
            tree = list_tree(process.pid)
            peak = max(peak, sum(read_pss_kib(pid) for pid in tree))
            ticks |= {pid: max(read_ticks(pid), ticks.get(pid, 0)) for pid in tree}
            time.sleep(every)
        seconds = time.perf_counter() - start
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{command[:4]} failed:\n{log.read().decode()[-3000:]}")
    return Measured(seconds, peak / 1024, sum(ticks.values()) / os.sysconf("SC_CLK_TCK"))


def list_tree(root: int) -> list[int]:
    """Return the process and all its descendants."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    tree = [root]
    while found := [pid for pid, parent in parents.items() if parent in tree and pid not in tree]:
        tree += found
    return tree


def read_pss_kib(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
    except OSError:
        return 0


def read_ticks(pid: int) -> int:
    """Return a process's own CPU time so far, in ticks of the clock; 0 when it is gone."""
    try:
        return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    except OSError:
        return 0


def run_ours(folder: Path, recipe: str) -> Measured:
    (folder / "bench.yaml").write_text(f"subsets: {{ours: [{RECIPES[recipe]}]}}\n")
    shutil.rmtree(folder / "subsets", ignore_errors=True)
    places = ["--scores", str(folder / "scores"), "--out", str(folder / "subsets")]
    return measure([sys.executable, "-m", "jobs", "select", str(folder / "bench.yaml"), *places])


def run_peer(folder: Path, checkout: str, python: str) -> Measured:
    (folder / "peer.py").write_text(PEER)
    words = [str(folder / "metadata"), str(folder / "peer.npy"), str(FRACTION), str(os.cpu_count())]
    return measure([python, str(folder / "peer.py"), *words], cwd=Path(checkout))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--text", help="parquet files with a `text` column: the captions")
    parser.add_argument(
        "--recipe", choices=RECIPES, default="datacomp", help="what ours selects; the peer has one rule"
    )
    parser.add_argument("--peer", help="a DataComp checkout")
    parser.add_argument("--peer-python", default=sys.executable, help="the interpreter of the peer's environment")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="where the rows are made, and kept; default: a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        if not (folder / "scores" / "manifest.json").is_file():
            make_rows(folder, args.rows, args.text)
        ours, peers = [], []
        for _ in range(args.repeats):
            ours.append(run_ours(folder, args.recipe))
            print(f"winnow   {ours[-1].seconds:8.2f} s {ours[-1].peak_mib:8.0f} MiB", flush=True)
            if args.peer:
                peers.append(run_peer(folder, args.peer, args.peer_python))
                print(f"DataComp {peers[-1].seconds:8.2f} s {peers[-1].peak_mib:8.0f} MiB", flush=True)
        print(json.dumps(summarize(folder, ours, peers)))
    return 0


def summarize(folder: Path, ours: list[Measured], peers: list[Measured]) -> dict[str, object]:
    """Return medians, the median of the pairwise ratios, the largest peaks, and whether the uids are the same."""
    subset = read_subset(str(folder / "subsets" / "ours.npy"))
    summary: dict[str, object] = {
        "rows_kept": len(subset),
        "seconds": round(statistics.median(m.seconds for m in ours), 2),
        "peak_mib": round(max(m.peak_mib for m in ours)),
    }
    if not peers:
        return summary
    ratios = [peer.seconds / our.seconds for our, peer in zip(ours, peers, strict=True)]
    return summary | {
        "peer_seconds": round(statistics.median(m.seconds for m in peers), 2),
        "peer_peak_mib": round(max(m.peak_mib for m in peers)),
        "times_faster": round(statistics.median(ratios), 2),
        "same_uids": bool(np.array_equal(subset, np.load(folder / "peer.npy"))),
    }


if __name__ == "__main__":
    sys.exit(main())
