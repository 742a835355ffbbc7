"""The loader's choices in whole batches and whole runs: pixels, sampler, cut_text."""

import json

import pytest
import torch

from pipeline.clip_model import open_model
from pipeline.errors import ConfigError
from training.config import TrainConfig
from training.data import open_batches
from training.images import read_crop
from training.index import list_tars, read_index
from training.run import train
from training.text import check_cut


def losses_of(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def opened():
    return open_model("winnow-vit-tiny")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(("pixels", "sampler"), [("fast", "exact"), ("exact", "datacomp"), ("fast", "datacomp")])
def test_batches_depend_on_the_step_alone(opened, squares, pixels, sampler):
    index = read_index(list_tars(str(squares)), tokenize=opened.tokenize, quiet=True)
    settings = {"crop": read_crop(opened.train_transform, pixels=pixels), "batch_size": 32, "seed": 1}
    whole = list(open_batches(index, steps=range(6), sampler=sampler, **settings))
    later = list(open_batches(index, steps=range(3, 6), sampler=sampler, num_workers=2, **settings))
    for one, two in zip(whole[3:], later, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert whole[0].pixel_BHWC.shape == (32, 32, 32, 3) and whole[0].pixel_BHWC.dtype == torch.uint8


SETTINGS = {"model": "winnow-vit-tiny", "samples": 32 * 6, "batch_size": 32, "warmup_steps": 2, "log_every_steps": 1}


@pytest.fixture(scope="module")
def plain(squares, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain")
    return train(TrainConfig(**SETTINGS), data=str(squares), out=str(out), quiet=True), losses_of(out)


@pytest.mark.parametrize("choice", [{"pixels": "fast"}, {"cut_text": True}, {"pixels": "fast", "cut_text": True}])
def test_faster_ways_train_alike(plain, squares, tmp_path, choice):
    manifest = train(TrainConfig(**SETTINGS, **choice), data=str(squares), out=str(tmp_path), quiet=True)
    assert losses_of(tmp_path) == pytest.approx(plain[1], abs=2e-3)
    assert manifest.config == plain[0].config | choice


def test_text_that_cannot_be_cut_is_refused():
    with pytest.raises(ConfigError, match="the text tower of a model looks at padding"):
        check_cut(torch.nn.Linear(2, 2), "a model")
