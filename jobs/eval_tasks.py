"""winnow eval: a model, several, or every checkpoint of a run -> zero-shot results on the sets that are there."""

import logging
import re
import sys
from collections.abc import Sequence
from typing import Any

from eval38.config import EvalConfig
from eval38.summary import list_failed
from eval38.table import format_comparison, format_table
from jobs.arguments import add_recipe, job, make_parser, split_words
from jobs.recipes import load_recipe
from pipeline.errors import ConfigError, EvalError, WinnowError
from pipeline.storage import is_folder, is_local, join

EXAMPLE = """  winnow eval --model runs/dfn --data evalsets --out results
  winnow eval --model ViT-B-32/datacomp_m_s128m_b4k --data evalsets --out results eval.tasks=[cifar10,mnist]
  winnow eval --model runs/dfn --data evalsets --out results eval.own=[signs]     yours: evalsets/signs/CLASS/IMAGE.jpg
  winnow eval --model runs/dfn --every --data evalsets --out results       every kept checkpoint -> results/curve.jsonl
  winnow eval --model base=runs/none --model runs/dfn --data evalsets --out results            -> results/base and /dfn
  torchrun --nproc-per-node 8 -m jobs eval --model runs/dfn --data evalsets --out results      a share to each GPU

`winnow eval download` fetches sets, `winnow eval compare` sets results side by side, `winnow eval submission` writes
a DataComp leaderboard entry; each has its own --help."""
LABEL = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)


@job
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, evaluate, print the table."""
    parser = make_parser("eval", "Run the zero-shot tasks whose data is there, and print a table.", EXAMPLE)
    add_recipe(parser)
    help = (
        "run folder, NAME/tag, NAME@file, hf-hub:org/name or MODULE:FUNCTION of your own Python; given several times, "
        "images are decoded once for all, and each has a folder OUT/LABEL"
    )
    parser.add_argument("--model", required=True, action="append", metavar="[LABEL=]MODEL", help=help)
    help = "evaluate every checkpoint that the run kept (train.keep_checkpoints); NAME@FOLDER if it is not finished"
    parser.add_argument("--every", action="store_true", help=help)
    parser.add_argument("--data", required=True, help="folder with wds_<task>_test folders, as on the hub")
    parser.add_argument("--out", required=True, help="results folder")
    help = "folder to keep the images' vectors in: other templates or class names then need no image"
    parser.add_argument("--features", help=help)
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:1, ...; under torchrun cuda is one each"
    )
    args = parser.parse_args(argv)
    config = load_recipe(*split_words(args.words)).eval
    from training.world import is_first

    if not is_first():
        logging.getLogger("winnow").setLevel(logging.CRITICAL)  # the first process says it
    places = {"data": args.data, "features": args.features, "device": args.device, "quiet": not is_first()}
    table, failures = evaluate_asked(config, args.model, every=args.every, out=args.out, **places)
    if table and is_first():
        print(table)
    if failures:
        raise EvalError("\n".join(failures))


def evaluate_asked(
    config: EvalConfig, models: Sequence[str], *, every: bool, out: str, **places: Any
) -> tuple[str, list[str]]:
    """Evaluate one model, every checkpoint of one, or several.

    Return the table, and what failed of the models and of the sets that were asked for by name.
    Raises ConfigError for several runs with --every or two models of one label.
    """
    from eval38.curve import evaluate_checkpoints, format_curve
    from eval38.evaluate import evaluate, evaluate_models

    named, keys = name_models(models), (*config.tasks, *config.own)
    if len(models) == 1:
        (model,) = named.values()
        if every:
            points = evaluate_checkpoints(config, run=model, out=out, **places)
            found = {key: why for point in points for key, why in point.get("failed", {}).items() if key in keys}
            return format_curve(points), _tell_failed([f"{key}: {why}" for key, why in found.items()])
        alone = evaluate(config, model=model, out=out, **places).facts
        return format_table(alone), _tell_failed(list_failed(alone, keys))
    if every:
        raise ConfigError(f"--every takes one run, not {len(models)}: give each a command of its own.")
    folders = {join(out, label): model for label, model in named.items()}
    made = dict(zip(named, evaluate_models(config, folders, **places).values(), strict=True))
    facts = {label: one.facts for label, one in made.items() if not isinstance(one, WinnowError)}
    table = format_comparison(facts) if facts else ""
    failed = [f"{label}: {error}" for label, error in made.items() if isinstance(error, WinnowError)]
    of_models = [f"{len(failed)} of {len(made)} models could not be evaluated:", *failed] if failed else []
    of_sets = dict.fromkeys(line for one in facts.values() for line in list_failed(one, keys))
    return table, [*of_models, *_tell_failed(list(of_sets))]


def _tell_failed(sets: Sequence[str]) -> list[str]:
    return [f"{len(sets)} of the sets asked for could not be evaluated:", *sets] if sets else []


def name_models(models: Sequence[str]) -> dict[str, str]:
    """Return label -> model string; a model without a label is called by the end of its name.

    Raises ConfigError when two have one label, or one has none that names a folder.
    """
    named: dict[str, str] = {}
    for word in models:
        is_path = is_local(word) and is_folder(word)  # runs/lr=1
        given = None if is_path else LABEL.fullmatch(word)
        label, model = given.groups() if given else (re.sub(r"[^\w.]+", "-", word.rstrip("/").rpartition("/")[2]), word)
        if not label.strip("."):
            raise ConfigError(f"model {word!r} would be called {label!r}, which names no folder: say LABEL={model}.")
        if label in named:
            raise ConfigError(f"two models are called {label!r}: give one of them another, as in other={model}.")
        named[label] = model
    return named


if __name__ == "__main__":
    sys.exit(main())
