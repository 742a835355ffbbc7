"""winnow select: stored scores -> SUBSETS/<name>.npy, without reading an image."""

import sys
from collections.abc import Sequence

from jobs.arguments import add_fresh, add_recipe, add_spark, job, make_parser, split_words
from jobs.recipes import load_recipe
from jobs.score_pool import print_counts
from jobs.stage_select import run_select
from pipeline.errors import ConfigError
from pipeline.spark_session import lazy_session

EXAMPLE = """  winnow select datacomp-basic --scores scores --out subsets
  winnow select dfn-tiny --scores scores --out subsets subsets.dfn.0.top.fraction=0.3
  winnow select my.yaml --scores scores --out subsets --with metadata/ --with aesthetic.parquet"""


@job
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, select every subset of the recipe, print the accounts."""
    parser = make_parser("select", "Apply a recipe's rules to stored scores.", EXAMPLE)
    add_recipe(parser)
    parser.add_argument("--scores", required=True, help="scores folder")
    parser.add_argument("--out", required=True, help="subsets folder")
    parser.add_argument(
        "--with",
        dest="tables",
        action="append",
        default=[],
        metavar="TABLE",
        help="parquet file, folder or glob with a uid column, whose other columns the rules may use too (repeatable)",
    )
    add_fresh(parser)
    add_spark(parser)
    args = parser.parse_args(argv)
    recipe = load_recipe(*split_words(args.words))
    if not recipe.subsets:
        raise ConfigError(f"recipe {recipe.name!r} has no subsets to select.")
    with lazy_session(args.master, name="winnow select") as start:
        for name, steps in recipe.subsets.items():
            manifest = run_select(start, args.scores, name, steps, args.out, tables=args.tables, fresh=args.fresh)
            print(f"subset {name}: {manifest.facts['rows']:,} rows")
            print_counts(manifest)


if __name__ == "__main__":
    sys.exit(main())
