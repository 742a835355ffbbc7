"""Released networks by hub id, with the licence that their publisher gives: the one place that says so.

winnow ships no weights.  A licence is what the model card says and binds whoever uses the weights; what is not listed
here is unknown, never free.  Sources: the model cards as stored copies of huggingface.co show them; for Apple's, the
merged pull requests "AMLR license" of the six repositories; Fang et al. 2023 (arXiv:2309.17425), appendix.
"""

from dataclasses import dataclass

CARD_URL = "https://huggingface.co/{}"


@dataclass(frozen=True, slots=True)
class Released:
    """A network that anyone can download."""

    hub: str
    """Its id on the Hugging Face hub; a model string as it stands, and with `hf-hub:` before it."""
    licence: str
    """As the model card names it."""
    about: str
    is_checked: bool
    """Whether a copy of the card with this licence was read; otherwise it is that of the publisher's other models."""


AMLR = "apple-amlr (research only; until 2025 apple-sample-code-license)"
RELEASED: tuple[Released, ...] = (
    Released("apple/DFN-public", AMLR, "a DFN: ViT-B/32 on CC12M, CC3M, Shutterstock 15M; 1.28 B samples", True),
    Released("apple/DFN2B-CLIP-ViT-B-16", AMLR, "CLIP trained on DFN-2B, not its filter; 12.8 B samples", True),
    Released("apple/DFN2B-CLIP-ViT-L-14", AMLR, "CLIP trained on DFN-2B, not its filter; 12.8 B samples", True),
    Released("apple/DFN2B-CLIP-ViT-L-14-39B", AMLR, "CLIP trained on DFN-2B, not its filter; 39 B samples", True),
    Released("apple/DFN5B-CLIP-ViT-H-14", AMLR, "CLIP trained on DFN-5B, not its filter; 39 B samples", True),
    Released("apple/DFN5B-CLIP-ViT-H-14-378", AMLR, "the same, 5 B samples more at 378 px", True),
    Released("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "mit", "CLIP trained on LAION-2B; 34 B samples", False),
    Released("laion/CLIP-ViT-L-14-laion2B-s32B-b82K", "mit", "CLIP trained on LAION-2B; 32 B samples", True),
    Released("laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K", "mit", "CLIP trained on DataComp-1B; 13 B samples", False),
    Released("laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K", "mit", "CLIP trained on DataComp-1B; 13 B samples", False),
)


def find_released(hub: str) -> Released | None:
    """Return the row of a hub id, or None for one that is not listed."""
    return next((row for row in RELEASED if row.hub == hub), None)


def spell_licence(hub: str) -> str:
    """Return the licence of a hub id in words, and where to read it; one that is not listed has an unknown licence."""
    row, url = find_released(hub), CARD_URL.format(hub)
    if row is None:
        return f"unknown to winnow; read {url}"
    return f"{row.licence}{'' if row.is_checked else ', not verified'}; read {url}"
