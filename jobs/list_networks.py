"""winnow dfn list: released networks that a score entry can name as its model, with their licences."""

import sys
from collections.abc import Sequence

from jobs.arguments import job, make_parser
from pipeline.clip_model import find_hub_id, list_pretrained
from pipeline.released import RELEASED, spell_licence

EXAMPLE = """  winnow dfn list
  winnow dfn list --all"""
WIDTH = 53
"""The longest of open_clip's names, and a space."""


@job
def main(argv: Sequence[str] | None = None) -> None:
    """Print two lines per network."""
    parser = make_parser("dfn list", "List released networks with their licences.", EXAMPLE)
    parser.add_argument("--all", action="store_true", help="also every pretrained tag that open_clip knows")
    args = parser.parse_args(argv)
    for row in RELEASED:
        print(f"{row.hub:{WIDTH}}{row.about}\n{'':{WIDTH}}licence: {spell_licence(row.hub)}")
    for model in list_pretrained() if args.all else ():
        hub = find_hub_id(model)
        print(f"{model:{WIDTH}}licence: {spell_licence(hub) if hub else 'unknown to winnow, and no hub id'}")
    print("A licence is the publisher's, and binds whoever uses the weights.  Offline, name a folder with their files.")


if __name__ == "__main__":
    sys.exit(main())
