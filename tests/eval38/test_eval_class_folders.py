"""A set of one's own as a folder of images per class: the same numbers as in the hub's layout."""

import json
import os
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
from made_evalsets import draw_picture, make_labelled
from torchvision.datasets import ImageFolder

from eval38.class_folders import read_images, read_set
from eval38.config import EvalConfig
from eval38.evaluate import evaluate
from eval38.rows import ImageRow, LostImage
from eval38.tasks import own_task
from jobs.eval_tasks import main
from pipeline.errors import EvalError, PoolError

LABELS = [0, 1, 2, 3, 3, 2, 1, 0]


def make_folders(data: Path) -> Path:
    """Write data/mine/CLASS/N.PNG of four classes, the pictures that make_labelled puts into tars."""
    for n, label in enumerate(LABELS):
        (data / "mine" / f"thing {label}").mkdir(parents=True, exist_ok=True)
        (data / "mine" / f"thing {label}" / f"{n}.PNG").write_bytes(draw_picture(n))
    return data / "mine"


def test_numbers_are_those_of_the_hubs_layout(checkpoint: str, tmp_path: Path) -> None:
    hub, folder = tmp_path / "data" / "wds_toy_test", make_folders(tmp_path / "data")
    make_labelled(hub, own_task("toy", classes=4), LABELS)
    shutil.copy(hub / "zeroshot_classification_templates.txt", folder)
    (folder / "thing 0" / ".DS_Store").write_bytes(b"x")
    words = ["--model", checkpoint, "--data", str(hub.parent), "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main([*words, "--features", str(tmp_path / "features"), "eval.own=[toy,mine]"]) == 0
    outcomes = tmp_path / "out" / "outcomes" / "wds_mine_test.npz"
    lines = (tmp_path / "out" / "eval_results.jsonl").read_text().splitlines()
    rows = {row["key"]: row for row in map(json.loads, lines)}
    assert rows["mine"]["metrics"] == rows["toy"]["metrics"]
    assert rows["mine"]["images"] == 8 and not rows["mine"]["incomplete"]
    assert np.load(outcomes)["label"].tolist() == sorted(LABELS)
    shutil.move(folder / "thing 0" / "7.PNG", folder / "thing 1" / "0.PNG")
    assert main([*words, "--features", str(tmp_path / "features"), "eval.own=[toy,mine]"]) == 0
    moved = (tmp_path / "out" / "eval_results.jsonl").read_text().splitlines()
    assert np.load(outcomes)["label"].tolist() == [0, 1, 1, 1, 2, 2, 3, 3] and moved[1] == lines[1]


def test_what_is_no_image_is_lost_and_names_may_be_given(checkpoint: str, tmp_path: Path) -> None:
    folder = make_folders(tmp_path / "data")
    (folder / "thing 2" / "notes.txt").write_text("x")
    (folder / "thing 2" / "9.jpg").write_bytes(b"")
    (folder / "no images" / "below").mkdir(parents=True)
    (folder / "classnames.txt").write_text(
        "\n".join(f"{colour} square" for colour in ("red", "green", "blue", "white"))
    )
    places = {"data": str(tmp_path / "data"), "out": str(tmp_path / "out"), "device": "cpu"}
    made = evaluate(EvalConfig(own=("mine",)), model=checkpoint, **places, quiet=True)  # type: ignore[arg-type]
    assert dict(made.counts["mine"].failed) == {"missing_image": 1, "unreadable_image": 1}
    assert made.facts["tasks"]["mine"]["incomplete"]
    (folder / "classnames.txt").write_text("red\n")
    with pytest.raises(EvalError, match="has 1 names, but 4 folders"):
        evaluate(EvalConfig(own=("mine",)), model=checkpoint, **places, quiet=True)  # type: ignore[arg-type]
    (tmp_path / "data" / "empty").mkdir()
    with pytest.raises(EvalError, match=r"empty has no test/nshards.txt, nor folders of images, one per class"):
        evaluate(EvalConfig(own=("empty",)), model=checkpoint, **places, quiet=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("data", ["plain", "a[1]", "{a,b}", "x::y"])
def test_the_files_are_those_of_image_folder_in_its_order(tmp_path: Path, data: str) -> None:
    folder, picture = make_folders(tmp_path / data), draw_picture(0)
    elsewhere = tmp_path / "elsewhere"
    for path in (folder / "thing 1/b/deep", folder / "thing 1/b-c", folder / "only/below", elsewhere):
        path.mkdir(parents=True)
        (path / "2.png").write_bytes(picture)
    (folder / "thing 0" / "linked").symlink_to(elsewhere)
    (folder / "a link").symlink_to(elsewhere)
    found = read_set(own_task("mine"), str(tmp_path / data))
    rows, wanted = list(read_images(found)), ImageFolder(folder)
    assert list(found.classes) == wanted.classes
    assert [(f"{folder}/{row.name}", row.truth) for row in rows if isinstance(row, ImageRow)] == wanted.samples
    assert len(rows) == len(wanted) == len(LABELS) + 5


def test_nothing_but_what_is_hidden_vanishes(tmp_path: Path) -> None:
    folder, picture = make_folders(tmp_path), draw_picture(0)
    (folder / "thing 1" / "gone.png").symlink_to(tmp_path / "nothing")
    os.mkfifo(folder / "thing 2" / "pipe.jpg")
    (folder / "thing 3" / os.fsdecode(b"\xff.png")).write_bytes(picture)
    (folder / os.fsdecode(b"\xfe")).mkdir()
    (folder / os.fsdecode(b"\xfe") / "x.png").write_bytes(picture)
    (folder / "thing 1" / ".hidden").mkdir()
    (folder / "thing 1" / ".hidden" / "x.png").write_bytes(picture)
    found = read_set(own_task("mine"), str(tmp_path))
    rows = list(read_images(found))
    lost = {row.name: row.reason for row in rows if isinstance(row, LostImage)}
    assert lost == {"thing 1/gone.png": "missing_image", "thing 2/pipe.jpg": "missing_image"}
    assert len(rows) == len(LABELS) + 4 and rows[-1].name == r"\udcfe/x.png" and found.classes[-1] == r"\udcfe"
    (tmp_path / "nothing").write_bytes(picture)
    assert read_set(own_task("mine"), str(tmp_path)).data_hash != found.data_hash


def test_a_link_to_a_folder_above_is_refused(tmp_path: Path) -> None:
    folder = make_folders(tmp_path)
    (folder / "thing 1" / "loop").symlink_to(folder)
    with pytest.raises(PoolError, match="loop' is a link to a folder that holds it"):
        read_set(own_task("mine"), str(tmp_path))


def test_folders_of_a_remote_store_are_the_same() -> None:
    memory = fsspec.filesystem("memory")
    for name in ("b/x.png", "a/deep/y.png", "a/z.png", "a/notes.txt"):
        memory.pipe_file(f"/remote-folders/mine/{name}", draw_picture(0))
    try:
        found = read_set(own_task("mine"), "memory://remote-folders")
        rows = [(row.name, isinstance(row, ImageRow)) for row in read_images(found)]
    finally:
        memory.rm("/remote-folders", recursive=True)
    assert found.classes == ("a", "b")
    assert rows == [("a/notes.txt", False), ("a/z.png", True), ("a/deep/y.png", True), ("b/x.png", True)]
