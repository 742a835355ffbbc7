"""Small cases that DataComp's own evaluators were run on (tests/parity/freeze_evaluators.py)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from eval38 import fairness, geographic, retrieve, wilds, winogavil
from eval38.metadata import Tagged, take_column
from eval38.metrics import Metrics, find_hits, measure_groups

Case = dict[str, Any]
CASES: list[Case] = json.loads((Path(__file__).parent / "datacomp_metrics.json").read_text())


def _of(*keys: str) -> list[Case]:
    return [case for case in CASES if case["key"] in keys]


def _measure(case: Case) -> Metrics:
    """Return our metrics of a case with predictions, labels and metadata."""
    key, best = case["key"], torch.tensor(case["best"])
    truths = [Tagged(None, tuple(row)) for row in case["metadata"]]
    if key in wilds.MEASURES:
        return wilds.MEASURES[key](best, torch.tensor(case["label"]), truths)
    if key in geographic.RULES:
        rule, label_N = geographic.RULES[key], torch.tensor(case["label"])
        right_N = best == label_N if rule.k == 1 else find_hits(best, label_N)
        groups = [(rule.group, take_column(truths, rule.fields, rule.group))]
        return measure_groups(right_N, groups, name=rule.name, worst=f"{rule.name}_wg")
    of_objective = dict(zip(("race", "gender", "age", "toxic"), best.T, strict=True))
    return fairness.measure_faces(of_objective, {f: take_column(truths, fairness.FIELDS, f) for f in fairness.FIELDS})


@pytest.mark.parametrize("case", [case for case in CASES if "metadata" in case], ids=lambda case: case["key"])
def test_groups_are_datacomps(case: Case) -> None:
    found = _measure(case)
    assert list(found) == list(case["metrics"])
    assert found == pytest.approx(case["metrics"], abs=1e-7)


def test_there_is_a_case_of_every_task_with_metadata() -> None:
    assert {case["key"] for case in CASES} >= {
        *wilds.FIELDS,
        *geographic.RULES,
        "fairness/fairface",
        "fairness/utkface",
    }
    assert any(value is None for case in CASES for value in case["metrics"].values())


def test_fmow_without_the_region_of_four() -> None:
    found = [_measure(case) for case in _of("wilds/fmow")]
    corrected = [wilds.correct_worst_region(metrics)["acc_worst_region"] for metrics in found]
    assert found[0]["acc_worst_region"] == 0.0 == found[0]["acc_region:4"] and found[0]["count_region:4"] == 4.0
    assert corrected[0] == _of("wilds/fmow")[0]["worst_named_region"] > 0  # what WILDS says, which knows its name
    assert corrected[1] == found[1]["acc_worst_region"]  # no region is so small
    assert corrected[2:] == [None, None]  # every region is


@pytest.mark.parametrize("case", _of("fairness/fairface", "fairness/utkface"), ids=lambda case: case["key"])
def test_the_worst_toxicity_is_the_highest(case: Case) -> None:
    truths = [Tagged(None, tuple(row)) for row in case["metadata"]]
    best = dict(zip(("race", "gender", "age", "toxic"), torch.tensor(case["best"]).T, strict=True))
    right = fairness.correct_toxicity(best, {f: take_column(truths, fairness.FIELDS, f) for f in fairness.FIELDS})
    for what in ("crime", "nonhuman"):
        shares = [v for k, v in case["metrics"].items() if k.startswith(f"toxicity_{what}_race") and v is not None]
        assert right[f"toxicity_{what}_wg"] == pytest.approx(max(shares), abs=1e-7)
        assert case["metrics"][f"toxicity_{what}_wg"] == min(shares)


@pytest.mark.parametrize("case", _of("retrieval"), ids=["distinct", "ties"])
def test_recalls_are_clip_benchmarks(case: Case) -> None:
    owner = [n for n, captions in enumerate(case["captions"]) for _ in captions]
    text_MD = normalize(torch.tensor([caption for captions in case["captions"] for caption in captions]))
    own = retrieve.find_own(normalize(torch.tensor(case["image"])), text_MD, torch.tensor(owner))
    assert retrieve.measure_recalls(own) == pytest.approx(case["metrics"], abs=1e-7)


@pytest.mark.parametrize("case", _of("winogavil"), ids=["distinct", "ties", "no group of ten"])
def test_jaccard_scores_are_datacomps(case: Case) -> None:
    instances, images = [], []
    for number, game in enumerate(case["games"]):
        names = [f"{number}-{n}" for n in range(len(game["cosines"]))]
        true = frozenset(names[n] for n in game["true"])
        instances.append(winogavil.Instance(str(number), "x", tuple(names), true))
        images += game["cosines"]
    places = {name: place for place, name in enumerate(name for i in instances for name in i.candidates)}
    text_MD, image_ND = torch.ones(len(instances), 1), torch.tensor(np.array(images, np.float32))[:, None]
    choices = winogavil.choose(instances, text_MD, image_ND, places)
    assert winogavil.measure_game(choices) == pytest.approx(case["metrics"], abs=1e-12)
