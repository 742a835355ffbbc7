"""The numbers of DataComp's scale_configs.py and ViTamin's yaml files, and how a recipe takes them."""

import shlex

import pytest

from jobs.arguments import split_words
from jobs.recipes import builtin_recipes, load_recipe, require_train
from jobs.train_clip import EXAMPLE
from pipeline.clip_model import describe_architecture
from pipeline.errors import ConfigError
from training.config import TrainConfig

SCALES = {
    "debug": ("ViT-B-32", 1_024, 1e-4, 500, 128_000, 0.98),
    "small": ("ViT-B-32", 4_096, 5e-4, 500, 12_800_000, 0.98),
    "medium": ("ViT-B-32", 4_096, 5e-4, 500, 128_000_000, 0.98),
    "large": ("ViT-B-16", 8_192, 5e-4, 500, 1_280_000_000, 0.98),
    "xlarge": ("ViT-L-14", 90_112, 1e-3, 10_000, 12_800_000_000, 0.95),
}


@pytest.mark.parametrize("scale", SCALES)
def test_datacomps_scales(scale: str) -> None:
    config = load_recipe(f"train-datacomp-{scale}").train
    assert config
    model, batch, rate, warmup, samples, beta2 = SCALES[scale]
    assert (config.model, config.batch_size, config.learning_rate, config.warmup_steps) == (model, batch, rate, warmup)
    assert (config.beta1, config.beta2, config.eps, config.weight_decay) == (0.9, beta2, 1e-6, 0.2)
    assert 0 <= config.samples - samples < batch and config.schedule == "cosine"
    assert config.sampler == "datacomp" and config.precision == "bf16"


def test_another_scale_under_a_filter_recipe() -> None:
    small, medium = load_recipe("datacomp-basic").train, load_recipe("datacomp-basic", ["train.recipe=datacomp-medium"])
    assert (
        small
        == load_recipe("train-datacomp-small").train
        == TrainConfig(
            model="ViT-B-32",
            samples=12_800_000,
            batch_size=4096,
            learning_rate=5e-4,
            warmup_steps=500,
            precision="bf16",
            sampler="datacomp",
        )
    )
    assert medium.train == load_recipe("train-datacomp-medium").train
    own = load_recipe(None, ["train.recipe=datacomp-small", "train.precision=fp32"]).train
    assert own and small and (own.precision, own.samples) == ("fp32", small.samples)


def test_an_unknown_scale_gets_near_names() -> None:
    with pytest.raises(ConfigError, match="did you mean 'datacomp-small'"):
        load_recipe("datacomp-basic", ["train.recipe=datacomp-smal"])


def test_vitamins_schedules() -> None:
    long = load_recipe("train-vitamin-l-long").train
    assert long and (long.batch_size, long.num_steps, long.beta2, long.learning_rate) == (90_160, 141_970, 0.95, 2e-3)
    assert long.augment.scale == (0.4, 1.0) and long.augment.gray_scale_prob == 0.2
    tuned = load_recipe("train-vitamin-l-336").train
    assert tuned and (tuned.schedule, tuned.weight_decay, tuned.learning_rate) == ("constant", 0.0, 1e-5)
    largest = load_recipe("train-vitamin-xl-long").train
    assert largest and describe_architecture(largest.model)["vision_cfg"]["image_size"] == 224
    locked = load_recipe("train-vitamin-s-ltt").train
    assert locked and (locked.model, locked.lock_text) == ("ViTamin-S-LTT", "ViTamin-L/datacomp1b")
    assert len([name for name in builtin_recipes() if name.startswith("train-vitamin")]) == 11


@pytest.mark.parametrize("line", EXAMPLE.replace("\\\n", "").splitlines())
def test_what_the_help_shows_can_be_said(line):
    """The words that are no flag and no flag's value are the recipe's."""
    words = shlex.split(line)[2:]
    flags = {n for n, word in enumerate(words) if word.startswith("--")}
    chosen = [word for n, word in enumerate(words) if not flags & {n, n - 1}]
    assert chosen and require_train(load_recipe(*split_words(chosen)))
