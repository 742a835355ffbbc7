"""winnow tasks: the evaluation tasks, one line each."""

import sys
from collections.abc import Sequence

from eval38.tasks import TASKS
from jobs.arguments import job, make_parser


@job
def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    make_parser("tasks", "List the 40 evaluation tasks; 38 count.", "  winnow tasks").parse_args(argv)
    print(f"{'key':52s}{'kind':12s}{'metric':24s}{'images':>8s}{'classes':>8s}  {'group':16s}counted")
    for task in TASKS:
        counted = "yes" if task.counted else "no"
        sizes = f"{task.images:8,}{task.classes or '-':>8}"
        print(f"{task.key:52s}{task.kind:12s}{task.metric or '-':24s}{sizes}  {task.group:16s}{counted}")


if __name__ == "__main__":
    sys.exit(main())
