"""winnow train: shards -> a run directory with a CLIP checkpoint."""

import sys
from collections.abc import Sequence

from jobs.arguments import add_eval_data, add_recipe, job, make_parser, split_words
from jobs.recipes import load_recipe, require_train
from pipeline.manifest import add_counts
from pipeline.report.formats import format_tally

EXAMPLE = """  winnow train dfn-tiny --data out/shards/dfn --out runs/dfn
  winnow train train-datacomp-small --data 'shards/{00000000..00000031}.tar' --out runs/b32
  winnow train train-vitamin-l-336 --init runs/l --data shards --out runs/l336 train.samples=1802929520
  winnow train dfn-tiny --data shards --out runs/x --eval-data evalsets \\
      train.zeroshot.tasks=[cifar10,mnist] train.zeroshot.every_samples=6400"""


@job
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, train, print where the checkpoint is."""
    parser = make_parser("train", "Train a CLIP on shards; run it again after an interruption to go on.", EXAMPLE)
    add_recipe(parser)
    parser.add_argument("--data", required=True, help="shards or a pool: folder, glob, brace range, a::b")
    parser.add_argument("--out", required=True, help="run folder")
    parser.add_argument(
        "--init", metavar="MODEL", help="weights to start from: run folder, ARCHITECTURE@FILE, tag, hub id"
    )
    add_eval_data(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    args = parser.parse_args(argv)
    config = require_train(load_recipe(*split_words(args.words)))
    from jobs.zeroshot import open_zeroshot
    from training.run import train
    from training.world import is_first

    measure = open_zeroshot(config, args.eval_data)
    manifest = train(config, data=args.data, out=args.out, init=args.init, measure=measure, device=args.device)
    facts, rows = manifest.facts, add_counts(manifest.counts.values())
    if is_first():
        if rows.failed:
            print(f"{rows.read - rows.kept:,} of {rows.read:,} rows could not be used: {format_tally(rows.failed)}")
        print(f"{facts['samples_seen']:,} samples seen, final loss {facts['final_loss']:.4f}, model in {args.out}")


if __name__ == "__main__":
    sys.exit(main())
