"""Index + order -> batches.  A batch is a pure function of (data, batch size, seed, step): workers change nothing.

Of a row with several captions one is drawn by (seed, position), and a position is an epoch and a place in it.
An image that cannot be decoded is replaced by another row of its set, by (seed, position, attempt), and reported.
B rows in the batch, H and W pixels, C = 3 channels, L tokens.
"""

import queue
import threading
from collections.abc import Generator, Iterable
from contextlib import closing
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.errors import StageError
from pipeline.images import UnreadableImage
from training.images import NUM_DRAWS, Crop, read_image
from training.index import RowIndex, TarReader
from training.order import draw_uniform, replacement_row
from training.samplers import open_sampler
from training.world import ALONE, World

T = TypeVar("T")
MAX_ATTEMPTS = 100
"""Rows tried for one position before the data is called unusable."""
PREFETCH_BATCHES = 4


class Batch(NamedTuple):
    """One step's rows."""

    pixel_BHWC: torch.Tensor
    """uint8."""
    token_BL: torch.Tensor
    """int32."""
    row_B: torch.Tensor
    """int64: the rows used, replacements in place."""
    unreadable: torch.Tensor
    """int64: rows drawn whose image could not be decoded, once per draw."""


class Batches(Dataset[Batch]):
    """step -> Batch, for torch's DataLoader."""

    def __init__(
        self, index: RowIndex, *, crop: Crop, batch_size: int, seed: int, sampler: str = "exact", world: World = ALONE
    ) -> None:
        self.index, self.crop, self.batch_size, self.seed = index, crop, batch_size, seed
        self.rank, self.num_own = world.rank, batch_size // world.size
        self.reader = TarReader(index.urls)
        self.rows_at = open_sampler(sampler, index, batch_size=batch_size, seed=seed)

    def __getitem__(self, step: int) -> Batch:
        """Return this process's part of the batch of one step, counted from 0."""
        first = step * self.batch_size + self.rank * self.num_own
        positions = range(first, first + self.num_own)
        rows = self.rows_at(positions)
        uniform_BD = draw_uniform(self.seed, np.arange(positions.start, positions.stop), NUM_DRAWS + 1)
        uniform = uniform_BD.tolist()
        pixel_BHWC = np.empty((len(positions), self.crop.height_px, self.crop.width_px, 3), np.uint8)
        unreadable: list[int] = []
        for slot, position in enumerate(positions):
            rows[slot], pixel_BHWC[slot] = self._read(int(rows[slot]), position, uniform[slot], unreadable)
        caption_B = (uniform_BD[:, NUM_DRAWS] * self.index.num_captions_N[rows]).astype(np.int64)
        token_BL = self.index.token_UL[self.index.caption_N[rows] + caption_B]
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
    num_workers: int = 0,
    pin: bool = False,
    world: World = ALONE,
) -> Generator[Batch, None, None]:
    """Yield the batch of each step, loaded ahead by processes, or by a thread when num_workers is 0.

    `sampler` is a name of samplers.py.  `pin` puts batches in page-locked memory, for a GPU.
    Of several processes each gets its part, in the order of their ranks; batch_size is that of all together.
    Raises StageError when no readable row can be found.
    """
    batches = Batches(index, crop=crop, batch_size=batch_size, seed=seed, sampler=sampler, world=world)
    loader = DataLoader(batches, batch_size=None, sampler=steps, num_workers=num_workers, pin_memory=pin)
    try:
        if num_workers:
            yield from loader
        else:
            with closing(prefetch(loader, depth=PREFETCH_BATCHES)) as ahead:
                yield from ahead
    finally:
        batches.reader.close()


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
