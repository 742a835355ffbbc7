"""winnow eval download: the hub's evaluation sets -> a local folder, hashes checked, resumable."""

import os
import sys
from collections.abc import Sequence

from eval38.download import GB, WantedSet, check_room, fetch_sets, plan_sets
from eval38.hub import HUB, Hub
from eval38.table import align
from eval38.tasks import TASKS, find_task
from jobs.arguments import job, make_parser
from pipeline.errors import ConfigError, StageError

EXAMPLE = """  winnow eval download --out evalsets cifar10 mnist vtab/caltech101
  winnow eval download --out evalsets --all --max-gb 80 --yes
  HF_ENDPOINT=https://mirror.example winnow eval download --out evalsets imagenet1k --dry-run"""


@job
def main(argv: Sequence[str] | None = None) -> None:
    """List what is chosen and missing, ask, fetch."""
    parser = make_parser("eval download", "Fetch evaluation sets from the hub. Only the tasks named.", EXAMPLE)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="keys of the task list (see `winnow tasks`)")
    parser.add_argument("--all", action="store_true", help="all 40 tasks")
    parser.add_argument("--out", required=True, help="local folder; each set becomes a folder wds_<task>_test")
    parser.add_argument("--yes", action="store_true", help="fetch without asking")
    parser.add_argument("--dry-run", action="store_true", help="say what is missing, hash what is there, fetch nothing")
    parser.add_argument("--max-gb", type=float, metavar="GB", help="fetch nothing if more than this is missing")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of the sets (default: main)")
    help = f"the hub or a mirror of it (default: HF_ENDPOINT, else {HUB}); a token in HF_TOKEN is sent to it alone"
    parser.add_argument("--endpoint", default=os.environ.get("HF_ENDPOINT") or HUB, help=help)
    args = parser.parse_args(argv)
    if bool(args.tasks) == args.all:
        raise ConfigError("name the tasks to fetch, or --all. `winnow tasks` lists them.")
    tasks = TASKS if args.all else [find_task(key) for key in dict.fromkeys(args.tasks)]
    hub = Hub(args.endpoint, os.environ.get("HF_TOKEN", "").strip() or None)
    sets, failed = plan_sets(hub, tasks, args.out, revision=args.revision)
    print(_format(sets), flush=True)
    check_room(sets, args.out, max_gb=args.max_gb)
    if not args.dry_run:
        if any(not file.done for one in sets for file in one.files) and not (args.yes or _agreed()):
            raise ConfigError("nothing is fetched without your consent: add --yes.")
        failed += fetch_sets(hub, sets)
    if failed:
        raise StageError("\n".join([f"{len(failed)} sets or files could not be had:", *failed]))


def _agreed() -> bool:
    if not sys.stdin.isatty():
        return False
    print("Fetch what is missing? [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")  # input() would raise on Ctrl-D


def _format(sets: Sequence[WantedSet]) -> str:
    rows = [["task", "repository", "commit", "files", "GB", "missing GB"]]
    for one in sets:
        sizes = (f"{one.size / GB:.3f}", f"{one.missing / GB:.3f}")
        rows.append([one.task.key, one.repo, one.commit[:8], str(len(one.files)), *sizes])
    totals = (sum(one.size for one in sets), sum(one.missing for one in sets))
    rows.append(["all", "", "", str(sum(len(one.files) for one in sets)), *(f"{total / GB:.3f}" for total in totals)])
    return "\n".join(align(rows, left=(0, 1, 2)))


if __name__ == "__main__":
    sys.exit(main())
