"""Retrieval: which image belongs to a caption, and which captions to an image.

A set is a webdataset (KEY.txt holds an image's captions, one a line; CLIP_benchmark's layout), or a table and an
archive as on the hub, or parquet (archives.py).  Source: mlfoundations/datacomp at 4a8df19, eval_utils/retr_eval.py;
LAION-AI/CLIP_benchmark at 48de38c, metrics/zeroshot_retrieval.py.

Shapes: N images, M captions, D dims, K best.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from eval38.archives import (
    check_strings,
    find_files,
    is_parquet,
    open_archive,
    parse_list,
    read_parquet,
    read_table,
    take_picture,
)
from eval38.classify import Outcome
from eval38.embed import Embedder, Seen
from eval38.metrics import Metrics, single
from eval38.rows import (
    NUM_TARS_FILE,
    EvalSet,
    ImageRow,
    LostImage,
    check_type,
    hash_files,
    list_tars,
    read_tars,
    take_image,
)
from eval38.statistics import CAPTIONS, CAPTIONS_RIGHT, IMAGE_RIGHT
from eval38.tasks import Task, folder_of
from pipeline.schemas import CAPTION, CAPTION_EXTENSION, IMAGE, REASON_NULL_CAPTION, TAR_SUFFIX
from pipeline.storage import exists, join

RETRIEVAL = "retrieval"
FILE_NAME, RAW = "filename", "raw"
"""Columns of the hub's table: the image's file name, and its captions as a list."""
RECALLED = (1, 5, 10)

Captions = tuple[str, ...]


def read_captioned(task: Task, data: str) -> EvalSet:
    """Return the set; captions stand beside the images and are read with them.  Raises EvalError."""
    folder = join(data, folder_of(task))
    check_type(folder, RETRIEVAL)
    if exists(join(folder, NUM_TARS_FILE)):
        files = list_tars(folder)
        return EvalSet(task, (), (), files, hash_files([join(folder, NUM_TARS_FILE), *files]))
    files = find_files(folder)
    return EvalSet(task, (), (), files, hash_files(files))


def evaluate(_: EvalSet, seen: Seen[Captions], model: Embedder) -> Outcome:
    """Return the recalls of the set in both directions."""
    text_MD = model.embed_texts([caption for captions in seen.truths for caption in captions])
    sizes = torch.tensor([len(captions) for captions in seen.truths])
    owner_M = torch.arange(len(sizes)).repeat_interleave(sizes)
    own = find_own(seen.image_ND, text_MD, owner_M)
    return Outcome(measure_recalls(own), len(sizes), seen.lost, per_image=tabulate(own, owner_M))


def read_rows(eval_set: EvalSet) -> Iterator[ImageRow[Captions] | LostImage]:
    """Yield every image with its captions as truth, a lost one with its reason."""
    for row in _read_any(eval_set):
        if isinstance(row, ImageRow) and not (row.truth and all(caption.strip() for caption in row.truth)):
            yield LostImage(row.name, REASON_NULL_CAPTION, f"an empty caption among {len(row.truth)}")
        else:
            yield row


def _read_any(eval_set: EvalSet) -> Iterator[ImageRow[Captions] | LostImage]:
    if eval_set.files[0].endswith(TAR_SUFFIX):
        return _read_tars(eval_set)
    return _read_parquet(eval_set.files) if is_parquet(eval_set.files) else _read_archive(*eval_set.files)


def _read_tars(eval_set: EvalSet) -> Iterator[ImageRow[Captions] | LostImage]:
    for found in read_tars(eval_set):
        if isinstance(found, LostImage):
            yield found
            continue
        text = found[1].find([CAPTION_EXTENSION]) or b""
        try:
            yield take_image(*found, tuple(text.decode().splitlines()))
        except UnicodeDecodeError as error:
            yield LostImage(found[0], REASON_NULL_CAPTION, f"the captions are not UTF-8 text ({error})")


def _read_archive(table: str, archive: str) -> Iterator[ImageRow[Captions] | LostImage]:
    with open_archive(archive) as images:
        for place, row in read_table(table, (FILE_NAME, RAW)):
            yield images.read(row[FILE_NAME], row[FILE_NAME], tuple(parse_list(row[RAW], place)))


def _read_parquet(urls: tuple[str, ...]) -> Iterator[ImageRow[Captions] | LostImage]:
    for place, row in read_parquet(urls, (IMAGE, CAPTION)):
        captions = row[CAPTION] or []
        if isinstance(captions, list):
            captions = [caption or "" for caption in captions]
        yield take_picture(row[IMAGE], place, tuple(check_strings(captions, place)))


class Own(NamedTuple):
    """Which of the nearest, nearest first, belong together."""

    image_MK: Tensor
    """bool: is the k-th nearest image of a caption its own?"""
    text_NK: Tensor
    """bool: is the k-th nearest caption of an image one of its own?"""


def find_own(image_ND: Tensor, text_MD: Tensor, owner_M: Tensor) -> Own:
    """Return what belongs together among the ten nearest; owner_M (int64) is each caption's image.

    Vectors are unit; equal cosines come in torch.topk's order.  The cosines are made once, for both directions, as in
    DataComp and CLIP_benchmark: 0.5 GB for MSCOCO, and again as much while they are turned.
    """
    cosine_MN = text_MD @ image_ND.T
    image_MK, text_NK = _find_nearest(cosine_MN), _find_nearest(cosine_MN.T.contiguous())
    return Own(image_MK == owner_M[:, None], owner_M[text_NK] == torch.arange(len(image_ND))[:, None])


def tabulate(own: Own, owner_M: Tensor) -> dict[str, Tensor]:
    """Return for each image whether the nearest caption is its own, its captions, and those with the right image."""
    num_images = len(own.text_NK)
    return {
        IMAGE_RIGHT: own.text_NK[:, 0].long(),
        CAPTIONS: torch.bincount(owner_M, minlength=num_images),
        CAPTIONS_RIGHT: torch.bincount(owner_M[own.image_MK[:, 0]], minlength=num_images),
    }


def measure_recalls(own: Own) -> Metrics:
    """Return recall@1, 5 and 10 in both directions and the mean of the two at 1.

    image_retrieval_recall@k: share of captions whose image is among their k nearest; text_retrieval_recall@k: share of
    images with one of their captions among their k nearest.
    """
    metrics: Metrics = {}
    for k in RECALLED:
        for direction, found in (("image", own.image_MK), ("text", own.text_NK)):
            metrics[f"{direction}_retrieval_recall@{k}"] = single(int(found[:, :k].any(dim=1).sum()) / len(found))
    at_1 = [metrics[f"{direction}_retrieval_recall@1"] or 0.0 for direction in ("text", "image")]
    return metrics | {"mean_recall@1": 0.5 * sum(at_1)}


def _find_nearest(cosine_QF: Tensor) -> Tensor:
    """Return the nearest of F for each of Q, nearest first: int64 (Q, K)."""
    k = min(max(RECALLED), cosine_QF.shape[1])
    return cosine_QF.topk(k, dim=1).indices
