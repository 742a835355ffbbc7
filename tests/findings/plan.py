"""What is trained and compared: filter networks, subsets, and how long each induced model trains."""

from dataclasses import dataclass, field, replace
from typing import Any

MODEL = "winnow-vit-tiny"
RIGHT_KINDS = ("clean", "exact_duplicate", "near_duplicate")
"""Kinds of the truth file whose caption is right."""
SHARE = 0.4
"""Kept share of the pool where nothing else is said; 43.9 % of the pool's captions are right."""
SAMPLES = 16_000
"""Samples an induced model sees, where nothing else is said."""
CLEAN, RAW = "clean", "raw"


@dataclass(frozen=True, slots=True)
class Net:
    """A filter network: where its epochs come from, how long it trains, and what follows."""

    sets: dict[str, float]
    """CLEAN or RAW -> share of every epoch."""
    samples: int = 16_000
    model: str = MODEL
    finetune: bool = False
    """Then on the clean images with class templates for captions, half of the weights kept."""


@dataclass(frozen=True, slots=True)
class Subset:
    """Steps over the scores, as a recipe has them, and the budgets it is trained for."""

    steps: list[dict[str, Any]]
    samples: tuple[int, ...] = (SAMPLES,)
    findings: tuple[str, ...] = field(default=())
    """Letters of the tables it stands in."""


NETS = {
    "raw": Net({RAW: 1}),
    "dfn": Net({CLEAN: 1}),
    "dfn_finetuned": Net({CLEAN: 1}, finetune=True),
    "spoiled_10": Net({CLEAN: 0.9, RAW: 0.1}),
    "spoiled_25": Net({CLEAN: 0.75, RAW: 0.25}),
    "spoiled_50": Net({CLEAN: 0.5, RAW: 0.5}),
    "dfn_2k": Net({CLEAN: 1}, samples=1_984),
    "dfn_4k": Net({CLEAN: 1}, samples=4_032),
    "dfn_8k": Net({CLEAN: 1}, samples=8_000),
    "dfn_64k": Net({CLEAN: 1}, samples=64_000),
    "raw_64k": Net({RAW: 1}, samples=64_000),
}
"""Every one keeps SHARE of the pool in finding c."""
FINETUNE_SAMPLES, FINETUNE_RATE = 8_000, 2e-4
BUDGETS = (4_032, SAMPLES)
FRACTIONS = (0.05, 0.1, 0.2, 0.3, SHARE, 0.6)


TEMPERATURE = 0.0707
"""1 / exp(logit_scale) of the DFN at the end of its training."""
LATER = [
    {"filter": "neg_clip_loss", "name": "ncl", "image": "dfn_img", "text": "dfn_txt", "tau": TEMPERATURE},
    {"filter": "norm_sim", "embedding": "dfn_img"},
    {"filter": "semdedup", "name": "near"},
]
"""Score entries of finding e; run.py adds the files that they read."""


def top(column: str, fraction: float) -> list[dict[str, Any]]:
    """Return the steps that keep a fraction of the pool."""
    return [{"name": f"top {fraction:.0%}", "top": {"by": column, "fraction": fraction}}]


BASIC = [
    {"name": "english", "where": "caption_language = 'en'"},
    {"name": "words", "where": "caption_words > 2"},
    {"name": "chars", "where": "caption_chars > 5"},
    {"name": "min side", "where": "image_min_side_px >= 200"},
    {"name": "aspect", "where": "image_aspect <= 3"},
]


def list_subsets() -> dict[str, Subset]:
    """Return the subsets by name."""
    subsets = {
        "none": Subset([], BUDGETS, ("a", "d")),
        "basic": Subset(BASIC, findings=("a",)),
        "oracle": Subset([{"name": "right", "where": f"kind IN {RIGHT_KINDS}"}], findings=("a",)),
    }
    letters = {"raw": "ac", "dfn": "abc", "dfn_finetuned": "ac"} | {f"spoiled_{p}": "bc" for p in (10, 25, 50)}
    for name in NETS:
        subsets[name] = Subset(top(f"{name}_similarity_score", SHARE), findings=tuple(letters.get(name, "c")))
    for fraction in FRACTIONS:
        subsets[name_fraction(fraction)] = Subset(top("dfn_similarity_score", fraction), BUDGETS, ("d",))
    subsets["dfn"] = replace(subsets["dfn"], findings=("a", "b", "c", "d", "e"))
    dfn = {"by": "dfn_similarity_score"}
    similar = [{"name": "top 60%", "top": dfn | {"fraction": 0.6}}, *top("norm_sim_score", SHARE)]
    apart = [{"name": "no near duplicate", "where": "near_similarity <= 0.95"}, *top("dfn_similarity_score", SHARE)]
    drawn = [{"name": "draws", "soft_cap": dfn | {"fraction": SHARE, "temperature": TEMPERATURE}}]
    steps = {"ncl": top("ncl_score", SHARE), "dfn_norm_sim": similar, "dfn_semdedup": apart, "dfn_soft_cap": drawn}
    return subsets | {name: Subset(steps[name], findings=("e",)) for name in steps}


def name_fraction(fraction: float) -> str:
    """Return the name of the subset that keeps a fraction of the pool by the DFN."""
    return "dfn" if fraction == SHARE else f"dfn_{fraction * 100:.0f}pc"
