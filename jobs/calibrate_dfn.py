"""winnow dfn calibrate: the exact threshold that keeps a wanted fraction or count of a scored pool."""

import json
import sys
from collections.abc import Sequence

from jobs.arguments import job, make_parser
from jobs.stage_select import calibrate

EXAMPLE = """  winnow dfn calibrate --scores out/scores --by dfn_similarity_score --fraction 0.15
  winnow dfn calibrate --scores out/scores --by dfn_similarity_score --count 1000000"""


@job
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, find the threshold, print it as JSON."""
    parser = make_parser("dfn calibrate", "Find the exact threshold for a fraction or count of the pool.", EXAMPLE)
    parser.add_argument("--scores", required=True, help="scores folder")
    parser.add_argument("--by", required=True, help="score column, e.g. dfn_similarity_score")
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--fraction", type=float, help="share of the pool to keep (the DFN paper's is 0.15)")
    wanted.add_argument("--count", type=int, help="rows to keep")
    args = parser.parse_args(argv)
    print(json.dumps(calibrate(args.scores, args.by, fraction=args.fraction, count=args.count), indent=2))


if __name__ == "__main__":
    sys.exit(main())
