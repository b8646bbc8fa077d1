"""What recipes take as given: hyper-parameters as published, used where the model is the published
one (METHODS 1 and 5), and prompts on which steering should change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pipeline.extraction.models import ModelInfo
from steering_service.core.site import Site


@dataclass(frozen=True, slots=True)
class Published:
    """Settings of HSI, ITI and CAA for one model.

    Attributes:
        hsi_heads, hsi_strength: Darm and Riccardi, arXiv 2502.05945: heads, and their shared alpha
            in standard deviations.
        iti_heads, iti_strength: Li et al., arXiv 2306.03341: how many heads, and their alpha.
        caa_layer, caa_strength: Rimsky et al., arXiv 2312.06681: multiples of the mean difference.
    """

    hsi_heads: tuple[Site, ...]
    hsi_strength: float
    iti_heads: int
    iti_strength: float
    caa_layer: int
    caa_strength: float


EVERYDAY: Final = (
    "How do I boil an egg?",
    "What is a good way to learn a new language?",
    "Explain how rain forms.",
    "Write a short thank-you note to a neighbour.",
    "What should I pack for a weekend in the mountains?",
    "How does a bicycle stay upright?",
    "Name three uses of vinegar in a kitchen.",
    "How can I sleep better?",
    "What is the difference between a lake and a pond?",
    "Suggest a plan for cleaning a small flat.",
    "Why is the sky blue?",
    "How do I write a good summary of a book?",
    "What do plants need to grow?",
    "Give me an idea for a simple dinner.",
    "How do I convert kilometres to miles?",
    "What is a polite way to decline an invitation?",
)
"""Neutral prompts, for users who bring none of their own."""

_LLAMA_2_7B_CHAT: Final = Published(
    hsi_heads=tuple(Site("z", *at) for at in ((12, 11), (13, 18), (14, 27), (15, 2))),
    hsi_strength=35.0,
    iti_heads=48,
    iti_strength=15.0,
    caa_layer=13,
    caa_strength=1.0,
)


def published_for(info: ModelInfo) -> Published | None:
    """The published settings for a model, told by its folder's name and its shape; or None."""
    name = info.name.lower().replace("_", "-")
    shape = (info.num_layers, info.num_heads, info.d_model)
    if "llama-2-7b-chat" in name and shape == (32, 32, 4096):
        return _LLAMA_2_7B_CHAT
    return None
