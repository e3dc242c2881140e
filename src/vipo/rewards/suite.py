"""All rewards of a run as one scorer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from vipo.rewards.evidence import EvidenceGrid
from vipo.rewards.scoring import ENDLESS, Patience, score
from vipo.types import Prompt, Reward, Scores


@dataclass(frozen=True)
class RewardSuite:
    """Rewards with their weights as one :class:`vipo.types.Scorer`; stops the run if too many samples go unscored.

    Args:
        max_failed_share: of the samples of one call; a reward that fails on more stops the run.
        retries, pause_seconds, trains, must_reach, patience, evidence: of :func:`vipo.rewards.scoring.score`. Without
            ``trains`` it scores parts of an evaluation, in which samples without a score are NaN, however many.
    """

    rewards: Mapping[str, Reward]
    weights: Mapping[str, float]
    max_failed_share: float = 1.0
    retries: int = 2
    pause_seconds: float = 15.0
    trains: bool = True
    must_reach: bool = False
    patience: Patience = ENDLESS
    evidence: EvidenceGrid | None = None

    def __call__(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Scores:
        return score(
            self.rewards,
            self.weights,
            media,
            prompts,
            retries=self.retries,
            pause_seconds=self.pause_seconds,
            trains=self.trains,
            must_reach=self.must_reach,
            max_failed_share=self.max_failed_share,
            patience=self.patience,
            evidence=self.evidence,
        )
