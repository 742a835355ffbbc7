from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eval38.classify import evaluate, judge, list_prompts, rank_classes
from eval38.embed import Embedder, Encoder, Seen, see_images
from eval38.rows import EvalSet, read_images, read_set
from eval38.tasks import find_task, own_task
from pipeline.clip_model import open_model
from pipeline.errors import EvalError

MakeSet = Callable[..., Path]
CLEVR = "vtab/clevr_closest_object_distance"


@pytest.fixture(scope="module")
def model() -> Embedder:
    return Embedder(Encoder(open_model("winnow-vit-tiny"), device="cpu", precision="fp32"), quiet=True)


def _see(found: EvalSet, model: Embedder) -> Seen[int]:
    (seen,) = see_images(read_images(found), [model.encoder], batch_size=5, name="toy", quiet=True)
    assert isinstance(seen, Seen)
    return seen


@pytest.mark.parametrize(("shift", "acc1"), [(0, 1.0), (1, 0.0)])
def test_right_answer_known_by_construction(make_set: MakeSet, model: Embedder, shift: int, acc1: float) -> None:
    """Class vectors are the vectors of the classes' own images, in place or moved on by one class."""
    seen = _see(read_set(own_task("toy"), str(make_set().parent)), model)
    metrics, _ = judge(seen.image_ND, seen.image_ND[:4].roll(-shift, dims=0), torch.tensor(seen.truths))
    assert metrics == {"acc1": acc1, "acc5": None, "mean_per_class_recall": acc1} and len(seen.truths) == 16


@pytest.mark.parametrize(("num_classes", "width"), [(2, 1), (5, 5), (9, 5)])
def test_ranking(num_classes: int, width: int) -> None:
    class_CD = torch.eye(num_classes)
    image_ND = torch.nn.functional.normalize(torch.arange(num_classes, 0, -1).float()[None], dim=1)
    top_NK, best_N = rank_classes(image_ND, class_CD)
    assert top_NK.tolist() == [list(range(width))] and best_N.tolist() == [0]


def test_of_equal_classes_the_first_is_best() -> None:
    """ImageNet's list has two names twice; DataComp's recall comes from argmax."""
    _, best_N = rank_classes(torch.ones(3000, 4) / 2, torch.ones(7, 4) / 2)
    assert best_N.tolist() == [0] * 3000


def test_a_set_without_one_readable_image(make_set: MakeSet, model: Embedder) -> None:
    folder = make_set()
    for tar in (folder / "test").glob("*.tar"):
        tar.write_bytes(b"")
    found = read_set(own_task("toy"), str(folder.parent))
    with pytest.raises(EvalError, match=r"none of 2 images could be read; the first: 0.tar"):
        _see(found, model)


def test_datacomps_column_drops_the_blank_class(make_set: MakeSet, model: Embedder) -> None:
    """Without the fourth of six names, label 3 means `distant`, 4 `very distant` and 5 nothing."""
    names = "very nearby\nnearby\nnear\n\ndistant\nvery distant\n"
    found = read_set(find_task(CLEVR), str(make_set("vtab-clevr_closest_object_distance", classes=names).parent))
    seen = _see(found, model)
    outcome = evaluate(found, seen, model)
    label_N = torch.tensor(seen.truths)
    five = model.embed_classes(["very nearby", "nearby", "near", "distant", "very distant"], found.templates)
    assert outcome.metrics == judge(seen.image_ND, five, label_N).metrics
    six = model.embed_classes(found.classes, found.templates)
    assert outcome.corrected == judge(seen.image_ND, six, label_N).metrics
    assert "a  square" in list_prompts(found)


def test_a_label_beyond_datacomps_classes_is_wrong() -> None:
    """Six labels against five classes, as scikit-learn counts them: the sixth class has recall 0."""
    metrics, _ = judge(torch.eye(6), torch.eye(6)[:5], torch.arange(6))
    assert metrics["acc1"] == metrics["mean_per_class_recall"] == pytest.approx(5 / 6) and metrics["acc5"] == 5 / 6


def test_ones_own_set_keeps_a_blank_class(make_set: MakeSet, model: Embedder) -> None:
    found = read_set(own_task("toy"), str(make_set(classes="red\n\nblue\nyellow\n").parent))
    assert evaluate(found, _see(found, model), model).corrected is None
