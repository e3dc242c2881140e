"""Rewards that teach nothing: what a judge does under them is what training by itself does to it.

rewards={experiments/claims/controls.py:noise: 1.0}        a number drawn for each picture
rewards={experiments/claims/controls.py:Shuffled: 1.0}     the real scores, dealt out anew within each group
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from vipo import rewards
from vipo.types import Prompt


def noise(media: Tensor, _prompts: Sequence[Prompt]) -> Tensor:
    """A standard normal number a picture, drawn from its own pixels: the same picture gets the same number again."""
    return torch.tensor([_drawn(picture) for picture in media.cpu()])


class Shuffled:
    """``emoji_match``, but each picture gets the score of a group mate that its own pixels choose."""

    def __init__(self) -> None:
        self.real = rewards.build("emoji_match")

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        scores, drawn = self.real(media, prompts).clone(), noise(media, prompts)
        for text in dict.fromkeys(prompt.text for prompt in prompts):
            at = torch.tensor([i for i, prompt in enumerate(prompts) if prompt.text == text])
            scores[at] = scores[at[drawn[at].argsort()]]
        return scores


def _drawn(picture: Tensor) -> float:
    seed = int.from_bytes(hashlib.sha256(picture.numpy().tobytes()).digest()[:7], "big")
    return float(torch.randn((), generator=torch.Generator().manual_seed(seed)))
