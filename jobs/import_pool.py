"""winnow import: webdataset tars or a folder of images -> a pool with uids and parquet, image bytes untouched."""

import sys
from collections.abc import Sequence
from typing import Any

from jobs.arguments import add_spark, job, make_parser
from jobs.ingest_urls import print_outcomes
from pipeline.intake.image_folder import FROM_FOLDER, FROM_TXT, Captions, import_images
from pipeline.intake.own_tars import Work, import_tars
from pipeline.schemas import CAPTION
from pipeline.spark import run_each
from pipeline.spark_session import lazy_session

EXAMPLE = """  winnow import --tars laion/ --out pool                        # tars without parquet or uids
  winnow import --tars 'a/{00000..00099}.tar::b/*.tar' --out pool     # from several folders: numbered anew
  winnow import --images photos/ --out pool                     # captions from photos/x/1.txt beside 1.jpg
  winnow import --images coco/train2017 --captions captions.csv --file-column image --out pool
  winnow import --images imagenet/train --captions folder --out pool"""
SUMMARY = """Make a pool of data that winnow did not download: uids and parquet are added, no image byte is changed.

Tars are hard-linked into OUT (copied where that is not possible), so do not write into either.  uid comes from the
.json where it holds one, else from image and caption.  Run it again to go on."""


@job
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, import, print the account."""
    parser = make_parser("import", SUMMARY, EXAMPLE)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--tars", help="webdataset tars: folder, glob, brace range, a::b")
    source.add_argument("--images", help="folder of jpg, jpeg, png and webp files, searched with all below it")
    parser.add_argument("--out", required=True, help="pool folder; the account is its import.json")
    parser.add_argument("--copy", action="store_true", help="copy tars instead of linking them")
    help = (
        f"of images: {FROM_TXT} (NAME.txt beside NAME.jpg; the default), {FROM_FOLDER} (the folder's name), or a table"
    )
    parser.add_argument("--captions", default=FROM_TXT, help=help)
    parser.add_argument(
        "--file-column", default="file", help="paths in the table, relative to --images (default: file)"
    )
    parser.add_argument("--caption-column", default=CAPTION, help=f"captions in the table (default: {CAPTION})")
    parser.add_argument("--rows-per-tar", type=int, default=10_000, help="of images (default: 10000)")
    add_spark(parser)
    args = parser.parse_args(argv)
    captions = Captions(source=args.captions, file_column=args.file_column, caption_column=args.caption_column)
    with lazy_session(args.master, name="winnow import") as start:

        def run(work: Work, items: Sequence[Any]) -> list[dict[str, Any]]:
            return run_each(start(), work, items, what="import")

        if args.tars:
            manifest = import_tars(run, args.tars, args.out, copy=args.copy)
        else:
            manifest = import_images(run, args.images, captions, args.out, rows_per_tar=args.rows_per_tar)
    print_outcomes(manifest)
    for note, rows in manifest.facts["noted"].items():
        print(f"{'kept, but ' + note:24s}{rows:12,}")
    for kind in ("broken", "unused_tables"):
        for name, why in manifest.facts[kind].items():
            print(f"{name}: {why}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
