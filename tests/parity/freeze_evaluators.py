"""Small cases through DataComp's own evaluators -> tests/eval38/datacomp_metrics.json, for tests that need no peer.

`PEER_PYTHON tests/parity/freeze_evaluators.py CHECKOUT tests/eval38/datacomp_metrics.json`, in the environment that
tests/parity/evaluators.py names.  Predictions, labels and metadata are drawn with a fixed seed: absent classes, empty
groups, a region of four images, equal vectors.  DataComp's code is not changed; models are stand-ins that return the
case's vectors.  NaN is written as null.
"""

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

Case = dict[str, Any]
RNG = np.random.default_rng(0)


def draw(high: int, num: int, *, low: int = 0) -> list[int]:
    """Return random integers."""
    return RNG.integers(low, high, num).tolist()


def guess(labels: list[int], num_classes: int) -> list[int]:
    """Return the labels, of which about a third is replaced by chance."""
    return [int(RNG.integers(num_classes)) if RNG.random() < 0.35 else label for label in labels]


def make_group_cases() -> list[Case]:
    """Return cases of the tasks that are judged by predictions, labels and metadata."""
    labels = draw(12, 80)
    cases = [
        {
            "key": "wilds/iwildcam",
            "best": guess(labels, 20),
            "label": labels,
            "metadata": [[0] * 8 + [y] for y in labels],
        }
    ]
    labels = draw(2, 60)
    cases.append({"key": "wilds/camelyon17", "best": guess(labels, 2), "label": labels})
    cases[-1]["metadata"] = [[2, slide, y] for slide, y in zip(draw(24, 60, low=20), labels, strict=True)]
    for sizes in ([20, 0, 15, 9, 4], [20, 8, 7], [4, 2], [1]):
        regions = [region for region, size in enumerate(sizes) for _ in range(size)]
        labels = draw(62, len(regions))
        best = guess(labels, 62)
        if sizes[-1] == 4:
            best[-4:] = [(label + 1) % 62 for label in labels[-4:]]
        years = draw(16, len(regions), low=14)
        cases.append({"key": "wilds/fmow", "best": best, "label": labels})
        cases[-1]["metadata"] = [[r, year, y, 0] for r, year, y in zip(regions, years, labels, strict=True)]
    labels = draw(58, 50)
    top = [RNG.permutation([label, *draw(58, 4)]).tolist() if RNG.random() < 0.6 else draw(58, 5) for label in labels]
    cases.append({"key": "fairness/dollar_street", "best": top, "label": labels})
    cases[-1]["metadata"] = [list(row) for row in zip(draw(4, 50, low=1), draw(4, 50), draw(4, 50), strict=True)]
    labels = draw(40, 50)
    cases.append({"key": "fairness/geode", "best": guess(labels, 40), "label": labels})
    cases[-1]["metadata"] = [list(row) for row in zip(draw(6, 50), draw(20, 50), strict=True)]
    for key, num_races in (("fairness/fairface", 7), ("fairness/utkface", 5)):
        race = draw(num_races, 60)
        best = zip(guess(race, 7), draw(2, 60), draw(9, 60), draw(21, 60), strict=True)
        truth = zip(draw(9, 60), draw(2, 60), race, [int(r != 1) for r in race], strict=True)
        cases.append(
            {"key": key, "best": [list(row) for row in best], "label": None, "metadata": [list(r) for r in truth]}
        )
    return cases


def run_groups(case: Case) -> Case:
    """Return the case with what DataComp's evaluator says of it."""
    from eval_utils.fairness_eval import EVALUATORS

    metadata = torch.tensor(case["metadata"])
    label = None if case["label"] is None else torch.tensor(case["label"])
    found = EVALUATORS[case["key"]](metadata).eval(torch.tensor(case["best"]), label, metadata)
    return case | {"metrics": found[0] if isinstance(found, tuple) else found}


def run_named_regions(case: Case) -> Case:
    """Return an FMoW case with the worst region where the last is called Other, as WILDS's own data set calls it."""
    from eval_utils.wilds_eval import FMoWEvaluator

    metadata = torch.tensor(case["metadata"])
    named = FMoWEvaluator.__new__(FMoWEvaluator)
    named._metadata_map = {"region": [*"ABCD"[: int(metadata[:, 0].max())], "Other"]}
    named.__init__(metadata)
    found = named.eval(torch.tensor(case["best"]), torch.tensor(case["label"]), metadata)[0]
    return case | {"worst_named_region": found["acc_worst_region"]}


class Vectors(torch.nn.Module):
    """A model whose inputs are its vectors."""

    def encode_image(self, x: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        return x

    encode_text = encode_image


def make_retrieval_case(num_images: int, *, repeats: bool) -> Case:
    """Return images and one to three captions of each; with `repeats` some images have the same captions' vectors."""
    image = RNG.normal(size=(num_images, 6)).round(3)
    captions = [(image[n] + RNG.normal(size=(1 + n % 3, 6)).round(3)).tolist() for n in range(num_images)]
    if repeats:
        captions[3], image[5] = captions[2][:1], image[4]
    return {"key": "retrieval", "image": image.tolist(), "captions": captions}


def run_retrieval(case: Case) -> Case:
    """Return the case with CLIP_benchmark's recalls and DataComp's mean."""
    from clip_benchmark.metrics import zeroshot_retrieval

    loader = [(torch.tensor(case["image"], dtype=torch.float32), case["captions"])]
    metrics = zeroshot_retrieval.evaluate(
        Vectors(), loader, lambda rows: torch.tensor(rows, dtype=torch.float32), "cpu", recall_k_list=[1, 5, 10]
    )
    mean = 0.5 * (metrics["text_retrieval_recall@1"] + metrics["image_retrieval_recall@1"])
    return case | {"metrics": metrics | {"mean_recall@1": mean}}


def make_game_case(sizes: list[int], *, ties: bool) -> Case:
    """Return instances with the cosine of each candidate; with `ties` many are equal."""
    games = []
    for n, size in enumerate(sizes):
        cosines = (draw(3, size) if ties else RNG.normal(size=size).astype(np.float32)).__iter__()
        games.append(
            {"cosines": [float(c) for c in cosines], "true": sorted(RNG.permutation(size)[: 1 + n % 4].tolist())}
        )
    return {"key": "winogavil", "games": games}


def run_games(case: Case) -> Case:
    """Return the case with DataComp's scores."""
    from eval_utils import wino_eval

    def load_dataset(name: str, split: str, cache_dir: str | None) -> list[Case]:
        rows = []
        for game in case["games"]:
            names = [f"c{n}" for n in range(len(game["cosines"]))]
            row = {"candidate_images": game["cosines"], "cue": "x", "candidates": names}
            rows.append(row | {"associations": [names[n] for n in game["true"]]})
        return rows

    sys.modules["datasets"].load_dataset = load_dataset  # type: ignore[attr-defined]
    wino_eval.create_model = lambda arch, path: (Vectors(), lambda cosine: torch.tensor([cosine]), "cpu")
    wino_eval.open_clip.get_tokenizer = lambda arch: lambda prompts: torch.ones(1, 1)
    return case | {"metrics": wino_eval.evaluate_winogavil_dataset("", "", num_workers=0)}


def main(peer: str, out: str) -> None:
    """Make the cases, run them, write the file."""
    sys.path.insert(0, peer)
    sys.modules["datasets"] = types.ModuleType("datasets")
    cases = [run_groups(case) for case in make_group_cases()]
    first = next(n for n, case in enumerate(cases) if case["key"] == "wilds/fmow")
    cases[first] = run_named_regions(cases[first])
    cases += [run_retrieval(make_retrieval_case(num, repeats=repeats)) for num, repeats in ((24, False), (24, True))]
    games = ([5, 6, 10, 12] * 6, False), ([5, 6, 10, 12] * 6, True), ([5, 6, 6], False)
    cases += [run_games(make_game_case(sizes, ties=ties)) for sizes, ties in games]
    for case in cases:
        values = {name: float(value) for name, value in case["metrics"].items()}
        case["metrics"] = {name: None if math.isnan(value) else value for name, value in values.items()}
    lines = ",\n".join(json.dumps(case, allow_nan=False) for case in cases)
    Path(out).write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
