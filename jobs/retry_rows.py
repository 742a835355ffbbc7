"""winnow retry: score again only the rows that failed for one reason."""

import sys
from collections.abc import Sequence

from jobs.arguments import add_spark, add_tasks_per_gpu, job, make_parser
from jobs.score_pool import print_counts
from jobs.stage_score import run_retry
from pipeline.spark_session import lazy_session

EXAMPLE = """  winnow status out/scores
  winnow retry out/scores --reason unreadable_image"""


@job
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, retry, print how many rows were mended and the new accounts."""
    summary = "Score again only the rows that failed for a reason, as the scores folder's own request says."
    parser = make_parser("retry", summary, EXAMPLE)
    parser.add_argument("scores", metavar="SCORES", help="scores folder")
    parser.add_argument("--reason", required=True, help="a reason in the accounts, such as unreadable_image")
    add_spark(parser)
    add_tasks_per_gpu(parser)
    args = parser.parse_args(argv)
    with lazy_session(args.master, name="winnow retry") as start:
        manifest, done = run_retry(start, args.scores, args.reason, tasks_per_gpu=args.tasks_per_gpu)
    print(f"{done['mended']:,} of {done['tried']:,} rows that failed for {args.reason} have scores now")
    print_counts(manifest)


if __name__ == "__main__":
    sys.exit(main())
