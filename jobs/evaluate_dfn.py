"""winnow dfn evaluate: how good filters are, by their scores and by the models that they induce."""

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from jobs.arguments import add_recipe, add_spark, add_tasks_per_gpu, job, make_parser, split_words
from jobs.recipes import load_recipe
from jobs.stage_agreement import FRACTIONS, measure_scores
from jobs.stages import SCORES_FOLDER
from pipeline.errors import ConfigError
from pipeline.evaluation_page import render_evaluation
from pipeline.report.read import NO_FILTER
from pipeline.schemas import EVALUATION, EVALUATION_PAGE, FORMAT_VERSION
from pipeline.storage import join, write_bytes

EXAMPLE = """  winnow dfn evaluate --scores out/scores --by dfn_similarity_score,raw_similarity_score --out judged \\
      --truth truth.parquet --right-kinds clean,exact_duplicate
  winnow dfn evaluate dfn-tiny --pool pools/cifar-web --clean pools/cifar-hq --eval-data eval --seeds 0,1,2 --out out"""


@job
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, measure what is asked for, write evaluation.json and evaluation.md, print the tables."""
    parser = make_parser("dfn evaluate", "Judge filters by their scores, and by the models that they induce.", EXAMPLE)
    add_recipe(parser)
    parser.add_argument("--out", required=True, help="folder for evaluation.json and .md; a run folder with --pool")
    parser.add_argument("--by", default="", help="score columns to judge, with commas")
    parser.add_argument("--scores", help="scores folder (default: that of the run in OUT)")
    parser.add_argument("--truth", help="parquet with uid and kind, to measure precision and recall")
    parser.add_argument("--right-kinds", default="", help="kinds of the truth file that are right, with commas")
    parser.add_argument("--fractions", default=",".join(map(str, FRACTIONS)), help="of the pool, with commas")
    parser.add_argument("--pool", help="candidate pool: train a model on each of the recipe's subsets of it")
    parser.add_argument("--clean", help="clean pairs, where the recipe trains a DFN on them")
    parser.add_argument("--eval-data", help="folder of evaluation sets in hub layout (wds_<task>_test)")
    parser.add_argument("--subsets", default="", help="which of the recipe's subsets, with commas (default: all)")
    parser.add_argument("--baseline", default=NO_FILTER, help=f"subset to compare with (default: {NO_FILTER})")
    parser.add_argument("--seeds", default="0,1,2", help="a model of each subset per seed (default: 0,1,2)")
    parser.add_argument("--confidence", type=float, default=0.95, help="of the intervals (default: 0.95)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add_spark(parser)
    add_tasks_per_gpu(parser)
    args = parser.parse_args(argv)
    check_wish(args)
    induced = induce(args) if args.pool else None
    found = {"format_version": FORMAT_VERSION, "scores": judge(args) if args.by else None, "induced": induced}
    content = json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    page = render_evaluation(json.loads(content))
    write_bytes(join(args.out, EVALUATION_PAGE), page.encode())
    write_bytes(join(args.out, EVALUATION), content.encode())
    print(page, end="")


def check_wish(args: Namespace) -> None:
    """Raise ConfigError for a wish that says too little, or something that nothing would come of."""
    split_fractions(args.fractions)
    if not (args.by or args.pool):
        raise ConfigError("say what to judge: score columns with --by, or the recipe's subsets of a --pool.")
    if bool(args.pool) != bool(args.eval_data):
        raise ConfigError("induced models need both --pool and --eval-data.")
    if args.words and not args.pool:
        raise ConfigError(f"recipe {args.words[0]!r} is for induced models: say of which --pool, or leave it out.")
    if (args.truth or args.right_kinds) and not args.by:
        raise ConfigError("--truth and --right-kinds are for score columns: name those with --by.")
    if args.right_kinds and not args.truth:
        raise ConfigError(f"--right-kinds {args.right_kinds!r} are kinds of a truth: say which with --truth.")


def induce(args: Namespace) -> dict[str, Any]:
    """Run the induced test that the arguments ask for."""
    from jobs.stage_induced import run_induced

    places = {"pool": args.pool, "eval_data": args.eval_data, "out": args.out, "clean": args.clean}
    choices = {"baseline": args.baseline, "subsets": split_list(args.subsets), "confidence": args.confidence}
    seeds = [int(word) for word in split_list(args.seeds) if word.isdecimal()]
    if len(seeds) < len(split_list(args.seeds)):
        raise ConfigError(f"--seeds {args.seeds!r} should be whole numbers with commas, none below 0.")
    spark = {"master": args.master, "tasks_per_gpu": args.tasks_per_gpu}
    recipe = load_recipe(*split_words(args.words))
    return run_induced(recipe, **places, **choices, seeds=seeds, device=args.device, **spark)


def judge(args: Namespace) -> dict[str, Any]:
    """Measure the score columns that the arguments name."""
    return measure_scores(
        args.scores or join(args.out, SCORES_FOLDER),
        split_list(args.by),
        truth=args.truth,
        right_kinds=split_list(args.right_kinds),
        fractions=split_fractions(args.fractions),
    )


def split_list(words: str) -> list[str]:
    """Return words between commas."""
    return [word.strip() for word in words.split(",") if word.strip()]


def split_fractions(words: str) -> list[float]:
    """Return numbers between commas.  Raises ConfigError for what is none, or when there is none."""
    try:
        found = [float(word) for word in split_list(words)]
    except ValueError:
        found = []
    if not found:
        raise ConfigError(f"--fractions {words!r} should be numbers in [0, 1] with commas, such as 0.15,0.3.")
    return found


if __name__ == "__main__":
    sys.exit(main())
