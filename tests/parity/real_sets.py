"""CLIP_benchmark 1.6.2 against `winnow eval` on real sets: are accuracy, recall and retrieval the same numbers?

`python -m tests.parity.real_sets --python PEER_PYTHON --data EVALSETS --pool TARS --model MODEL [--model ...]`

Evaluates each model (an architecture of winnow's with a checkpoint: winnow-vit-tiny@file) on CIFAR-10, MNIST and
Caltech-101 under EVALSETS, and on retrieval between the images and captions of the first rows of a pool's tars, written
as a webdataset.  Both sides run in float32 on the CPU.  PEER_PYTHON has clip_benchmark 1.6.2, webdataset 0.2.31,
open_clip_torch and numpy < 2.3.  Prints a table; exit code 1 when a number differs by more than 1e-6.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from eval38.config import EvalConfig
from eval38.evaluate import evaluate
from eval38.tasks import find_task, folder_of
from pipeline.schemas import CAPTION_EXTENSION, IMAGE_EXTENSIONS
from pipeline.storage import expand
from pipeline.tars import read_rows
from tests.made_evalsets import write_tars

TOLERANCE = 1e-6
CLASSIFIED = ("cifar10", "mnist", "vtab/caltech101")
RETRIEVED = "retrieval/flickr_1k_test_image_text_retrieval"
PEER = """
import json, sys
from pathlib import Path
import open_clip, torch
from clip_benchmark.datasets.builder import build_dataset, image_captions_collate_fn
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
asked = json.loads(Path(sys.argv[1]).read_text())
open_clip.add_model_config(asked["configs"])
if __name__ == "__main__":
    model, _, transform = open_clip.create_model_and_transforms(asked["model"], pretrained=asked["checkpoint"])
    model.eval()
    tokenize = open_clip.get_tokenizer(asked["model"])
    for key, folder in asked["sets"].items():
        kind = "zeroshot_retrieval" if key.startswith("retrieval") else "zeroshot_classification"
        found = build_dataset("wds/" + key, root=folder, transform=transform, split="test", download=False, task=kind)
        if key.startswith("retrieval"):
            loader = torch.utils.data.DataLoader(found, batch_size=64, collate_fn=image_captions_collate_fn)
            metrics = zeroshot_retrieval.evaluate(model, loader, tokenize, "cpu", amp=False, recall_k_list=[1, 5, 10])
        else:
            loader = torch.utils.data.DataLoader(found.batched(64), batch_size=None)
            words = found.classes, found.templates
            metrics = zeroshot_classification.evaluate(model, loader, tokenize, *words, "cpu", amp=False)
        print(json.dumps({"key": key, "metrics": metrics}), flush=True)
"""


def write_captioned(folder: Path, tars: str, num_rows: int) -> None:
    """Write the first rows of a pool as a retrieval set, one caption an image; rows without one are passed over."""
    rows = []
    for tar in expand(tars):
        for row in read_rows(tar):
            image, caption = (
                row.find(IMAGE_EXTENSIONS),
                " ".join((row.find([CAPTION_EXTENSION]) or b"").decode().split()),
            )
            if image and caption and len(rows) < num_rows:
                rows.append({"jpg": image, "txt": caption.encode()})
    write_tars(folder, rows)
    (folder / "dataset_type.txt").write_text("retrieval\n")


def run_peer(folder: Path, python: str, model: str, data: Path) -> dict[str, dict[str, float]]:
    """Return CLIP_benchmark's metrics by task."""
    architecture, _, checkpoint = model.partition("@")
    asked = {
        "configs": str(Path(__file__).resolve().parents[2] / "pipeline" / "clip_models"),
        "model": architecture,
        "checkpoint": checkpoint,
        "sets": {key: str(data / folder_of(find_task(key))) for key in (*CLASSIFIED, RETRIEVED)},
    }
    (folder / "asked.json").write_text(json.dumps(asked))
    (folder / "peer.py").write_text(PEER)
    command = [python, str(folder / "peer.py"), str(folder / "asked.json")]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row["key"]: row["metrics"] for row in rows}


def main() -> None:
    """Parse, evaluate each model twice, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="python that has clip_benchmark")
    parser.add_argument("--data", required=True, type=Path, help="folder with wds_cifar10_test and others")
    parser.add_argument("--pool", required=True, help="tars of images with captions, a glob")
    parser.add_argument("--model", required=True, action="append", help="winnow-vit-tiny@checkpoint.pt")
    parser.add_argument("--rows", type=int, default=1000, help="images of the retrieval set")
    args = parser.parse_args()
    folder, same = Path(tempfile.mkdtemp()), True
    data = folder / "data"
    data.mkdir()
    for task in map(find_task, CLASSIFIED):
        (data / folder_of(task)).symlink_to((args.data / folder_of(task)).resolve())
    write_captioned(data / folder_of(find_task(RETRIEVED)), args.pool, args.rows)
    for number, model in enumerate(args.model):
        out, start = folder / f"ours{number}", time.perf_counter()
        evaluate(EvalConfig(), model=model, data=str(data), out=str(out), device="cpu", quiet=True)
        middle = time.perf_counter()
        theirs = run_peer(folder, args.python, model, data)
        print(f"{model}: winnow {middle - start:.1f} s, CLIP_benchmark {time.perf_counter() - middle:.1f} s")
        rows = map(json.loads, (out / "eval_results.jsonl").read_text().splitlines())
        for row in rows:
            for name, value in theirs[row["key"]].items():
                found = row["metrics"][name]
                same &= abs(found - value) <= TOLERANCE
                print(f"  {row['key']:48s}{name:28s}{found:10.6f}{value:10.6f}{abs(found - value):10.1e}")
    sys.exit(not same)


if __name__ == "__main__":
    main()
