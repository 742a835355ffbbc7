"""winnow ingest: tables of urls and captions -> a pool, by img2dataset with the settings of DataComp's downloader."""

import os
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow.parquet as pq

from jobs.arguments import job, make_parser
from pipeline.errors import PoolError
from pipeline.pool import list_columns, list_parts
from pipeline.schemas import STATUS, TEXT, UID, URL
from pipeline.storage import open_file

EXAMPLE = """  winnow ingest --urls metadata --out pool
  winnow ingest --urls tables --caption-column alt --out pool --processes 16 --threads 128"""
DATACOMP: dict[str, Any] = {
    "input_format": "parquet",
    "url_col": URL,
    "output_format": "webdataset",
    "image_size": 512,
    "resize_mode": "keep_ratio_largest",
    "resize_only_if_bigger": True,
    "retries": 2,
    "oom_shard_count": 8,
}
"""What DataComp's download_upstream.py (:31-145, :218-238) asks of img2dataset; opt-out headers stay honoured."""


def download_pool(urls: str, out: str, *, caption_column: str, processes: int, threads: int) -> Counter[str]:
    """Download every url of the parquet files in a folder into OUT, and return the number of rows per outcome.

    Shards that are already there are kept, so a second run goes on.  Raises PoolError without url or caption column.
    """
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import would ask the network for a newer version
    columns = set(list_columns(list_parts(urls)[0]))
    for needed in (URL, caption_column):
        if needed not in columns:
            raise PoolError(f"{urls!r} has no column {needed!r} (it has {sorted(columns)}). See --caption-column.")
    from img2dataset import download

    kept = [UID] if UID in columns else []
    download(
        url_list=urls,
        output_folder=out,
        caption_col=caption_column,
        save_additional_columns=kept,
        processes_count=processes,
        thread_count=threads,
        **DATACOMP,
    )
    return count_outcomes(out)


def count_outcomes(pool: str) -> Counter[str]:
    """Return rows by img2dataset's `status`, over all parts of a pool."""
    outcomes: Counter[str] = Counter()
    for part in list_parts(pool):
        assert part.table
        with open_file(part.table) as file:
            outcomes.update(pq.read_table(file, columns=[STATUS])[STATUS].to_pylist())
    return outcomes


@job
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, download, print the outcomes."""
    parser = make_parser("ingest", "Download a pool from parquet tables of urls and captions.", EXAMPLE)
    parser.add_argument("--urls", required=True, help="folder of parquet files with a url and a caption column")
    parser.add_argument("--out", required=True, help="pool folder")
    parser.add_argument("--caption-column", default=TEXT, help=f"caption column (default: {TEXT}, CommonPool's)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: one per core")
    parser.add_argument("--threads", type=int, default=32, help="downloads at once in each process (default: 32)")
    args = parser.parse_args(argv)
    places = {"caption_column": args.caption_column, "processes": args.processes, "threads": args.threads}
    for outcome, rows in download_pool(args.urls, args.out, **places).most_common():
        print(f"{outcome:24s}{rows:12,}")


if __name__ == "__main__":
    sys.exit(main())
