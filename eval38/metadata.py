"""Images with a row of metadata beside them (KEY.npy, as WILDS and DataComp's fairness sets have) in one pass.

A row of metadata is a vector of integers; the field names stand in no file, only in DataComp's evaluators
(wilds_eval.py and fairness_eval.py at 4a8df19), so the width is checked against them.  WILDS adds a last column
(from_source_domain) that nobody reads, so more columns than fields are taken.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eval38.rows import EvalSet, ImageRow, LostImage, read_label, read_tars, take_image
from eval38.tasks import folder_of
from pipeline.errors import EvalError
from pipeline.schemas import METADATA_EXTENSION, REASON_MISSING_METADATA
from pipeline.tars import TarRow

LABEL = "y"
"""The field that repeats the label, where there is one."""
MAX_VALUE = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class Tagged:
    """What is known of an image with metadata."""

    label: int | None
    """None where the set has no single label."""
    metadata: tuple[int, ...]


def read_tagged_images(
    eval_set: EvalSet, fields: Sequence[str], *, labelled: bool = True
) -> Iterator[ImageRow[Tagged] | LostImage]:
    """Yield every row with its label and metadata as truth, a lost one with its reason.

    `fields` names the columns from the left.  Raises EvalError for metadata that are not at least so many integers,
    that are wider than the row before, or whose `y` is not the label (DataComp leaves that check out).
    """
    width: int | None = None
    for found in read_tars(eval_set):
        if isinstance(found, LostImage):
            yield found
            continue
        truth = _read_truth(*found, eval_set, fields, labelled=labelled)
        if isinstance(truth, LostImage):
            yield truth
            continue
        width = width or len(truth.metadata)
        if len(truth.metadata) != width:
            raise EvalError(f"{_place(eval_set, found[0])} has {len(truth.metadata)} columns, rows before it {width}.")
        yield take_image(*found, truth)


def _read_truth(
    name: str, row: TarRow, eval_set: EvalSet, fields: Sequence[str], *, labelled: bool
) -> Tagged | LostImage:
    label = read_label(name, row, eval_set) if labelled else None
    if isinstance(label, LostImage):
        return label
    content = row.find([METADATA_EXTENSION])
    if content is None:
        return LostImage(name, REASON_MISSING_METADATA, f"no .{METADATA_EXTENSION} member")
    metadata = _parse_metadata(content, _place(eval_set, name), fields)
    if label is not None and LABEL in fields and metadata[fields.index(LABEL)] != label:
        raise EvalError(
            f"{_place(eval_set, name)} says y = {metadata[fields.index(LABEL)]}, but the label is {label}: "
            "labels and metadata do not belong together. Fetch the set again."
        )
    return Tagged(label, metadata)


def _place(eval_set: EvalSet, name: str) -> str:
    return f"{folder_of(eval_set.task)}/test/{name}.{METADATA_EXTENSION}"


def _parse_metadata(content: bytes, place: str, fields: Sequence[str]) -> tuple[int, ...]:
    try:
        values = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # whatever numpy makes of bytes that are no array
        raise EvalError(f"{place} is no array ({type(error).__name__}: {error}).") from None
    if values.ndim != 1 or len(values) < len(fields) or values.dtype.kind not in "iufb":
        raise EvalError(
            f"{place} should be a vector of at least {len(fields)} integers ({', '.join(fields)}), "
            f"not {values.dtype} of shape {values.shape}."
        )
    found = values.tolist()
    if not all(value == value // 1 and abs(value) <= MAX_VALUE for value in found):
        raise EvalError(f"{place} should hold integers of at most {MAX_VALUE:,}, not {found}.")
    return tuple(map(int, found))


def take_column(truths: Sequence[Tagged], fields: Sequence[str], field: str) -> Tensor:
    """Return one field of all images: int64 (N,).  Raises EvalError for a negative value: it names no group."""
    column = fields.index(field)
    value_N = torch.tensor([truth.metadata[column] for truth in truths], dtype=torch.int64)
    if len(value_N) and int(value_N.min()) < 0:
        raise EvalError(f"metadata field {field!r} is {int(value_N.min())} for an image: groups count from 0.")
    return value_N


def take_labels(truths: Sequence[Tagged]) -> Tensor:
    """Return the labels: int64 (N,)."""
    return torch.tensor([truth.label for truth in truths], dtype=torch.int64)
