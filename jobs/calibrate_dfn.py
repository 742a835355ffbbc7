"""winnow dfn calibrate: the threshold that keeps a wanted fraction or count of a scored pool, and the filter's card."""

import json
import sys
from collections.abc import Sequence

from jobs.arguments import job, make_parser
from jobs.stage_calibrate import calibrate
from pipeline.errors import ConfigError

EXAMPLE = """  winnow dfn calibrate --scores out/scores --by dfn_similarity_score --fraction 0.15
  winnow dfn calibrate --scores out/scores --by dfn_similarity_score --fraction 0.15 --sample 100000 --seed 1
  winnow dfn calibrate --scores out/scores --by dfn_similarity_score --count 1000000 --card out/card --heldout pairs"""


@job
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, find the threshold, write the card if asked, print the threshold as JSON."""
    parser = make_parser("dfn calibrate", "Find the threshold for a fraction or count of a pool.", EXAMPLE)
    parser.add_argument("--scores", required=True, help="scores folder")
    parser.add_argument("--by", required=True, help="score column, e.g. dfn_similarity_score")
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--fraction", type=float, help="share of the pool to keep (the DFN paper's is 0.15)")
    wanted.add_argument("--count", type=int, help="rows to keep")
    help = (
        "look at a share (0.1) or a number (100000) of the scored rows only; adds intervals. 1.0: the scored rows are "
    )
    parser.add_argument("--sample", help=help + "themselves a sample of a larger pool")
    parser.add_argument("--seed", type=int, default=0, help="decides the sample (default: 0)")
    parser.add_argument("--confidence", type=float, default=0.95, help="of the intervals (default: 0.95)")
    parser.add_argument("--card", metavar="PLACE", help="folder, or file that ends in .json, for the filter card")
    parser.add_argument("--network", metavar="MODEL", help="where the network is, if not where it scored from")
    parser.add_argument("--heldout", metavar="PAIRS", help="pairs to measure retrieval on, for the card")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    args = parser.parse_args(argv)
    if not args.card and (args.network or args.heldout):
        raise ConfigError("--network and --heldout are for the filter card. Say where it goes with --card.")
    wish = {"fraction": args.fraction, "count": args.count, "sample": read_sample(args.sample), "seed": args.seed}
    found = calibrate(args.scores, args.by, **wish, confidence=args.confidence)
    if args.card:
        from jobs.stage_card import write_card

        places = {"model": args.network, "heldout": args.heldout, "device": args.device}
        print(f"winnow: filter card: {write_card(args.card, args.scores, found, **places)}", file=sys.stderr)
    print(json.dumps(found, indent=2, allow_nan=False))


def read_sample(text: str | None) -> float | int | None:
    """Return a whole number as a count, a number with a point as a share.  Raises ConfigError for anything else."""
    if text is None or text.isdecimal():
        return None if text is None else int(text)
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"--sample {text!r} should be a share such as 0.1, or a number of rows.") from None


if __name__ == "__main__":
    sys.exit(main())
