"""Recipes: the choices of all stages in one YAML file, checked field by field.  Built-in ones are in recipes/."""

import importlib.resources
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import yaml

from eval38.config import EvalConfig
from pipeline.config import config, override, read_config, read_yaml
from pipeline.errors import ConfigError, check_file_name, check_name
from pipeline.select import Step
from pipeline.shards import ShardConfig
from pipeline.storage import exists
from training.config import TrainConfig

NETWORK_PREFIX = "network:"
"""`model: network:dfn` in a score entry names a filter network of the same recipe."""


@config
class Network:
    """A filter network: a CLIP that will score the pool."""

    data: Literal["clean", "pool"]
    """What it is trained on: the clean pairs (--clean), which makes it a DFN, or the raw pool."""
    train: TrainConfig


@config
class Recipe:
    """Every stage's choices; an absent stage is not run."""

    name: str
    source: str = ""
    """Paper and section, or what the recipe is for."""
    networks: dict[str, Network] = field(default_factory=dict)
    """Filter networks to train first, by name."""
    score: list[dict[str, Any]] = field(default_factory=list)
    """Filters in order: {filter: KIND, name: NAME, option: value}; `winnow filters` lists them."""
    subsets: dict[str, list[Step]] = field(default_factory=dict)
    """Subset name -> steps; no step keeps the whole pool."""
    shards: ShardConfig = field(default_factory=ShardConfig)
    train: TrainConfig | None = None
    """How one model per subset is trained: the same number of samples seen for each (DataComp's principle)."""
    eval: EvalConfig = field(default_factory=EvalConfig)


def builtin_recipes() -> dict[str, dict[str, Any]]:
    """Return name -> content of every recipe file that winnow ships."""
    files = sorted(importlib.resources.files("jobs").joinpath("recipes").iterdir(), key=lambda f: f.name)
    return {f.name.removesuffix(".yaml"): yaml.safe_load(f.read_text()) for f in files if f.name.endswith(".yaml")}


def load_recipe(name: str | None, overrides: Sequence[str] = ()) -> Recipe:
    """Return a built-in recipe or the one in a YAML file, with overrides; None starts from nothing but defaults.

    Raises ConfigError naming the bad field, or (did you mean) an unknown recipe.
    """
    values: dict[str, Any] = {"name": "command line"}
    if name is not None and (name.endswith((".yaml", ".yml")) or Path(name).suffix):
        if not exists(name):
            raise ConfigError(f"there is no recipe file {name!r}.")
        values = {"name": Path(name).stem} | read_yaml(name)
    elif name is not None:
        builtin = builtin_recipes()
        check_name(name, builtin, kind="recipe")
        values = {"name": name} | builtin[name]
    recipe = read_config(Recipe, override(values, overrides), where="recipe")
    check_names(recipe)
    return recipe


def check_names(recipe: Recipe) -> None:
    """Raise ConfigError when a score entry names a network that is not trained, or a name cannot name a folder."""
    for kind, names in (("network", recipe.networks), ("subset", recipe.subsets)):
        for name in names:
            check_file_name(name, kind=kind)
    for entry in recipe.score:
        model = entry.get("model")
        if isinstance(model, str) and model.startswith(NETWORK_PREFIX):
            check_name(model.removeprefix(NETWORK_PREFIX), recipe.networks, kind="network")


def require_train(recipe: Recipe) -> TrainConfig:
    """Return the train section.  Raises ConfigError when there is none."""
    if recipe.train is None:
        raise ConfigError("this recipe does not train. Give a recipe that does, or train.model=NAME train.samples=N.")
    return recipe.train
