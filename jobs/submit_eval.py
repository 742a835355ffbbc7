"""winnow eval submission: results -> the files of a DataComp leaderboard entry; nothing is sent."""

import sys
from collections.abc import Sequence

from eval38.submission import SCALES, write_submission
from jobs.arguments import job, make_parser

EXAMPLE = """  winnow eval submission --results results/dfn --scale small --out entry
  winnow eval submission --results results/dfn --scale medium --out entry --checkpoint runs/dfn/checkpoint.pt \\
      --samples subsets/dfn.npy"""


@job
def main(argv: Sequence[str] | None = None) -> None:
    """Check, write, print the scores that DataComp's aggregate_scores.py would."""
    parser = make_parser("eval submission", "Write a DataComp leaderboard entry. Nothing is sent.", EXAMPLE)
    parser.add_argument("--results", required=True, help="results folder of `winnow eval`, all 38 tasks")
    parser.add_argument("--scale", required=True, help=f"competition scale: {', '.join(SCALES)}")
    parser.add_argument("--out", required=True, help="folder for the files")
    parser.add_argument("--checkpoint", help="trained model to put beside the results")
    parser.add_argument(
        "--samples", nargs="*", default=[], metavar="FILE", help="subset files the model was trained on"
    )
    help = "write results of sets of which some images could not be evaluated"
    parser.add_argument("--allow-incomplete", action="store_true", help=help)
    args = parser.parse_args(argv)
    written = write_submission(
        args.results,
        args.out,
        scale=args.scale,
        checkpoint=args.checkpoint,
        samples=args.samples,
        allow_incomplete=args.allow_incomplete,
    )
    print("\n".join(f"{name}: {value:.3f}" for name, value in written.scores.items()))
    print(f"\nIn {written.folder}: {', '.join(written.files)}. Nothing was sent; put them in your hub repository.")


if __name__ == "__main__":
    sys.exit(main())
