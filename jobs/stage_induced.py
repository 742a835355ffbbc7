"""The induced test: what a model is worth that is trained only on what a filter keeps (Fang et al. 2023, section 3.1).

Every subset gets one model per seed, all of equal samples seen, and each is evaluated.  A filter's own accuracy, where
it is a network, stands beside; the paper finds that it does not tell.  Made in a run folder, on `winnow run`'s stages:

    OUT/induced/<subset>/seed-<n>/run and eval    one model of one subset

Each is skipped when it is done.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from eval38.evaluate import evaluate
from eval38.summary import mean
from jobs.recipes import Recipe, require_train
from jobs.run_recipe import run_recipe
from jobs.stages import SCORES_FOLDER, SHARDS_FOLDER, SUBSETS_FOLDER, timed
from jobs.zeroshot import open_zeroshot
from pipeline.errors import ConfigError, EvalError, check_name
from pipeline.intervals import check_confidence, mean_interval
from pipeline.lock import hold_lock
from pipeline.manifest import Manifest, read_manifest
from pipeline.storage import join
from pipeline.target_aware import is_target_aware
from training.run import train

INDUCED_FOLDER = "induced"
AVERAGE = "average"
"""The measure over all counted tasks that every model has a result for."""
Values = Mapping[str, float]
"""Measure -> accuracy of one model."""


def run_induced(
    recipe: Recipe,
    *,
    pool: str,
    eval_data: str,
    out: str,
    seeds: Sequence[int],
    baseline: str,
    clean: str | None = None,
    subsets: Sequence[str] = (),
    confidence: float = 0.95,
    device: str = "auto",
    **spark: Any,
) -> dict[str, Any]:
    """Train and evaluate a model per subset and seed, and return what came out, as JSON values (docs/DFN.md).

    `subsets` are those of the recipe, all of them by default; `baseline` is the one that the others are compared with.
    `spark` goes to run_recipe.  Raises ConfigError for an unknown subset or a seed given twice, EvalError when no task
    has a result for every model, and what the stages raise.
    """
    check_confidence(confidence)
    config, chosen = require_train(recipe), list(dict.fromkeys(subsets or recipe.subsets))
    for name in chosen:
        check_name(name, recipe.subsets, kind="subset")
    check_name(baseline, chosen, kind="subset to compare with")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds {list(seeds)} should be different numbers, three or more for an interval.")
    for seed in seeds:
        replace(config, seed=seed)  # raises for one that is out of range
    recipe = replace(recipe, subsets={name: recipe.subsets[name] for name in chosen})
    open_zeroshot(config, eval_data)  # raises before anything is made
    run_recipe(recipe, pool=pool, out=out, clean=clean, eval_data=eval_data, until="shards", **spark)
    with hold_lock(out, "dfn evaluate"):
        made = {name: [train_seed(recipe, name, seed, eval_data, out, device) for seed in seeds] for name in chosen}
        own = evaluate_networks(recipe, eval_data, out, device)
    measures = list_measures([*own.values(), *(result for pairs in made.values() for _, result in pairs)])
    induced = {name: [read_values(result, measures) for _, result in pairs] for name, pairs in made.items()}
    rows = [
        describe_subset(recipe, name, out, made[name][0][0])
        | {"own": read_values(own[name], measures) if name in own else None}
        | {"measures": compare_seeds(induced[name], induced[baseline], confidence, is_baseline=name == baseline)}
        for name in chosen
    ]
    return {
        "samples_seen": config.samples,
        "model": config.model,
        "seeds": list(seeds),
        "confidence": confidence,
        "baseline": baseline,
        "measures": measures,
        "subsets": rows,
    }


def train_seed(
    recipe: Recipe, name: str, seed: int, eval_data: str, out: str, device: str
) -> tuple[Manifest, Manifest]:
    """Train one model on a subset's shards and evaluate it; return both manifests.  What is done stays."""
    print(f"winnow: subset {name}, seed {seed}", file=sys.stderr)
    folder, shards = join(out, INDUCED_FOLDER, name, f"seed-{seed}"), join(out, SHARDS_FOLDER, name)
    model, cut = join(folder, "run"), read_manifest(shards)
    config, parents = replace(require_train(recipe), seed=seed), {"shards": cut.identity if cut else ""}
    with timed(out, "train induced", f"{name} seed {seed}"):
        measure = open_zeroshot(config, eval_data)
        run = train(config, data=shards, out=model, parents=parents, measure=measure, device=device)
    with timed(out, "eval induced", f"{name} seed {seed}"):
        result = join(folder, "eval")
        return run, evaluate(recipe.eval, model=model, data=eval_data, out=result, device=device, replace=True)


def evaluate_networks(recipe: Recipe, eval_data: str, out: str, device: str) -> dict[str, Manifest]:
    """Evaluate the recipe's filter networks where `winnow run` does, and return the manifests by network."""
    found = {}
    for name in recipe.networks:
        with timed(out, "eval", f"network-{name}"):
            model, result = join(out, "networks", name), join(out, "eval", f"network-{name}")
            found[name] = evaluate(recipe.eval, model=model, data=eval_data, out=result, device=device, replace=True)
    return found


def list_measures(models: Sequence[Manifest]) -> dict[str, str]:
    """Return measure -> name: the average over the counted tasks where there are several, then each task.

    Only tasks that every model has a value for.  Raises EvalError when there is none.
    """
    first, *_ = models
    shared = {
        key: task
        for key, task in first.facts["tasks"].items()
        if all(made.facts["tasks"].get(key, {}).get("value") is not None for made in models)
    }
    if not shared:
        raise EvalError("no task has a result for every model, so there is nothing to compare. See the messages above.")
    num_counted = sum(task["counted"] for task in shared.values())
    average = {AVERAGE: f"average over {num_counted} counted tasks"} if num_counted > 1 else {}
    return average | {key: task["name"] for key, task in shared.items()}


def read_values(made: Manifest, measures: Mapping[str, str]) -> Values:
    """Return a model's value of each measure, in [0, 1]."""
    tasks = {key: made.facts["tasks"][key] for key in measures if key != AVERAGE}
    values = {key: float(task["value"]) for key, task in tasks.items()}
    if AVERAGE not in measures:
        return values
    return {AVERAGE: float(mean([values[key] for key, task in tasks.items() if task["counted"]]) or 0)} | values


def compare_seeds(
    values: Sequence[Values], baseline: Sequence[Values], confidence: float, *, is_baseline: bool
) -> dict[str, Any]:
    """Return for each measure the values by seed, their mean with its interval, and the difference to the baseline.

    The difference is paired by seed: of one seed, both models start from the same weights.
    """
    found = {}
    for measure in values[0]:
        of_seeds = [one[measure] for one in values]
        pairs = [one[measure] - other[measure] for one, other in zip(values, baseline, strict=True)]
        found[measure] = {
            "values": of_seeds,
            "mean_and_half_width": mean_interval(of_seeds, confidence),
            "difference_and_half_width": None if is_baseline else mean_interval(pairs, confidence),
        }
    return found


def describe_subset(recipe: Recipe, name: str, out: str, run: Manifest) -> dict[str, Any]:
    """Return what a subset is: rows, copies, whether it is target-aware, and how often a model sees it."""
    selected, scored = (
        read_manifest(join(out, SUBSETS_FOLDER), name=f"{name}.json"),
        read_manifest(join(out, SCORES_FOLDER)),
    )
    assert selected and scored
    return {
        "subset": name,
        "target_aware": is_target_aware(recipe.subsets[name], scored),
        "rows": selected.facts["rows"],
        "copies": selected.facts["copies"],
        "epochs": run.facts["mean_epochs"],
    }
