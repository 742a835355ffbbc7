"""winnow report: everything in a run folder -> RUN/report.html."""

import sys
from collections.abc import Sequence

from jobs.arguments import job, make_parser
from pipeline.report import write_report
from pipeline.report.distributions import SURVEY_ROWS

EXAMPLE = """  winnow report out --pool pools/cifar-web
  winnow report out --pool pool --truth truth.parquet --right-kinds clean,exact_duplicate
  winnow report runs/b32"""


@job
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, write, print where it is."""
    parser = make_parser("report", "Write one self-contained HTML page about a run folder.", EXAMPLE)
    parser.add_argument("run", help="run folder, as `winnow run --out` or `winnow train --out` made it")
    parser.add_argument("--pool", help="the pool, for thumbnails")
    parser.add_argument("--truth", help="parquet with uid and kind, to report precision and recall")
    parser.add_argument("--right-kinds", default="", help="kinds of the truth file that are right, with commas")
    parser.add_argument(
        "--rows",
        type=int,
        default=SURVEY_ROWS,
        help="scores to draw histograms and choose pictures from, in whole parts evenly spaced; 0: all (%(default)s)",
    )
    args = parser.parse_args(argv)
    kinds = tuple(kind for kind in args.right_kinds.split(",") if kind)
    print(write_report(args.run, pool=args.pool, truth=args.truth, right_kinds=kinds, max_rows=args.rows))


if __name__ == "__main__":
    sys.exit(main())
