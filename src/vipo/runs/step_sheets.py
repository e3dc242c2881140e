"""An iteration's maps as a picture to look at: the first sample of each of the first groups."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vipo.assemble import Session
from vipo.media.map_sheets import clip_map_sheet, map_sheet
from vipo.options import NORMALISES_POSITIONS
from vipo.structuring import PerceptualStructuring, oriented_components
from vipo.structuring.sources import Perceptual, Product
from vipo.types import MapSource, TrainStep
from vipo.user_file import is_user_file

PICTURES, CLIPS = 6, 3  # at most so many rows
CAPTION = 120  # characters of a clip's prompt


def step_sheet(
    step: TrainStep,
    maps: Float[Tensor, "N T H W"],
    session: Session,
    factors: Mapping[str, Float[Tensor, "N T H W"]],
) -> Image.Image:
    """Picture, components (if the map has any), map and credit; of clips, their latent frames side by side.

    Args:
        factors: the maps of a product, by the recipe's names.
    """
    firsts = list(range(0, len(maps), step.rollout.group_size))
    texts = [step.rollout.prompts[i].text for i in firsts]
    rewards = [f"reward {float(step.scores.total[i]):.3f}" for i in firsts]
    credit = session.recipe.credit  # of some there is no one advantage for all positions
    by_sample = credit not in NORMALISES_POSITIONS and not is_user_file(credit)
    if maps.shape[1] > 1:
        short = [textwrap.shorten(text, CAPTION, placeholder=" ...") for text in texts]
        rows, captions = firsts[:CLIPS], _captions(short, rewards)[:CLIPS]
        stride, clips = session.generator.temporal_stride, step.rollout.media[rows]
        advantages = step.advantage[rows].tolist() if by_sample else None
        return clip_map_sheet(clips, maps[rows], captions, temporal_stride=stride, advantages=advantages)
    rows, captions = firsts[:PICTURES], _captions(texts, rewards)[:PICTURES]
    pictures, structuring = step.rollout.media[rows, :, 0], _structuring(session.trainer.map_source)
    parts = None if structuring is None else oriented_components(structuring, pictures)
    shown = {name: factor[rows, 0] for name, factor in factors.items()}
    advantages = step.advantage[rows].tolist() if by_sample else None
    return map_sheet(pictures, parts, maps[rows, 0], captions, factors=shown, advantages=advantages)


def _captions(texts: list[str], rewards: list[str]) -> list[str]:
    return [f"{text}\n{reward}" for text, reward in zip(texts, rewards, strict=True)]


def _structuring(source: MapSource | None) -> PerceptualStructuring | None:
    """The perceptual part of a map source, if it has one."""
    sources = source.sources if isinstance(source, Product) else [source]
    return next((part.structuring for part in sources if isinstance(part, Perceptual)), None)
