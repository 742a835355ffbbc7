"""Images and prompts -> unit vectors; reading and decoding run ahead in threads while the models work.

Several encoders can look at the same images, each decoded once.  Several processes share a set's batches (ranks.py).
Shapes: N images, M prompts, C classes, T templates, D dims; H x W pixels.  Vectors are float32 and unit norm.

Threads only decode, resize and crop (uint8); the model's own scaling to floats is done for a whole batch on the
device, with the operations and so the bits of the model's transform.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from threading import Condition
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from torchvision.transforms import Compose, Normalize, ToTensor
from tqdm import tqdm

from eval38.config import Precision
from eval38.ranks import gather, is_own
from eval38.rows import PLACEHOLDER, ImageRow, LostImage
from eval38.text import encode_text, group_prompts
from pipeline.clip_model import OpenedClip
from pipeline.devices import count_cores
from pipeline.errors import EvalError, ModelError
from pipeline.images import UnreadableImage, decode_image
from pipeline.schemas import REASON_UNREADABLE_IMAGE
from training.world import ALONE, World

PIECE_IMAGES, PIECE_BYTES = 32, 16 << 20
"""What one thread decodes at a time: so many images, or as few as hold so many bytes."""
NUM_BATCHES_AHEAD, BYTES_AHEAD = 3, 256 << 20
"""How far reading is ahead of the models, in batches and in bytes still to be decoded."""
PROMPTS_PER_FORWARD = 512
MIN_ROWS = 16
"""A smaller batch is filled up: on a CPU products of fewer rows round otherwise (bf16: 1 row, float32: up to 9)."""

Geometry = Callable[[Image.Image], Image.Image]
"""Resize and crop, PIL to PIL."""


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Seen(Generic[T]):
    """The images of a whole set, after its one pass."""

    image_ND: Tensor
    """Unit vectors, on the CPU; N is at least 1."""
    truths: tuple[T, ...]
    """N long."""
    lost: tuple[LostImage, ...]


@dataclass(frozen=True, slots=True)
class ImageBatch(Generic[T]):
    """Decoded images of consecutive rows, and the rows among them that were lost."""

    image_NHW3: Tensor
    """uint8; empty when all rows were lost."""
    truths: tuple[T, ...]
    """N long: what is known of each image."""
    lost: tuple[LostImage, ...]


class _Part(NamedTuple):
    """What the encoders made of one batch."""

    number: int
    """Which batch of the set it is."""
    vectors: tuple[Tensor | ModelError, ...]
    """By encoder; () when all rows were lost."""
    truths: tuple[Any, ...]
    lost: tuple[LostImage, ...]


class Encoder:
    """An opened model on its device, with one number format."""

    def __init__(self, opened: OpenedClip, *, device: str, precision: Precision) -> None:
        self.opened, self.device, self.precision = opened, device, precision
        self.geometry, self.scale = split_transform(opened.eval_transform)

    def encode_images(self, image_NHW3: Tensor) -> Tensor:
        """Return unit vectors (N, D) of decoded uint8 images, on the device."""
        full = torch.tensor(255.0, device=self.device)  # a GPU divides exactly by a tensor, and not by a number
        image_N3HW = image_NHW3.to(self.device).permute(0, 3, 1, 2).contiguous().float().div(full)
        return self._run(self.opened.model.encode_image, self.scale(image_N3HW))

    def encode_prompts(self, prompts: Sequence[str], *, quiet: bool = False, world: World = ALONE) -> Tensor:
        """Return unit vectors (M, D) in the order of the prompts, on the CPU; each process encodes its share.

        Prompts of one length go together (text.py).
        """
        token_ML = self.opened.tokenize(list(prompts))
        groups = group_prompts(self.opened.model, token_ML)
        parts = [place_B for group in groups for place_B in torch.split(group, PROMPTS_PER_FORWARD)]

        def encode_own() -> dict[int, Tensor]:
            text_parts = {}
            with tqdm(
                total=len(prompts), unit="prompt", desc="prompts", disable=quiet or not world.is_first
            ) as progress:
                for number, place_B in enumerate(parts):
                    if is_own(number, world):
                        token_BL = token_ML[place_B].to(self.device)
                        text_parts[number] = self._run(partial(encode_text, self.opened.model), token_BL).cpu()
                    progress.update(len(place_B))
            return text_parts

        found = {number: part for share in gather(world, encode_own) for number, part in share.items()}
        return torch.cat([found[number] for number in range(len(parts))])[torch.cat(parts).argsort()]

    def _run(self, encode: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        reduced = self.precision == "bf16"
        try:
            autocast = torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=reduced)
            with torch.inference_mode(), keep_float32(), autocast:
                features = encode(fill_rows(inputs))[: len(inputs)]
        except RuntimeError as error:  # torch's, for want of memory too
            what = str(error).partition("\n")[0].rstrip(".")
            raise ModelError(
                f"the model fails on {len(inputs)} inputs of shape {tuple(inputs.shape[1:])} on {self.device}: "
                f"{what}. If memory ran out, lower eval.batch_size."
            ) from error
        vector_ND = normalize(features.float(), dim=-1)
        if not bool(vector_ND.isfinite().all()):
            raise ModelError(f"the model gives vectors that are not finite in {self.precision}: did training diverge?")
        return vector_ND


def fill_rows(inputs: Tensor) -> Tensor:
    """Return the rows of a batch, the last one repeated where they are fewer than MIN_ROWS."""
    missing = MIN_ROWS - len(inputs)
    return torch.cat([inputs, inputs[-1:].repeat_interleave(missing, dim=0)]) if missing > 0 else inputs


class Embedder:
    """An encoder that reads each prompt once, whichever tasks ask for it."""

    def __init__(self, encoder: Encoder, *, quiet: bool = False, world: World = ALONE) -> None:
        self.encoder, self.quiet, self.world = encoder, quiet, world
        self._places: dict[str, int] = {}
        self._text_MD = torch.empty(0, encoder.opened.embed_dim)

    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """Return unit vectors (M, D) of the prompts, which may repeat, on the CPU; known ones are not encoded again."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._places]
        if new:
            text_MD = self.encoder.encode_prompts(new, quiet=self.quiet, world=self.world)
            self._places |= {prompt: place for place, prompt in enumerate(new, start=len(self._places))}
            self._text_MD = torch.cat([self._text_MD, text_MD])
        return self._text_MD[[self._places[prompt] for prompt in prompts]]

    def embed_classes(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Return unit class vectors (C, D): the mean of a class's unit prompt vectors, made unit again.

        Source: LAION-AI/CLIP_benchmark at 48de38c, zero_shot_classifier; float32 where DataComp runs it in float16.
        """
        text_CTD = self.embed_texts(spell_prompts(classes, templates)).view(len(classes), len(templates), -1)
        return normalize(text_CTD.mean(dim=1), dim=-1)


def see_images(
    rows: Iterable[ImageRow[T] | LostImage],
    encoders: Sequence[Encoder],
    *,
    batch_size: int,
    name: str,
    total: int | None = None,
    quiet: bool = False,
    world: World = ALONE,
) -> list[Seen[T] | ModelError]:
    """Return what each encoder makes of the rows' images, and the rows that were lost; each image is decoded once.

    The encoders shape images alike (`geometry`) and are on one device.  One that gives vectors that are not finite has
    its error instead.  `name` and `total` (rows expected) are for the progress bar and messages.
    Raises EvalError when not one image can be read.
    """
    quiet = quiet or not world.is_first

    def see_own() -> list[_Part]:
        with tqdm(total=total, unit="image", desc=name, disable=quiet) as progress:
            return list(_encode_batches(rows, encoders, batch_size=batch_size, world=world, advance=progress.update))

    parts = sorted((part for share in gather(world, see_own) for part in share), key=lambda part: part.number)
    truths = tuple(truth for part in parts for truth in part.truths)
    lost = tuple(row for part in parts for row in part.lost)
    if not truths:
        why = f"; the first: {lost[0].name}: {lost[0].message}" if lost else ""
        raise EvalError(f"{name}: none of {len(lost)} images could be read{why}.")
    columns = zip(*(part.vectors for part in parts if part.vectors), strict=True)
    return [_join_vectors(column, truths, lost) for column in columns]


def _join_vectors(
    found: Sequence[Tensor | ModelError], truths: tuple[T, ...], lost: tuple[LostImage, ...]
) -> Seen[T] | ModelError:
    whole = [vectors for vectors in found if isinstance(vectors, Tensor)]
    error = next((one for one in found if isinstance(one, ModelError)), None)
    return error or Seen(torch.cat(whole), truths, lost)


def _encode_batches(
    rows: Iterable[ImageRow[Any] | LostImage],
    encoders: Sequence[Encoder],
    *,
    batch_size: int,
    world: World,
    advance: Callable[[int], Any],
) -> Iterator[_Part]:
    """Yield what the encoders make of this process's batches; one that failed is not asked again."""
    failed: dict[int, ModelError] = {}
    batches = decode_batches(rows, encoders[0].geometry, batch_size=batch_size, world=world)
    for number, batch in zip(count(world.rank, world.size), batches, strict=False):
        image_NHW3, vectors = batch.image_NHW3.to(encoders[0].device), list[Tensor | ModelError]()
        for place, encoder in enumerate(encoders if batch.truths else ()):
            try:
                vectors.append(failed.get(place) or encoder.encode_images(image_NHW3).cpu())
            except ModelError as error:
                failed[place] = error
                vectors.append(error)
        yield _Part(number, tuple(vectors), batch.truths, batch.lost)
        advance(world.size * (len(batch.truths) + len(batch.lost)))


@contextmanager
def keep_float32() -> Iterator[None]:
    """Keep a GPU from rounding float32 factors to TF32's 10 bits, as torch's convolutions do, and training's products.

    The switches are put back after.
    """
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        yield
    finally:
        for switch, allowed in zip(switches, before, strict=True):
            switch.allow_tf32 = allowed


def spell_prompts(classes: Iterable[str], templates: Sequence[str]) -> list[str]:
    """Return the C * T prompts, by class and then template."""
    return [template.replace(PLACEHOLDER, name) for name in classes for template in templates]


def split_transform(transform: Any) -> tuple[Geometry, Callable[[Tensor], Tensor]]:
    """Return a model's evaluation transform as its PIL part and its scaling of float images in [0, 1].

    Raises ModelError unless it ends in ToTensor and Normalize, as every open_clip evaluation transform does.
    """
    steps = list(getattr(transform, "transforms", []))
    if len(steps) < 2 or not isinstance(steps[-2], ToTensor) or not isinstance(steps[-1], Normalize):
        raise ModelError(f"the model's evaluation transform does not end in ToTensor and Normalize: {transform}.")
    return Compose(steps[:-2]), steps[-1]


def decode_batches(
    rows: Iterable[ImageRow[T] | LostImage],
    geometry: Geometry,
    *,
    batch_size: int,
    num_threads: int | None = None,
    world: World = ALONE,
) -> Iterator[ImageBatch[T]]:
    """Yield this process's batches in order: `batch_size` consecutive rows each; a lost row makes its batch smaller.

    One thread reads all rows and `num_threads` (default: one per core) decode, at most three batches ahead and holding
    at most BYTES_AHEAD of images still to be decoded, but for the piece just read.
    """
    source, numbers, room = iter(rows), count(), _Room()
    with ThreadPoolExecutor(num_threads or count_cores()) as decoders, ThreadPoolExecutor(1) as reader:

        def decode(piece: Sequence[ImageRow[T] | LostImage], num_bytes: int) -> Future[ImageBatch[T]]:
            room.take(num_bytes)
            decoded = decoders.submit(decode_rows, piece, geometry)
            decoded.add_done_callback(lambda _: room.give(num_bytes))
            return decoded

        def read_batch() -> list[Future[ImageBatch[T]]]:
            while not is_own(next(numbers), world):
                deque(islice(source, batch_size), maxlen=0)  # another process has it
            return [decode(*piece) for piece in cut_pieces(islice(source, batch_size))]

        ahead = deque(reader.submit(read_batch) for _ in range(NUM_BATCHES_AHEAD))
        while pieces := ahead.popleft().result():
            ahead.append(reader.submit(read_batch))
            yield join_batches([piece.result() for piece in pieces])


class _Room:
    """Bytes of images that are read and not yet decoded, shared by the reader and the decoders."""

    def __init__(self) -> None:
        self.held, self.changed = 0, Condition()

    def take(self, num_bytes: int) -> None:
        """Wait until there is room, which there always is when nothing is held."""
        with self.changed:
            self.changed.wait_for(lambda: not self.held or self.held + num_bytes <= BYTES_AHEAD)
            self.held += num_bytes

    def give(self, num_bytes: int) -> None:
        with self.changed:
            self.held -= num_bytes
            self.changed.notify()


def cut_pieces(rows: Iterable[ImageRow[T] | LostImage]) -> Iterator[tuple[list[ImageRow[T] | LostImage], int]]:
    """Yield (rows, bytes of their images) in order: PIECE_IMAGES rows, or fewer where they reach PIECE_BYTES."""
    piece, num_bytes = list[ImageRow[T] | LostImage](), 0
    for row in rows:
        piece.append(row)
        num_bytes += len(row.content) if isinstance(row, ImageRow) else 0
        if len(piece) == PIECE_IMAGES or num_bytes >= PIECE_BYTES:
            yield piece, num_bytes
            piece, num_bytes = [], 0
    if piece:
        yield piece, num_bytes


def decode_rows(rows: Sequence[ImageRow[T] | LostImage], geometry: Geometry) -> ImageBatch[T]:
    """Return the rows decoded, in order; one that cannot be is among the lost."""
    images, truths, lost = [], list[T](), list[LostImage]()
    for row in rows:
        if isinstance(row, LostImage):
            lost.append(row)
        elif isinstance(decoded := decode_row(row, geometry), LostImage):
            lost.append(decoded)
        else:
            images.append(decoded)
            truths.append(row.truth)
    image_NHW3 = torch.from_numpy(np.stack(images)) if images else torch.empty(0, dtype=torch.uint8)
    return ImageBatch(image_NHW3, tuple(truths), tuple(lost))


def decode_row(row: ImageRow[Any], geometry: Geometry) -> "np.ndarray[Any, np.dtype[np.uint8]] | LostImage":
    """Return uint8 pixels (H, W, 3), turned to RGB before they are resized, or why there are none.

    CLIP_benchmark's webdatasets decode to RGB first, too; open_clip's own transform resizes first.
    """
    try:
        return np.array(geometry(decode_image(row.content)))
    except UnreadableImage as error:
        return LostImage(row.name, error.reason, str(error))
    except Exception as error:  # the transform cannot take this mode or shape
        return LostImage(row.name, REASON_UNREADABLE_IMAGE, f"{type(error).__name__}: {error}")


def join_batches(pieces: Sequence[ImageBatch[T]]) -> ImageBatch[T]:
    """Return consecutive batches as one."""
    images = [piece.image_NHW3 for piece in pieces if piece.truths]
    return ImageBatch(
        torch.cat(images) if images else torch.empty(0, dtype=torch.uint8),
        tuple(truth for piece in pieces for truth in piece.truths),
        tuple(lost for piece in pieces for lost in piece.lost),
    )
