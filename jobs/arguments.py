"""What the verbs' command lines share: parser, recipe and override words, error printing."""

import argparse
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from pipeline.errors import ConfigError, WinnowError

Job = Callable[..., int]
SHARED_VERBS = ("train", "eval")
"""Verbs whose work several processes share, as torchrun starts them."""


class _Parser(argparse.ArgumentParser):
    """Takes overrides after flags as well as before them, which argparse alone does not, and no empty place.

    `--out "$OUT"` with no such variable would be the root folder.
    """

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        found = self.parse_intermixed_args(args, namespace)
        for action in self._actions:
            if action.default != "" and getattr(found, action.dest, None) == "":
                name = "/".join(action.option_strings) or action.dest
                raise ConfigError(f"{name} is empty: name a place. Is a shell variable not set?")
        return found


def make_parser(verb: str, summary: str, example: str) -> argparse.ArgumentParser:
    """Return a parser whose --help ends with examples.

    Raises ConfigError where torchrun started several processes of a verb that is for one.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1" and verb not in SHARED_VERBS:
        raise ConfigError(
            f"WORLD_SIZE is {size}, as torchrun sets it, but `winnow {verb}` is for one process: several would write "
            f"the same files. Start it without torchrun (or unset WORLD_SIZE); only {' and '.join(SHARED_VERBS)} run "
            "in several processes."
        )
    return _Parser(
        prog=f"winnow {verb}",
        description=summary,
        epilog=f"examples:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add the words `RECIPE a.b=value ...`, in any order; the recipe is a built-in name or a YAML file."""
    help = "a built-in recipe (see `winnow recipes`) or a YAML file, and overrides such as train.samples=1000"
    parser.add_argument("words", nargs="*", metavar="RECIPE a.b=VALUE", help=help)


def add_eval_data(parser: argparse.ArgumentParser) -> None:
    """Add --eval-data, for verbs that train."""
    help = "folder of evaluation sets (wds_<task>_test), for train.zeroshot"
    parser.add_argument("--eval-data", metavar="DIR", help=help)


def add_spark(parser: argparse.ArgumentParser) -> None:
    """Add --master."""
    parser.add_argument("--master", help="Spark master (default: spark-submit's, else every core of this machine)")


def add_tasks_per_gpu(parser: argparse.ArgumentParser) -> None:
    """Add --tasks-per-gpu."""
    help = "tasks that share a GPU, where there are GPUs (default: 1); each loads the models"
    parser.add_argument("--tasks-per-gpu", type=int, default=1, metavar="N", help=help)


def add_fresh(parser: argparse.ArgumentParser) -> None:
    """Add --resume, which is the default and changes nothing, and --fresh."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="go on where the last run stopped (the default)")
    group.add_argument("--fresh", action="store_true", help="delete what earlier runs made in OUT, and start over")


def split_words(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return (recipe or None, overrides).  Raises ConfigError for a second recipe."""
    recipes = [word for word in words if "=" not in word]
    if len(recipes) > 1:
        raise ConfigError(f"two recipes given: {recipes[0]!r} and {recipes[1]!r}.")
    return (recipes[0] if recipes else None), [word for word in words if "=" in word]


def job(main: Callable[[Sequence[str] | None], None]) -> Job:
    """Return `main` with winnow's errors printed without a traceback and turned into exit codes (0, 1, 2)."""

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        logging.basicConfig(level=logging.WARNING, format="winnow: %(message)s")
        warnings.filterwarnings("ignore", category=FutureWarning)
        try:
            main(argv)
        except WinnowError as error:
            print(f"winnow: error: {error}", file=sys.stderr)
            return error.exit_code
        except OSError as error:
            print(f"winnow: error: {error}", file=sys.stderr)
            return WinnowError.exit_code
        except KeyboardInterrupt:
            print("winnow: interrupted; run the same command again to go on", file=sys.stderr)
            return 130
        return 0

    return run
