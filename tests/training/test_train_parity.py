"""Losses that open_clip_train 3.3.0 gave, frozen by tests/parity/open_clip_train.py --freeze, against winnow's now."""

import json
import math
from pathlib import Path

import pytest

from tests.parity.open_clip_train import TOLERANCE, write_shards
from training.config import TrainConfig
from training.run import train

FROZEN = sorted(Path(__file__).parent.glob("open_clip_train_*.json"))


@pytest.mark.parametrize("frozen", FROZEN, ids=lambda file: file.stem)
def test_every_step_is_open_clip_trains(frozen, tmp_path):
    peer = json.loads(frozen.read_text())
    config = TrainConfig(**peer["config"], log_every_steps=1)
    write_shards(tmp_path / "shards", min(config.samples, 256), peer["side"])
    train(config, data=str(tmp_path / "shards"), out=str(tmp_path / "out"), quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == pytest.approx(peer["losses"], abs=TOLERANCE)
    assert [line["learning_rate"] for line in lines] == peer["rates"]
    assert lines[-1]["logit_scale"] == pytest.approx(math.exp(peer["logit_scale"]), abs=TOLERANCE)


def test_there_are_frozen_cases():
    assert len(FROZEN) == 2
