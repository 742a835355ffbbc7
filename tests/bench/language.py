"""How often the embedded language model is right: `python -m tests.bench.language`, a minute; see docs/LANGUAGE.md.

Reads ../shared/data/text: Multi30k's captions, whose language is known, and web titles, whose language is not.  gcld3,
laion2b's detector, is compared where the gcld3 extra is installed.  Prints tables; asserts nothing.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from filters import build_filter
from pipeline.batches import PLAIN_ROWS
from pipeline.schemas import CAPTION_WORDS, TEXT

TEXTS = Path(__file__).parent.parent.parent.parent / "shared" / "data" / "text"
LENGTHS = {"1-2": (1, 2), "3-5": (3, 5), "6-10": (6, 10), "> 10": (11, 10**9)}
"""Words by str.split()."""
LOW_CONFIDENCE = 0.5
DETECTORS = ("fasttext", *(["gcld3"] if importlib.util.find_spec("gcld3") else []))


def score(table: pa.Table, **entry: str) -> dict[str, np.ndarray]:
    """The columns of one filter on all captions."""
    filter = build_filter(entry)
    score_batch = filter.load()
    texts = table.select([TEXT]).cast(pa.schema([(TEXT, pa.string())]))
    scored = [score_batch(batch).columns for batch in texts.combine_chunks().to_batches(PLAIN_ROWS)]
    names = [name for name, _ in filter.makes]
    return {
        name: pa.concat_arrays(columns).to_numpy(zero_copy_only=False)
        for name, columns in zip(names, zip(*scored, strict=True), strict=True)
    }


def read(file: str) -> tuple[pa.Table, dict[str, np.ndarray]]:
    """A table of captions, and the columns of every detector and of caption_length."""
    table = pq.read_table(TEXTS / f"{file}.parquet")
    columns = score(table, filter="caption_length")
    for detector in DETECTORS:
        columns |= score(table, filter="caption_language", name=detector, detector=detector)
    return table, columns


def print_row(*cells: object) -> None:
    print("|", " | ".join(f"{c:.2%}" if isinstance(c, float) else str(c) for c in cells), "|")


def print_header(*cells: str) -> None:
    print()
    print_row(*cells)
    print_row(*["---"] * len(cells))


def print_by_length(
    words: np.ndarray, rows: np.ndarray, name: str, measure: Callable[[np.ndarray], list[float]]
) -> None:
    """One line per length, and one for all."""
    for length, (low, high) in {**LENGTHS, "all": (0, 10**9)}.items():
        chosen = rows & (words >= low) & (words <= high)
        if chosen.any():
            print_row(name, length, int(chosen.sum()), *measure(chosen))


def print_known(table: pa.Table, columns: dict[str, np.ndarray]) -> None:
    """Accuracy per language and length."""
    truth = table["lang"].to_numpy()

    def measure(chosen: np.ndarray) -> list[float]:
        right = [float((columns[detector] == truth)[chosen].mean()) for detector in DETECTORS]
        return [*right, float((columns["fasttext_confidence"][chosen] < LOW_CONFIDENCE).mean())]

    print_header("language", "words", "captions", *(f"{d} right" for d in DETECTORS), f"confidence < {LOW_CONFIDENCE}")
    for language in sorted(set(truth)):
        print_by_length(columns[CAPTION_WORDS], truth == language, language, measure)


def print_english(groups: np.ndarray, columns: dict[str, np.ndarray]) -> None:
    """What a rule `language = 'en'` keeps by each detector, and where both say the same."""

    def measure(chosen: np.ndarray) -> list[float]:
        english = np.array([(columns[detector] == "en")[chosen] for detector in DETECTORS])
        low = columns["fasttext_confidence"][chosen] < LOW_CONFIDENCE
        return [*english.mean(1).tolist(), float((english == english[0]).all(0).mean()), float(low.mean())]

    names = [f"{d}: en" for d in DETECTORS]
    print_header("captions of", "words", "captions", *names, "the same", f"confidence < {LOW_CONFIDENCE}")
    for group in sorted(set(groups)):
        print_by_length(columns[CAPTION_WORDS], groups == group, group, measure)


if __name__ == "__main__":
    for file, by in (("multi30k_captions", "lang"), ("url_text", "source")):
        table, columns = read(file)
        if by == "lang":
            print_known(table, columns)
        print_english(table[by].to_numpy(), columns)
