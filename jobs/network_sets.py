"""What a recipe says of fine-tuning sets -> sets to train on: tars found, class names put into templates.

A hub folder is read as eval38/rows.py reads evaluation sets, but from its train split.  A folder of class folders holds
CLASS/*.jpg|jpeg|png|webp; the class name is the folder's, or the line of classnames.txt at the folder's place in sorted
order (as torchvision's ImageFolder numbers classes).
"""

from collections.abc import Sequence

from eval38.class_folders import name_classes
from eval38.rows import CLASSES_FILE, PLACEHOLDER, TEMPLATES_FILE, read_classes, read_templates
from pipeline.errors import ConfigError, PoolError
from pipeline.schemas import IMAGE_EXTENSIONS, TAR_SUFFIX
from pipeline.storage import exists, expand, join, name_of, read_bytes
from training.captioned import Classes, TrainSet
from training.config import SetConfig
from training.index import list_tars

TRAIN, TEST, NUM_TARS = "train", "test", "nshards.txt"


def open_sets(configs: Sequence[SetConfig]) -> list[TrainSet]:
    """Return the sets; no image has been read yet.

    Raises PoolError for one without tars or images, ConfigError for one without templates or with a test split only.
    """
    return [_open_set(config) for config in configs]


def _open_set(config: SetConfig) -> TrainSet:
    place = str(config.pairs or config.classes).rstrip("/")
    name = config.name or name_of(place)
    if config.pairs:
        return TrainSet(name, tuple(list_tars(place)), config.share)
    has_train, has_test = (exists(join(place, split, NUM_TARS)) for split in (TRAIN, TEST))
    if has_test and not has_train:
        raise ConfigError(f"{place!r} has a {TEST} split only: what is trained on it could not be judged by it.")
    templates = config.templates or _find_templates(place)
    for template in templates:
        if PLACEHOLDER not in template:
            raise ConfigError(f"template {template!r} of set {name!r} has no {PLACEHOLDER} for the class name.")
    if has_train:
        num_tars = int(read_bytes(join(place, TRAIN, NUM_TARS)))
        urls = [join(place, TRAIN, f"{number}{TAR_SUFFIX}") for number in range(num_tars)]
        classes = Classes(spell_captions(read_classes(join(place, CLASSES_FILE)), templates))
        return TrainSet(name, tuple(urls), config.share, classes)
    files = find_class_files(place)
    classes = Classes(spell_captions(name_classes(place, list(files)), templates), tuple(map(len, files.values())))
    return TrainSet(name, tuple(url for urls in files.values() for url in urls), config.share, classes)


def _find_templates(place: str) -> Sequence[str]:
    url = join(place, TEMPLATES_FILE)
    if not exists(url):
        raise ConfigError(f"there is no {url}: give the set templates, such as ['a photo of a {PLACEHOLDER}.'].")
    return read_templates(url)


def spell_captions(names: Sequence[str], templates: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Return each class's captions, by template."""
    return tuple(tuple(template.replace(PLACEHOLDER, name) for template in templates) for name in names)


def find_class_files(folder: str) -> dict[str, list[str]]:
    """Return folder name -> image files, both sorted.  Raises PoolError when there is none."""
    found: dict[str, list[str]] = {}
    for url in expand(join(folder, "*", "*")):
        if url.rpartition(".")[2].lower() in IMAGE_EXTENSIONS:
            found.setdefault(name_of(url.rpartition("/")[0]), []).append(url)
    if not found:
        raise PoolError(f"{folder!r} holds no CLASS/IMAGE file with one of the endings {', '.join(IMAGE_EXTENSIONS)}.")
    return {name: found[name] for name in sorted(found)}
