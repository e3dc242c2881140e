"""Run several rewards over one rollout's media and keep the books: what scored, what did not, and why.

A score is never invented: what a reward could not score is NaN, counted and explained in ``Scores.failures``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from vipo.types import Prompt, Reward, Scores, UserError


def score(
    rewards: Mapping[str, Reward],
    weights: Mapping[str, float],
    media: Float[Tensor, "N 3 F Y X"],
    prompts: Sequence[Prompt],
) -> Scores:
    """Every reward on every sample, float32, without gradients.

    Raises:
        UserError: rewards and weights do not have the same names, a reward raised, it returned the wrong shape, or it
            scored no sample at all.
    """
    _check(rewards, weights, media, prompts)
    by_name, failures = {}, {}
    for name, reward in rewards.items():
        values = _run(name, reward, media, prompts)
        missing = ~values.isfinite()
        by_name[name] = values.masked_fill(missing, torch.nan)
        if missing.any():
            failures[name] = _failure(name, missing)
    return Scores(by_name, dict(weights), failures)


def _check(
    rewards: Mapping[str, Reward], weights: Mapping[str, float], media: Tensor, prompts: Sequence[Prompt]
) -> None:
    if not rewards:
        raise UserError("no reward was given; name at least one, see `vipo list rewards`")
    if set(rewards) != set(weights):
        raise UserError(f"rewards {sorted(rewards)} and weights {sorted(weights)} must have the same names")
    if media.ndim != 5 or media.shape[1] != 3 or media.shape[0] != len(prompts):
        raise ValueError(f"media {tuple(media.shape)} must be (N, 3, F, Y, X) with N = {len(prompts)} prompts")


def _run(name: str, reward: Reward, media: Tensor, prompts: Sequence[Prompt]) -> Float[Tensor, " N"]:
    try:
        with torch.no_grad():
            values = reward(media, prompts)
    except Exception as error:
        raise UserError(f"reward {name!r} raised {type(error).__name__}: {error}") from error
    if not isinstance(values, Tensor):
        raise UserError(f"reward {name!r} returned {type(values).__name__}; it must return a tensor ({len(prompts)},)")
    if values.shape != (len(prompts),) or values.is_complex():
        raise UserError(
            f"reward {name!r} returned {tuple(values.shape)} of {values.dtype};"
            f" it must return one real number per sample, shape ({len(prompts)},)"
        )
    return values.detach().float().to(media.device)


def _failure(name: str, missing: Tensor) -> str:
    count, total = int(missing.sum()), missing.numel()
    where = ", ".join(map(str, missing.nonzero().flatten().tolist()[:8])) + (", ..." if count > 8 else "")
    sentence = f"reward {name!r} gave no finite score for {count} of {total} samples (indices {where})"
    if count == total:
        raise UserError(f"{sentence}: there is nothing to learn from. Check the reward on a picture you know")
    return f"{sentence}; they are left out of their groups"
