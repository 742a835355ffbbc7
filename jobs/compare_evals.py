"""winnow eval compare: results of several models side by side, with intervals and tests."""

import json
import sys
from collections.abc import Sequence

from eval38.compare import compare, format_compared
from eval38.statistics import PAIRED_RESAMPLES
from jobs.arguments import job, make_parser
from pipeline.errors import ConfigError

EXAMPLE = """  winnow eval compare results/none results/dfn
  winnow eval compare base=results/a dfn=results/b --column corrected
  winnow eval compare results/dfn theirs=datacomp_run --json > comparison.json"""


@job
def main(argv: Sequence[str] | None = None) -> None:
    """Compare and print."""
    parser = make_parser("eval compare", "Compare models on the tasks they were evaluated on.", EXAMPLE)
    help = "folder with eval_results.jsonl, of winnow or of DataComp; differences are to the first"
    parser.add_argument("runs", nargs="+", metavar="[LABEL=]FOLDER", help=help)
    help = "compat (default): numbers as DataComp computes them; corrected: its mistakes mended"
    parser.add_argument("--column", choices=["compat", "corrected"], default="compat", help=help)
    help = "compare although a task was evaluated on files with another hash"
    parser.add_argument("--any-data", action="store_true", help=help)
    help = f"draws of a paired test (default {PAIRED_RESAMPLES:,}); its smallest p is 2 / (N + 1)"
    parser.add_argument("--resamples", type=int, default=PAIRED_RESAMPLES, metavar="N", help=help)
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON instead of a table")
    args = parser.parse_args(argv)
    if args.resamples < 1:
        raise ConfigError(f"--resamples should be at least 1, not {args.resamples}.")
    facts = compare(args.runs, column=args.column, any_data=args.any_data, resamples=args.resamples)
    as_json = json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    print(as_json if args.json else format_compared(facts), end="")


if __name__ == "__main__":
    sys.exit(main())
