"""winnow recipes: the built-in recipes, or one of them as YAML to copy."""

import sys
from collections.abc import Sequence

import yaml

from jobs.arguments import job, make_parser
from jobs.recipes import builtin_recipes
from pipeline.errors import check_name

EXAMPLE = """  winnow recipes
  winnow recipes dfn-tiny > my.yaml"""


@job
def main(argv: Sequence[str] | None = None) -> None:
    """Print the list, or one recipe."""
    parser = make_parser("recipes", "List the built-in recipes, or print one to copy.", EXAMPLE)
    parser.add_argument("name", nargs="?", help="print this recipe's YAML")
    args = parser.parse_args(argv)
    recipes = builtin_recipes()
    if args.name:
        check_name(args.name, recipes, kind="recipe")
        print(yaml.safe_dump(recipes[args.name], sort_keys=False, allow_unicode=True), end="")
        return
    for name, values in recipes.items():
        print(f"{name:22s}{values.get('source', '')}")


if __name__ == "__main__":
    sys.exit(main())
