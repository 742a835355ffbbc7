"""The 40 rows of DataComp's task list, in its order; 38 of them are counted in the average.

Source: mlfoundations/datacomp at 4a8df19, tasklist.yml (key, name, size, classes, main metric, random score) and
aggregate_scores.py (groups).  tests/eval38/datacomp_tasklist.json holds the same facts, and a test compares them.
"""

from dataclasses import dataclass
from typing import Literal

from pipeline.errors import ConfigError, check_name

Kind = Literal["classify", "wilds", "geographic", "retrieve", "winogavil", "fairness"]
"""How a task is evaluated.  geographic: DataComp's Dollar Street and GeoDE; fairness: FairFace and UTKFace."""
Group = Literal["imagenet", "imagenet_shift", "vtab", "retrieval", "other", "own"]
"""Which mean of DataComp's aggregate a task enters; `other` enters none, `own` is the user's."""
Metric = Literal[
    "acc1",
    "mean_per_class_recall",
    "mean_recall@1",
    "jaccard_score_10-12",
    "F1-macro_all",
    "acc_worst_region",
    "acc_top5_wg",
    "acc_wg",
]
"""The main metric, in DataComp's spelling."""

REPORTED_GROUPS: dict[Group, str] = {
    "imagenet": "ImageNet",
    "imagenet_shift": "ImageNet dist. shifts",
    "vtab": "VTAB",
    "retrieval": "Retrieval",
}
"""Groups whose mean is reported, with DataComp's names for them."""


@dataclass(frozen=True, slots=True)
class Task:
    """One evaluation set and how it is judged."""

    key: str
    """DataComp's key, e.g. vtab/caltech101."""
    name: str
    """DataComp's display name."""
    kind: Kind
    metric: Metric | None
    """The metric that counts; None where DataComp names none."""
    group: Group
    images: int | None
    """How many images (WinoGAViL: instances) the set holds; None when nobody says."""
    classes: int | None
    """How many class names it has; None where it has none, or several lists."""
    random_baseline: float | None
    """The main metric of a guess, in [0, 1], as DataComp lists it; None where it lists none."""
    counted: bool
    """Whether it enters the 38-task average."""


# fmt: off
TASKS: tuple[Task, ...] = (
    # key, name, kind, metric, group, images, classes, random_baseline, counted
    Task("vtab/caltech101", "Caltech-101", "classify", "mean_per_class_recall", "vtab", 6_085, 102, 0.009804, True),
    Task("cifar10", "CIFAR-10", "classify", "acc1", "other", 10_000, 10, 0.1, True),
    Task("vtab/cifar100", "CIFAR-100", "classify", "acc1", "vtab", 10_000, 100, 0.01, True),
    Task("vtab/clevr_count_all", "CLEVR Counts", "classify", "acc1", "vtab", 15_000, 8, 0.125061, True),
    Task("vtab/clevr_closest_object_distance", "CLEVR Distance", "classify", "acc1", "vtab", 15_000, 6, 0.19052, True),
    Task("country211", "Country211", "classify", "acc1", "other", 21_100, 211, 0.004739, True),
    Task("vtab/dtd", "Describable Textures", "classify", "acc1", "vtab", 1_880, 47, 0.021277, True),
    Task("vtab/eurosat", "EuroSAT", "classify", "acc1", "vtab", 5_400, 10, 0.101483, True),
    Task("fgvc_aircraft", "FGVC Aircraft", "classify", "mean_per_class_recall", "other", 3_333, 100, 0.01, True),
    Task("food101", "Food-101", "classify", "acc1", "other", 25_250, 101, 0.009901, True),
    Task("gtsrb", "GTSRB", "classify", "acc1", "other", 12_630, 43, 0.037604, True),
    Task("imagenet1k", "ImageNet 1k", "classify", "acc1", "imagenet", 50_000, 1000, 0.001, True),
    Task("imagenet_sketch", "ImageNet Sketch", "classify", "acc1", "imagenet_shift", 50_889, 1000, 0.001, True),
    Task("imagenetv2", "ImageNet v2", "classify", "acc1", "imagenet_shift", 10_000, 1000, 0.001, True),
    Task("imagenet-a", "ImageNet-A", "classify", "acc1", "imagenet_shift", 7_500, 200, 0.008056, True),
    Task("imagenet-o", "ImageNet-O", "classify", "acc1", "imagenet_shift", 2_000, 200, 0.006047, True),
    Task("imagenet-r", "ImageNet-R", "classify", "acc1", "imagenet_shift", 30_000, 200, 0.006163, True),
    Task("vtab/kitti_closest_vehicle_distance",
         "KITTI Vehicle Distance", "classify", "acc1", "vtab", 711, 4, 0.295289, True),
    Task("mnist", "MNIST", "classify", "acc1", "other", 10_000, 10, 0.10035, True),
    Task("objectnet", "ObjectNet", "classify", "acc1", "imagenet_shift", 18_574, 113, 0.009481, True),
    Task("vtab/flowers", "Oxford Flowers-102", "classify", "mean_per_class_recall", "vtab", 6_149, 102, 0.009804, True),
    Task("vtab/pets", "Oxford-IIIT Pet", "classify", "mean_per_class_recall", "vtab", 3_669, 37, 0.027027, True),
    Task("voc2007", "Pascal VOC 2007", "classify", "acc1", "other", 14_976, 20, 0.154038, True),
    Task("vtab/pcam", "PatchCamelyon", "classify", "acc1", "vtab", 32_768, 2, 0.5, True),
    Task("renderedsst2", "Rendered SST2", "classify", "acc1", "other", 1_821, 2, 0.500001, True),
    Task("vtab/resisc45", "RESISC45", "classify", "acc1", "vtab", 6_300, 45, 0.022342, True),
    Task("cars", "Stanford Cars", "classify", "acc1", "other", 8_041, 196, 0.00516, True),
    Task("stl10", "STL-10", "classify", "acc1", "other", 8_000, 10, 0.1, True),
    Task("sun397", "SUN397", "classify", "acc1", "vtab", 108_754, 397, 0.004645, True),
    Task("vtab/svhn", "SVHN", "classify", "acc1", "vtab", 26_032, 10, 0.117897, True),
    Task("retrieval/flickr_1k_test_image_text_retrieval",
         "Flickr", "retrieve", "mean_recall@1", "retrieval", 1_000, None, None, True),
    Task("retrieval/mscoco_2014_5k_test_image_text_retrieval",
         "MSCOCO", "retrieve", "mean_recall@1", "retrieval", 5_000, None, None, True),
    Task("misc/winogavil", "WinoGAViL", "winogavil", "jaccard_score_10-12", "retrieval", 3_563, None, 0.205, True),
    Task("wilds/iwildcam", "iWildCam", "wilds", "F1-macro_all", "other", 42_791, 182, 0.143056, True),
    Task("wilds/camelyon17", "Camelyon17", "wilds", "acc1", "other", 85_054, 2, 0.5, True),
    Task("wilds/fmow", "FMoW", "wilds", "acc_worst_region", "other", 22_108, 62, 0.027193, True),
    Task("fairness/dollar_street", "Dollar Street", "geographic", "acc_top5_wg", "other", 3_503, 58, None, True),
    Task("fairness/geode", "GeoDE", "geographic", "acc_wg", "other", 12_488, 40, None, True),
    Task("fairness/fairface", "FairFace", "fairness", None, "other", 10_954, None, None, False),
    Task("fairness/utkface", "UTKFace", "fairness", None, "other", 23_703, None, None, False),
)
# fmt: on

NUM_COUNTED = sum(task.counted for task in TASKS)


def find_task(key: str) -> Task:
    """Return the row with this key.  Raises ConfigError with near keys when there is none."""
    check_name(key, (task.key for task in TASKS), kind="task")
    return next(task for task in TASKS if task.key == key)


def own_task(name: str, *, classes: int | None = None, images: int | None = None) -> Task:
    """Return a row for a classification set of the user's own; it is judged by acc1 and never counted.

    classes and images are checked against the data where given.  Raises ConfigError for a name
    that a row of the table or its folder already has.
    """
    task = Task(name, name, "classify", "acc1", "own", images, classes, None, False)
    for row in TASKS:
        if name == row.key or folder_of(task) == folder_of(row):
            raise ConfigError(f"own set {name!r} is the task {row.key!r} of the table: list it under tasks instead.")
    return task


def folder_of(task: Task) -> str:
    """Return the folder of a task in the hub's layout, e.g. wds_vtab-caltech101_test.

    Source: mlfoundations/datacomp download_evalsets.py, where `fairness/` is left out of the name.
    """
    return f"wds_{task.key.removeprefix('fairness/').replace('/', '-')}_test"
