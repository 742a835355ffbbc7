"""winnow's training loader against open_clip_train's, on one core: tests/bench/loader.py --help.

Prints; asserts nothing.  Both read the same tars in one process with one thread and give batches of 224 px; they run in
turn, and the median of the pairwise ratios counts (above 1: we are faster).  `cpu` is the same ratio in processor
time, which a busy machine distorts less.  open_clip's batch is normalised float32; ours is uint8, normalised on the
training device, so there is a line with that done on the CPU too.  Both sides' shuffle buffers are filled, and our
index is made, before the clock.

The images are a pool's own, brought to a short side of 256 or 512 px and saved as JPEG of quality 95, as img2dataset
does: `enlarged`, which leaves little for the decoder to do, or `tiled` side by side at their own scale, which leaves
more than a photograph of that size.

The peer is the Python of an environment that has open_clip_torch==3.3.0 and webdataset==0.2.86 (newer ones break it):
    python tests/bench/loader.py --pool POOL --peer peer-venv/bin/python
"""

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.clip_model import open_model
from pipeline.images import decode_image
from pipeline.pool import list_parts
from pipeline.tars import TarRow, make_member, pack_row, read_rows, write_end
from training.data import Batches
from training.images import Crop, normalise, read_crop
from training.index import RowIndex, list_tars, read_index

MODEL, BATCH_SIZE, JPEG_QUALITY, ROWS_PER_TAR = "ViT-B-32", 64, 95, 250
PEER = """
import json, sys, time, types
import torch, open_clip
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip_train.data import get_wds_dataset
torch.set_num_threads(1)
model, pattern, batch_size, num_batches = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
transform = image_transform_v2(PreprocessCfg(), is_train=True)
args = types.SimpleNamespace(train_data=pattern, val_data=None, train_num_samples=10**6, dataset_resampled=True,
    train_data_upsampling_factors=None, seed=0, batch_size=batch_size, workers=0, world_size=1)
loader = get_wds_dataset(args, transform, True, tokenizer=open_clip.get_tokenizer(model)).dataloader
batches = iter(loader)
next(batches)
wall, cpu = time.perf_counter(), time.process_time()
for _ in range(num_batches):
    next(batches)
print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]))
"""
Seconds = tuple[float, float]
"""Of wall clock and of processor."""


def enlarge(images: Sequence[Image.Image], number: int, side_px: int) -> Image.Image:
    image = images[number]
    scale = side_px / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def tile(images: Sequence[Image.Image], number: int, side_px: int) -> Image.Image:
    canvas = Image.new("RGB", (side_px * 4 // 3, side_px))
    for y in range(0, canvas.height, 128):
        for x in range(0, canvas.width, 128):
            canvas.paste(images[number % len(images)].crop((0, 0, 128, 128)), (x, y))
            number += 1
    return canvas


MAKERS: dict[str, Callable[[Sequence[Image.Image], int, int], Image.Image]] = {"enlarged": enlarge, "tiled": tile}


def read_pool(pool: str, num_rows: int) -> list[tuple[bytes, bytes]]:
    """The first (image, caption) pairs of a pool that are not long strips."""
    pairs = []
    for part in list_parts(pool):
        for row in read_rows(part.tar):
            contents = {member.extension: member.content for member in row.members}
            width, height = decode_image(contents["jpg"]).size
            if max(width, height) <= 2 * min(width, height):
                pairs.append((contents["jpg"], contents["txt"]))
            if len(pairs) == num_rows:
                return pairs
    return pairs


def write_data(folder: Path, pairs: Sequence[tuple[bytes, bytes]], *, kind: str, side_px: int) -> int:
    """Write tars; return the mean bytes of an image."""
    folder.mkdir()
    images, total = [decode_image(image) for image, _ in pairs], 0
    for first in range(0, len(pairs), ROWS_PER_TAR):
        with (folder / f"{first // ROWS_PER_TAR:05d}.tar").open("wb") as file:
            position = 0
            for number in range(first, min(first + ROWS_PER_TAR, len(pairs))):
                buffer = io.BytesIO()
                MAKERS[kind](images, number, side_px).save(buffer, "JPEG", quality=JPEG_QUALITY)
                key, image = f"{number:09d}", buffer.getvalue()
                members = (make_member(f"{key}.jpg", image), make_member(f"{key}.txt", pairs[number][1]))
                position += file.write(pack_row(TarRow(key, members)))
                total += len(image)
            write_end(file, position)
    return total // len(pairs)


def run_ours(index: RowIndex, crop: Crop, num_batches: int, *, floats: bool) -> Seconds:
    batches = Batches(index, crop=crop, batch_size=BATCH_SIZE, seed=0)
    batches[0]
    wall, cpu = time.perf_counter(), time.process_time()
    for step in range(1, num_batches + 1):
        batch = batches[step]
        if floats:
            normalise(batch.pixel_BHWC, crop)
    return time.perf_counter() - wall, time.process_time() - cpu


def run_peer(python: str, folder: Path, num_batches: int) -> Seconds:
    pattern = "::".join(list_tars(str(folder)))
    command = [python, "-c", PEER, MODEL, pattern, str(BATCH_SIZE), str(num_batches)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    wall, cpu = json.loads(done.stdout.splitlines()[-1])
    return wall, cpu


def compare(folder: Path, args: argparse.Namespace) -> None:
    opened = open_model(MODEL)
    index = read_index(list_tars(str(folder)), tokenize=opened.tokenize, quiet=True)
    crop = read_crop(opened.train_transform)
    ways = {
        "exact": (crop, False),
        "fast": (replace(crop, pixels="fast"), False),
        "fast, floats": (replace(crop, pixels="fast"), True),
    }
    theirs: list[Seconds] = []
    ours: dict[str, list[Seconds]] = {name: [] for name in ways}
    for _ in range(args.pairs):
        theirs.append(run_peer(args.peer, folder, args.batches))
        for name, (way, floats) in ways.items():
            ours[name].append(run_ours(index, way, args.batches, floats=floats))
    num_images = args.batches * BATCH_SIZE
    print(f"  {'open_clip':14} {num_images / statistics.median(wall for wall, _ in theirs):6.0f} images/s")
    for name, times in ours.items():
        rate = num_images / statistics.median(wall for wall, _ in times)
        ratios = [
            statistics.median(t[clock] / o[clock] for t, o in zip(theirs, times, strict=True)) for clock in (0, 1)
        ]
        print(f"  {name:14} {rate:6.0f} images/s   {ratios[0]:.2f} x   cpu {ratios[1]:.2f} x", flush=True)


def print_lengths(pairs: Sequence[tuple[bytes, bytes]]) -> None:
    token_NL = open_model(MODEL).tokenize([caption.decode() for _, caption in pairs]).numpy()
    length_N = token_NL.argmax(1) + 1  # the end token has the largest id
    quantiles = np.quantile(length_N, (0.1, 0.5, 0.9)).astype(int)
    print(f"captions: {len(pairs)}, tokens with both ends: 10 %, 50 %, 90 % {quantiles}, most {length_N.max()} of 77")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", required=True, help="a pool of JPEGs of about 128 px or more")
    parser.add_argument("--peer", required=True, help="python of open_clip's environment")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--batches", type=int, default=15)
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    pairs = read_pool(args.pool, args.rows)
    print_lengths(pairs)
    with tempfile.TemporaryDirectory() as folder:
        for kind in MAKERS:
            for side_px in (256, 512):
                data = Path(folder) / f"{kind}-{side_px}"
                num_bytes = write_data(data, pairs, kind=kind, side_px=side_px)
                print(f"{kind}, {side_px} px, {num_bytes / 1000:.0f} kB an image", flush=True)
                compare(data, args)


if __name__ == "__main__":
    sys.exit(main())
