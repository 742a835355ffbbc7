"""winnow status: what is done, what failed and what is left in a run folder or a scores folder."""

import json
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.arguments import job, make_parser
from jobs.stages import FITS_FOLDER, RECIPE, SCORES_FOLDER, SHARDS_FOLDER, SUBSETS_FOLDER
from pipeline.errors import PoolError
from pipeline.lock import read_lock
from pipeline.manifest import read_manifest
from pipeline.schemas import (
    FAILURE_FILTER,
    FAILURE_REASON,
    FAILURES_FOLDER,
    MANIFEST,
    PARQUET_SUFFIX,
    REQUEST,
    STATS_SUFFIX,
)
from pipeline.storage import exists, is_folder, join, list_folder, name_of, open_file, read_bytes

EXAMPLE = """  winnow status out                 # a whole run
  winnow status out/scores          # one stage
  winnow retry out/scores --reason unreadable_image"""


@job
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, look, print one line per piece of work."""
    parser = make_parser("status", "Show what is done, what failed and what is left; changes nothing.", EXAMPLE)
    parser.add_argument("run", metavar="RUN", help="run folder, or a scores folder")
    run = parser.parse_args(argv).run
    if exists(join(run, RECIPE)):
        lines = list(describe_run(run))
    elif exists(join(run, REQUEST)):
        lines = list(describe_scores(run))
    else:
        raise PoolError(f"{run!r} is neither a run folder (with {RECIPE}) nor a scores folder (with {REQUEST}).")
    print(f"{'':32s}{'done':>9s}{'left':>9s}  notes")
    print("\n".join(lines))


def describe_run(run: str) -> Iterator[str]:
    """Yield the lines of every stage that the run's recipe asks for."""
    recipe = json.loads(read_bytes(join(run, RECIPE)))
    for name in recipe.get("networks", {}):
        yield _describe_made(join(run, "networks", name), f"network {name}")
    scores = join(run, SCORES_FOLDER)
    if exists(join(scores, REQUEST)):
        yield from describe_scores(scores)
    else:
        yield _line("score", 0, None, "not started")
    for name in recipe.get("fit", {}):
        yield _describe_made(join(run, FITS_FOLDER, name), f"fit {name}")
    for name in recipe.get("subsets", {}):
        yield _describe_made(join(run, SUBSETS_FOLDER), f"subset {name}", manifest=f"{name}.json")
    for name in recipe.get("subsets", {}):
        yield _describe_shards(join(run, SHARDS_FOLDER, name), f"shards {name}")
    for name in recipe.get("subsets", {}) if recipe.get("train") else ():
        yield _describe_made(join(run, "runs", name), f"train {name}")
    networks = [f"network-{name}" for name in recipe.get("networks", {})]
    for name in [*networks, *(recipe.get("subsets", {}) if recipe.get("train") else ())]:
        yield _describe_made(join(run, "eval", name), f"eval {name}")


def describe_scores(out: str) -> Iterator[str]:
    """Yield one line per filter: parts done and left, rows failed by reason."""
    asked = json.loads(read_bytes(join(out, REQUEST)))
    made = read_manifest(out)
    parts = {f"{part}{PARQUET_SUFFIX}" for part in asked["parts"]}
    failed = _count_failures(out, parts)
    for entry in asked["entries"]:
        name = entry.get("name", entry["filter"])
        here = parts & {name_of(url) for url in list_folder(join(out, name))}
        notes = [f"{reason} {number:,}" for reason, number in sorted(failed.get(name, Counter()).items())]
        yield _line(f"score {name}", len(here), len(parts) - len(here), "; ".join(notes), unit="part")
    for part, why in (made.facts["broken"] if made else {}).items():
        yield _line(f"  part {part}", 0, 1, str(why))
    if not made:
        yield _line("score", 0, None, _say_owner(out) or "not finished: the same command goes on")


def _count_failures(out: str, parts: Collection[str]) -> dict[str, Counter[str]]:
    """Return filter -> reason -> rows in quarantine; torn files are passed over."""
    failed: dict[str, Counter[str]] = {}
    for url in (url for url in list_folder(join(out, FAILURES_FOLDER)) if name_of(url) in parts):
        try:
            with open_file(url) as file:
                table = pq.read_table(file, columns=[FAILURE_FILTER, FAILURE_REASON])
        except (pa.ArrowException, OSError):
            continue
        for row in table.group_by([FAILURE_FILTER, FAILURE_REASON]).aggregate([([], "count_all")]).to_pylist():
            failed.setdefault(row[FAILURE_FILTER], Counter())[row[FAILURE_REASON]] += row["count_all"]
    return failed


def _describe_made(folder: str, what: str, *, manifest: str = MANIFEST) -> str:
    """Return the line of something that has one manifest."""
    made = read_manifest(folder, name=manifest) if is_folder(folder) else None
    if made is None:
        started = is_folder(folder) and manifest == MANIFEST and bool(list_folder(folder))
        return _line(what, 0, 1, _say_owner(folder) or ("not finished" if started else "not started"))
    failed = Counter[str]()
    for counts in made.counts.values():
        failed.update(counts.failed)
    return _line(what, 1, 0, "; ".join(f"{reason} {number:,}" for reason, number in sorted(failed.items())))


def _describe_shards(folder: str, what: str) -> str:
    made = read_manifest(folder) if is_folder(folder) else None
    if made is None and is_folder(folder):
        here = sum(url.endswith(STATS_SUFFIX) for url in list_folder(folder))
        return _line(what, here, None, _say_owner(folder) or "not finished", unit="shard")
    if made is None:
        return _line(what, 0, None, "not started")
    notes = [f"{reason} {number:,}" for reason, number in made.counts["rows"].failed.items()]
    return _line(what, made.facts["num_shards"], 0, "; ".join(notes), unit="shard")


def _say_owner(folder: str) -> str | None:
    owner: dict[str, Any] | None = read_lock(folder)
    return f"held by process {owner['pid']} on {owner['host']}" if owner else None


def _line(what: str, done: int, left: int | None, notes: str, unit: str = "") -> str:
    missing = "?" if left is None else f"{left:,}"
    notes = "; ".join(word for word in (unit and f"{unit}s", notes) if word)
    return f"{what:32s}{done:9,}{missing:>9s}  {notes}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
