"""winnow score: pool -> SCORES/<filter>/<part>.parquet."""

import sys
from collections.abc import Sequence

from jobs.arguments import add_fresh, add_recipe, add_spark, add_tasks_per_gpu, job, make_parser, split_words
from jobs.recipes import list_ready, load_recipe, place_entry
from jobs.stage_fit import warn_if_other
from jobs.stage_score import run_score
from pipeline.errors import ConfigError
from pipeline.manifest import Manifest, read_manifest
from pipeline.spark_session import lazy_session
from pipeline.storage import join

EXAMPLE = """  winnow score datacomp-basic --pool pool --out scores
  winnow score my.yaml --pool 's3://bucket/pool/{00000000..00000099}.tar' --out s3://bucket/scores --master yarn
  spark-submit --py-files code.zip jobs/score_pool.py my.yaml --pool hdfs:///pool --out hdfs:///scores"""


@job
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, score, print the accounts."""
    parser = make_parser("score", "Score every part of a pool with a recipe's filters.", EXAMPLE)
    add_recipe(parser)
    parser.add_argument("--pool", required=True, help="candidate pool: folder, glob, brace range, a::b")
    parser.add_argument("--out", required=True, help="scores folder")
    parser.add_argument("--fits", help="folder of `winnow fit`, for filters that need one; without their fit they wait")
    add_fresh(parser)
    add_spark(parser)
    add_tasks_per_gpu(parser)
    args = parser.parse_args(argv)
    recipe = load_recipe(*split_words(args.words))
    fits = {name: read_manifest(join(args.fits, name)) for name in recipe.fit} if args.fits else {}
    fitted = {name: made for name, made in fits.items() if made}
    for name, made in fitted.items():
        warn_if_other(name, recipe.fit[name], made)
    entries = [place_entry(entry, fits=args.fits) for entry in list_ready(recipe.score, fitted)]
    if recipe.score and not entries:
        raise ConfigError(
            f"every filter of recipe {recipe.name!r} needs a fit. Run `winnow fit` with --out FITS, "
            "then score with --fits FITS."
        )
    if len(entries) < len(recipe.score):
        print("winnow: filters with a fit wait for `winnow fit`; then score again with --fits", file=sys.stderr)
    with lazy_session(args.master, name="winnow score") as start:
        print_counts(run_score(start, args.pool, entries, args.out, fresh=args.fresh, tasks_per_gpu=args.tasks_per_gpu))


def print_counts(manifest: Manifest) -> None:
    """Print one line per account: rows read, kept, dropped by rule, failed by reason."""
    print(f"{manifest.stage:20s}{'in':>12s}{'kept':>12s}  dropped, failed")
    for name, counts in manifest.counts.items():
        losses = [f"{reason} {number:,}" for reason, number in [*counts.dropped.items(), *counts.failed.items()]]
        print(f"{name:20s}{counts.read:12,}{counts.kept:12,}  {', '.join(losses) or '-'}")


if __name__ == "__main__":
    sys.exit(main())
