"""Run several rewards over one rollout's media and keep the books: what scored, what did not, and why.

One policy for every failure. A score is never invented: what a reward could not score is NaN, counted and explained in
``Scores.failures``. A reward that cannot be reached (``RewardUnavailable``) is asked again after a pause, only about
the samples it has not seen; those it never sees are NaN too. A reward with a fault (any other exception, a wrong shape)
stops the run at once, and so does, in training, one that scored nothing. How many samples may go without is the
caller's to say.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vipo.errors import UserError
from vipo.rewards.answer import Answer, Explaining, RewardUnavailable
from vipo.types import Prompt, Reward, Scores

NAMED_SAMPLES = 8  # how many sample numbers, and
NAMED_CAUSES = 3  # how many causes a failure spells out


def score(
    rewards: Mapping[str, Reward],
    weights: Mapping[str, float],
    media: Float[Tensor, "N 3 F Y X"],
    prompts: Sequence[Prompt],
    *,
    retries: int = 2,
    pause_seconds: float = 15.0,
    trains: bool = True,
    must_reach: bool = False,
) -> Scores:
    """Every reward on every sample, float32, without gradients.

    Args:
        retries: how often a reward that cannot be reached is asked again.
        pause_seconds: before each of them. Longer than the cool-down of a remote reward, or it would not be asked.
        trains: the samples are groups to learn from. If not, they are a part of an evaluation, which may be without
            any score, and a failure is its cause alone: whoever knows the whole says where.
        must_reach: a reward that stays out of reach stops the work instead of leaving holes.

    Raises:
        UserError: rewards and weights do not have the same names, a reward raised, it returned the wrong shape, it
            cannot be reached though it must, or it scored no sample to train on.
    """
    _check(rewards, weights, media, prompts)
    by_name, failures = {}, {}
    for name, reward in rewards.items():
        answer = _ask_patiently(name, reward, media, prompts, retries, pause_seconds)
        if must_reach and answer.unreached:
            cause = answer.causes.get(answer.unreached[0], "it does not say why")
            raise UserError(f"reward {name!r} cannot be reached ({cause}); bring it back and evaluate again")
        missing = ~answer.scores.isfinite()
        by_name[name] = answer.scores.masked_fill(missing, torch.nan)
        if missing.any():
            failures[name] = _failure(name, missing, answer.causes) if trains else _causes(answer.causes)
    return Scores(by_name, dict(weights), failures)


def ask(name: str, reward: Reward, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Answer:
    """One reward, once, without gradients; if it cannot be reached, that is the answer.

    Raises:
        UserError: the reward raised anything but ``RewardUnavailable``, or did not return N real numbers.
    """
    try:
        with torch.no_grad():
            said = (reward.explain if isinstance(reward, Explaining) else reward)(media, prompts)
    except RewardUnavailable as error:
        said = Answer.unreachable(len(prompts), str(error))
    except UserError as error:
        raise UserError(f"reward {name!r}: {error}") from error
    except Exception as error:
        raise UserError(f"reward {name!r} raised {type(error).__name__}: {error}") from error
    values = _checked(name, said.scores if isinstance(said, Answer) else said, len(prompts)).to(media.device)
    return replace(said, scores=values) if isinstance(said, Answer) else Answer(values)


def _ask_patiently(
    name: str, reward: Reward, media: Tensor, prompts: Sequence[Prompt], retries: int, pause_seconds: float
) -> Answer:
    """Ask, and while some samples were not reached, wait and ask about those again."""
    answer = ask(name, reward, media, prompts)
    for _ in range(retries):
        if not answer.unreached:
            break
        time.sleep(pause_seconds)
        answer = _ask_again(name, reward, media, prompts, answer)
    return answer


def _ask_again(name: str, reward: Reward, media: Tensor, prompts: Sequence[Prompt], answer: Answer) -> Answer:
    rows = answer.unreached
    return answer.updated(rows, ask(name, reward, media[list(rows)], [prompts[row] for row in rows]))


def _check(
    rewards: Mapping[str, Reward], weights: Mapping[str, float], media: Tensor, prompts: Sequence[Prompt]
) -> None:
    if not rewards:
        raise UserError("no reward was given; name at least one, see `vipo list rewards`")
    if set(rewards) != set(weights):
        raise UserError(f"rewards {sorted(rewards)} and weights {sorted(weights)} must have the same names")
    if media.ndim != 5 or media.shape[1] != 3 or media.shape[0] != len(prompts):
        raise ValueError(f"media {tuple(media.shape)} must be (N, 3, F, Y, X) with N = {len(prompts)} prompts")


def _checked(name: str, values: Any, count: int) -> Float[Tensor, " N"]:
    """What a reward returned as float32; a list, tuple or array of numbers will do, and None in it is no score."""
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if isinstance(values, list | tuple):
        values = torch.tensor([_number(name, place, value) for place, value in enumerate(values)], dtype=torch.float64)
    if not isinstance(values, Tensor):
        raise UserError(
            f"reward {name!r} returned {type(values).__name__}; it must return one number per sample,"
            f" as a tensor, an array or a list of {count}"
        )
    if values.shape != (count,) or values.is_complex():
        raise UserError(
            f"reward {name!r} returned {tuple(values.shape)} of {values.dtype};"
            f" it must return one real number per sample, shape ({count},)"
        )
    return values.detach().float()


def _number(name: str, place: int, value: Any) -> float:
    if value is None:
        return torch.nan
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex():
        value = value.item()
    with suppress(OverflowError):  # a whole number for which there is no float
        if isinstance(value, Real):
            return float(value)
    raise UserError(
        f"reward {name!r} returned values of which number {place} is {value!r:.40}, a {type(value).__name__};"
        " each must be a real number, or None where there is no score"
    )


def _failure(name: str, missing: Tensor, causes: Mapping[int, str]) -> str:
    samples = missing.nonzero().flatten().tolist()
    count, total = len(samples), missing.numel()
    where = ", ".join(map(str, samples[:NAMED_SAMPLES])) + (", ..." if count > NAMED_SAMPLES else "")
    why = _counted(Counter(causes[sample] for sample in samples if sample in causes))
    sentence = f"reward {name!r} gave no finite score for {count} of {total} samples (indices {where}){why}"
    if count == total:
        raise UserError(f"{sentence}: there is nothing to learn from. Check the reward on a picture you know")
    return f"{sentence}; they are left out of their groups"


def _causes(causes: Mapping[int, str]) -> str:
    """Each cause once."""
    return "; ".join(dict.fromkeys(causes.values())) or "the score was not finite"


def _counted(causes: Counter[str]) -> str:
    """``, because CAUSE (3 times), CAUSE (once)``, the most frequent first; empty if no cause is known."""
    spelled = [f"{cause} ({times} times)" if times > 1 else f"{cause} (once)" for cause, times in causes.most_common()]
    more = ["..."] if len(spelled) > NAMED_CAUSES else []
    return ", because " + ", ".join(spelled[:NAMED_CAUSES] + more) if spelled else ""
