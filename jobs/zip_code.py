"""winnow zip: the five packages as code.zip for `spark-submit --py-files`; the same code gives the same bytes."""

import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from jobs.arguments import job, make_parser

PACKAGES = ("pipeline", "filters", "training", "eval38", "jobs")
ROOT = Path(__file__).parent.parent
FIXED_DATE = (1980, 1, 1, 0, 0, 0)


def write_zip(path: str) -> int:
    """Write the packages' files, sorted, with fixed dates, and return how many."""
    files = [f for p in PACKAGES for f in (ROOT / p).rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(files):
            info = zipfile.ZipInfo(str(file.relative_to(ROOT)), FIXED_DATE)
            info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(info, file.read_bytes())
    return len(files)


@job
def main(argv: Sequence[str] | None = None) -> None:
    """Write the zip, print its path."""
    parser = make_parser("zip", "Write code.zip for spark-submit --py-files.", "  winnow zip code.zip")
    parser.add_argument("path", help="where to write")
    args = parser.parse_args(argv)
    print(f"{args.path}: {write_zip(args.path)} files")


if __name__ == "__main__":
    sys.exit(main())
