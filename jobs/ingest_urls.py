"""winnow ingest: tables of urls and captions -> a pool, by img2dataset with the settings of DataComp's downloader."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from jobs.arguments import add_spark, job, make_parser
from pipeline.errors import StageError
from pipeline.intake.download import DISTRIBUTORS, Machine, Shards, download_shards
from pipeline.intake.url_tables import HASHES, ROWS, IngestConfig, ingest
from pipeline.manifest import Manifest
from pipeline.schemas import TEXT, URL
from pipeline.spark_session import open_session

EXAMPLE = """  winnow ingest --urls metadata --out pool
  winnow ingest --urls metadata --out hdfs:///pool --master yarn --threads 128
  winnow ingest --urls urls.csv --url-column link --caption-column alt --out pool --distributor multiprocessing
  winnow ingest --urls metadata --out pool --keep-mismatched        # as DataComp: no image is lost for its hash"""
SUMMARY = """Download a pool from tables of urls and captions, by img2dataset.

Every http or https url of the table is fetched from the machine that runs the worker, whatever host it names, and
redirects are followed; run it where nothing private answers, or behind a proxy (http_proxy, https_proxy).  Other urls
(file:, ftp:, data:) are counted as not_http and never opened.  Images that a server opts out of with X-Robots-Tag are
left out.  Columns uid, face_bboxes and sha256 or md5 are used when they are there.  Run it again to go on."""


@job
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, download, print the outcomes."""
    args = _parse(argv)
    options = IngestConfig(
        url_column=args.url_column,
        caption_column=args.caption_column,
        image_size=args.image_size,
        resize_mode=args.resize_mode,
        encode_format=args.encode_format,
        blur_faces=not args.no_blur,
        mismatched="keep" if args.keep_mismatched else "fail",
        rows_per_shard=args.rows_per_shard,
    )
    machine = Machine(
        distributor=args.distributor,
        processes=args.processes,
        threads=args.threads,
        timeout_s=args.timeout,
        retries=args.retries,
        stall_s=args.stall,
    )

    def download(shards: Shards, wanted: Sequence[int]) -> Mapping[int, str]:
        with ExitStack() as stack:
            if machine.distributor == "multiprocessing":
                return download_shards(shards, wanted, machine)
            session = stack.enter_context(open_session(args.master, name="winnow ingest"))
            return download_shards(shards, wanted, machine, cancel=session.sparkContext.cancelAllJobs)

    manifest = ingest(download, args.urls, options, args.out)
    print_outcomes(manifest)
    if verdicts := manifest.facts[HASHES]:
        print("hashes: " + ", ".join(f"{verdict} {rows:,}" for verdict, rows in verdicts.items()))
    if missing := manifest.facts["missing"]:
        named = "; ".join(f"{shard}: {why}" for shard, why in missing.items())
        raise StageError(
            f"{len(missing)} of {manifest.facts['num_shards']} shards are missing ({named}). Run it again."
        )
    if not manifest.counts[ROWS].kept:
        raise StageError(f"not one image came. See error_message in {args.out}/*.parquet; delete them to try again.")


def print_outcomes(manifest: Manifest) -> None:
    """Print the rows that came in, that are kept, and that are not by reason, one line each."""
    for counts in manifest.counts.values():
        outcomes = {"in": counts.read, "kept": counts.kept, **counts.dropped, **counts.failed}
        print("\n".join(f"{outcome:24s}{rows:12,}" for outcome, rows in outcomes.items()))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("ingest", SUMMARY, EXAMPLE)
    add = parser.add_argument
    add("--urls", required=True, help="parquet, csv, tsv or jsonl: file, folder, glob, a::b")
    add("--out", required=True, help="pool folder; the account is its ingest.json")
    add("--url-column", default=URL, help=f"default: {URL}")
    add("--caption-column", default=TEXT, help=f"default: {TEXT}, CommonPool's")
    add("--image-size", type=int, default=512, help="longest side in px (default: 512)")
    modes = ("no", "border", "keep_ratio", "keep_ratio_largest", "center_crop")
    add("--resize-mode", choices=modes, default="keep_ratio_largest", help="default: keep_ratio_largest")
    add("--encode-format", choices=("jpg", "png", "webp"), default="jpg", help="default: jpg")
    add("--no-blur", action="store_true", help="do not blur face_bboxes")
    add("--keep-mismatched", action="store_true", help="keep images whose hash is not the table's; both are recorded")
    add("--rows-per-shard", type=int, default=10_000, help="default: 10000")
    add("--distributor", choices=DISTRIBUTORS, default="pyspark", help="default: pyspark")
    add_spark(parser)
    add("--processes", type=int, default=os.cpu_count() or 1, help="of multiprocessing (default: one per core)")
    add("--threads", type=int, default=32, help="downloads at once in each worker (default: 32)")
    add("--timeout", type=float, default=10, help="seconds for a connection or the next byte (default: 10)")
    add("--retries", type=int, default=2, help="further requests after a failed one (default: 2)")
    add("--stall", type=float, default=900, help="seconds without a byte until a shard is given up (default: 900)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
