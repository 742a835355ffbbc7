"""winnow run: every stage of a recipe, each skipped when it is already done.

RUN/networks/<name>  RUN/fits/<name>  RUN/scores  RUN/subsets  RUN/shards/<subset>  RUN/runs/<subset>
RUN/eval/<subset>  RUN/report.html
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from eval38.table import format_comparison
from jobs.arguments import add_fresh, add_recipe, add_spark, add_tasks_per_gpu, job, make_parser, split_words
from jobs.recipes import FIT, Recipe, list_ready, load_recipe, place_entry
from jobs.stage_fit import check_files, list_inputs, run_fit
from jobs.stage_score import run_score
from jobs.stage_select import run_select
from jobs.stage_shards import run_shards
from jobs.stages import FITS_FOLDER, RECIPE, SCORES_FOLDER, SHARDS_FOLDER, SUBSETS_FOLDER, timed
from pipeline.config import as_mapping
from pipeline.errors import ConfigError, EvalError, PoolError, StageError, WinnowError, check_name
from pipeline.filesystem import find_place
from pipeline.lock import hold_lock
from pipeline.manifest import Manifest, read_manifest
from pipeline.pool import list_parts, pool_identity
from pipeline.report import write_report
from pipeline.spark_session import lazy_session
from pipeline.storage import exists, expand, join, remove, write_bytes
from pipeline.subset import SUBSET_SUFFIX
from training.config import TrainConfig

FOLDERS = ("networks", FITS_FOLDER, SCORES_FOLDER, SUBSETS_FOLDER, SHARDS_FOLDER, "runs", "eval")
NAMES = ("filter", "name", FIT)
"""Fields of a score entry that name no place."""
STAGES = ("networks", "score", "select", "shards", "train", "eval")
EXAMPLE = """  winnow run dfn-tiny --pool pools/cifar-web --clean pools/cifar-hq --eval-data eval --out out
  winnow run dfn-tiny --pool pools/openstax --clean pools/cifar-hq --out out2 --until shards
  winnow run my.yaml --pool pool --out out3 --master 'local[8]' train.samples=12800000"""


def run_recipe(
    recipe: Recipe,
    *,
    pool: str,
    out: str,
    clean: str | None = None,
    eval_data: str | None = None,
    master: str | None = None,
    until: str = "eval",
    fresh: bool = False,
    tasks_per_gpu: int = 1,
) -> dict[str, Manifest]:
    """Run the stages up to `until` and return the evaluation manifests by run name.

    `fresh` deletes first what an earlier run made in OUT.
    Raises WinnowError; StageError when another driver works on OUT, or `fresh` is asked of a folder that is no run.
    """
    if fresh and exists(out) and not exists(join(out, RECIPE)):
        raise StageError(f"{out!r} was not made by `winnow run` (it has no {RECIPE}), so --fresh deletes nothing.")
    stages = STAGES[: STAGES.index(until) + 1]
    for name, config in recipe.fit.items():
        check_files(name, config)
    check_zeroshot(list_trained(recipe, stages), eval_data)
    if fresh:
        _keep_inputs(out, [place for place in (pool, clean, eval_data, *list_places(recipe)) if place])
    with hold_lock(out, "run"):
        if fresh:
            discard_run(out)
        write_bytes(join(out, RECIPE), (json.dumps(as_mapping(recipe), indent=2) + "\n").encode())
        train_networks(recipe, pool=pool, clean=clean, out=out, eval_data=eval_data)
        if "score" in stages:
            curate(recipe, pool=pool, out=out, master=master, stages=stages, tasks_per_gpu=tasks_per_gpu)
        if "train" in stages and recipe.train:
            train_subsets(recipe, out, eval_data)
        if "eval" in stages and eval_data:
            return evaluate_runs(recipe, eval_data, out)
    if "eval" in stages:
        print("winnow: nothing is evaluated: no --eval-data", file=sys.stderr)
    return {}


def list_places(recipe: Recipe) -> list[str]:
    """Return every place that a recipe names as an input; a few of them are names of models or columns."""
    of_fits = [place for config in recipe.fit.values() for place in list_inputs(config).values()]
    of_sets = [
        place
        for network in recipe.networks.values()
        for part in (network.finetune.sets if network.finetune else ())
        for place in (part.pairs, part.classes)
    ]
    options = [value for entry in recipe.score for option, value in entry.items() if option not in NAMES]
    models = [network.init for network in recipe.networks.values()]
    places = [place for place in (*of_fits, *of_sets, *options, *models) if isinstance(place, str)]
    return [*places, *(place.rpartition("@")[2] for place in places if "@" in place)]  # ARCHITECTURE@FILE


def _keep_inputs(out: str, places: Sequence[str]) -> None:
    """Raise ConfigError when what --fresh would delete holds the run's own inputs."""
    doomed = [find_place(join(out, name)) for name in FOLDERS]
    for place in (one for several in places for one in several.split("::")):
        spelled = expand(place) if any(sign in place for sign in "*?[{") else [place]
        if any(f"{find_place(url)}/".startswith(f"{folder}/") for url in spelled for folder in doomed):
            raise ConfigError(f"{place!r} lies in a folder of the run {out!r} that --fresh would delete. Move it.")


def discard_run(out: str) -> None:
    """Delete every stage's folder of a run folder."""
    folders = [name for name in FOLDERS if exists(join(out, name))]
    print(f"winnow: starting over, deleting {', '.join(folders) or 'nothing'} in {out}", file=sys.stderr)
    for name in folders:
        remove(join(out, name))


def list_trained(recipe: Recipe, stages: Sequence[str]) -> list[TrainConfig]:
    """Return the choices of everything that these stages train, the second phases of networks left out."""
    configs = [network.train for network in recipe.networks.values()]
    return configs + [recipe.train] if recipe.train and "train" in stages else configs


def check_zeroshot(configs: Sequence[TrainConfig], eval_data: str | None) -> None:
    """Raise ConfigError or EvalError for what is to be measured in training and cannot be."""
    for config in configs:
        from jobs.zeroshot import open_zeroshot

        open_zeroshot(config, eval_data)


def train_networks(recipe: Recipe, *, pool: str, clean: str | None, out: str, eval_data: str | None = None) -> None:
    """Train the recipe's filter networks into OUT/networks."""
    for name, network in recipe.networks.items():
        from jobs.stage_networks import run_network

        data = pool if network.data == "pool" else clean
        if data is None:
            raise ConfigError(f"network {name!r} is trained on clean pairs: say where they are with --clean.")
        parents = {str(network.data): pool_identity(list_parts(data))}
        print(f"winnow: network {name} on {data}", file=sys.stderr)
        with timed(out, "train network", name):
            run_network(network, data=data, out=join(out, "networks", name), parents=parents, eval_data=eval_data)


def curate(
    recipe: Recipe, *, pool: str, out: str, master: str | None, stages: Sequence[str], tasks_per_gpu: int = 1
) -> None:
    """Fit, score, select and write shards on one Spark session.

    A fit may read the scores of filters without a fit, and of those whose fit stands before it in the recipe.
    """
    scores, subsets = (join(out, name) for name in (SCORES_FOLDER, SUBSETS_FOLDER))
    places = {"networks": join(out, "networks"), "fits": join(out, FITS_FOLDER)}
    with lazy_session(master, name=f"winnow {recipe.name}") as start:
        ready: list[dict[str, Any]] = []
        for number, (name, config) in enumerate(recipe.fit.items()):
            before = ready
            ready = list_ready(recipe.score, list(recipe.fit)[:number])
            if len(ready) > len(before):
                with timed(out, "score", f"before fit {name}"):
                    entries = [place_entry(entry, **places) for entry in ready]
                    run_score(start, pool, entries, scores, tasks_per_gpu=tasks_per_gpu)
            with timed(out, "fit", name), naming_those_that_wait(name, recipe.score, ready):
                run_fit(start, config, join(places["fits"], name), pool=pool, scores=scores if ready else None)
        with timed(out, "score"):
            entries = [place_entry(entry, **places) for entry in recipe.score]
            run_score(start, pool, entries, scores, tasks_per_gpu=tasks_per_gpu)
        for name, steps in recipe.subsets.items() if "select" in stages else ():
            with timed(out, "select", name):
                run_select(start, scores, name, steps, subsets)
        for name in recipe.subsets if "shards" in stages else ():
            with timed(out, "shards", name):
                subset = join(subsets, name + SUBSET_SUFFIX)
                run_shards(start, pool, subset, recipe.shards, join(out, SHARDS_FOLDER, name), scores=scores)


@contextmanager
def naming_those_that_wait(
    fit: str, entries: Sequence[Mapping[str, Any]], ready: Sequence[Mapping[str, Any]]
) -> Iterator[None]:
    """Say more where a ConfigError or PoolError of a fit is about a column of a filter that waits for a fit itself."""
    waiting = {str(entry.get("name", entry["filter"])): entry[FIT] for entry in entries if entry not in ready}
    try:
        yield
    except (ConfigError, PoolError) as error:
        blocked = [name for name in waiting if f"'{name}_" in str(error)]
        if not blocked:
            raise
        raise type(error)(
            f"{error} Filter {blocked[0]!r} waits for fit {waiting[blocked[0]]!r}, which is not made before fit "
            f"{fit!r}. Put it before that one in the recipe; a fit that waits for itself cannot be made."
        ) from None


def train_subsets(recipe: Recipe, out: str, eval_data: str | None) -> None:
    """Train one model per subset, each for the same number of samples seen, into OUT/runs."""
    from jobs.zeroshot import open_zeroshot
    from training.run import train

    assert recipe.train
    for name in recipe.subsets:
        shards = join(out, SHARDS_FOLDER, name)
        made = read_manifest(shards)
        print(f"winnow: train on subset {name}", file=sys.stderr)
        with timed(out, "train", name):
            parents = {"shards": made.identity if made else ""}
            measure = open_zeroshot(recipe.train, eval_data)
            train(recipe.train, data=shards, out=join(out, "runs", name), parents=parents, measure=measure)


def evaluate_runs(recipe: Recipe, eval_data: str, out: str) -> dict[str, Manifest]:
    """Evaluate every trained model and filter network into OUT/eval; return manifests by run name.

    Raises EvalError when one could not be evaluated, after the others.
    """
    from eval38.evaluate import evaluate_models

    models = {f"network-{name}": join(out, "networks", name) for name in recipe.networks}
    models |= {name: join(out, "runs", name) for name in recipe.subsets} if recipe.train else {}
    if not models:
        return {}
    folders = {join(out, "eval", name): model for name, model in models.items()}
    with timed(out, "eval"):
        found = evaluate_models(recipe.eval, folders, data=eval_data, replace=True)
        made = dict(zip(models, found.values(), strict=True))
        for name, one in made.items():
            if isinstance(one, WinnowError):
                raise EvalError(f"{name}: {one}") from one
    return {name: one for name, one in made.items() if isinstance(one, Manifest)}


@job
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, run, print the table, write the report."""
    parser = make_parser("run", "Run every stage of a recipe; finished stages are skipped.", EXAMPLE)
    add_recipe(parser)
    parser.add_argument("--pool", required=True, help="candidate pool: folder, glob, brace range, a::b")
    parser.add_argument("--out", required=True, help="run folder")
    parser.add_argument("--clean", help="clean pairs, where the recipe trains a DFN on them")
    parser.add_argument("--eval-data", help="folder of evaluation sets in hub layout (wds_<task>_test)")
    parser.add_argument("--until", default="eval", metavar="STAGE", help=f"last stage: {', '.join(STAGES)}")
    parser.add_argument("--truth", help="parquet with uid and kind, to report precision and recall")
    parser.add_argument("--right-kinds", default="", help="kinds of the truth file that are right, with commas")
    add_fresh(parser)
    add_spark(parser)
    add_tasks_per_gpu(parser)
    args = parser.parse_args(argv)
    check_name(args.until, STAGES, kind="stage")
    recipe = load_recipe(*split_words(args.words))
    places = {"pool": args.pool, "out": args.out, "clean": args.clean, "eval_data": args.eval_data}
    results = run_recipe(
        recipe, **places, master=args.master, until=args.until, fresh=args.fresh, tasks_per_gpu=args.tasks_per_gpu
    )
    if results:
        print(format_comparison({name: result.facts for name, result in results.items()}))
    kinds = tuple(kind for kind in args.right_kinds.split(",") if kind)
    with timed(args.out, "report"):
        url = write_report(args.out, pool=args.pool, truth=args.truth, right_kinds=kinds)
    print(f"report: {url}")


if __name__ == "__main__":
    sys.exit(main())
