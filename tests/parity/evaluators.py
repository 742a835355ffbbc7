"""DataComp's own evaluators against `winnow eval` on the same 40 made-up sets: is every metric the same number?

`python -m tests.parity.evaluators --peer CHECKOUT --python PEER_PYTHON`

Makes the 40 sets of tests/made_evalsets.py and a tiny model whose answers differ between them, evaluates them with
winnow and, task by task, with DataComp's evaluate_model in the environment of PEER_PYTHON (clip-benchmark 1.4.0,
webdataset 0.2.31, wilds 2.0.0, scikit-learn, open_clip_torch, numpy < 2.3).  DataComp's code is not changed: what
`datasets` loads from the hub is answered with the same rows, and without a GPU its autocast does nothing.  Then
DataComp's aggregate_scores.py reads winnow's results file.  Prints a table; exit code 1 when a number differs.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

from eval38.config import EvalConfig
from eval38.evaluate import evaluate
from eval38.tasks import TASKS
from tests.made_evalsets import NUM_PICTURES, make_sets_and_model

TOLERANCE = 1e-6
PEER = """
import io, json, sys, types
from pathlib import Path
asked = json.loads(Path(sys.argv[1]).read_text())
sys.path[:0] = [asked["peer"], asked["root"]]
from PIL import Image
from tests.made_evalsets import NUM_PICTURES, draw_picture, list_captions, list_games

def picture(n):
    return Image.open(io.BytesIO(draw_picture(n))).convert("RGB")

def load_dataset(name, split, cache_dir):
    if "winogavil" not in name:
        return [{"image": picture(n), "caption": list_captions(n)} for n in range(NUM_PICTURES)]
    games = [{name: json.loads(text) if text[0] == "[" else text for name, text in row.items()} for row in list_games()]
    return [game | {"candidate_images": [picture(int(c.split()[1])) for c in game["candidates"]]} for game in games]

sys.modules["datasets"] = types.SimpleNamespace(load_dataset=load_dataset)
import open_clip
open_clip.add_model_config(asked["root"] + "/pipeline/clip_models")
from eval_utils.main import evaluate_model
info = {"scale_config": {"model": asked["model"]}, "checkpoint": asked["checkpoint"]}
if __name__ == "__main__":
    with Path(asked["out"]).open("w") as out:
        for key in asked["keys"]:
            metrics = evaluate_model(key, info, asked["data"], NUM_PICTURES, batch_size=16)
            print(json.dumps({"key": key, "metrics": metrics}), file=out, flush=True)
"""


def run_peer(folder: Path, peer: str, python: str) -> dict[str, dict[str, float]]:
    """Return DataComp's metrics by task."""
    asked = {
        "peer": peer,
        "root": str(Path(__file__).resolve().parents[2]),
        "model": "winnow-vit-tiny",
        "checkpoint": str(folder / "tiny.pt"),
        "data": str(folder / "data"),
        "out": str(folder / "peer.jsonl"),
        "keys": [task.key for task in TASKS],
    }
    (folder / "asked.json").write_text(json.dumps(asked))
    (folder / "peer.py").write_text(PEER)
    command = [python, str(folder / "peer.py"), str(folder / "asked.json")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = map(json.loads, (folder / "peer.jsonl").read_text().splitlines())
    return {row["key"]: row["metrics"] for row in rows}


def find_difference(ours: dict[str, float | None], theirs: dict[str, float]) -> float:
    """Return the largest difference of two results' metrics; infinity when one has what the other has not."""
    if set(ours) - {"main_metric"} != set(theirs):
        return math.inf
    largest = 0.0
    for name, value in theirs.items():
        found, expected = ours[name], None if value is None or math.isnan(value) else value
        if (found is None) != (expected is None):
            return math.inf
        largest = max(largest, abs((found or 0.0) - (expected or 0.0)))
    return largest


def main() -> None:
    """Parse, make the sets, evaluate twice, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="DataComp checkout")
    parser.add_argument("--python", required=True, help="python that can run it")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    folder = args.out or Path(tempfile.mkdtemp())
    model = make_sets_and_model(folder)
    places = {"data": str(folder / "data"), "out": str(folder / "ours")}
    facts = evaluate(EvalConfig(), model=model, **places, device="cpu", quiet=True).facts
    results = folder / "ours" / "eval_results.jsonl"
    rows = {row["key"]: row for row in map(json.loads, results.read_text().splitlines())}
    theirs, same = run_peer(folder, args.peer, args.python), True
    print(
        f"{NUM_PICTURES} pictures\n{'task':52s}{'metrics':>8s}{'main':>9s}{'corrected':>11s}{'largest difference':>20s}"
    )
    for key, row in rows.items():
        difference = find_difference(row["metrics"], theirs[key])
        same &= difference <= TOLERANCE
        main_metric, right = row["metrics"]["main_metric"], row.get("corrected", {}).get("main_metric")
        said = ["-" if value is None else f"{value:.6f}" for value in (main_metric, right)]
        print(f"{key:52s}{len(theirs[key]):8d}{said[0]:>9s}{said[1]:>11s}{difference:20.1e}")
    command = [args.python, f"{args.peer}/aggregate_scores.py", "--input", str(results)]
    print(f"\n{facts['average']['label']}: {facts['average']['value']:.3f}, ", end="")
    print(f"corrected {facts['average_corrected']['value']:.3f}; DataComp's aggregate_scores.py on winnow's file:")
    print(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    sys.exit(not same)


if __name__ == "__main__":
    main()
