"""winnow filters: what a recipe can name after `filter:`, with options and source."""

import dataclasses
import sys
from collections.abc import Sequence

from filters import TABLE
from jobs.arguments import job, make_parser


@job
def main(argv: Sequence[str] | None = None) -> None:
    """Print one block per filter."""
    make_parser("filters", "List the filters a recipe can name.", "  winnow filters").parse_args(argv)
    for row in TABLE:
        options = [f.name for f in dataclasses.fields(row.options)]
        print(f"{row.kind:20s}{row.summary}  ({row.source})")
        print(f"{'':20s}options: {', '.join(options) or 'none'}")


if __name__ == "__main__":
    sys.exit(main())
