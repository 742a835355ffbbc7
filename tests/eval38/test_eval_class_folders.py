"""A set of one's own as a folder of images per class: the same numbers as in the hub's layout."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from made_evalsets import draw_picture, make_labelled

from eval38.config import EvalConfig
from eval38.evaluate import evaluate
from eval38.tasks import own_task
from jobs.eval_tasks import main
from pipeline.errors import EvalError

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
