"""Stored features of a locked text tower against the tower run at every step."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import training.run
from pipeline.clip_model import open_model
from pipeline.schemas import RUN_CAPTIONS
from training.config import TrainConfig
from training.index import list_tars, read_index
from training.locked import can_store, store_features
from training.run import train
from training.start import find_start, open_start

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A text tower as a model string."""
    file = tmp_path_factory.mktemp("weights") / "tiny.pt"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        torch.save(open_model("winnow-vit-tiny").model.state_dict(), file)
    return f"winnow-vit-tiny@{file}"


def make_config(weights, **choices):
    settings = {"model": "winnow-vit-tiny", "samples": 128, "batch_size": 32, "log_every_steps": 1}
    return TrainConfig(**settings | {"lock_text": weights, "warmup_steps": 2} | choices)


@pytest.fixture(scope="module")
def shards(tmp_path_factory, square_rows, write_shards):
    return write_shards(tmp_path_factory.mktemp("shards"), square_rows(64))


@pytest.fixture(scope="module")
def index(shards):
    return read_index(list_tars(str(shards)), tokenize=open_model("winnow-vit-tiny").tokenize, quiet=True)


def open_locked(config):
    return open_start(find_start(config.model, None, out="elsewhere"), config, device=CPU).model


@pytest.mark.parametrize(("choices", "most"), [({}, 1e-6), ({"cut_text": True}, 1e-6), ({"precision": "bf16"}, 2**-11)])
def test_each_caption_gets_the_towers_own_features(weights, index, tmp_path, choices, most):
    config = make_config(weights, **choices)
    model = open_locked(config)
    feature_UD = store_features(config, model, index, out=str(tmp_path), weights="w", quiet=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
        text_UD = model.encode_text(torch.from_numpy(index.token_UL).long(), normalize=True).float()
    assert feature_UD.dtype == (np.float16 if config.precision == "bf16" else np.float32)
    assert np.abs(np.asarray(feature_UD, np.float32) - text_UD.numpy()).max() <= most
    assert isinstance(feature_UD, np.memmap)
    assert (tmp_path / RUN_CAPTIONS).stat().st_size == 4096 + feature_UD.nbytes


def test_the_file_is_taken_again_only_for_the_same_tower_and_captions(weights, index, tmp_path, caplog):
    config, place = make_config(weights), tmp_path / RUN_CAPTIONS
    model = open_locked(config)

    def store(index=index, weights="w"):
        return store_features(config, model, index, out=str(tmp_path), weights=weights, quiet=True)

    first = np.array(store())
    made = place.stat().st_ino
    assert np.array_equal(store(), first) and place.stat().st_ino == made
    store(weights="other")
    assert place.stat().st_ino != made
    assert len(store(replace(index, token_UL=index.token_UL[:9]))) == 9
    store()
    place.write_bytes(place.read_bytes()[:-1])
    assert np.array_equal(store(), first) and "again because" in caplog.text
    remote = store_features(config, model, index, out="memory://locked", weights="w", quiet=True)
    assert np.array_equal(remote, first)


def test_only_towers_that_stay_the_same_are_stored(weights, index):
    model = open_locked(make_config(weights))
    assert can_store(make_config(weights), model, index)
    assert not can_store(make_config(None), model, index)
    assert not can_store(make_config(weights, samples=96), model, index)  # 64 captions, less than twice each
    model.transformer.resblocks.append(torch.nn.Dropout(0.1))
    assert not can_store(make_config(weights), model, index)


@pytest.mark.parametrize("choices", [{"accum_freq": 2, "cut_text": True}])
def test_a_run_is_that_of_the_tower(weights, shards, tmp_path, monkeypatch, choices):
    runs = {}
    for name in ("stored", "run"):
        if name == "run":
            monkeypatch.setattr(training.run, "can_store", lambda *_: False)
        train(make_config(weights, **choices), data=str(shards), out=str(tmp_path / name), quiet=True)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        runs[name] = [json.loads(line) for line in lines]
    stored, run = ([line["loss"] for line in runs[name]] for name in ("stored", "run"))
    assert stored == pytest.approx(run, abs=1e-5) and stored[-1] < stored[0]
    assert not (tmp_path / "stored" / RUN_CAPTIONS).exists()
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["state_dict"] for name in runs)
    assert all(torch.allclose(one[key], two[key], atol=1e-5) for key in one)
