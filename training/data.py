"""Index + order -> batches.  A batch is a pure function of (data, batch size, seed, step): workers change nothing.

Of a row with several captions one is drawn by (seed, position), and a position is an epoch and a place in it.
An image that cannot be decoded is replaced by another row of its set, by (seed, position, attempt), and reported.
B rows in the batch, H and W pixels, C = 3 channels, L tokens.
"""

import logging
import queue
import threading
from collections.abc import Generator, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.errors import StageError
from pipeline.images import UnreadableImage
from pipeline.storage import is_local
from training.images import NUM_DRAWS, Crop, read_image
from training.index import RowIndex, TarReader
from training.order import draw_uniform, replacement_row
from training.processes import make_ahead
from training.samplers import open_sampler
from training.spool import Spool, SpoolReader
from training.world import ALONE, World

log = logging.getLogger("winnow")
T = TypeVar("T")
MAX_ATTEMPTS = 100
"""Rows tried for one position before the data is called unusable."""
PREFETCH_BATCHES = 4


class Batch(NamedTuple):
    """One step's rows."""

    pixel_BHWC: torch.Tensor
    """uint8."""
    token_BL: torch.Tensor
    """int32; of a locked text tower, its features (B, D) in their place."""
    row_B: torch.Tensor
    """int64: the rows used, replacements in place."""
    unreadable: torch.Tensor
    """int64: rows drawn whose image could not be decoded, once per draw."""


class Batches(Dataset[Batch]):
    """step -> Batch, for torch's DataLoader."""

    def __init__(
        self,
        index: RowIndex,
        *,
        crop: Crop,
        batch_size: int,
        seed: int,
        sampler: str = "exact",
        window_shards: int = 0,
        world: World = ALONE,
    ) -> None:
        self.index, self.crop, self.batch_size, self.seed = index, crop, batch_size, seed
        self.rank, self.num_own = world.rank, batch_size // world.size
        self.reader = TarReader(index.urls)
        self.sampler = open_sampler(sampler, index, batch_size=batch_size, seed=seed, window_shards=window_shards)

    def own_positions(self, step: int) -> range:
        """Return the positions of this process's part of the batch of one step."""
        first = step * self.batch_size + self.rank * self.num_own
        return range(first, first + self.num_own)

    def __getitem__(self, step: int) -> Batch:
        """Return this process's part of the batch of one step, counted from 0."""
        positions = self.own_positions(step)
        rows = self.sampler.rows_at(positions)
        uniform_BD = draw_uniform(self.seed, np.arange(positions.start, positions.stop), NUM_DRAWS + 1)
        uniform = uniform_BD.tolist()
        pixel_BHWC = np.empty((len(positions), self.crop.height_px, self.crop.width_px, 3), np.uint8)
        unreadable: list[int] = []
        for slot, position in enumerate(positions):
            rows[slot], pixel_BHWC[slot] = self._read(int(rows[slot]), position, uniform[slot], unreadable)
        caption_B = (uniform_BD[:, NUM_DRAWS] * self.index.num_captions_N[rows]).astype(np.int64)
        text_UX = self.index.token_UL if self.index.feature_UD is None else self.index.feature_UD
        text_BX = np.asarray(text_UX[self.index.caption_N[rows] + caption_B])
        token_BL = text_BX.astype(np.int32) if text_BX.dtype == np.uint16 else text_BX  # torch hardly knows uint16
        found = torch.tensor(unreadable, dtype=torch.int64)
        return Batch(torch.from_numpy(pixel_BHWC), torch.from_numpy(token_BL), torch.from_numpy(rows), found)

    def _read(self, row: int, position: int, uniform: list[float], unreadable: list[int]) -> tuple[int, np.ndarray]:
        """Return the row and crop for a position, after adding to `unreadable` every row that had to be passed over."""
        first, num_rows = self.index.find_set(row)
        for attempt in range(1, MAX_ATTEMPTS + 1):
            place = (int(a[row]) for a in (self.index.tar_N, self.index.offset_N, self.index.size_N))
            try:
                return row, read_image(self.reader.read(*place), self.crop, uniform)
            except UnreadableImage as error:
                unreadable.append(row)
                last = f"row {row} of {self.index.num_rows}: {error}"
            row = first + replacement_row(self.seed, position, attempt, num_rows=num_rows)
        raise StageError(
            f"train: {MAX_ATTEMPTS} rows in turn had no readable image, the last {last}. Check the shards."
        )


def open_batches(
    index: RowIndex,
    *,
    crop: Crop,
    batch_size: int,
    seed: int,
    steps: range,
    sampler: str = "exact",
    window_shards: int = 0,
    num_workers: int = 0,
    pin: bool = False,
    world: World = ALONE,
) -> Generator[Batch, None, None]:
    """Yield the batch of each step, loaded ahead by processes, or by a thread when num_workers is 0.

    `sampler` and `window_shards` are those of samplers.py.  `pin` puts batches in page-locked memory, for a GPU.
    Of several processes each gets its part, in the order of their ranks; batch_size is that of all together.
    Raises StageError when no readable row can be found, or a loader process was killed.
    """
    order: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "window_shards": window_shards}
    batches = Batches(index, crop=crop, sampler=sampler, world=world, **order)
    spool = _open_spool(batches, steps, num_workers, order | {"name": sampler})
    if spool:
        batches.reader = SpoolReader(index.urls, spool.folder)
    if num_workers:
        ahead = make_ahead(batches.__getitem__, steps, num_processes=num_workers, pin=pin)
    else:
        loader = DataLoader(batches, batch_size=None, sampler=steps, pin_memory=pin)
        ahead = prefetch(loader, depth=PREFETCH_BATCHES)
    try:
        if spool:
            spool.start()  # after the loader's processes have been forked
        for step, batch in zip(steps, ahead, strict=True):
            if spool:
                spool.go_on(step + 1)
            yield batch
    finally:
        ahead.close()
        del ahead  # ends the loader's processes
        batches.reader.close()
        if spool:
            spool.close()


def _open_spool(batches: Batches, steps: range, num_workers: int, settings: Mapping[str, Any]) -> Spool | None:
    """Return what brings the shards of the steps to come; None where all are here, or rows come from all of them."""
    index = batches.index
    if all(is_local(url) for url in index.urls):
        return None
    if not batches.sampler.window_rows:
        log.warning("train: the tars are remote and every image is asked for alone; window_shards=8 reads them whole.")
        return None
    planner = open_sampler(index=index, **settings)  # its own, as the loader's thread uses the other meanwhile
    ahead = -(-planner.window_rows // batches.batch_size) + PREFETCH_BATCHES + 2 * num_workers
    return Spool(index, lambda step: planner.rows_at(batches.own_positions(step)), steps=steps, ahead=ahead)


def prefetch(items: Iterable[T], *, depth: int) -> Generator[T, None, None]:
    """Yield the same items, made ahead of time by a thread that stays `depth` ahead and stops when this is closed."""
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()

    def hand_over(item: T | None, error: BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put((item, error), timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                hand_over(item, None)
                if stopped.is_set():
                    return
            hand_over(None, StopIteration())
        except BaseException as error:
            hand_over(None, error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        thread.join()
