"""winnow zip: the five packages as code.zip for `spark-submit --py-files`; the same code gives the same bytes."""

import sys
from collections.abc import Sequence

from jobs.arguments import job, make_parser
from pipeline.code_zip import write_zip


@job
def main(argv: Sequence[str] | None = None) -> None:
    """Write the zip, print its path."""
    parser = make_parser("zip", "Write code.zip for spark-submit --py-files.", "  winnow zip code.zip")
    parser.add_argument("path", help="where to write")
    args = parser.parse_args(argv)
    print(f"{args.path}: {write_zip(args.path)} files")


if __name__ == "__main__":
    sys.exit(main())
