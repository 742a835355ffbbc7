"""The filters of DataComp's basic rule against its own code: `python -m tests.bench.filters --peer DIR`, two minutes.

Real captions (--text, parquet files with a `text` column) in random order make parts of CommonPool metadata, with
invented sizes; no caption comes twice as long as they last.  Part by part, in one process and one thread: DataComp's
load_uids_with_basic_filter_helper (DIR is its checkout), and winnow's filters with the same rule over their scores.
Both read the part and end with uids.  DataComp opens the language model for every part, as its code does; winnow's
stays open, as in its workers, but for `--cold`.  Prints microseconds of CPU a row, the ratio, and whether the uids are
the same; asserts nothing.
"""

import argparse
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from filters import build_filter, caption_language
from pipeline.batches import PLAIN_ROWS
from pipeline.contract import Filter, Score
from pipeline.schemas import (
    ASPECT,
    CAPTION_CHARS,
    CAPTION_WORDS,
    MIN_SIDE_PX,
    ORIGINAL_HEIGHT,
    ORIGINAL_WIDTH,
    TEXT,
    UID,
)
from pipeline.storage import expand
from pipeline.uid import UID_DTYPE, format_uids, parse_uids

KINDS = ("caption_language", "caption_length", "image_size")


def read_captions(text: str) -> pa.ChunkedArray:
    """All captions in random order."""
    columns = [pq.read_table(file, columns=[TEXT])[TEXT].cast(pa.string()) for file in expand(text)]
    captions = pa.chunked_array([chunk for column in columns for chunk in column.chunks])
    return captions.take(pa.array(np.random.default_rng(0).permutation(len(captions))))


def write_part(url: str, captions: pa.ChunkedArray, start: int, num_rows: int) -> None:
    """A part of a pool with the captions from `start` on, and sizes of 100 to 2,000 px."""
    rng = np.random.default_rng(start)
    uids = np.empty(num_rows, UID_DTYPE)
    uids["f0"], uids["f1"] = rng.integers(0, 2**64, (2, num_rows), dtype=np.uint64)
    sizes = {name: rng.integers(100, 2000, num_rows) for name in (ORIGINAL_WIDTH, ORIGINAL_HEIGHT)}
    texts = captions.take(pa.array((start + np.arange(num_rows)) % len(captions)))
    pq.write_table(pa.table({UID: format_uids(uids), TEXT: texts, **sizes}), url)


def open_peer(folder: str) -> Callable[[str], np.ndarray]:
    """DataComp's function, with the embedded language model for the one it downloads."""
    sys.path.insert(0, folder)
    for name in ("gcld3", "nltk", "nltk.corpus"):  # imported at its head, unused by basic
        stub: Any = types.ModuleType(name)
        stub.wordnet = None
        sys.modules.setdefault(name, stub)
    import fasttext

    fasttext.FastText = getattr(fasttext, "FastText", types.SimpleNamespace())
    from baselines import apply_filter

    apply_filter.download = lambda *_: caption_language._find_embedded_model()
    return lambda url: apply_filter.load_uids_with_basic_filter_helper((fsspec.filesystem("file"), url))


def open_filters() -> dict[str, tuple[Filter, Score]]:
    """Winnow's, with their models."""
    filters = {kind: build_filter({"filter": kind}) for kind in KINDS}
    return {kind: (filter, filter.load()) for kind, filter in filters.items()}


def score_part(opened: dict[str, tuple[Filter, Score]], url: str, spent: dict[str, float]) -> np.ndarray:
    """Winnow's uids; `spent` gets the CPU seconds of each filter."""
    table = pq.read_table(url)
    columns = {}
    for kind, (filter, score) in opened.items():
        start = time.process_time()
        scored = [score(batch).columns for batch in table.to_batches(PLAIN_ROWS)]
        for (name, _), parts in zip(filter.makes, zip(*scored, strict=True), strict=True):
            columns[name] = pa.chunked_array(parts)
        spent[kind] = time.process_time() - start
    kept = pc.equal(columns["caption_language"], "en")
    for name, low in ((CAPTION_WORDS, 3), (CAPTION_CHARS, 6), (MIN_SIDE_PX, 200)):
        kept = pc.and_(kept, pc.greater_equal(columns[name], low))
    return parse_uids(table[UID].filter(pc.and_(kept, pc.less_equal(columns[ASPECT], 3.0))))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", required=True)
    parser.add_argument("--text", default="../shared/data/text/*.parquet")
    parser.add_argument("--rows", type=int, default=100_000, help="of a part")
    parser.add_argument("--parts", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="open winnow's model for every part too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    captions, peer, opened = read_captions(options.text), open_peer(options.peer), open_filters()
    parts: list[dict[str, float]] = []
    kept = same = 0
    with tempfile.TemporaryDirectory() as scratch:
        url = str(Path(scratch) / "00000000.parquet")
        for part in range(options.parts):
            write_part(url, captions, part * options.rows, options.rows)
            spent: dict[str, float] = {}
            start = time.process_time()
            theirs = peer(url)
            middle = time.process_time()
            opened = open_filters() if options.cold else opened
            ours = score_part(opened, url, spent)
            parts.append({"datacomp": middle - start, "winnow": time.process_time() - middle, **spent})
            kept, same = kept + len(ours), same + np.array_equal(np.sort(theirs), np.sort(ours))
    for name in parts[0]:
        print(f"{name}: {statistics.median(p[name] for p in parts) / options.rows * 1e6:.2f} us a row")
    ratios = [p["datacomp"] / p["winnow"] for p in parts]
    print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"{kept} of {options.parts * options.rows} kept; the same uids in {same} of {options.parts} parts")


if __name__ == "__main__":
    main()
