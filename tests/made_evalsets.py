"""Made-up evaluation sets of all 40 tasks in the exact layouts of the hub, with the same few pictures in each.

Class counts, metadata fields and file names are the real ones; the sets are small.  Imports no evaluator of ours, so
that a peer's environment can import it too.
"""

import csv
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from eval38.tasks import TASKS, Task, folder_of

Members = dict[str, bytes]
NUM_PICTURES = 36
IMAGES_PER_TAR = 20
OBJECTIVES = {"age": 9, "gender": 2, "race": 7, "toxic": 21}
REGIONS = [0] * 10 + [1] * 9 + [2] * 8 + [4] * 5 + [5] * 4
"""FMoW: region 3 is empty, region 5 has four images."""


def draw_picture(n: int) -> bytes:
    """Return a 40 x 32 px PNG: coloured noise over a colour, different for each n."""
    rng = np.random.default_rng(n)
    pixels = rng.integers(0, 256, (1, 1, 3)) * 0.7 + rng.integers(0, 256, (8, 10, 3)).repeat(4, 0).repeat(4, 1) * 0.3
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def list_classes(task: Task) -> list[str]:
    """Return class names in label order: the fourth of CLEVR Distance is blank, the faces' have objectives."""
    if task.kind == "fairness":
        return [f"{name}:{name} {n}" for name, count in OBJECTIVES.items() for n in range(count)]
    names = [f"thing {n}" for n in range(task.classes or 0)]
    if task.key == "vtab/clevr_closest_object_distance":
        names[3] = ""
    return names


def list_templates(task: Task) -> list[str]:
    """Return two templates; for faces one per objective."""
    if task.kind == "fairness":
        return [f"{name}:a photo of a {{c}} {name}" for name in OBJECTIVES]
    return ["a photo of a {c}.", "{c}"]


def list_metadata(task: Task, labels: Sequence[int]) -> list[list[int]] | None:
    """Return the metadata of each picture, with WILDS's extra column; None where the task has none."""
    rng = np.random.default_rng(1)
    num = len(labels)
    columns: dict[str, list[Sequence[int]]] = {
        "wilds/iwildcam": [*(rng.integers(0, 5, num) for _ in range(8)), labels, [0] * num],
        "wilds/camelyon17": [[2] * num, rng.integers(20, 24, num), labels, [0] * num],
        "wilds/fmow": [REGIONS[:num], rng.integers(14, 16, num), labels, [0] * num],
        "fairness/dollar_street": [rng.integers(0, 4, num), rng.integers(0, 4, num), rng.integers(0, 4, num)],
        "fairness/geode": [rng.integers(0, 6, num), rng.integers(0, 20, num)],
        "fairness/fairface": [rng.integers(0, 9, num), rng.integers(0, 2, num), r := rng.integers(0, 7, num), r != 1],
        "fairness/utkface": [rng.integers(0, 9, num), rng.integers(0, 2, num), r := rng.integers(0, 5, num), r != 1],
    }
    if task.key not in columns:
        return None
    return [[int(value) for value in row] for row in zip(*columns[task.key], strict=True)]


def write_tars(folder: Path, rows: Sequence[Members], *, per_tar: int = IMAGES_PER_TAR) -> None:
    """Write test/0.tar, 1.tar, ... and nshards.txt; members are named by extension."""
    (folder / "test").mkdir(parents=True, exist_ok=True)
    parts = [rows[start : start + per_tar] for start in range(0, len(rows), per_tar)]
    (folder / "test" / "nshards.txt").write_text(f"{len(parts)}\n")
    key = 0
    for number, part in enumerate(parts):
        with tarfile.open(folder / "test" / f"{number}.tar", "w") as tar:
            for members in part:
                for extension, content in members.items():
                    info = tarfile.TarInfo(f"s{key:07d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                key += 1


def pack_array(values: Sequence[int]) -> bytes:
    """Return an .npy of int64."""
    file = io.BytesIO()
    np.save(file, np.array(values, np.int64))
    return file.getvalue()


def make_labelled(folder: Path, task: Task, labels: Sequence[int]) -> None:
    """Write a set of tars with class names and templates."""
    metadata = list_metadata(task, labels)
    rows: list[Members] = []
    for n, label in enumerate(labels):
        rows.append(
            {"png": draw_picture(n)} if task.kind == "fairness" else {"cls": b"%d" % label, "png": draw_picture(n)}
        )
        if metadata:
            rows[-1]["npy"] = pack_array(metadata[n])
    write_tars(folder, rows)
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in list_classes(task)))
    (folder / "zeroshot_classification_templates.txt").write_text("".join(f"{t}\n" for t in list_templates(task)))


def list_captions(n: int) -> list[str]:
    """Return five or six captions of a picture; the last is the next picture's first."""
    return [f"picture {n}, told {m} times" for m in range(4 + n % 2)] + [f"picture {n + 1}, told 0 times"]


def make_captioned_archive(folder: Path, stem: str) -> None:
    """Write a retrieval set as nlphuji's repositories on the hub have it."""
    names = [f"{1000 + 7 * n}.jpg" for n in range(NUM_PICTURES)]
    rows = [{"filename": names[n], "raw": json.dumps(list_captions(n)), "split": "test"} for n in range(NUM_PICTURES)]
    write_table(folder / f"test_{stem}.csv", rows)
    write_archive(folder / f"images_{stem}_test.zip", {f"images_{stem}_test/{k}": n for n, k in enumerate(names)})


def make_captioned_tars(folder: Path) -> None:
    """Write a retrieval set as CLIP_benchmark has it."""
    captions = ["\n".join(list_captions(n)).encode() for n in range(NUM_PICTURES)]
    write_tars(folder, [{"png": draw_picture(n), "txt": text} for n, text in enumerate(captions)])
    (folder / "dataset_type.txt").write_text("retrieval\n")


def list_games() -> list[dict[str, str]]:
    """Return WinoGAViL's table: instances of 5, 6, 10 and 12 candidates, some cues with a vowel or a capital first."""
    rng = np.random.default_rng(5)
    rows = []
    for n in range(40):
        candidates = [f"thing {c}" for c in rng.permutation(NUM_PICTURES)[: (5, 6, 10, 12)[n % 4]]]
        cue = ("apple", "Owl", "bald", "tea party")[n % 3] + f" {n % 7}"
        game = {"candidates": json.dumps(candidates), "cue": cue, "associations": json.dumps(candidates[: 2 + n % 3])}
        rows.append({**game, "num_associations": str(2 + n % 3), "num_candidates": str(len(candidates))})
    return rows


def make_games(folder: Path) -> None:
    """Write WinoGAViL as nlphuji's repository on the hub has it."""
    write_table(folder / "winogavil_dataset.csv", list_games())
    pictures = {f"winogavil_images/thing {n}.jpg": n for n in range(NUM_PICTURES)}
    write_archive(folder / "winogavil_images.zip", pictures)


def write_table(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write a csv with a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def write_archive(path: Path, pictures: dict[str, int]) -> None:
    """Write a zip of pictures by member name, with what macOS leaves beside them."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, n in pictures.items():
            archive.writestr(name, draw_picture(n))
            archive.writestr(f"__MACOSX/{Path(name).parent}/._{Path(name).name}", b"Mac OS X")


def make_all(data: Path, choose_labels: Callable[[Task], Sequence[int]]) -> None:
    """Write all 40 sets under `data`; choose_labels gives NUM_PICTURES labels of a task with class names."""
    for task in TASKS:
        folder = data / folder_of(task)
        if task.kind == "winogavil":
            make_games(folder)
        elif task.key == "retrieval/flickr_1k_test_image_text_retrieval":
            make_captioned_archive(folder, "1k_flickr")
        elif task.kind == "retrieve":
            make_captioned_tars(folder)
        else:
            make_labelled(folder, task, choose_labels(task))


def make_sets_and_model(folder: Path) -> str:
    """Write folder/data, the 40 sets, and folder/tiny.pt; return the model string.

    The model is an untrained one whose answers still depend on picture and prompt; about three labels in five are its
    answers, so that no metric is all or nothing.  FMoW's region of four has no right answer.
    """
    import torch

    from eval38.classify import rank_classes
    from eval38.embed import Embedder, Encoder, see_images
    from eval38.rows import ImageRow
    from pipeline.clip_model import open_model

    with torch.random.fork_rng():
        torch.manual_seed(3)
        weights = open_model("winnow-vit-tiny").model.state_dict()
    weights["visual.conv1.weight"] *= 30
    weights["token_embedding.weight"] *= 30
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights, folder / "tiny.pt")
    model = f"winnow-vit-tiny@{folder / 'tiny.pt'}"
    encoder = Encoder(open_model(model), device="cpu", precision="fp32")
    embedder = Embedder(encoder, quiet=True)
    pictures = [ImageRow(str(n), draw_picture(n), n) for n in range(NUM_PICTURES)]
    (seen,) = see_images(pictures, [encoder], batch_size=NUM_PICTURES, name="pictures", quiet=True)
    rng = np.random.default_rng(0)

    def choose_labels(task: Task) -> list[int]:
        if task.classes is None:
            return [0] * NUM_PICTURES
        best = rank_classes(
            seen.image_ND, embedder.embed_classes(list_classes(task), list_templates(task))
        ).best_N.tolist()
        labels = [b if rng.random() < 0.6 else int(rng.integers(task.classes)) for b in best]
        other = [(b + 1) % task.classes for b in best] if task.key == "wilds/fmow" else labels
        return labels[: REGIONS.index(5)] + other[REGIONS.index(5) :]

    make_all(folder / "data", choose_labels)
    return model
