import pytest

from pipeline.config import read_config
from pipeline.errors import ConfigError
from training.config import TrainConfig, Zeroshot, describe_choices


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"samples": 1000, "batch_size": 64}, "take 960 or 1024"),
        ({"samples": 10, "batch_size": 64}, "take 64"),
        ({"samples": 0}, "samples is 0; it must be at least 1"),
        ({"batch_size": 1}, "at least 2 rows"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be above 0"),
        ({"beta2": 1.0}, "beta2 is 1.0; it must be at least 0 and below 1"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"grad_clip_norm": 0.0}, "grad_clip_norm"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"seed": -1}, "seed"),
        ({"precision": "fp8"}, "fp8"),
        ({"log_every_steps": 0}, "log_every_steps"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": float("inf")}, "learning_rate is inf; it must be above 0 and finite"),
        ({"optimizer": "adamm"}, "optimizer"),
        ({"optimizer": "adan"}, "adan takes three betas|beta3=0.99"),
        ({"beta3": 0.99}, "adan alone takes three betas"),
        ({"accum_freq": 3}, "does not divide into accum_freq 3"),
        ({"patch_dropout": 1.0}, "patch_dropout is 1.0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints is 0"),
        ({"loss": "coca"}, "loss"),
        ({"schedule": "linear"}, "schedule"),
        ({"grad_checkpointing": "some"}, "grad_checkpointing"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**{"model": "winnow-vit-tiny", "samples": 1280} | values)


def test_a_recipe_block_is_read_and_a_misspelt_field_named():
    config = read_config(TrainConfig, {"model": "winnow-vit-tiny", "samples": "1280"}, where="train")
    assert config.num_steps == 20
    with pytest.raises(ConfigError, match="did you mean 'samples'"):
        read_config(TrainConfig, {"model": "winnow-vit-tiny", "sample": 1280}, where="train")
    with pytest.raises(ConfigError, match=r"train\.samples: .*'1e6'; write 1000000"):
        read_config(TrainConfig, {"model": "winnow-vit-tiny", "samples": "1e6"}, where="train")
    with pytest.raises(ConfigError, match="take 1280 or 1344"):
        read_config(TrainConfig, {"model": "winnow-vit-tiny", "samples": 1300}, where="train")


def test_how_a_run_goes_is_no_part_of_what_it_is():
    how = {"report_to": (), "zeroshot": Zeroshot(tasks=("cifar10",), every_samples=64)}
    config = TrainConfig(model="winnow-vit-tiny", samples=1280, num_workers=2, log_every_steps=1, **how)
    assert describe_choices(config) == describe_choices(TrainConfig(model="winnow-vit-tiny", samples=1280))
