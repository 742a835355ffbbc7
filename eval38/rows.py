"""Evaluation sets on disk -> images and what is known of them, in the hub's webdataset layout.

    wds_<name>_test/classnames.txt                         one class per line; the line number is the label
    wds_<name>_test/zeroshot_classification_templates.txt  one prompt per line, {c} stands for the class
    wds_<name>_test/test/nshards.txt                       how many tars
    wds_<name>_test/test/0.tar ...                         members KEY.jpg|png|webp and KEY.cls (the label)

Every contradiction is named.  metadata.py adds KEY.npy, retrieve.py KEY.txt; class_folders.py reads images in folders.
Caveat: an empty line inside classnames.txt is a class.  CLEVR Distance has one (see classify.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from eval38.source import identify_files
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
from pipeline.storage import exists, is_folder, join, name_of, read_bytes
from pipeline.tars import BrokenTar, TarRow, read_rows

CLASSES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
TYPE_FILE = "dataset_type.txt"
NUM_TARS_FILE = "test/nshards.txt"
CLASSIFICATION, MULTILABEL = "classification", "multilabel"
PLACEHOLDER = "{c}"
MAX_DIGITS = 10


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class EvalSet:
    """A set that agrees with its table row; no image has been read yet."""

    task: Task
    classes: tuple[str, ...]
    """Class names in label order; a name may be empty or occur twice.  () where the task has none."""
    templates: tuple[str, ...]
    """Prompts with {c}; () where the task has none."""
    files: tuple[str, ...]
    """What holds the images: tars, class folders, or for retrieval and WinoGAViL a table and an archive, or parquet."""
    data_hash: str
    """Hex sha256 over what tells all files of the set from others."""


@dataclass(frozen=True, slots=True)
class ImageRow(Generic[T]):
    """One image of a set, not yet decoded."""

    name: str
    """File and key, e.g. 0.tar:s0000012."""
    content: bytes
    truth: T
    """What is known of it: a label, metadata, captions."""


@dataclass(frozen=True, slots=True)
class LostImage:
    """A row that could not be evaluated."""

    name: str
    """File and key; the file alone when it ends early."""
    reason: str
    message: str


def has_data(task: Task, data: str) -> bool:
    """Return whether the task's folder is in `data`."""
    return is_folder(place_set(task, data))


def place_set(task: Task, data: str) -> str:
    """Return a set's folder: the hub's name for it, or the name itself where a set of the user's own has no such."""
    folder = join(data, folder_of(task))
    return join(data, task.key) if task.group == "own" and not is_folder(folder) else folder


def read_set(task: Task, data: str, *, types: Sequence[str] = (CLASSIFICATION,)) -> EvalSet:
    """Return the task's classes, templates and tars after checking them against each other and the table.

    `types` is what dataset_type.txt may say.  A task of the user's own gets its class count from the class names.
    Raises EvalError for a missing or empty file, another kind of set, a template without {c}, or another class count.
    """
    folder = place_set(task, data)
    check_type(folder, *types)
    classes, templates = read_classes(join(folder, CLASSES_FILE)), read_templates(join(folder, TEMPLATES_FILE))
    if task.classes is not None and len(classes) != task.classes:
        raise EvalError(
            f"{join(folder, CLASSES_FILE)} has {len(classes)} classes, but {task.name} has {task.classes}. "
            "An empty line is a class (CLEVR Distance has one); fetch the file again if it was edited."
        )
    tars = list_tars(folder)
    texts = [join(folder, name) for name in (CLASSES_FILE, TEMPLATES_FILE, NUM_TARS_FILE)]
    return EvalSet(replace(task, classes=len(classes)), classes, templates, tars, hash_files([*texts, *tars]))


def check_type(folder: str, *expected: str) -> None:
    """Raise EvalError when the set says that it is of another type; one that says nothing is of an expected type."""
    if exists(url := join(folder, TYPE_FILE)) and (found := _read_text(url).strip().lower()) not in expected:
        needed = " or ".join(map(repr, expected))
        raise EvalError(f"{folder} is a {found!r} set by its {TYPE_FILE}, but its task needs a {needed} set.")


def hash_files(urls: Sequence[str]) -> str:
    """Return the hex sha256 over what tells the files from others, in order (source.py)."""
    return hash_json(identify_files(urls))


def _read_text(url: str) -> str:
    if not exists(url):
        raise EvalError(f"{url} is missing; an evaluation set in the hub's layout has one.")
    try:
        return read_bytes(url).decode("utf-8-sig")  # Windows editors put a mark before the first letter
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
    if not (text.isascii() and text.isdigit() and len(text) < MAX_DIGITS and int(text) > 0):
        raise EvalError(f"{url} should hold the number of tars, not {text[:MAX_DIGITS]!r}.")
    tars = []
    for number in range(int(text)):
        tars.append(join(folder, "test", f"{number}{TAR_SUFFIX}"))
        if not exists(tars[-1]):
            raise EvalError(f"{url} promises {text} tars, but {name_of(tars[-1])} is not there. Fetch the set again.")
    return tuple(tars)


def spell_name(name: str) -> str:
    """Return a file's name as text: in a tar or on a disk it may be any bytes."""
    return name.encode("utf-8", "backslashreplace").decode()


def read_tars(eval_set: EvalSet) -> Iterator[tuple[str, TarRow] | LostImage]:
    """Yield (name, row) of every row in tar order; a tar that ends early counts as one lost row."""
    for tar in eval_set.files:
        try:
            for row in read_rows(tar):
                yield spell_name(f"{name_of(tar)}:{row.key}"), row
        except BrokenTar as error:
            yield LostImage(name_of(tar), REASON_TRUNCATED_TAR, str(error).replace(tar, name_of(tar)))


def read_images(eval_set: EvalSet) -> Iterator[ImageRow[int] | LostImage]:
    """Yield every row with its label as truth, a lost one with its reason.

    Raises EvalError for a label that is no class of the set.
    """
    for found in read_tars(eval_set):
        if isinstance(found, LostImage):
            yield found
        elif isinstance(label := read_label(*found, eval_set), LostImage):
            yield label
        else:
            yield take_image(*found, label)


def take_image(name: str, row: TarRow, truth: T) -> ImageRow[T] | LostImage:
    """Return the image member of a row beside what is known of it."""
    content = row.find(IMAGE_EXTENSIONS)
    if content is None:
        return LostImage(name, REASON_MISSING_IMAGE, f"no {'/'.join(IMAGE_EXTENSIONS)} member")
    return ImageRow(name, content, truth)


def read_label(name: str, row: TarRow, eval_set: EvalSet) -> int | LostImage:
    """Return the label of a row.  Raises EvalError for one that is no class of the set."""
    label = row.find([CLASS_EXTENSION])
    if label is None:
        return LostImage(name, REASON_MISSING_LABEL, f"no .{CLASS_EXTENSION} member")
    text, num_classes = label.decode("ascii", "replace").strip(), len(eval_set.classes)
    if not (text.isascii() and text.isdigit() and len(text) < MAX_DIGITS and int(text) < num_classes):
        raise EvalError(
            f"{folder_of(eval_set.task)}/test/{name}.{CLASS_EXTENSION} says label {text!r}, "
            f"but {CLASSES_FILE} has {num_classes} classes (labels 0 to {num_classes - 1})."
        )
    return int(text)
