"""`winnow VERB ...` -> the verb's own main."""

import importlib
import os
import sys
from collections.abc import Sequence

from jobs import VERBS
from pipeline.errors import ConfigError, check_name

USAGE = "usage: winnow VERB [--help] ...\n\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code: 0 done, 1 a stage failed, 2 bad usage or config."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads must not spin beside other work
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE + "\n".join(f"  {verb:17s}{summary}" for verb, (_, summary) in VERBS.items()))
        return 0 if words else ConfigError.exit_code
    verb, rest = (" ".join(words[:2]), words[2:]) if " ".join(words[:2]) in VERBS else (words[0], words[1:])
    try:
        check_name(verb, VERBS, kind="verb")
    except ConfigError as error:
        print(f"winnow: {error}", file=sys.stderr)
        return ConfigError.exit_code
    job = importlib.import_module(VERBS[verb][0])
    code: int = job.main(rest)
    return code


if __name__ == "__main__":
    sys.exit(main())
