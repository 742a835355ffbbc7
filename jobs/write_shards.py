"""winnow shards: pool + subset file -> webdataset shards that open_clip reads as they are."""

import sys
from collections.abc import Sequence

from jobs.arguments import add_fresh, add_recipe, add_spark, job, make_parser, split_words
from jobs.recipes import load_recipe
from jobs.score_pool import print_counts
from jobs.stage_shards import run_shards
from pipeline.spark_session import lazy_session

EXAMPLE = """  winnow shards --pool pool --subset subsets/dfn.npy --out shards/dfn
  winnow shards --pool pool --scores scores --subset subsets/dfn.npy --out shards/dfn shards.shuffle_seed=0
  winnow shards --pool pool --subset datacomp_subset.npy --out shards shards.rows_per_shard=5000 shards.keys=uid"""


@job
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, write the shards, print the account."""
    parser = make_parser("shards", "Copy a subset's rows into webdataset shards of equal size.", EXAMPLE)
    add_recipe(parser)
    parser.add_argument("--pool", required=True, help="candidate pool: folder, glob, brace range, a::b")
    parser.add_argument("--subset", required=True, help="subset .npy (ours or DataComp's)")
    parser.add_argument("--out", required=True, help="shards folder")
    parser.add_argument("--scores", help="folder of `winnow score` on this pool: saves reading the tars' headers")
    add_fresh(parser)
    add_spark(parser)
    args = parser.parse_args(argv)
    recipe = load_recipe(*split_words(args.words))
    with lazy_session(args.master, name="winnow shards") as start:
        places = {"pool": args.pool, "subset": args.subset, "out": args.out, "scores": args.scores}
        manifest = run_shards(start, **places, config=recipe.shards, fresh=args.fresh)
    print_counts(manifest)
    print(f"{manifest.facts['num_shards']:,} shards, {manifest.facts['rows']:,} rows in {args.out}")


if __name__ == "__main__":
    sys.exit(main())
