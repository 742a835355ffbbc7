"""winnow eval: a checkpoint -> zero-shot results on the evaluation sets that are there."""

import sys
from collections.abc import Sequence

from eval38.evaluate import evaluate
from eval38.table import format_table
from jobs.arguments import add_recipe, job, make_parser, split_words
from jobs.recipes import load_recipe

EXAMPLE = """  winnow eval --model runs/dfn --data evalsets --out results
  winnow eval --model ViT-B-32/datacomp_m_s128m_b4k --data evalsets --out results eval.tasks=[cifar10,mnist]

`winnow eval download` fetches sets, `winnow eval compare` sets results side by side, `winnow eval submission` writes
a DataComp leaderboard entry; each has its own --help."""


@job
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, evaluate, print the table."""
    parser = make_parser("eval", "Run the zero-shot tasks whose data is there, and print a table.", EXAMPLE)
    add_recipe(parser)
    help = "run folder, NAME/tag, NAME@file, hf-hub:org/name or MODULE:FUNCTION of your own Python"
    parser.add_argument("--model", required=True, help=help)
    parser.add_argument("--data", required=True, help="folder with wds_<task>_test folders, as on the hub")
    parser.add_argument("--out", required=True, help="results folder")
    help = "folder to keep the images' vectors in: other templates or class names then need no image"
    parser.add_argument("--features", help=help)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    args = parser.parse_args(argv)
    config = load_recipe(*split_words(args.words)).eval
    manifest = evaluate(
        config, model=args.model, data=args.data, out=args.out, features=args.features, device=args.device
    )
    print(format_table(manifest.facts))


if __name__ == "__main__":
    sys.exit(main())
