"""winnow import-datacomp: DataComp's metadata, shards and subset files -> what is wrong there, sound subsets."""

import sys
from collections.abc import Iterator, Mapping, Sequence

from jobs.arguments import job, make_parser
from pipeline.datacomp.bring_in import IN_METADATA, IN_SHARDS, SUBSETS, import_datacomp, name_subsets
from pipeline.datacomp.findings import BROKEN
from pipeline.datacomp.metadata import SCALES
from pipeline.errors import ConfigError, StageError
from pipeline.schemas import STATUS_SUCCESS

EXAMPLE = """  winnow import-datacomp --metadata data/metadata --scale small --out checked
  winnow import-datacomp --metadata data/metadata --shards data/shards --subset mine.npy --out checked
  winnow score filter.yaml --pool data/metadata --out scores        # then, on what is sound
  winnow shards --pool data/shards --subset checked/subsets/mine.npy --out shards"""
SUMMARY = """Look through what DataComp's tools left on disk, say what is wrong there, and make subset files sound.

Nothing but OUT is written: OUT/subsets/NAME.npy is each subset file sorted, as DataComp's resharder and winnow take it,
and OUT/import.json is the account.  Metadata and shards need no import: give the folders to --pool.
Exit code 1 when something is broken beyond use."""
SHARE_OF = {STATUS_SUCCESS: "rows", IN_METADATA: "uids", IN_SHARDS: "uids"}
"""Number -> the number of its section that it is a share of."""


@job
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, look through, print the table and the findings."""
    parser = make_parser("import-datacomp", SUMMARY, EXAMPLE)
    parser.add_argument("--metadata", help="folder of parquet and, maybe, npz (in part_* folders too)")
    parser.add_argument("--shards", help="folder that img2dataset or DataComp's resharder wrote")
    help = "subset file, .npy or bare bytes, in any order (repeatable)"
    parser.add_argument("--subset", action="append", default=[], help=help)
    parser.add_argument("--scale", choices=SCALES, help="of the pool, to tell whether metadata is missing")
    parser.add_argument("--out", required=True, help="folder for subsets and the account")
    args = parser.parse_args(argv)
    if not (args.metadata or args.shards or args.subset):
        raise ConfigError("there is nothing to look through. Give --metadata, --shards or --subset.")
    if args.scale and not args.metadata:
        raise ConfigError("--scale tells how many rows --metadata should have. Give that too.")
    places = {"metadata": args.metadata, "shards": args.shards, "subsets": name_subsets(args.subset)}
    manifest = import_datacomp(args.out, **places, scale=args.scale)
    for name, section in manifest.facts["sections"].items():
        print("\n".join(describe(name, section["numbers"])))
    findings = manifest.facts["findings"]
    for finding in findings:
        print(f"{finding['level']:8s} {finding['where']}: {finding['message']}")
    if args.subset:
        print(f"subsets are in {args.out}/{SUBSETS}")
    if num_broken := sum(finding["level"] == BROKEN for finding in findings):
        raise StageError(f"{num_broken} of the findings above mean that something is broken beyond use.")


def describe(name: str, numbers: Mapping[str, int]) -> Iterator[str]:
    """Yield the lines of one section of the table."""
    yield name
    for label, number in numbers.items():
        whole = numbers.get(SHARE_OF.get(label, ""), 0)
        yield f"  {label:24s}{number:16,}" + (f"{number / whole:10.2%}" if whole else "")


if __name__ == "__main__":
    sys.exit(main())
