from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eval38.classify import classify, rank_classes, spell_prompts
from eval38.embed import Encoder, decode_batches
from eval38.rows import LabelledImage, read_images, read_set
from eval38.tasks import own_task
from pipeline.clip_model import open_model
from pipeline.errors import EvalError

MakeSet = Callable[..., Path]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(open_model("winnow-vit-tiny"), device="cpu", precision="fp32")


@pytest.mark.parametrize(("shift", "acc1"), [(0, 1.0), (1, 0.0)])
def test_right_answer_known_by_construction(make_set: MakeSet, encoder: Encoder, shift: int, acc1: float) -> None:
    """Class vectors are the vectors of the classes' own images, in place or moved on by one class."""
    found = read_set(own_task("toy"), str(make_set().parent))
    first = [row for row in read_images(found) if isinstance(row, LabelledImage)][:4]
    (batch,) = decode_batches(first, encoder.geometry, batch_size=4)
    image_CD = encoder.encode_images(batch.image_NHW3)
    places, vectors = {}, []
    for c, prompts in enumerate(spell_prompts(found)):
        for prompt in prompts:
            places[prompt] = len(vectors)
            vectors.append(image_CD[(c + shift) % 4])
    outcome = classify(found, encoder, torch.stack(vectors), places, batch_size=5, quiet=True)
    assert outcome.metrics == {"acc1": acc1, "acc5": None, "mean_per_class_recall": acc1}
    assert outcome.num_images == 16 and not outcome.lost


def test_prompts_are_spelled_by_class_and_template(make_set: MakeSet) -> None:
    found = read_set(own_task("toy"), str(make_set(templates="a {c} {x} {c}\n{c}!\n").parent))
    assert spell_prompts(found)[1] == ["a green {x} green", "green!"]


@pytest.mark.parametrize(("num_classes", "width"), [(2, 2), (5, 5), (9, 5)])
def test_ranking(num_classes: int, width: int) -> None:
    class_CD = torch.eye(num_classes)
    image_ND = torch.nn.functional.normalize(torch.arange(num_classes, 0, -1).float()[None], dim=1)
    assert rank_classes(image_ND, class_CD).tolist() == [list(range(width))]


def test_a_set_without_one_readable_image(make_set: MakeSet, encoder: Encoder) -> None:
    folder = make_set()
    for tar in (folder / "test").glob("*.tar"):
        tar.write_bytes(b"")
    found = read_set(own_task("toy"), str(folder.parent))
    prompts = [prompt for row in spell_prompts(found) for prompt in row]
    text_MD = encoder.encode_prompts(prompts, quiet=True)
    with pytest.raises(EvalError, match=r"none of 2 images could be read; the first: 0.tar"):
        classify(found, encoder, text_MD, {p: n for n, p in enumerate(prompts)}, batch_size=4, quiet=True)
