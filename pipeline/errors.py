"""The error tree.  A message has the value, the reason and the remedy.

WinnowError
├── ConfigError (ValueError)   a flag or recipe value is wrong                  exit 2
├── PoolError (ValueError)     a pool, part, tar or parquet is not what it says  exit 1
├── ModelError (ValueError)    a checkpoint or model name cannot be used         exit 1
├── EvalError (ValueError)     an evaluation set is broken                       exit 1
└── StageError (RuntimeError)  a stage could not finish, or its accounts differ  exit 1
    └── Stopped                SIGTERM ended it; saved, the same command goes on  exit 143
"""

import difflib
import errno
import re
from collections.abc import Iterable

OUT_OF_MEANS = frozenset({errno.ENOMEM, errno.EMFILE, errno.ENFILE})


def is_out_of_means(error: BaseException) -> bool:
    """Return whether an error says that this machine lacks memory or file handles, and nothing of the data."""
    return isinstance(error, MemoryError) or getattr(error, "errno", None) in OUT_OF_MEANS


class WinnowError(Exception):
    """Any failure winnow explains itself; the command line prints it without a traceback."""

    exit_code = 1


class ConfigError(WinnowError, ValueError):
    """A flag or a recipe says something that cannot be done."""

    exit_code = 2


class PoolError(WinnowError, ValueError):
    """Input data is missing or is not what its name and schema promise."""


class ModelError(WinnowError, ValueError):
    """A model name, hub id or checkpoint cannot be opened as asked."""


class EvalError(WinnowError, ValueError):
    """An evaluation set contradicts its own description."""


class StageError(WinnowError, RuntimeError):
    """A stage stopped, or could not account for every row."""


class Stopped(StageError):
    """A scheduler asked the process to end, and what was done is saved."""

    exit_code = 143
    """128 + SIGTERM, as shells and schedulers have it."""


def check_name(name: str, known: Iterable[str], *, kind: str) -> None:
    """Raise ConfigError with the nearest known names unless `name` is one of them."""
    names = sorted(known)
    if name in names:
        return
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
    raise ConfigError(f"unknown {kind} {name!r}: {hint}Known: {', '.join(names) or 'none'}.")


def check_file_name(name: str, *, kind: str) -> None:
    """Raise ConfigError unless `name` can name a file or folder as it is: letters, digits, dot, dash, underscore."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(
            f"{kind} {name!r} names a file: use letters, digits, '.', '-' and '_', letter or digit first."
        )
