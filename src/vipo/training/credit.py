"""Who gets the credit: factors of an advantage over objective, sample, position and solver step, and their product.

    weight(row) = clip( sum over objectives k of  A_k(i, p)  *  M_i(p) )  *  f(t)      for the row's sample i and step t

================ ======== ============================================= ====================================
credit           ratio    A_k(i, p)  and  M_i(p)                        is
================ ======== ============================================= ====================================
sample           scalar   A_k(i)                                        DanceGRPO, Flow-GRPO
uniform          local    A_k(i), ones                                  the paper's ablation
reward_map       local    (M_i(p) r_k,i) normalised per position        the paper's ablation
advantage_map    local    A_k(i), M_i(p)                                ViPO (arXiv 2511.18719)
flaw_map         local    A_k(i), 1 - H_i(p)                            ImageDoctor's code (arXiv 2510.01010)
dense_reward     local    (r_k,i + std_group(r_k) e_i(p)) normalised    BoxFlow-GRPO (arXiv 2606.06113)
                          per position: the sign may differ
signed_consensus local    A_k(i), S_i(p): the sign may differ           ours, of ``consensus`` before the relu
================ ======== ============================================= ====================================

Evidence e_j,i(p) in [-1, 1] is what reward j says of position p beside its score, and c_j its weight, ``evidence`` of
the reward in the recipe:

    H_i(p) = sum_j c_j relu(-e_j,i(p)) / sum_j c_j,        e_i(p) = sum_j c_j e_j,i(p)

With one judge of flaws W in [0, 1], e = -W, these are 1 - W, which is not brought to mean 1, and r - c W std_group(r);
two that weigh the same give ImageDoctor's H = (misalignment + artefact) / 2. A third way in is ViPO's, M from |e|: the
map source ``evidence``. A reward k whose weight is negative takes -e, so that what its judges found good stays good. A
sample without evidence keeps A_k(i) at every position, and is left out where others are compared position by position.

The factor f of a step, mean 1 over the steps that a run may train on (:func:`step_factor`):

=========== ============================================================== ====================================
equal       1                                                              GRPO
noise_level std of the step: steps that explore more learn more            TempFlow-GRPO (arXiv 2508.04324)
gradient    std / (d mean / d u): each step's gradient has one size        Flash-GRPO (arXiv 2605.15980)
=========== ============================================================== ====================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vipo import sde
from vipo.errors import UserError
from vipo.objective import combine_advantages, dense_reward, sound, weighted
from vipo.options import NEEDS_MAPS, SIGNED_MAPS, CreditKind, Objective, Solver
from vipo.registry import parameters
from vipo.types import Rollout, Scores, sent
from vipo.user_answer import checked
from vipo.user_file import CREDIT, answering

OFFERED = ("advantage", "maps", "scores", "rollout")  # to a credit of the user's own


@dataclass(frozen=True)
class Credit:
    """The factors of one iteration's weights.

    Args:
        advantage: of each sample, over all objectives; 0 for a sample without a score.
        local: the weight of each sample, (N,) under one ratio per sample or (N, T, H, W) under local ones, clipped.
        step: the factor of each solver step.
        sound: whether the maps it was made of were, see :func:`vipo.objective.check_maps`; asked before an update.
    """

    advantage: Float[Tensor, " N"]
    local: Float[Tensor, "N *position"]
    step: Float[Tensor, " S"]
    sound: Bool[Tensor, ""]

    def weight(self, sample: Int[Tensor, " R"], step: Int[Tensor, " R"]) -> Float[Tensor, "R *position"]:
        """What multiplies the ratio of recorded rows."""
        chosen = self.local[sent(sample, self.local.device)]
        factor = self.step[sent(step, self.step.device)]
        return chosen * factor.reshape(-1, *[1] * (chosen.ndim - 1))


def takes_maps(credit: CreditKind | OwnCredit) -> bool:
    """Whether it takes what a map source gives."""
    return "maps" in credit.asks if isinstance(credit, OwnCredit) else credit in NEEDS_MAPS


def is_signed(credit: CreditKind | OwnCredit) -> bool:
    """Whether its maps may be negative."""
    return isinstance(credit, OwnCredit) or credit in SIGNED_MAPS


def combined(objective: Objective, scores: Scores, group_size: int) -> Float[Tensor, " N"]:
    """A_i over all objectives; 0 for a sample without a score."""
    rewards, weights = _objectives(objective, scores)
    return combine_advantages(rewards, weights, group_size)


def assign(
    credit: CreditKind,
    objective: Objective,
    scores: Scores,
    advantage: Float[Tensor, " N"],
    maps: Float[Tensor, "N T H W"] | None,
    grid: tuple[int, int, int],
    group_size: int,
    step: Float[Tensor, " S"],
) -> Credit:
    """The credit of one iteration's samples.

    Args:
        advantage: of :func:`combined`.
        maps: needed by the credits in ``NEEDS_MAPS``; ``grid`` is their (T, H, W) where there are none. For
            ``dense_reward`` they are e, NaN throughout a sample without evidence.
        step: of :func:`step_factor`.

    Raises:
        ValueError: an unknown credit, or maps that are missing.
    """
    if credit not in get_args(CreditKind):
        raise ValueError(f"credit={credit!r} is not known; choose from {', '.join(get_args(CreditKind))}")
    if maps is None and credit in NEEDS_MAPS:
        raise ValueError(f"credit={credit!r} needs maps of shape (N, T, H, W)")
    if credit == "sample":
        local = advantage
    elif maps is None or credit == "uniform":
        local = _everywhere(advantage, grid)
    elif credit == "reward_map":
        rewards, weights = _objectives(objective, scores)
        seen = {name: maps * values[:, None, None, None] for name, values in rewards.items()}
        local = combine_advantages(seen, weights, group_size)
    elif credit == "dense_reward":
        local = _dense(objective, scores, advantage, maps, group_size)
    else:
        local = weighted(advantage, maps)
    are_sound = torch.ones((), dtype=torch.bool, device=local.device)
    if maps is not None:  # of signed ones only the outcome must be finite
        are_sound = local.isfinite().all() if credit in SIGNED_MAPS else sound(maps)
    return Credit(advantage, local.clamp(-objective.advantage_clip, objective.advantage_clip), step, are_sound)


@dataclass(frozen=True)
class OwnCredit:
    """A credit of the user's own, ``file.py:thing``: the weight of each sample, (N,) or (N, T, H, W), from what it asks
    for by name of ``advantage`` (N,), 0 where a sample has no score, ``maps`` (N, T, H, W) of the recipe's sources,
    ``scores`` and ``rollout``.

    Raises:
        UserError: it asks for something else.
    """

    name: str
    function: Callable[..., Any]

    def __post_init__(self) -> None:
        lacking = [
            name for name, p in parameters(self.function).items() if p.default is p.empty and name not in OFFERED
        ]
        if lacking:
            raise UserError(
                f"credit {self.name!r} asks for {lacking[0]!r}; it is given, by name, {', '.join(OFFERED)}, and with"
                " credit_options a function is called that makes it"
            )

    @cached_property
    def asks(self) -> tuple[str, ...]:
        """What it is given."""
        return tuple(name for name in parameters(self.function) if name in OFFERED)

    def __call__(
        self,
        objective: Objective,
        scores: Scores,
        advantage: Float[Tensor, " N"],
        maps: Float[Tensor, "N T H W"] | None,
        rollout: Rollout,
        step: Float[Tensor, " S"],
    ) -> Credit:
        """The credit of one process's samples; a sample without a score weighs nothing, whatever it says of it.

        Raises:
            UserError: it raised, or gave no finite weights.
        """
        offered = {"advantage": advantage, "maps": maps, "scores": scores, "rollout": rollout}
        with torch.no_grad(), answering(CREDIT, self.name):
            given = self.function(**{name: offered[name] for name in self.asks})
        if isinstance(given, Tensor) and given.ndim > 0 and len(given) == len(advantage):
            scored = sent(scores.total.isfinite(), given.device).reshape(-1, *[1] * (given.ndim - 1))
            given = given.where(scored, torch.zeros_like(given))
        shapes = [(len(advantage),), (len(advantage), *rollout.latent_grid)]
        weight = checked(CREDIT, self.name, given, shapes, "(N,) or (N, T, H, W)")
        local = weight.detach().to(advantage.device, torch.float32)
        bound, sound_as_checked = objective.advantage_clip, torch.ones((), dtype=torch.bool, device=local.device)
        return Credit(advantage, local.clamp(-bound, bound), step, sound_as_checked)


def _everywhere(advantage: Float[Tensor, " N"], grid: tuple[int, int, int]) -> Float[Tensor, "N T H W"]:
    return weighted(advantage, torch.ones(len(advantage), *grid, device=advantage.device))


def _dense(
    objective: Objective, scores: Scores, advantage: Tensor, evidence: Float[Tensor, "N T H W"], group_size: int
) -> Float[Tensor, "N T H W"]:
    """Each reward and its evidence compared in the groups at each position; A_i where a sample has no evidence."""
    rewards, weights = _objectives(objective, scores)
    seen = {
        name: dense_reward(values, -evidence if weights[name] < 0 else evidence, group_size)
        for name, values in rewards.items()
    }
    local = combine_advantages(seen, weights, group_size).to(advantage.dtype)
    grid = (evidence.shape[1], evidence.shape[2], evidence.shape[3])
    return local.where(~evidence.isnan(), _everywhere(advantage, grid))


def _objectives(objective: Objective, scores: Scores) -> tuple[Mapping[str, Tensor], Mapping[str, float]]:
    """What is normalised in the groups and then summed: every reward, or their sum alone."""
    if objective.combine == "reward":
        return {"reward": scores.total}, {"reward": 1.0}
    return scores.by_name, scores.weights


def step_factor(objective: Objective, solver: Solver, sigmas: Float[Tensor, " levels"]) -> Float[Tensor, " S"]:
    """f(t) of every solver step; 1 for a step that is never trained on. ``sigmas`` is the solver's grid."""
    factor = torch.ones(solver.steps, device=sigmas.device)
    steps = list(solver.candidates)
    if objective.step_weight == "equal" or not steps:
        return factor
    here = sent(torch.tensor(steps), sigmas.device)
    moved, std = sde.step_scale(sigmas[here], sigmas[here + 1], kind=solver.kind, eta=solver.eta)
    chosen = std if objective.step_weight == "noise_level" else std / moved.abs()
    factor[here] = chosen / chosen.mean()
    return factor


def flat_groups(advantage: Float[Tensor, " N"], group_size: int) -> Float[Tensor, ""]:
    """The share of groups that teach nothing: no two different scores are left in them."""
    return (advantage.unflatten(0, (-1, group_size)) == 0).all(1).float().mean()
