"""winnow demo: a pool rendered on the spot, through the whole line, on a laptop; nothing is downloaded."""

import sys
import time
from collections.abc import Sequence
from typing import Any

from eval38.table import format_comparison
from jobs.arguments import add_spark, job, make_parser
from jobs.recipes import load_recipe
from jobs.run_recipe import run_recipe
from jobs.stages import timed
from pipeline.report import write_report
from pipeline.scene_captions import RIGHT_KINDS
from pipeline.scenes import TASKS, truth_url, write_demo_clean, write_demo_pool, write_demo_tasks
from pipeline.storage import exists, join, write_bytes

EXAMPLE = """  winnow demo
  winnow demo --quick --out /tmp/demo"""
POOL_ROWS, CLEAN_ROWS, TASK_IMAGES, ROWS_PER_PART = 6000, 2000, 1024, 1000
QUICK = ("networks.clip.train.samples=5120", "networks.dfn.train.samples=5120", "train.samples=8000")
"""Overrides of --quick: fewer samples seen; pool, rules and tasks stay."""


def make_data(out: str, *, seed: int) -> None:
    """Render pool, clean pairs and evaluation sets into OUT, unless they are there."""
    mark = join(out, f"made-from-seed-{seed}")
    if exists(mark):
        return
    write_demo_pool(join(out, "pool"), seed=seed, num_rows=POOL_ROWS, rows_per_part=ROWS_PER_PART)
    write_demo_clean(join(out, "clean"), seed=seed, num_rows=CLEAN_ROWS, rows_per_part=ROWS_PER_PART)
    write_demo_tasks(join(out, "evalsets"), seed=seed, num_images=TASK_IMAGES)
    write_bytes(mark, b"")


@job
def main(argv: Sequence[str] | None = None) -> None:
    """Render, run every stage, print the table, write the report."""
    parser = make_parser("demo", "Render a small pool, curate it, train on each subset, evaluate, report.", EXAMPLE)
    parser.add_argument("--out", default="demo-out", help="folder for all of it (default: demo-out)")
    parser.add_argument("--quick", action="store_true", help="fewer samples seen: under 3 minutes, rougher numbers")
    parser.add_argument("--seed", type=int, default=0, help="decides pool, clean pairs and test images (default: 0)")
    add_spark(parser)
    args = parser.parse_args(argv)
    start = time.perf_counter()
    data, run = join(args.out, "data"), join(args.out, "quick" if args.quick else "run")
    with timed(run, "render"):
        make_data(data, seed=args.seed)
    recipe = load_recipe("demo", [*(QUICK if args.quick else ()), f"eval.own=[{','.join(TASKS)}]"])
    pool = join(data, "pool")
    places: dict[str, Any] = {"pool": pool, "clean": join(data, "clean"), "eval_data": join(data, "evalsets")}
    results = run_recipe(recipe, **places, out=run, master=args.master)
    url = write_report(run, pool=pool, truth=truth_url(pool), right_kinds=RIGHT_KINDS)
    print(format_comparison({name: result.facts for name, result in results.items()}))
    print(f"{time.perf_counter() - start:.0f} s; report: {url}")


if __name__ == "__main__":
    sys.exit(main())
