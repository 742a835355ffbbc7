import json
import logging
import math

import open_clip
import pytest
import torch
from open_clip_train.scheduler import cosine_lr

from pipeline import lock
from pipeline.clip_model import find_clip, open_model
from pipeline.errors import ConfigError, ModelError, PoolError, StageError
from pipeline.lock import hold_lock
from pipeline.manifest import read_manifest
from training.config import TrainConfig
from training.data import open_batches
from training.images import normalise, read_crop
from training.index import list_tars, read_index
from training.run import train


def make_config(**values):
    settings = {
        "model": "winnow-vit-tiny",
        "samples": 32 * 12,
        "batch_size": 32,
        "learning_rate": 1e-3,
        "warmup_steps": 4,
    }
    return TrainConfig(**settings | {"log_every_steps": 1} | values)


def read_lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(squares, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    return out, train(make_config(), data=str(squares), out=str(out), quiet=True)


def test_a_run_says_what_it_did(finished):
    out, manifest = finished
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoint.pt",
        "manifest.json",
        "metrics.jsonl",
        "model.json",
        "tensorboard",
    ]
    assert read_manifest(str(out)) == manifest
    assert manifest.stage == "train" and manifest.counts["rows"].kept == 256
    lines = read_lines(out)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["samples"] == manifest.facts["samples_seen"] == 384
    assert manifest.facts["final_loss"] == lines[-1]["loss"]
    assert (manifest.facts["distinct_rows"], manifest.facts["mean_epochs"]) == (256, 1.5)
    assert manifest.facts["unreadable_draws"] == 0 and manifest.facts["num_parameters"] == 5_817_729
    assert all(0 < line["learning_rate"] <= 1e-3 and line["grad_norm"] > 0 for line in lines)


def test_a_finished_run_is_not_done_again(finished, squares):
    out, manifest = finished
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert train(make_config(num_workers=2), data=str(squares), out=str(out), quiet=True) == manifest
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before


@pytest.mark.parametrize("mistake", [{"heldout": 300}, {"grad_checkpointing": "conv"}, {"lock_text": "ViT-B-32"}])
def test_a_mistake_leaves_a_finished_run_as_it_was(finished, squares, mistake):
    out, manifest = finished
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    changed = make_config(seed=1, **mistake)
    with pytest.raises(ConfigError):
        train(changed, data=str(squares), out=str(out), quiet=True)
    assert train(make_config(), data=str(squares), out=str(out), quiet=True) == manifest
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before


def test_two_cannot_train_into_one_folder(squares, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    with hold_lock(str(tmp_path), "train"), pytest.raises(StageError, match="is at work here"):
        train(make_config(), data=str(squares), out=str(tmp_path), quiet=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["out", "wandb"])
def test_what_cannot_be_written_is_told_before_the_tars_are_read(tmp_path, write_tar, monkeypatch, name):
    """Reading them would be an error too, as no row of them is usable."""
    data, out = write_tar(tmp_path / "data/0.tar", [("a.txt", b"no image")]), tmp_path / "out"
    if name == "out":
        out.write_text("a file")
        with pytest.raises(FileExistsError):
            train(make_config(), data=str(data), out=str(out), quiet=True)
        return
    pytest.importorskip("wandb")
    for variable in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"report_to wandb: .* Or set WANDB_MODE=offline, or leave it out"):
        train(make_config(report_to=("wandb",)), data=str(data), out=str(out), quiet=True)


def test_the_same_run_gives_the_same_bytes(finished, squares, tmp_path):
    out, _ = finished
    train(make_config(log_every_steps=5, checkpoint_every_steps=3), data=str(squares), out=str(tmp_path), quiet=True)
    for name in ("checkpoint.pt", "manifest.json", "model.json"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()


def test_a_run_opens_as_a_model_and_in_open_clip(finished):
    out, _ = finished
    assert find_clip(str(out)).architecture == "winnow-vit-tiny"
    ours = open_model(str(out)).model
    theirs = open_clip.create_model("winnow-vit-tiny", pretrained=str(out / "checkpoint.pt"))
    fresh = open_model("winnow-vit-tiny").model
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name])
    assert not torch.equal(fresh.logit_scale, ours.logit_scale)


def test_losses_equal_a_plain_open_clip_loop(finished, squares):
    """The same batches through open_clip's own forward, loss and schedule, with torch's unfused AdamW."""
    config = make_config()
    torch.manual_seed(config.seed)
    opened = open_model(config.model)
    model, crop = opened.model.train(), read_crop(opened.train_transform)
    index = read_index(list_tars(str(squares)), tokenize=opened.tokenize, quiet=True)
    named = list(model.named_parameters())
    rest = [p for n, p in named if p.ndim >= 2 and not any(part in n for part in ("bn", "ln", "bias", "logit_scale"))]
    others = [p for _, p in named if not any(p is q for q in rest)]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-6)
    adjust, compute_loss, losses = cosine_lr(optimizer, 1e-3, 4, 12), open_clip.ClipLoss(), []
    for step, batch in enumerate(open_batches(index, crop=crop, batch_size=32, seed=0, steps=range(12))):
        adjust(step)
        optimizer.zero_grad()
        image_BD, text_BD, scale = model(normalise(batch.pixel_BHWC, crop), batch.token_BL.long())
        loss = compute_loss(image_BD, text_BD, scale)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        losses.append(loss.item())
    assert [line["loss"] for line in read_lines(finished[0])] == pytest.approx(losses, abs=1e-4)


@pytest.mark.parametrize("model", ["winnow-vit-tiny", "winnow-vitamin-tiny"])
def test_a_tiny_model_learns_coloured_squares(squares, tmp_path, model):
    config = TrainConfig(model=model, samples=64 * 60, batch_size=64, learning_rate=2e-3, warmup_steps=8)
    manifest = train(config, data=str(squares), out=str(tmp_path), quiet=True)
    assert manifest.facts["final_loss"] < math.log(64) / 2


def test_training_goes_on_from_another_run(finished, squares, tmp_path):
    out, first = finished
    manifest = train(make_config(model=str(out), samples=64), data=str(squares), out=str(tmp_path), quiet=True)
    assert "weights" in manifest.parents and "weights" not in first.parents
    assert read_lines(tmp_path)[0]["loss"] < read_lines(out)[0]["loss"]
    assert find_clip(str(tmp_path)).architecture == "winnow-vit-tiny"


def test_a_start_that_cannot_be_used_says_so(finished, squares, tmp_path):
    out, _ = finished
    for model, message in [
        (f"winnow-vitamin-tiny@{out}/checkpoint.pt", "not a winnow-vitamin-tiny"),
        (f"winnow-vit-small@{out}/checkpoint.pt", "not a winnow-vit-small"),
        ("hf-hub:someone/model", "from the hub only"),
    ]:
        with pytest.raises(ModelError, match=message):
            train(make_config(model=model), data=str(squares), out=str(tmp_path / "out"), quiet=True)
    with pytest.raises(ModelError, match="into itself"):
        train(make_config(model=str(out), samples=64), data=str(squares), out=str(out), quiet=True)


def test_faulty_rows_are_accounted(tmp_path, write_tar, write_shards, square_rows):
    rows = square_rows(64)
    rows[5] = (rows[5][0], b"broken")
    data = write_shards(tmp_path / "data", rows)
    write_tar(data / "9.tar", [("a.txt", b"no image"), ("b.png", rows[0][1])])
    manifest = train(make_config(samples=128), data=str(data), out=str(tmp_path / "out"), quiet=True)
    rows_account = manifest.counts["rows"]
    assert (rows_account.read, rows_account.kept) == (66, 63)
    assert rows_account.failed == {"missing_image": 1, "null_caption": 1, "unreadable_image": 1}
    assert manifest.facts["unreadable_draws"] >= 2 and manifest.facts["distinct_rows"] == 63


def test_a_diverging_run_stops_and_names_the_step(squares, tmp_path):
    config = make_config(learning_rate=1e30, warmup_steps=0, log_every_steps=4)
    with pytest.raises(StageError, match=r"loss became nan at step [2-4]\. There is no save before it"):
        train(config, data=str(squares), out=str(tmp_path), quiet=True)
    assert not (tmp_path / "manifest.json").exists()


def test_a_diverging_run_names_its_last_good_save(squares, tmp_path):
    config = make_config(learning_rate=1e30, warmup_steps=0, checkpoint_every_steps=1)
    with pytest.raises(StageError, match=r"last good save is .*resume-00000001\.pt"):
        train(config, data=str(squares), out=str(tmp_path), quiet=True)


def test_a_run_whose_last_step_diverges_is_not_finished(squares, tmp_path):
    config = make_config(samples=32, learning_rate=1e39, warmup_steps=0)
    with pytest.raises(StageError, match="a weight became infinite or NaN by step 1"):
        train(config, data=str(squares), out=str(tmp_path), quiet=True)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_changed_config_is_named_and_trained_afresh(finished, squares, tmp_path, caplog):
    data = str(squares)
    train(make_config(samples=64), data=data, out=str(tmp_path), quiet=True)
    with caplog.at_level(logging.WARNING, logger="winnow"):
        manifest = train(make_config(samples=64, seed=1), data=data, out=str(tmp_path), quiet=True)
    assert "config.seed changed from 0 to 1" in caplog.text
    assert manifest.config["seed"] == 1 and len(read_lines(tmp_path)) == 2


def test_parents_given_replace_the_datas_own_identity(squares, tmp_path):
    manifest = train(make_config(samples=64), data=str(squares), out=str(tmp_path), parents={"shards": "x"}, quiet=True)
    assert manifest.parents == {"shards": "x"}


def test_bf16_and_clipping_train(squares, tmp_path):
    config = make_config(samples=64, precision="bf16", grad_clip_norm=1.0)
    assert math.isfinite(train(config, data=str(squares), out=str(tmp_path), quiet=True).facts["final_loss"])


def test_a_batch_larger_than_the_data_is_warned_of(tmp_path, write_shards, square_rows, caplog):
    data = write_shards(tmp_path / "data", square_rows(10))
    train(make_config(samples=32), data=str(data), out=str(tmp_path / "out"), quiet=True)
    assert "a batch has 32 rows and there are 10 to train on" in caplog.text


@pytest.mark.parametrize("device", ["gpu", "meta"])
def test_a_device_that_is_none_is_an_error(squares, tmp_path, device):
    with pytest.raises(ConfigError, match=rf"device '{device}' cannot be trained on \(.*\): say auto, cpu"):
        train(make_config(), data=str(squares), out=str(tmp_path), device=device, quiet=True)


def test_data_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(PoolError):
        train(make_config(), data=str(tmp_path / "absent"), out=str(tmp_path / "out"), quiet=True)
