"""What the Spark stages share: names of a run's folders, the log of wall times, broken parts.

The stages themselves: stage_score.py, stage_select.py, stage_shards.py.  Each writes its manifest last and is skipped
when done.  Single verbs (score_pool.py, ...) and whole recipes (run_recipe.py) call the same three.  `start` returns
the Spark session (pipeline.spark_session.lazy_session); a stage that is done never calls it.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pipeline.schemas import EVENTS
from pipeline.storage import exists, join, read_bytes, write_bytes

log = logging.getLogger("winnow")
Start = Callable[[], Any]
RECIPE = "recipe.json"
"""The recipe of a run folder, written first: what makes a folder one."""
FITS_FOLDER, SCORES_FOLDER, SUBSETS_FOLDER, SHARDS_FOLDER = "fits", "scores", "subsets", "shards"


@contextmanager
def timed(run: str, stage: str, name: str = "") -> Iterator[None]:
    """Append one line with the stage's wall time to RUN/events.jsonl, whatever happens inside."""
    start = time.perf_counter()
    outcome = "failed"
    try:
        yield
        outcome = "done"
    finally:
        seconds = round(time.perf_counter() - start, 2)
        line = json.dumps({"stage": stage, "name": name, "outcome": outcome, "seconds": seconds})
        url = join(run, EVENTS)
        write_bytes(url, (read_bytes(url) if exists(url) else b"") + line.encode() + b"\n")


def warn_broken(stage: str, broken: Mapping[str, str]) -> None:
    """Print why each broken part could not be read, or only to its end."""
    for part, message in broken.items():
        log.warning("%s: part %s: %s", stage, part, message)
