"""winnow export: a run or checkpoint -> a folder that open_clip opens and the Hugging Face hub takes."""

import sys
from collections.abc import Sequence

from jobs.arguments import job, make_parser

EXAMPLE = """  winnow export runs/b32 --to export/b32
  winnow export ViT-B-32@weights.pt --to export/b32"""


@job
def main(argv: Sequence[str] | None = None) -> None:
    """Export, print how to open it."""
    parser = make_parser("export", "Write a model in the hub's layout for open_clip, with a model card.", EXAMPLE)
    parser.add_argument("model", help="run folder, or ARCHITECTURE@FILE")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="folder to write")
    args = parser.parse_args(argv)
    from training.export import export_model

    export_model(args.model, args.to)
    print(f'open_clip.create_model_and_transforms("local-dir:{args.to}")')


if __name__ == "__main__":
    sys.exit(main())
