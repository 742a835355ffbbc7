"""Evaluation sets on disk -> labelled images, in the hub's webdataset layout; every contradiction is named.

    wds_<name>_test/classnames.txt                         one class per line; the line number is the label
    wds_<name>_test/zeroshot_classification_templates.txt  one prompt per line, {c} stands for the class
    wds_<name>_test/test/nshards.txt                       how many tars
    wds_<name>_test/test/0.tar ...                         members KEY.jpg|png|webp and KEY.cls (the label)

Caveat: an empty line inside classnames.txt is a class.  CLEVR Distance has one, and DataComp's pinned CLIP_benchmark
1.4.0 drops it, which shifts every label after it (fixed in CLIP_benchmark 832e17d; datacomp.md 4.7).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from eval38.tasks import Task, folder_of
from pipeline.errors import EvalError
from pipeline.manifest import hash_json
from pipeline.schemas import (
    CLASS_EXTENSION,
    IMAGE_EXTENSIONS,
    REASON_MISSING_IMAGE,
    REASON_MISSING_LABEL,
    REASON_TRUNCATED_TAR,
    TAR_SUFFIX,
)
from pipeline.storage import exists, fingerprint, is_folder, join, name_of, read_bytes
from pipeline.tars import BrokenTar, TarRow, read_rows

CLASSES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
TYPE_FILE = "dataset_type.txt"
NUM_TARS_FILE = "test/nshards.txt"
CLASSIFICATION = "classification"
PLACEHOLDER = "{c}"


@dataclass(frozen=True, slots=True)
class EvalSet:
    """A classification set that agrees with its table row; no image has been read yet."""

    task: Task
    classes: tuple[str, ...]
    """Class names in label order; a name may be empty or occur twice."""
    templates: tuple[str, ...]
    """Prompts with {c}."""
    tars: tuple[str, ...]
    data_hash: str
    """Hex sha256 over the fingerprints of all files of the set."""


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """One row of a set."""

    name: str
    """Tar and key, e.g. 0.tar:s0000012."""
    label: int
    content: bytes


@dataclass(frozen=True, slots=True)
class LostImage:
    """A row that could not be evaluated."""

    name: str
    """Tar and key; the tar alone when it ends early."""
    reason: str
    message: str


def has_data(task: Task, data: str) -> bool:
    """Return whether the task's folder is in `data`."""
    return is_folder(join(data, folder_of(task)))


def read_set(task: Task, data: str) -> EvalSet:
    """Return the task's classes, templates and tars after checking them against each other and the table.

    A task of the user's own gets its class count from the class names.
    Raises EvalError for a missing or empty file, another kind of set, a template without {c}, or another class count.
    """
    folder = join(data, folder_of(task))
    if exists(join(folder, TYPE_FILE)):
        found = _read_text(join(folder, TYPE_FILE)).strip().lower()
        if found != CLASSIFICATION:
            raise EvalError(f"{folder} is a {found!r} set by its {TYPE_FILE}, not one with a single class per image.")
    classes, templates = read_classes(join(folder, CLASSES_FILE)), read_templates(join(folder, TEMPLATES_FILE))
    if task.classes is not None and len(classes) != task.classes:
        raise EvalError(
            f"{join(folder, CLASSES_FILE)} has {len(classes)} classes, but {task.name} has {task.classes}. "
            "An empty line is a class (CLEVR Distance has one); fetch the file again if it was edited."
        )
    tars = list_tars(folder)
    texts = [join(folder, name) for name in (CLASSES_FILE, TEMPLATES_FILE, NUM_TARS_FILE)]
    data_hash = hash_json([fingerprint(url) for url in (*texts, *tars)])
    return EvalSet(replace(task, classes=len(classes)), classes, templates, tars, data_hash)


def _read_text(url: str) -> str:
    if not exists(url):
        raise EvalError(f"{url} is missing; an evaluation set in the hub's layout has one.")
    try:
        return read_bytes(url).decode()
    except UnicodeDecodeError as error:
        raise EvalError(f"{url} is not UTF-8 text ({error}).") from None


def read_classes(url: str) -> tuple[str, ...]:
    """Return the class names in label order, outer spaces stripped; only the newline at the very end is dropped."""
    names = _read_text(url).removesuffix("\n").split("\n")
    if not any(name.strip() for name in names):
        raise EvalError(f"{url} names no class.")
    return tuple(name.strip() for name in names)


def read_templates(url: str) -> tuple[str, ...]:
    """Return the prompt templates, empty lines left out.  Raises EvalError unless each holds {c}."""
    templates = tuple(line.strip() for line in _read_text(url).split("\n") if line.strip())
    if not templates:
        raise EvalError(f"{url} holds no template.")
    for template in templates:
        if PLACEHOLDER not in template:
            raise EvalError(f"{url}: template {template!r} has no {PLACEHOLDER}, so every class would get one prompt.")
    return templates


def list_tars(folder: str) -> tuple[str, ...]:
    """Return the tars that nshards.txt promises, in number order.  Raises EvalError unless each one is there."""
    url = join(folder, NUM_TARS_FILE)
    text = _read_text(url).strip()
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise EvalError(f"{url} should hold the number of tars, not {text!r}.")
    tars = tuple(join(folder, "test", f"{number}{TAR_SUFFIX}") for number in range(int(text)))
    missing = [name_of(tar) for tar in tars if not exists(tar)]
    if missing:
        raise EvalError(f"{url} promises {text} tars, but {', '.join(missing)} is not there. Fetch the set again.")
    return tars


def read_images(eval_set: EvalSet) -> Iterator[LabelledImage | LostImage]:
    """Yield every row of the set in tar order, a lost one with its reason; a tar that ends early counts as one row.

    Raises EvalError for a label that is no class of the set.
    """
    for tar in eval_set.tars:
        try:
            for row in read_rows(tar):
                yield _read_row(row, f"{name_of(tar)}:{row.key}", eval_set)
        except BrokenTar as error:
            yield LostImage(name_of(tar), REASON_TRUNCATED_TAR, str(error))


def _read_row(row: TarRow, name: str, eval_set: EvalSet) -> LabelledImage | LostImage:
    label, content = row.find([CLASS_EXTENSION]), row.find(IMAGE_EXTENSIONS)
    if label is None:
        return LostImage(name, REASON_MISSING_LABEL, f"no .{CLASS_EXTENSION} member")
    text, num_classes = label.decode("ascii", "replace").strip(), len(eval_set.classes)
    if not (text.isascii() and text.isdigit() and int(text) < num_classes):
        raise EvalError(
            f"{folder_of(eval_set.task)}/test/{name}.{CLASS_EXTENSION} says label {text!r}, "
            f"but {CLASSES_FILE} has {num_classes} classes (labels 0 to {num_classes - 1})."
        )
    if content is None:
        return LostImage(name, REASON_MISSING_IMAGE, f"no {'/'.join(IMAGE_EXTENSIONS)} member")
    return LabelledImage(name, int(text), content)
