from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from eval38.embed import Seen
from eval38.features import FeatureCache, describe_transform, read_features, write_features
from eval38.metadata import Tagged
from eval38.rows import EvalSet, LostImage, read_set
from eval38.tasks import own_task
from pipeline.clip_model import open_model
from pipeline.manifest import read_manifest

MakeSet = Callable[..., Path]
LOST = (LostImage("0.tar:s1", "unreadable_image", "not an image: «球»"),)


@pytest.fixture
def toy(make_set: MakeSet) -> EvalSet:
    return read_set(own_task("toy"), str(make_set().parent))


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(str(tmp_path / "features"), {"model_sha256": "a", "precision": "fp32"})


@pytest.mark.parametrize(
    "truths",
    [
        (0, 3, 1),
        (Tagged(2, (1, -2, 3)), Tagged(0, (0, 0, 0)), Tagged(None, (9, 9, 9))),
        (("a", "球 мяч"), ("",), ("\n", "b\u2028")),
        ("x.jpg", "y z.jpg", "é"),
    ],
)
def test_what_is_kept_is_found_to_the_bit(toy: EvalSet, cache: FeatureCache, truths: tuple[Any, ...]) -> None:
    assert read_features(cache, toy) is None
    seen = Seen(torch.randn(3, 7), truths, LOST)
    write_features(cache, toy, seen)
    found = read_features(cache, toy)
    assert found is not None and torch.equal(found.image_ND, seen.image_ND)
    assert found.truths == truths and found.lost == LOST
    found.image_ND.mul_(0)  # a caller's arithmetic never reaches the file
    again = read_features(cache, toy)
    assert again is not None and torch.equal(again.image_ND, seen.image_ND)


def test_other_words_find_it_and_other_images_or_models_do_not(toy: EvalSet, cache: FeatureCache) -> None:
    write_features(cache, toy, Seen(torch.randn(2, 4), (0, 3), ()))
    other_words = replace(toy, classes=("a", "b", "c", "d"), templates=("{c}?",), data_hash="other")
    assert read_features(cache, other_words) is not None
    assert read_features(cache, replace(toy, classes=("a", "b", "c"))) is None  # label 3 is no class now
    assert read_features(replace(cache, model={**cache.model, "precision": "bf16"}), toy) is None
    Path(toy.files[1]).write_bytes(b"")
    assert read_features(cache, toy) is None


@pytest.mark.parametrize("name", ["image.npy", "truths.json", "manifest.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\x93NUMPY\x01\x00", "short", "flipped"])
def test_what_is_not_whole_is_not_found(toy: EvalSet, cache: FeatureCache, name: str, content: bytes | str) -> None:
    write_features(cache, toy, Seen(torch.randn(2, 4), (0, 3), LOST))
    (file,) = Path(cache.folder).glob(f"*/{name}")
    whole = file.read_bytes()
    spoiled = {"short": whole[: len(whole) // 2], "flipped": bytes([whole[0] ^ 1]) + whole[1:]}
    file.write_bytes(spoiled[content] if isinstance(content, str) else content)
    assert read_features(cache, toy) is None
    write_features(cache, toy, Seen(torch.randn(2, 4), (0, 3), LOST))
    assert read_features(cache, toy) is not None
    manifest = read_manifest(str(file.parent))
    assert manifest is not None and manifest.counts["images"].failed == {"unreadable_image": 1}


def test_a_preprocessing_is_the_same_in_every_process() -> None:
    described = describe_transform(open_model("winnow-vit-tiny").eval_transform)
    assert "Resize" in described and "0x" not in described
