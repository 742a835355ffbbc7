"""Recipes: the choices of all stages in one YAML file, checked field by field.  Built-in ones are in recipes/."""

import importlib.resources
from collections.abc import Collection, Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from eval38.config import EvalConfig
from jobs.fit_kinds import FIT_KINDS, AnyFit, find_kind, read_fit
from pipeline.config import config, override, read_config, read_yaml
from pipeline.errors import ConfigError, check_file_name, check_name
from pipeline.kmeans import FitConfig
from pipeline.report.read import NETWORK_PREFIX as EVALUATED_PREFIX
from pipeline.select import Step, expand_uses
from pipeline.shards import ShardConfig
from pipeline.storage import exists, join
from training.config import NO_AUGMENT, Augment, FineTune, TrainConfig, follow

NETWORK_PREFIX = "network:"
"""`model: network:dfn` in a score entry names a filter network of the same recipe."""
TRAIN_RECIPE = "recipe"
"""`recipe: datacomp-small` in the train block takes that built-in recipe's; other fields of the block go before it."""
ROWS = "rows of a fit"
FIT = "fit"
"""`fit: in1k` in a score entry names a fit of the same recipe: the files that it makes, and options that it decides."""


@config
class Network:
    """A filter network: a CLIP that will score the pool."""

    data: Literal["clean", "pool"]
    """What it is trained on: the clean pairs (--clean), which makes it a DFN, or the raw pool."""
    train: TrainConfig
    init: str | None = None
    """Weights to start from: an open_clip tag of train.model, hub id, ARCHITECTURE@FILE or run folder; none: fresh."""
    augment: Augment = NO_AUGMENT
    """What is done to images in both phases; a phase's own train.augment goes before it."""
    finetune: FineTune | None = None
    """A second phase on other sets, and how the weights before and after it are mixed."""

    def __post_init__(self) -> None:
        if self.finetune:
            follow(self.train, self.finetune)


@config
class Recipe:
    """Every stage's choices; an absent stage is not run."""

    name: str
    source: str = ""
    """Paper and section, or what the recipe is for."""
    networks: dict[str, Network] = field(default_factory=dict)
    """Filter networks to train first, by name."""
    fit: dict[str, AnyFit] = field(default_factory=dict)
    """What to find in stored embeddings of the whole pool, by name: {kind: KIND (kmeans by default), option: value};
    `winnow fit` makes them in this order, filters read them (jobs/fit_kinds.py)."""
    score: list[dict[str, Any]] = field(default_factory=list)
    """Filters in order: {filter: KIND, name: NAME, option: value}; `winnow filters` lists them."""
    subsets: dict[str, list[Step]] = field(default_factory=dict)
    """Subset name -> steps; no step keeps the whole pool."""
    shards: ShardConfig = field(default_factory=ShardConfig)
    train: TrainConfig | None = None
    """How one model per subset is trained: the same number of samples seen for each (DataComp's principle)."""
    eval: EvalConfig = field(default_factory=EvalConfig)


def builtin_files() -> dict[str, str]:
    """Return name -> text of every recipe file that winnow ships, comments included."""
    files = sorted(importlib.resources.files("jobs").joinpath("recipes").iterdir(), key=lambda f: f.name)
    return {f.name.removesuffix(".yaml"): f.read_text() for f in files if f.name.endswith(".yaml")}


def builtin_recipes() -> dict[str, dict[str, Any]]:
    """Return name -> content of every recipe file that winnow ships."""
    return {name: yaml.safe_load(text) for name, text in builtin_files().items()}


def load_recipe(name: str | None, overrides: Sequence[str] = ()) -> Recipe:
    """Return a built-in recipe or the one in a YAML file, with overrides; None starts from nothing but defaults.

    A step that uses another subset has that subset's steps.
    Raises ConfigError naming the bad field, or (did you mean) an unknown recipe or subset.
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
    values = override(values, overrides)
    if isinstance(values.get("train"), Mapping):
        values["train"] = follow_train(values["train"])
    if isinstance(values.get(FIT), Mapping):
        values[FIT] = {name: read_fit(name, fit) for name, fit in values[FIT].items()}
    recipe = read_config(Recipe, values, where="recipe")
    check_names(recipe)
    score = [follow_fit(entry, recipe.fit) for entry in recipe.score]
    fit = {name: replace(config, rows=_expand_rows(config.rows, recipe.subsets)) for name, config in recipe.fit.items()}
    return replace(recipe, fit=fit, subsets=expand_uses(recipe.subsets), score=score)


def _expand_rows(rows: list[Step], subsets: Mapping[str, list[Step]]) -> list[Step]:
    """Return the steps that give a fit its rows, with those of the subsets that they use."""
    return expand_uses({**subsets, ROWS: rows})[ROWS]


def follow_train(train: Mapping[str, Any]) -> dict[str, Any]:
    """Return a train block with the fields of the built-in recipe that its `recipe` names, where it has none itself.

    `recipe: datacomp-small` means train-datacomp-small.yaml.  Raises ConfigError (did you mean) for an unknown one.
    """
    own = dict(train)
    if TRAIN_RECIPE not in own:
        return own
    known = {name.removeprefix("train-"): recipe for name, recipe in builtin_recipes().items() if "train-" in name}
    name = str(own.pop(TRAIN_RECIPE))
    check_name(name, known, kind="train recipe")
    return {**known[name]["train"], **own}


def check_names(recipe: Recipe) -> None:
    """Raise ConfigError when a score entry names a network or fit that there is not, or a name cannot name a folder."""
    for kind, names in (("network", recipe.networks), ("fit", recipe.fit), ("subset", recipe.subsets)):
        for name in names:
            check_file_name(name, kind=kind)
    for name in recipe.subsets:
        if name.startswith(EVALUATED_PREFIX):
            raise ConfigError(
                f"subset {name!r} would be evaluated where a network is: no subset's name begins with "
                f"{EVALUATED_PREFIX!r}. Call it something else."
            )
    for entry in recipe.score:
        model = entry.get("model")
        if isinstance(model, str) and model.startswith(NETWORK_PREFIX):
            check_name(model.removeprefix(NETWORK_PREFIX), recipe.networks, kind="network")
        if FIT in entry:
            check_name(str(entry[FIT]), recipe.fit, kind="fit")


def follow_fit(entry: dict[str, Any], fits: Mapping[str, AnyFit]) -> dict[str, Any]:
    """Return a score entry with the options that the fit it names decides, if it names one.

    Raises ConfigError when it says otherwise, its filter reads another kind of fit, or the fit finds no targets.
    """
    if FIT not in entry:
        return entry
    name = str(entry[FIT])
    config = fits[name]
    kind = FIT_KINDS[config.kind]
    if entry.get("filter") != kind.filter:
        raise ConfigError(
            f"score entry {entry!r}: fit {name!r} is of kind {config.kind!r}, for filter {kind.filter!r}."
        )
    if isinstance(config, FitConfig) and not config.targets and "targets" not in entry:
        raise ConfigError(f"score entry {entry!r} needs the targets of fit {name!r}. Say fit.{name}.targets=PATH.")
    for option in kind.options:
        value = getattr(config, option)
        if entry.get(option, value) != value:
            raise ConfigError(
                f"score entry {entry!r} has {option} {entry[option]!r}, and fit {name!r} has {value!r}. "
                f"Leave it out of the entry, or set fit.{name}.{option}."
            )
    return entry | {option: getattr(config, option) for option in kind.options}


def list_ready(entries: Sequence[dict[str, Any]], fitted: Collection[str]) -> list[dict[str, Any]]:
    """Return the score entries without a fit, and those whose fit is one of `fitted`."""
    return [entry for entry in entries if FIT not in entry or entry[FIT] in fitted]


def place_entry(entry: dict[str, Any], *, networks: str | None = None, fits: str | None = None) -> dict[str, Any]:
    """Return a score entry with the files in place of the network or fit that it names, made in these folders.

    Raises ConfigError when the folder is not known.
    """
    model = entry.get("model")
    if isinstance(model, str) and model.startswith(NETWORK_PREFIX):
        if networks is None:
            raise ConfigError(
                f"score entry {entry!r} uses a network that `winnow run` trains. Name its folder as model."
            )
        entry = entry | {"model": join(networks, model.removeprefix(NETWORK_PREFIX))}
    if FIT in entry:
        if fits is None:
            raise ConfigError(f"score entry {entry!r} needs what `winnow fit` makes. Say where that is with --fits.")
        kind = find_kind(str(entry.get("filter")))
        files = {option: join(fits, str(entry[FIT]), file) for option, file in kind.files.items()}
        entry = files | {name: value for name, value in entry.items() if name != FIT}
    return entry


def require_train(recipe: Recipe) -> TrainConfig:
    """Return the train section.  Raises ConfigError when there is none."""
    if recipe.train is None:
        raise ConfigError("this recipe does not train. Give a recipe that does, or train.model=NAME train.samples=N.")
    return recipe.train
