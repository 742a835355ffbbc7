"""winnow recipes: the built-in recipes, or one of them as YAML to copy."""

import sys
from collections.abc import Sequence

from jobs.arguments import job, make_parser
from jobs.recipes import builtin_files, builtin_recipes
from pipeline.errors import check_name

EXAMPLE = """  winnow recipes
  winnow recipes dfn-tiny > my.yaml"""


@job
def main(argv: Sequence[str] | None = None) -> None:
    """Print the list, or one recipe."""
    parser = make_parser("recipes", "List the built-in recipes, or print one to copy.", EXAMPLE)
    parser.add_argument("name", nargs="?", help="print this recipe's YAML")
    args = parser.parse_args(argv)
    if args.name:
        files = builtin_files()
        check_name(args.name, files, kind="recipe")
        print(files[args.name], end="")
        return
    recipes = builtin_recipes()
    width = max(map(len, recipes)) + 2
    for name, values in recipes.items():
        print(f"{name:{width}s}{values.get('source', '')}")


if __name__ == "__main__":
    sys.exit(main())
