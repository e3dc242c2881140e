"""What is kept of an iteration's first groups for looking closer, see :mod:`vipo.media.recordings`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from vipo.assemble import Session, build_map_source
from vipo.media.recordings import PRODUCT, Recording, small
from vipo.options import COMPARE_SAMPLES, needs_sources
from vipo.structuring.sources import Product, TextRelevance
from vipo.types import MapSource, TrainStep

PICTURES, CLIPS = (4, 256), (2, 160)  # groups at most, and pixels along a side of their pictures


def recorded_step(step: TrainStep, session: Session, factors: Mapping[str, Float[Tensor, "N T H W"]]) -> Recording:
    """The first groups with every map that there is, and those of the sources that cost no pass of a network.

    Args:
        factors: the maps of a product, by the recipe's names.
    """
    rollout, latent_frames = step.rollout, step.rollout.latents.shape[2]
    groups, side = CLIPS if latent_frames > 1 else PICTURES
    kept = slice(0, groups * rollout.group_size)
    taken = _taken(step, session)
    maps = {**_cheap(step, session), **factors, **({taken: step.maps} if step.maps is not None else {})}
    return Recording(
        iteration=step.iteration,
        group_size=rollout.group_size,
        first_sample=rollout.first_sample,
        credit=session.recipe.credit,
        prompts=tuple(prompt.text for prompt in rollout.prompts[kept]),
        media=small(rollout.media[kept], latent_frames, session.generator.temporal_stride, side),
        scores={name: values[kept] for name, values in step.scores.by_name.items()},
        advantage=step.advantage[kept],
        weight=step.weight[kept],
        maps={name: values[kept] for name, values in maps.items()},
        taken=taken,
    )


def _taken(step: TrainStep, session: Session) -> str:
    """The name of what the credit took: a source, a product of several, or the credit's own map."""
    recipe = session.recipe
    if step.maps is None:
        return ""
    if not needs_sources(recipe.credit):
        return recipe.credit
    return recipe.structuring.sources[0] if len(recipe.structuring.sources) == 1 else PRODUCT


def factors_of(step: TrainStep, session: Session) -> dict[str, Float[Tensor, "N T H W"]]:
    """The maps of a product, by the recipe's names; made once more, since training keeps only their product.

    Not that of a source which asks the generator: its weights are others since the update, and where they are sharded
    every process would have to take part.
    """
    source = session.trainer.map_source
    if not isinstance(source, Product):
        return {}
    named = zip(session.recipe.structuring.sources, source.sources, strict=True)
    return {name: _asked(part, step) for name, part in named if not isinstance(part, TextRelevance)}


def _cheap(step: TrainStep, session: Session) -> dict[str, Float[Tensor, "N T H W"]]:
    """What compares the samples of a group, and what rewards said; none of it asks a network.

    Nothing is compared where a process has only a part of each group.
    """
    names: list[str] = [] if session.trainer.share.splits_groups else sorted(COMPARE_SAMPLES)
    names += ["evidence"] if step.scores.evidence else []
    device, scorer = str(step.rollout.latents.device), session.evaluation_scorer
    sections = {name: replace(session.recipe.structuring, sources=(name,)) for name in names}
    made = {name: build_map_source(how, session.generator, scorer, device) for name, how in sections.items()}
    return {name: _asked(source, step) for name, source in made.items()}


def _asked(source: MapSource, step: TrainStep) -> Float[Tensor, "N T H W"]:
    """Told of a sample without a score that its advantage is NaN, as in training."""
    known = step.advantage.where(step.scores.total.isfinite(), torch.nan)
    return source(step.rollout, known, step.scores)
