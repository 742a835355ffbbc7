"""Sets -> one index: captioned pairs, and classification sets whose captions are templates with the class name put in.

A class has one caption per template, and each time an image is seen one of them is drawn (data.py).  So DFN's
fine-tuning data (Fang et al. 2023, arXiv:2309.17425, section 4: MS-COCO, Flickr30k and ImageNet-1k train, the last in
OpenAI's templates) is three sets.  The loss stays CLIP's: two images of one class in a batch count as each other's
negatives, as in FLYP (Goyal et al. 2023, arXiv:2212.00638).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.errors import ConfigError, PoolError
from pipeline.manifest import Counts, hash_json
from pipeline.schemas import CLASS_EXTENSION, REASON_MISSING_LABEL
from pipeline.storage import fingerprint_all
from training.index import (
    ROWS,
    Located,
    RowIndex,
    SetRows,
    Tokenize,
    hash_row,
    list_tars,
    locate_rows,
    read_index,
    tokenize_all,
)
from training.order import heldout_rows

HELDOUT, HELDOUT_COPY, NOT_HELDOUT = "heldout", "heldout_copy", "not_heldout"
"""Accounts of rows: kept out of training, kept out as copies of these, and all that were not drawn to be kept out."""


@dataclass(frozen=True, slots=True)
class Classes:
    """What turns the labels of a classification set into captions."""

    captions: tuple[tuple[str, ...], ...]
    """By label: the class name put into each template."""
    sizes: tuple[int, ...] | None = None
    """By label: how many of the set's files show it, where each file is one image; None where the files are tars."""


@dataclass(frozen=True, slots=True)
class TrainSet:
    """Images to train on, and where their captions come from."""

    name: str
    urls: tuple[str, ...]
    """Tars, or image files sorted by class."""
    share: float | None = None
    """Of every epoch; None for as many rows as there are."""
    classes: Classes | None = None
    """None for captions that lie beside the images."""


def as_sets(data: str | Sequence[TrainSet]) -> tuple[TrainSet, ...]:
    """Return the sets, or the tars of a place as the only one.  Raises ConfigError when two sets have one name."""
    if isinstance(data, str):
        return (TrainSet(ROWS, tuple(list_tars(data))),)
    names = [part.name for part in data]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two sets are called {name!r}: give one of them another `name`.")
    return tuple(data)


def identify_sets(sets: Sequence[TrainSet]) -> dict[str, str]:
    """Return name -> hash of a set's file names, sizes and times, and of its classes' captions and folders."""
    return {part.name: hash_json([fingerprint_all(part.urls), _describe_classes(part)]) for part in sets}


def _describe_classes(part: TrainSet) -> list[Any]:
    if part.classes is None:
        return []
    folders = [] if part.classes.sizes is None else [url.split("/")[-2] for url in part.urls]
    return [part.classes.captions, part.classes.sizes, folders]


def read_sets(sets: Sequence[TrainSet], *, tokenize: Tokenize, quiet: bool = False) -> RowIndex:
    """Return one index of all sets; an epoch has as many rows as they have together.

    Without shares an epoch sees every row once; with shares each set has exactly its part of it, to the nearest row.
    Raises PoolError for a set without a usable row or a label that is no class; ConfigError for a share that cannot be.
    """
    found = [_read_set(part, tokenize, quiet=quiet) for part in sets]
    per_epoch = divide_epoch(sets, [index.num_rows for index in found])
    tars = np.cumsum([0, *(len(part.urls) for part in sets)])[:-1]
    texts = np.cumsum([0, *(len(index.token_UL) for index in found)])[:-1]
    return RowIndex(
        tuple(url for part in sets for url in part.urls),
        np.concatenate([index.tar_N + start for index, start in zip(found, tars, strict=True)]).astype(np.int32),
        np.concatenate([index.offset_N for index in found]),
        np.concatenate([index.size_N for index in found]),
        np.concatenate([index.caption_N + start for index, start in zip(found, texts, strict=True)]).astype(np.int32),
        np.concatenate([index.num_captions_N for index in found]),
        np.concatenate([index.twin_N for index in found]),
        np.concatenate([index.token_UL for index in found]),
        tuple(
            SetRows(part.name, index.counts, quota) for part, index, quota in zip(sets, found, per_epoch, strict=True)
        ),
    )


def divide_epoch(sets: Sequence[TrainSet], num_rows: Sequence[int]) -> list[int]:
    """Return how many rows of each set an epoch sees: its share of all, the largest remainders rounded up."""
    shares = [part.share for part in sets]
    if all(share is None for share in shares):
        return list(num_rows)
    if None in shares:
        raise ConfigError(f"give every set a share, or none: they are {shares}.")
    exact = np.array(shares, float) / sum(filter(None, shares)) * sum(num_rows)
    quotas = np.floor(exact).astype(int)
    quotas[np.argsort(quotas - exact, kind="stable")[: sum(num_rows) - quotas.sum()]] += 1
    if not quotas.all():
        raise ConfigError(f"shares {shares} of {sum(num_rows)} rows leave a set without one: raise the smallest.")
    return [int(quota) for quota in quotas]


def _read_set(part: TrainSet, tokenize: Tokenize, *, quiet: bool) -> RowIndex:
    if part.classes is None:
        return read_index(part.urls, tokenize=tokenize, quiet=quiet)
    if part.classes.sizes is None:
        found = locate_rows(part.urls, CLASS_EXTENSION, REASON_MISSING_LABEL, quiet=quiet)
        labels = [_read_label(text, part.name, len(part.classes.captions)) for text in found.texts]
        return _index_classes(part, part.classes, found, np.array(labels)[found.text_N], tokenize)
    sizes = [int(info["size"]) for info in fingerprint_all(part.urls)]
    num = len(part.urls)
    twin_N = np.array([hash_row(url.encode(), 0, b"") for url in part.urls], np.uint64)
    zero_N, counts = np.zeros(num, np.int32), Counts(read=num, kept=num)
    found = Located(
        np.arange(num, dtype=np.int32), zero_N.astype(np.int64), np.array(sizes, np.int32), zero_N, (), twin_N, counts
    )
    label_N = np.repeat(np.arange(len(part.classes.sizes)), part.classes.sizes)
    return _index_classes(part, part.classes, found, label_N, tokenize)


def _read_label(text: str, name: str, num_classes: int) -> int:
    digits = text.strip()
    if digits.isascii() and digits.isdigit() and int(digits) < num_classes:
        return int(digits)
    raise PoolError(
        f"set {name!r} has an image with label {text!r}, but {num_classes} classes (labels 0 to {num_classes - 1}). "
        "Put beside it the class names that belong to it."
    )


def _index_classes(
    part: TrainSet, classes: Classes, found: Located, label_N: np.ndarray, tokenize: Tokenize
) -> RowIndex:
    """Return the index of a classification set; the captions of a class stand together."""
    num_C = np.array([len(captions) for captions in classes.captions])
    return RowIndex(
        tuple(part.urls),
        found.tar_N,
        found.offset_N,
        found.size_N,
        (np.cumsum(num_C) - num_C)[label_N].astype(np.int32),
        num_C[label_N].astype(np.int32),
        found.twin_N,
        tokenize_all([caption for captions in classes.captions for caption in captions], tokenize),
        (SetRows(part.name, found.counts, len(found.tar_N)),),
    )


def split_heldout(index: RowIndex, num_heldout: int, *, seed: int) -> tuple[RowIndex, RowIndex]:
    """Return (rows to train on, rows held out) of an index of one set; the first says how many were dropped.

    A copy of a held-out row is not trained on either.  Raises ConfigError when nothing would be left to train on, or
    the index is of several sets.
    """
    if len(index.sets) > 1:
        raise ConfigError(f"heldout is {num_heldout}, but rows are held out of one set only. Set heldout=0.")
    if num_heldout >= index.num_rows:
        raise ConfigError(f"heldout is {num_heldout}, but there are {index.num_rows} usable rows. Hold out fewer.")
    out_N = np.zeros(index.num_rows, bool)
    out_N[heldout_rows(num_heldout, num_rows=index.num_rows, seed=seed)] = True
    copy_N = np.isin(index.twin_N, index.twin_N[out_N]) & ~out_N
    num_left, num_copies = int((~out_N & ~copy_N).sum()), int(copy_N.sum())
    if not num_left:
        raise ConfigError(
            f"heldout is {num_heldout}, and the other {num_copies} usable rows are copies of those held out. Hold out "
            "fewer."
        )
    copies = {HELDOUT_COPY: num_copies} if num_copies else {}
    return (
        _take(index, ~(out_N | copy_N), {HELDOUT: num_heldout} | copies),
        _take(index, out_N, {NOT_HELDOUT: index.num_rows - num_heldout}),
    )


def _take(index: RowIndex, chosen_N: np.ndarray, dropped: dict[str, int]) -> RowIndex:
    """Return the chosen rows of an index of one set, with the account of the others."""
    (part,) = index.sets
    kept = int(chosen_N.sum())
    counts = replace(part.counts, kept=kept, dropped=dropped)
    names = ("tar_N", "offset_N", "size_N", "caption_N", "num_captions_N", "twin_N")
    return replace(
        index,
        **{name: getattr(index, name)[chosen_N] for name in names},
        sets=(SetRows(part.name, counts, kept),),
    )
