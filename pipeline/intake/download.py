"""Staged url tables -> shards, by img2dataset on its Spark or multiprocessing distributor.

img2dataset's parts are put together here as its own `download` does (1.47, main.py), so that what `download` keeps to
itself is in our hands: its SIGINT handler ends with exit code 0, its incremental mode reads every OUT/*.json as a
shard's, a shard that raises is printed on a worker and no more, and one that hangs holds all others for ever.
What a worker runs is img2dataset's Downloader inside ShardTask, which bounds the network and keeps the error's words.
"""

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from pipeline.errors import StageError
from pipeline.intake.web import install_web_opener
from pipeline.schemas import CAPTION, PARQUET_SUFFIX, PART_PATTERN, STATS_SUFFIX, TAR_SUFFIX, URL
from pipeline.storage import exists, fingerprint, join, list_folder, name_of, read_bytes, remove, write_bytes

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import, on any worker, would ask the network for a version
DISTRIBUTORS = ("pyspark", "multiprocessing")
TABLES, TEMPORARY, ERRORS = "tables", "tmp", "errors"
"""Folders in the state folder: staged tables, what img2dataset's reader writes, one file per shard that raised."""
SUFFIXES = (STATS_SUFFIX, PARQUET_SUFFIX, TAR_SUFFIX)
SHARDS_PER_JOB = 1000
TRIES = 2
POLL_S = 0.5
START_S = 120.0
"""What workers may take beyond a stall until the first shard is begun: to start, and to import."""
QUALITY = {"jpg": 95, "webp": 95, "png": 6}
"""95 is img2dataset's default, and so CommonPool's; for png it is the compression."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where and how hard to download; no byte of an image depends on it."""

    distributor: str
    """One of DISTRIBUTORS."""
    processes: int
    """Workers of the multiprocessing distributor; on Spark the session decides."""
    threads: int
    """Downloads at once in each worker."""
    timeout_s: float
    """Longest wait for a connection or the next byte; a whole answer has 6 times as long."""
    retries: int
    """Further requests after a failed one."""
    stall_s: float
    """Shards are given up when none of them has grown for so long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """What to make from the staged tables; the staged table of shard N is the Nth, and holds its rows."""

    out: str
    state: str
    num_shards: int
    rows_per_shard: int
    columns: tuple[str, ...]
    """Columns carried through beside url and caption."""
    blur_column: str | None
    hash_kind: str
    """Computed over the bytes as fetched: sha256 or md5."""
    verify: bool
    """Whether rows whose staged `hash_kind` differs are failed."""
    image_size: int
    resize_mode: str
    encode_format: str

    def is_done(self, shard: int) -> bool:
        """Return whether img2dataset finished the shard: it writes the stats last."""
        return exists(join(self.out, PART_PATTERN.format(shard) + STATS_SUFFIX))


@dataclass(frozen=True, slots=True)
class ShardTask:
    """What a worker calls for one shard; picklable."""

    downloader: Any
    errors: str

    def __call__(self, row: tuple[int, str]) -> tuple[bool, tuple[int, str]]:
        """Return (whether the shard is done, row), as the distributors expect; the error's words go to a file."""
        install_web_opener()
        try:
            self.downloader.download_shard(row)
            return True, row
        except Exception as error:
            said = f"{type(error).__name__}: {error}"[:300]
            write_bytes(join(self.errors, str(row[0])), said.encode("utf-8", "replace"))
            return False, row


def download_shards(
    shards: Shards,
    wanted: Sequence[int],
    machine: Machine,
    *,
    cancel: Callable[[], None] | None = None,
    quiet: bool = False,
) -> dict[int, str]:
    """Make the shards that are wanted, and return why for each that could not be made.

    A shard that raises is tried again once.  When a worker dies, its round is lost: the rest is run again, and from the
    first round that finishes nothing, one shard at a time, so that the one that kills workers takes no other with it.
    A Spark session, where `machine` says pyspark, must be active in this thread; `cancel` ends what it runs.
    """
    failed: dict[int, str] = {}
    tries: Counter[int] = Counter()
    alone = False
    with tqdm(total=len(wanted), desc="ingest", unit="shard", disable=quiet) as bar:
        while left := [n for n in wanted if n not in failed and not shards.is_done(n)]:
            batch = left[:1] if alone else left
            ended = _run_round(shards, batch, machine, cancel or _interrupt, bar)
            unmade = [n for n in batch if not shards.is_done(n)]
            for shard in unmade:
                tries[shard] += 1
                if message := ended.why(shard, alone=alone, again=tries[shard] < TRIES):
                    failed[shard] = message
            alone = alone or (ended.crash is not None and not ended.stuck and unmade == batch)
    return failed


def remove_shard(out: str, shard: int) -> None:
    """Delete the files of one shard, the sign that it is done first."""
    for suffix in SUFFIXES:
        remove(join(out, PART_PATTERN.format(shard) + suffix))


@dataclass(slots=True)
class _Round:
    """How one call of a distributor ended."""

    crash: str | None = None
    stuck: dict[int, str] = field(default_factory=dict)
    raised: dict[int, str] = field(default_factory=dict)

    def why(self, shard: int, *, alone: bool, again: bool) -> str | None:
        """Return why a shard is given up, or None to try it again."""
        if shard in self.raised:
            return None if again else self.raised[shard]
        if shard in self.stuck:
            return self.stuck[shard]
        if self.crash is None:
            return None if again else "img2dataset ended without it"
        return self.crash if alone else None


def _run_round(
    shards: Shards, batch: Sequence[int], machine: Machine, cancel: Callable[[], None], bar: "tqdm[Any]"
) -> _Round:
    try:
        from img2dataset.distributor import multiprocessing_distributor, pyspark_distributor
    except ImportError as error:
        raise StageError(f"ingest needs img2dataset ({error}): pip install 'winnow[spark]'.") from None
    spark = machine.distributor == "pyspark"
    distribute = pyspark_distributor if spark else multiprocessing_distributor
    for folder in (ERRORS, TEMPORARY):
        remove(join(shards.state, folder))
    for shard in batch:
        remove_shard(shards.out, shard)
    reader = _make_reader(shards, batch)
    task = ShardTask(_make_downloader(shards, machine, reader.column_list), join(shards.state, ERRORS))
    ended = _Round()
    with _watch(shards, batch, machine.stall_s, cancel, ended, bar), _hush():
        try:
            distribute(machine.processes, task, reader, SHARDS_PER_JOB, 0)
        except KeyboardInterrupt:
            if not ended.stuck:  # the user's, not the watch's
                raise
        except Exception as error:  # of Spark: a worker that died, or cancelled jobs
            ended.crash = " ".join(str(error).split())[:300]
    for url in list_folder(join(shards.state, ERRORS)):
        ended.raised[int(name_of(url))] = read_bytes(url).decode()
    return ended


def _make_reader(shards: Shards, batch: Sequence[int]) -> Any:
    from img2dataset.reader import Reader

    write_bytes(join(shards.state, TEMPORARY, ".made"), b"")
    return Reader(
        url_list=join(shards.state, TABLES),
        input_format="parquet",
        url_col=URL,
        caption_col=CAPTION,
        verify_hash_col=shards.hash_kind if shards.verify else None,
        verify_hash_type=shards.hash_kind if shards.verify else None,
        save_additional_columns=list(shards.columns),
        number_sample_per_shard=shards.rows_per_shard,
        done_shards=set(range(shards.num_shards)) - set(batch),
        tmp_path=join(shards.state, TEMPORARY),
    )


def _make_downloader(shards: Shards, machine: Machine, column_list: Sequence[str]) -> Any:
    """Return img2dataset's Downloader as DataComp's download_upstream.py (:31-145, :218-238) asks for it."""
    from img2dataset.blurrer import BoundingBoxBlurrer
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer
    from img2dataset.writer import WebDatasetSampleWriter

    resizer = Resizer(
        image_size=shards.image_size,
        resize_mode=shards.resize_mode,
        resize_only_if_bigger=True,
        encode_quality=QUALITY[shards.encode_format],
        encode_format=shards.encode_format,
        blurrer=BoundingBoxBlurrer() if shards.blur_column else None,
    )
    return Downloader(
        sample_writer_class=WebDatasetSampleWriter,
        resizer=resizer,
        thread_count=machine.threads,
        save_caption=True,
        extract_exif=True,
        output_folder=shards.out,
        column_list=list(column_list),
        timeout=machine.timeout_s,
        number_sample_per_shard=shards.rows_per_shard,
        oom_shard_count=8,
        compute_hash=shards.hash_kind,
        verify_hash_type=shards.hash_kind if shards.verify else None,
        encode_format=shards.encode_format,
        retries=machine.retries,
        user_agent_token=None,
        disallowed_header_directives=["noai", "noimageai", "noindex", "noimageindex"],  # img2dataset's default
        blurring_bbox_col=shards.blur_column,
    )


@contextmanager
def _hush() -> Iterator[None]:
    """Keep img2dataset's notes per table and its own bar off the screen."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):  # noqa: PTH123
        yield


@contextmanager
def _watch(
    shards: Shards, batch: Sequence[int], stall_s: float, cancel: Callable[[], None], ended: _Round, bar: "tqdm[Any]"
) -> Iterator[None]:
    """Move the bar while the block runs; when no shard grows for `stall_s`, note which were begun, and cancel."""
    stop = threading.Event()
    before_round = int(bar.n)

    def watch() -> None:
        seen, still_s = _look(shards, batch), 0.0
        while not stop.wait(POLL_S):
            now = _look(shards, batch)
            if before_round + now[0] != bar.n:
                bar.update(before_round + now[0] - int(bar.n))
            still_s = still_s + POLL_S if now == seen else 0.0
            seen = now
            if still_s >= stall_s + (0 if any(now) else START_S):
                stuck = {shard for shard, _ in now[1]} or set(batch)
                ended.stuck = dict.fromkeys(sorted(stuck), f"stalled: it did not grow for {stall_s:g} s")
                cancel()
                return

    thread = threading.Thread(target=watch, name="ingest watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        bar.update(before_round + _look(shards, batch)[0] - int(bar.n))


def _look(shards: Shards, batch: Sequence[int]) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Return how many shards of the batch are done, and (shard, bytes) of each file of those that are begun."""
    names = {name_of(url): url for url in list_folder(shards.out)}
    done, begun = 0, []
    for shard in batch:
        stem = PART_PATTERN.format(shard)
        if stem + STATS_SUFFIX in names:
            done += 1
            continue
        files = [names[stem + suffix] for suffix in (TAR_SUFFIX, PARQUET_SUFFIX) if stem + suffix in names]
        begun += [(shard, int(fingerprint(url)["size"])) for url in files]
    return done, tuple(begun)


def _interrupt() -> None:
    """Raise KeyboardInterrupt in the main thread, also while it waits for a lock."""
    main = threading.main_thread().ident
    assert main
    signal.pthread_kill(main, signal.SIGINT)
