"""What a reward says about a batch: scores, why some are missing, and which samples are worth asking about again.

Most rewards return a plain tensor and need nothing of this. A reward that can fail sample by sample, such as one in
another process, has a method ``explain`` beside ``__call__``, so that the causes reach ``Scores.failures``. One that
knows where in a sample it found its score has a method ``with_evidence``, which gives both in one pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from vipo.types import Prompt


class RewardUnavailable(RuntimeError):  # noqa: N818 - a state that may pass, not a fault
    """The reward cannot be reached now and may be later. Any reward may raise it; see ``vipo.rewards.scoring``."""


@dataclass(frozen=True)
class Answer:
    """One reward's scores of N samples; NaN marks a sample without one.

    ``causes`` says why, by sample, where that is known. ``unreached`` are the samples that the reward never saw.
    ``evidence`` is (T, H, W) by sample, see :mod:`vipo.rewards.evidence`; a sample that is not there has none.
    """

    scores: Float[Tensor, " N"]
    causes: Mapping[int, str] = field(default_factory=dict)
    unreached: tuple[int, ...] = ()
    evidence: Mapping[int, Float[Tensor, "t h w"]] = field(default_factory=dict)

    @classmethod
    def unreachable(cls, count: int, cause: str) -> Self:
        """None of ``count`` samples was seen, all for the same cause."""
        samples = range(count)
        return cls(torch.full((count,), torch.nan), dict.fromkeys(samples, cause), tuple(samples))

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Batches of one call, in order."""
        whole = cls(torch.full((sum(len(part.scores) for part in parts),), torch.nan))
        start = 0
        for part in parts:
            whole = whole.updated(range(start, start + len(part.scores)), part)
            start += len(part.scores)
        return whole

    def updated(self, rows: Sequence[int], part: Answer) -> Self:
        """With ``part`` in the place of what was known of ``rows``."""
        scores = self.scores.clone()
        scores[list(rows)] = part.scores.to(scores.device)
        causes = {row: cause for row, cause in self.causes.items() if row not in rows}
        causes |= {rows[place]: cause for place, cause in part.causes.items()}
        unreached = [row for row in self.unreached if row not in rows] + [rows[place] for place in part.unreached]
        evidence = {row: found for row, found in self.evidence.items() if row not in rows}
        evidence |= {rows[place]: found for place, found in part.evidence.items()}
        return type(self)(scores, causes, tuple(unreached), evidence)

    def complete(self) -> Float[Tensor, " N"]:
        """The scores, for a caller that takes a plain tensor.

        Raises:
            RewardUnavailable: there are samples that the reward never saw.
        """
        if self.unreached:
            raise RewardUnavailable(self.causes[self.unreached[0]])
        return self.scores


@runtime_checkable
class Explaining(Protocol):
    """A reward that tells why a sample has no score."""

    def explain(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Answer: ...


@runtime_checkable
class Locating(Protocol):
    """A reward that tells where in a sample it found its score."""

    def with_evidence(
        self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, "N T H W"]] | Answer:
        """The scores of ``__call__``, and evidence: -1 (at fault) to 1 (earned) at each position, at any resolution,
        with one frame, or as many as the media or the latents; NaN throughout a sample that there is none for."""
