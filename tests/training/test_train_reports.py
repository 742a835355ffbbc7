import math
import sys
import time
from pathlib import Path

import fsspec
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.errors import ConfigError
from training.config import TrainConfig
from training.reports import check_reports, open_reports
from training.run import train

LINE = {"step": 5, "samples": 160, "loss": 0.5, "mfu": None}


def read_curve(folder, name="loss"):
    return [(event.step, event.value) for event in EventAccumulator(str(folder)).Reload().Scalars(name)]


def test_a_report_that_is_not_installed_says_what_to_do_before_training(squares, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = TrainConfig(model="winnow-vit-tiny", samples=64, batch_size=32, report_to=("wandb",))
    with pytest.raises(ConfigError, match="pip install wandb, or leave it out"):
        train(config, data=str(squares), out=str(tmp_path / "out"), quiet=True)
    assert not (tmp_path / "out").exists()
    check_reports(["tensorboard"])


def test_tensorboard_gets_the_lines_unless_told_otherwise(squares, tmp_path):
    choices = {"model": "winnow-vit-tiny", "samples": 64, "batch_size": 32, "log_every_steps": 1}
    train(TrainConfig(**choices), data=str(squares), out=str(tmp_path / "shown"), quiet=True)
    assert [step for step, _ in read_curve(tmp_path / "shown" / "tensorboard")] == [1, 2]
    train(TrainConfig(**choices, report_to=()), data=str(squares), out=str(tmp_path / "not"), quiet=True)
    assert not (tmp_path / "not" / "tensorboard").exists()


def test_a_run_that_goes_on_takes_back_what_it_showed_of_later_steps(tmp_path):
    out = str(tmp_path)
    for start, steps in ((0, range(1, 9)), (5, range(6, 11))):
        with open_reports(["tensorboard"], out, step=start, identity="x") as reports:
            for step in steps:
                reports[0](LINE | {"step": step, "loss": 100.0 * start + step})
        time.sleep(1)  # files are read in the order of their names, which hold seconds
    curve = read_curve(tmp_path / "tensorboard")
    assert curve == [(step, step + (500.0 if step > 5 else 0.0)) for step in range(1, 11)]


def test_an_object_store_has_the_events_too(tmp_path):
    with open_reports(["tensorboard"], "memory://bucket/run", step=0, identity="x") as reports:
        reports[0](LINE)
        reports[0](LINE | {"step": 6, "loss": math.pi})
    store = fsspec.filesystem("memory")
    (file,) = store.ls("/bucket/run/tensorboard", detail=False)
    (tmp_path / Path(file).name).write_bytes(store.cat_file(file))
    assert read_curve(tmp_path) == [(5, 0.5), (6, pytest.approx(math.pi))]
    store.rm("/bucket", recursive=True)
