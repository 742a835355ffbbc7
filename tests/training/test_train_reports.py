import sys

import pytest

from pipeline.errors import ConfigError
from training.config import TrainConfig
from training.reports import open_reports
from training.run import train


@pytest.mark.parametrize(
    ("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")], ids=["tensorboard", "wandb"]
)
def test_a_report_that_is_not_installed_says_what_to_do(name, module, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=f"pip install {name}, or leave it out"):
        open_reports([name], str(tmp_path), step=0, identity="x")


def test_tensorboard_gets_the_lines(squares, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = TrainConfig(
        model="winnow-vit-tiny", samples=64, batch_size=32, log_every_steps=1, report_to=("tensorboard",)
    )
    train(config, data=str(squares), out=str(tmp_path), quiet=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
