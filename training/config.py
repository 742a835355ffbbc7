"""TrainConfig: the choices of one training run.  A recipe's `train:` block is read into it."""

import math
from dataclasses import field
from typing import Any, Literal

from pipeline.config import as_mapping, config, read_config
from pipeline.errors import ConfigError, check_name

CHOICES = {
    "precision": ("fp32", "bf16", "fp16"),
    "optimizer": ("adamw", "adan", "lamb", "lion", "muon"),
    "schedule": ("cosine", "constant"),
    "loss": ("clip", "siglip"),
    "grad_checkpointing": ("none", "all", "conv"),
    "pixels": ("exact", "fast"),
    "sampler": ("exact", "datacomp"),
}
FREE_FIELDS = (
    "num_workers",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "log_every_steps",
    "grad_checkpointing",
    "report_to",
    "zeroshot",
    "shard_optimizer",
)
"""Fields that change how a run goes but not the weights it ends with; no part of its identity."""
LATER_FIELDS = {
    "heldout": 0,
    "optimizer": "adamw",
    "beta3": None,
    "schedule": "cosine",
    "loss": "clip",
    "accum_freq": 1,
    "patch_dropout": 0.0,
    "lock_text": None,
    "pixels": "exact",
    "cut_text": False,
    "sampler": "exact",
    "window_shards": 0,
}
"""Fields that say nothing at these values, so runs made before there were such fields keep their identity."""


def _check_range(
    name: str, value: float | None, *, low: float, below: float = math.inf, most: float = math.inf
) -> None:
    if value is None or (low <= value < below and value <= most):
        return
    bounds = "above 0" if 0 < low < 1 else f"at least {low}"
    bounds += "" if below == math.inf else f" and below {below}"
    bounds += "" if math.isfinite(value) else " and finite"
    raise ConfigError(f"{name} is {value}; it must be {bounds}{'' if most == math.inf else f' and at most {most}'}.")


@config
class Augment:
    """What is done to an image in training.  Names and meanings are open_clip's aug_cfg, but for flip_prob, its own.

    The DFN paper uses "additional augmentation" and does not name the operations; all of these are off by default.
    """

    scale: tuple[float, float] | None = None
    """Bounds of the random crop's share of the image area; null: the model's own, (0.9, 1) in open_clip."""
    flip_prob: float = 0.0
    """Chance of a horizontal flip.  It makes captions with `left`, `right` or legible text wrong."""
    color_jitter: tuple[float, float, float, float] | None = None
    """Strength of brightness, contrast, saturation and hue changes, torchvision's ColorJitter; hue at most 0.5."""
    color_jitter_prob: float = 0.0
    """Chance that an image is jittered."""
    gray_scale_prob: float = 0.0
    """Chance that an image loses its colours."""

    def __post_init__(self) -> None:
        for name in ("flip_prob", "color_jitter_prob", "gray_scale_prob"):
            _check_range(f"augment.{name}", getattr(self, name), low=0, most=1)
        if self.scale and not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(f"augment.scale is {self.scale}; it must be two shares in (0, 1], the smaller first.")
        if self.color_jitter_prob and self.color_jitter is None:
            raise ConfigError("augment.color_jitter_prob needs color_jitter, such as [0.4, 0.4, 0.4, 0.1].")
        for strength, most in zip(self.color_jitter or (), (math.inf, math.inf, math.inf, 0.5), strict=False):
            _check_range("augment.color_jitter", strength, low=0, most=most)


NO_AUGMENT = Augment()


@config
class Zeroshot:
    """On what a model is measured while it trains, and how often.  The weights it ends with are the same."""

    tasks: tuple[str, ...] = ()
    """Keys of the evaluation's task list (`winnow tasks`)."""
    own: tuple[str, ...] = ()
    """Names of further classification sets, as in the eval block."""
    every_samples: int
    """Samples seen between two points; the first step that reaches a multiple, and the last, have one."""

    def __post_init__(self) -> None:
        _check_range("zeroshot.every_samples", self.every_samples, low=1)
        if not self.tasks and not self.own:
            raise ConfigError("zeroshot names no task: say zeroshot.tasks=[imagenet1k], or leave zeroshot out.")


@config
class TrainConfig:
    """Defaults suit winnow's tiny models and tens of thousands of samples on a CPU; DataComp's scales set their own.

    Of batches of 64 and 128 and rates of 5e-4 to 2e-3, these gave the best zero-shot CIFAR-10 after 30,016 samples.
    """

    model: str
    """Model string as pipeline/clip_model.py describes; weights it names are where training starts."""
    samples: int
    """Samples seen (rows, repeats counted), exact; a multiple of batch_size."""
    batch_size: int = 64
    """Rows per step."""
    learning_rate: float = 5e-4
    """Peak, after warmup; cosine to 0 from there."""
    beta1: float = 0.9
    """Decay of the mean gradient; lion, muon and adan use it in their own sense."""
    beta2: float = 0.98
    """Decay of the mean squared gradient; adan and lion use it in their own sense."""
    beta3: float | None = None
    """Adan alone, which needs it: decay of the mean squared gradient.  Its paper has 0.98, 0.92, 0.99."""
    eps: float = 1e-6
    """Added to the denominator."""
    optimizer: Literal["adamw", "adan", "lamb", "lion", "muon"] = "adamw"
    """AdamW is torch's, fused; the others are timm's.  muon keeps AdamW for vectors and embeddings."""
    weight_decay: float = 0.2
    """On matrices only: see optim.py."""
    warmup_steps: int = 40
    """Steps over which the learning rate rises linearly; at least the run's steps means it never falls."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Of the learning rate after warmup."""
    loss: Literal["clip", "siglip"] = "clip"
    """siglip: a sigmoid per pair and a learned bias (arXiv:2303.15343), starting from scale 10 and bias -10."""
    grad_clip_norm: float | None = None
    """Greatest total gradient norm; null leaves gradients alone."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16 and fp16 are autocast: weights and optimiser stay float32.  fp16 scales the loss (GradScaler)."""
    accum_freq: int = 1
    """Parts a batch is computed in, one after the other; the loss is over the whole batch (gradient caching)."""
    patch_dropout: float = 0.0
    """Share of image patches left out at random in training (FLIP, arXiv:2212.00794)."""
    lock_text: str | None = None
    """Model string whose text tower is taken over and frozen (ViTamin's locked-text tuning); null trains it."""
    grad_checkpointing: Literal["none", "all", "conv"] = "none"
    """Activations computed again in the backward pass: of every block, or of ViTamin's conv stages alone."""
    shard_optimizer: bool = False
    """Of several processes each keeps the optimiser's state of some weights (sharding.py); the same result."""
    augment: Augment = NO_AUGMENT
    """What is done to images besides the model's own random crop."""
    pixels: Literal["exact", "fast"] = "exact"
    """exact: open_clip's, bit for bit; fast: twice as many images a second, some pixels off by 1/255 (images.py)."""
    cut_text: bool = False
    """Run the text tower for each caption about as far as it reaches: faster, the same to rounding (text.py)."""
    sampler: Literal["exact", "datacomp"] = "exact"
    """exact: every row floor or ceil of its share; datacomp: whole shards drawn with replacement (samplers.py)."""
    window_shards: int = 0
    """With sampler exact, for tars on an object store: shards that are read whole and shuffled together; 0: all."""
    heldout: int = 0
    """Rows kept out of training with their copies, drawn by the seed, so that retrieval can be measured on them."""
    seed: int = 0
    """Decides fresh weights, the order of rows, crops, captions, held-out rows and dropout."""
    num_workers: int = 0
    """Loader processes; 0 loads in a thread.  Batches are the same."""
    checkpoint_every_steps: int = 500
    """Steps between saves of the unfinished run, the most a kill can cost."""
    keep_checkpoints: int = 1
    """Newest saves that are kept; more than 1 stay when the run is finished, as weights to evaluate."""
    log_every_steps: int = 10
    """Steps between lines of metrics.jsonl."""
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Where those lines go as well; [] is nowhere.  wandb needs `pip install wandb`."""
    zeroshot: Zeroshot | None = None
    """Tasks that the model is measured on while it trains, with `--eval-data`."""

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            check_name(getattr(self, name), known, kind=name)
        counts = (
            "samples",
            "batch_size",
            "checkpoint_every_steps",
            "log_every_steps",
            "accum_freq",
            "keep_checkpoints",
        )
        for name in counts:
            _check_range(name, getattr(self, name), low=1)
        for name in ("weight_decay", "warmup_steps", "seed", "num_workers", "heldout", "window_shards"):
            _check_range(name, getattr(self, name), low=0)
        for name in ("learning_rate", "eps", "grad_clip_norm"):
            _check_range(name, getattr(self, name), low=math.ulp(0.0))
        for name in ("beta1", "beta2", "beta3", "patch_dropout"):
            _check_range(name, getattr(self, name), low=0, below=1)
        if (self.beta3 is None) == (self.optimizer == "adan"):
            raise ConfigError(
                f"optimizer {self.optimizer} with beta3 {self.beta3}: adan alone takes three betas, and means other "
                "things by the first two. For adan say beta1=0.98 beta2=0.92 beta3=0.99, its paper's."
            )
        _check_range("seed", self.seed, low=0, below=2**63)
        if self.window_shards and self.sampler != "exact":
            raise ConfigError(f"sampler {self.sampler} reads shards whole as it is: leave window_shards out.")
        _check_budget(self.samples, self.batch_size)
        if self.batch_size % self.accum_freq:
            raise ConfigError(f"batch_size {self.batch_size} does not divide into accum_freq {self.accum_freq} parts.")

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the run."""
        return self.samples // self.batch_size


def _check_budget(samples: int, batch_size: int) -> None:
    if batch_size < 2:
        raise ConfigError(f"batch_size is {batch_size}; a contrastive batch needs at least 2 rows.")
    if samples % batch_size:
        less, more = samples // batch_size * batch_size, -(-samples // batch_size) * batch_size
        near = f"{less} or {more}" if less else str(more)
        raise ConfigError(f"samples {samples} is not a multiple of batch_size {batch_size}: take {near}.")


def describe_choices(config: TrainConfig) -> dict[str, Any]:
    """Return the fields that decide the weights, ready for a manifest."""
    later = LATER_FIELDS | {"augment": NO_AUGMENT}
    silent = {name for name, value in later.items() if getattr(config, name) == value}
    return {name: value for name, value in as_mapping(config).items() if name not in silent.union(FREE_FIELDS)}


@config
class SetConfig:
    """One set to fine-tune on: captioned pairs, or a classification set whose captions are made from templates."""

    pairs: str | None = None
    """Pool or shards: folder, glob, brace range, a::b."""
    classes: str | None = None
    """A hub folder (wds_<task>_train: classnames.txt, train/nshards.txt, train/0.tar ...) or one folder per class."""
    templates: list[str] = field(default_factory=list)
    """Prompts with {c}; none: those in the folder's zeroshot_classification_templates.txt."""
    share: float | None = None
    """Of every epoch, relative to the other sets' and exact to the row; null: by size, every row once an epoch."""
    name: str = ""
    """In manifests; '' takes the last part of the path."""

    def __post_init__(self) -> None:
        if (self.pairs is None) == (self.classes is None):
            raise ConfigError(f"a set has either pairs or classes: pairs is {self.pairs}, classes is {self.classes}.")
        if self.pairs and self.templates:
            raise ConfigError(f"set {self.pairs!r} has captions of its own: templates are for classes.")
        _check_range("share", self.share, low=math.ulp(0.0))


@config
class FineTune:
    """The second phase of a filter network: training on, then mixing the weights before and after (ensemble.py)."""

    sets: list[SetConfig]
    train: dict[str, Any]
    """Fields of a train block; what it does not say is as in the first phase."""
    ensemble: float = 0.5
    """Share of the fine-tuned weights, in [0, 1].  DFN's is not published."""
    sweep: list[float] = field(default_factory=list)
    """Shares that get a checkpoint each.  With train.heldout the network is the one of best held-out retrieval."""

    def __post_init__(self) -> None:
        if not self.sets:
            raise ConfigError("finetune.sets is empty: name at least one set.")
        for share in (self.ensemble, *self.sweep):
            _check_range("finetune.ensemble or sweep", share, low=0, most=1)
        for name in ("model", "heldout"):
            if name in self.train:
                raise ConfigError(f"finetune.train.{name} is that of the first phase: set train.{name} instead.")


def follow(first: TrainConfig, finetune: FineTune) -> TrainConfig:
    """Return the choices of the second phase.  Raises ConfigError for some that do not go together."""
    values = as_mapping(first) | {"heldout": 0} | finetune.train
    return read_config(TrainConfig, values, where="finetune.train")
