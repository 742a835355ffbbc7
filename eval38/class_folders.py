"""A set of the user's own as a folder of images per class, beside the hub's layout of rows.py.

    DATA/<name>/CLASS/[.../]IMAGE.jpg|jpeg|png|webp        classes by the sorted names of their folders (ImageFolder)
    DATA/<name>/classnames.txt                             optional: a name per folder, in that order
    DATA/<name>/zeroshot_classification_templates.txt      optional, else "a photo of a {c}."

A set's `files` are its class folders.  What is hidden (.DS_Store) is passed over; any other file is a lost image.
Source: torchvision 0.29, datasets/folder.py (find_classes, make_dataset), for what is found and in which order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from eval38 import rows, tasks
from eval38.rows import CLASSES_FILE, PLACEHOLDER, TEMPLATES_FILE, EvalSet, ImageRow, LostImage, spell_name
from eval38.source import is_readable, list_visible
from eval38.tasks import Task
from pipeline.errors import PoolError
from pipeline.manifest import hash_json
from pipeline.schemas import IMAGE_EXTENSIONS, REASON_MISSING_IMAGE, TAR_SUFFIX
from pipeline.storage import exists, join, name_of, read_bytes

TEMPLATES = (f"a photo of a {PLACEHOLDER}.",)


def read_set(task: Task, data: str) -> EvalSet:
    """Return a set of either layout, checked.  Raises EvalError as rows.read_set, PoolError for class folders."""
    folder = rows.place_set(task, data)
    is_hub = name_of(folder) == tasks.folder_of(task) or exists(join(folder, rows.NUM_TARS_FILE))
    return rows.read_set(task, data) if is_hub else _read_folders(task, folder)


def read_images(eval_set: EvalSet) -> Iterator[ImageRow[int] | LostImage]:
    """Yield every image of either layout with its label as truth, a lost one with its reason."""
    return rows.read_images(eval_set) if eval_set.files[0].endswith(TAR_SUFFIX) else _read_files(eval_set)


def _read_folders(task: Task, folder: str) -> EvalSet:
    names = sorted({path.partition("/")[0] for path in list_visible(folder) if "/" in path})
    if not names:
        raise PoolError(f"{folder} has no {rows.NUM_TARS_FILE}, nor folders of images, one per class.")
    folders = tuple(join(folder, name) for name in names)
    classes = name_classes(folder, [spell_name(name) for name in names])
    url = join(folder, TEMPLATES_FILE)
    templates = rows.read_templates(url) if exists(url) else TEMPLATES
    data_hash = hash_json([rows.hash_files(folders), classes, templates])
    return EvalSet(replace(task, classes=len(classes)), tuple(classes), templates, folders, data_hash)


def name_classes(folder: str, folders: Sequence[str]) -> Sequence[str]:
    """Return the names of class folders: the lines of classnames.txt, else their own.  Raises PoolError."""
    url = join(folder, CLASSES_FILE)
    if not exists(url):
        return folders
    names = rows.read_classes(url)
    if len(names) != len(folders):
        raise PoolError(f"{url} has {len(names)} names, but {len(folders)} folders of {folder!r} hold images.")
    return names


def _read_files(eval_set: EvalSet) -> Iterator[ImageRow[int] | LostImage]:
    for label, folder in enumerate(eval_set.files):
        for path in list_visible(folder):
            url, name = join(folder, path), spell_name(f"{name_of(folder)}/{path}")
            if path.rpartition(".")[2].lower() not in IMAGE_EXTENSIONS:
                yield LostImage(name, REASON_MISSING_IMAGE, f"no {'/'.join(IMAGE_EXTENSIONS)} file")
            elif not is_readable(url):
                yield LostImage(name, REASON_MISSING_IMAGE, "no file, but a link to nothing or a pipe")
            else:
                yield ImageRow(name, read_bytes(url), label)
