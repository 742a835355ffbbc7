"""winnow fit: stored embeddings of a whole pool -> OUT/<name>/, which the filters of fits read (jobs/fit_kinds.py)."""

import sys
from collections.abc import Sequence

from jobs.arguments import add_fresh, add_recipe, add_spark, job, make_parser, split_words
from jobs.recipes import load_recipe
from jobs.score_pool import print_counts
from jobs.stage_fit import check_files, run_fit
from pipeline.errors import ConfigError
from pipeline.manifest import Manifest
from pipeline.spark_session import lazy_session
from pipeline.storage import join

EXAMPLE = """  winnow fit my.yaml --pool commonpool/metadata --out fits
  winnow fit my.yaml --pool pool --scores scores --out fits fit.small.clusters=1000 fit.small.sample=0.3

where my.yaml holds, for instance
  fit:
    small: {embedding: l14_img, clusters: 100000, targets: in1k/*.pt}      # kind: kmeans
    near: {kind: semdedup, embedding: l14_img, clusters: 50000}
  score:
    - {filter: image_cluster, name: image_based, fit: small}
    - {filter: semdedup, name: dedup, fit: near}

Where a fit's `rows` read scores of another fit's filter: winnow score --fits FITS, winnow fit again; or winnow run."""


@job
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, fit every `fit` entry of the recipe, print the accounts."""
    parser = make_parser("fit", "Find what filters need to know of the whole pool, from stored embeddings.", EXAMPLE)
    add_recipe(parser)
    parser.add_argument("--pool", help="folder, glob, brace range or a::b of parts whose embeddings are read")
    parser.add_argument("--scores", help="scores folder: where a filter made the embedding, or the fit has `rows`")
    parser.add_argument("--out", required=True, help="folder of fits")
    add_fresh(parser)
    add_spark(parser)
    args = parser.parse_args(argv)
    recipe = load_recipe(*split_words(args.words))
    if not recipe.fit:
        raise ConfigError(f"recipe {recipe.name!r} has nothing to fit: its `fit` section is empty.")
    for name, config in recipe.fit.items():
        check_files(name, config)
    with lazy_session(args.master, name="winnow fit") as start:
        for name, config in recipe.fit.items():
            out = join(args.out, name)
            manifest = run_fit(start, config, out, pool=args.pool, scores=args.scores, fresh=args.fresh)
            print(f"fit {name}: {describe(manifest)}")
            print_counts(manifest)


def describe(manifest: Manifest) -> str:
    """Return one line of what a fit found."""
    facts = {name: value for name, value in manifest.facts.items() if name not in ("files", "broken")}
    if "clusters" not in facts:
        return ", ".join(f"{name} {value:,}" for name, value in facts.items())
    line = f"{facts['clusters']:,} clusters of {facts['dim']} numbers"
    for eps, number in facts.get("duplicates", {}).items():
        line += f", {number:,} to drop at eps {eps}"
    return f"{line}, {facts['target_clusters']:,} of them targets" if "target_clusters" in facts else line


if __name__ == "__main__":
    sys.exit(main())
