"""winnow select: stored scores -> SUBSETS/<name>.npy, without reading an image."""

import sys
import tempfile
from collections.abc import Sequence

from jobs.arguments import add_fresh, add_recipe, add_spark, job, make_parser, split_words
from jobs.recipes import load_recipe
from jobs.score_pool import print_counts
from jobs.stage_select import run_select
from pipeline.errors import ConfigError, check_name
from pipeline.select_explain import describe_size, explain
from pipeline.spark_session import lazy_session

EXAMPLE = """  winnow select datacomp-basic --scores scores --out subsets
  winnow select dfn-tiny --scores scores --out subsets subsets.dfn.0.top.fraction=0.3
  winnow select my.yaml --scores scores --out subsets --with metadata/ --with aesthetic.parquet
  winnow select my.yaml --scores scores --subset dfn --explain"""


@job
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, select the recipe's subsets, print the accounts."""
    parser = make_parser("select", "Apply a recipe's rules to stored scores.", EXAMPLE)
    add_recipe(parser)
    parser.add_argument("--scores", required=True, help="scores folder")
    parser.add_argument("--out", help="subsets folder; with --explain it may be absent, and nothing is kept")
    parser.add_argument(
        "--with",
        dest="tables",
        action="append",
        default=[],
        metavar="TABLE",
        help="parquet file, folder or glob with a uid column, whose other columns the rules may use too (repeatable)",
    )
    parser.add_argument("--subset", action="append", default=[], metavar="NAME", help="only this one (repeatable)")
    parser.add_argument("--explain", action="store_true", help="print each subset as a tree of its steps")
    add_fresh(parser)
    add_spark(parser)
    args = parser.parse_args(argv)
    recipe = load_recipe(*split_words(args.words))
    if not recipe.subsets:
        raise ConfigError(f"recipe {recipe.name!r} has no subsets to select.")
    for name in args.subset:
        check_name(name, recipe.subsets, kind=f"subset of recipe {recipe.name!r}")
    if args.out is None and not args.explain:
        raise ConfigError("say where the subsets go with --out, or ask for --explain.")
    samples = recipe.train.samples if recipe.train else None
    with lazy_session(args.master, name="winnow select") as start, tempfile.TemporaryDirectory() as nowhere:
        for name in args.subset or recipe.subsets:
            steps, out = recipe.subsets[name], args.out or nowhere
            manifest = run_select(start, args.scores, name, steps, out, tables=args.tables, fresh=args.fresh)
            if args.explain:
                print(explain(name, steps, manifest, samples_seen=samples), end="\n\n")
            else:
                print(f"subset {name}: {describe_size(manifest)}")
                print_counts(manifest)


if __name__ == "__main__":
    sys.exit(main())
