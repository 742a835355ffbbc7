"""Filters: one score family per file.  A filter adds columns keyed by uid and drops nothing.

TABLE lists them.  To add one: write a module with an `Options` class, `build(name, options) -> Filter` and a pure
`score(batch) -> Scored` (pipeline/contract.py says what is promised), add one row below, and note its version
(tests/filters/test_versions.py).  Models open in `load`, once per worker, and heavy libraries are imported there, so
listing filters costs nothing.  A filter with a model returns a TwoStepScore from `load`: `prepare` decodes rows in
threads while `finish` runs the model on the rows before them (clip_score.py).  One that compares the rows
of a part sets `whole_part` (neg_clip_loss.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from filters import (
    caption_entities,
    caption_language,
    caption_length,
    clip_score,
    image_cluster,
    image_size,
    metaclip,
    metadata,
    neg_clip_loss,
    norm_sim,
    norm_sim_d,
    probe,
    semdedup,
)
from pipeline.config import read_config
from pipeline.contract import Filter
from pipeline.errors import ConfigError, check_name
from pipeline.schemas import FAILURES_FOLDER, POOL, SPANS_FOLDER
from pipeline.target_aware import TARGET_AWARE


@dataclass(frozen=True, slots=True)
class FilterKind:
    """One row of the table."""

    kind: str
    """What a recipe says after `filter:`."""
    options: type[Any]
    build: Callable[[str, Any], Filter]
    summary: str
    source: str


TAKEN_NAMES = (FAILURES_FOLDER, POOL, SPANS_FOLDER)
DATACOMP = "https://arxiv.org/abs/2304.14108"
DFN = "https://arxiv.org/abs/2309.17425"
NEG_CLIP_LOSS = "https://arxiv.org/abs/2405.19547"
METACLIP = "https://arxiv.org/abs/2309.16671"
SEMDEDUP = "https://arxiv.org/abs/2303.09540"

TABLE: tuple[FilterKind, ...] = (
    FilterKind("caption_length", caption_length.Options, caption_length.build, "words and characters", DATACOMP),
    FilterKind("caption_entities", caption_entities.Options, caption_entities.build, "ImageNet-21k entities", DATACOMP),
    FilterKind("caption_language", caption_language.Options, caption_language.build, "language, fastText", DATACOMP),
    FilterKind("image_size", image_size.Options, image_size.build, "shorter side in px, aspect ratio", DATACOMP),
    FilterKind("metadata", metadata.Options, metadata.build, "columns of the pool's own parquet", DATACOMP),
    FilterKind("image_cluster", image_cluster.Options, image_cluster.build, "cluster, is it a target's", DATACOMP),
    FilterKind("metaclip", metaclip.Options, metaclip.build, "metadata entries that a caption has", METACLIP),
    FilterKind("clip_score", clip_score.Options, clip_score.build, "image-text cosine under any CLIP or DFN", DFN),
    FilterKind("neg_clip_loss", neg_clip_loss.Options, neg_clip_loss.build, "cosine less batch noise", NEG_CLIP_LOSS),
    FilterKind("norm_sim", norm_sim.Options, norm_sim.build, "likeness to target images", NEG_CLIP_LOSS),
    FilterKind("norm_sim_d", norm_sim_d.Options, norm_sim_d.build, "left when the atypical go (fit)", NEG_CLIP_LOSS),
    FilterKind("semdedup", semdedup.Options, semdedup.build, "likeness to an earlier row (fit)", SEMDEDUP),
    FilterKind("probe", probe.Options, probe.build, "logit of a linear probe on embeddings (fit)", DFN),
)


def build_filter(entry: Mapping[str, Any]) -> Filter:
    """Return the filter that a recipe entry names: {filter: KIND, name: NAME (KIND by default), option: value, ...}.

    `target_aware: true` marks one that reads train data of evaluation tasks, where winnow cannot know it.

    Raises ConfigError (did you mean) for an unknown kind or option.
    """
    options = dict(entry)
    kind = options.pop("filter", None)
    if not isinstance(kind, str):
        raise ConfigError(f"score entry {dict(entry)!r} does not say which filter it is, as in `filter: clip_score`.")
    check_name(kind, [row.kind for row in TABLE], kind="filter")
    name = str(options.pop("name", kind))
    if not name.isidentifier() or not name.isascii():
        raise ConfigError(f"filter {name!r}: columns are named after it, so use letters, digits and '_' only.")
    if name in TAKEN_NAMES:
        raise ConfigError(f"filter {name!r}: winnow's own files and accounts are called that; give another `name:`.")
    is_aware = options.pop(TARGET_AWARE, False)
    if not isinstance(is_aware, bool):
        raise ConfigError(f"filter {name!r}: {TARGET_AWARE} is {is_aware!r}; say true or false.")
    row = next(row for row in TABLE if row.kind == kind)
    built = row.build(name, read_config(row.options, options, where=f"filter {name}"))
    return replace(built, target_aware=built.target_aware or is_aware)
