"""`winnow VERB ...` -> the verb's own main."""

import difflib
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
    try:
        verb, rest = split_verb(words)
    except ConfigError as error:
        print(f"winnow: {error}", file=sys.stderr)
        return ConfigError.exit_code
    job = importlib.import_module(VERBS[verb][0])
    code: int = job.main(rest)
    return code


def split_verb(words: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Return the verb, of one word or two, and the words after it; raise ConfigError if there is no such verb."""
    pair, pairs = " ".join(words[:2]), [verb for verb in VERBS if " " in verb]
    if pair in pairs:
        return pair, words[2:]
    misspelt = words[0] not in VERBS and any(words[0] == known.split()[0] for known in pairs)
    if misspelt or difflib.get_close_matches(pair, pairs, cutoff=0.9):
        check_name(pair, pairs, kind="verb")
    check_name(words[0], VERBS, kind="verb")
    return words[0], words[1:]


if __name__ == "__main__":
    sys.exit(main())
