"""Where an allocation map may come from: one interface, ``MapSource``, from a rollout, its samples' advantages (NaN
where a sample has no score) and its scores to one weight per latent position.

==================== ==================================================================== ==========================
source               evidence e(p) at a position                                          needs
==================== ==================================================================== ==========================
``Perceptual``       the paper's: principal components of a backbone's features           a backbone
``RewardGradient``   |dR/dpixels|, root mean square over the position's pixels            a differentiable reward
``TextRelevance``    |v(z, text) - v(z, "")|, the change of the velocity with the text    two passes of the generator
``Disagreement``     variance of the latents over the group's samples                      nothing
``Deviation``        |latents - the group's mean|^2, of the sample itself                  nothing
``Consensus``        agreement with the better and disagreement with the worse mates      nothing
``Evidence``         sum_j c_j |e_j(p)|, what the rewards themselves say of p              a reward with evidence
==================== ==================================================================== ==========================

``Product`` multiplies any of them. All but the first go beyond the paper; docs/results.md says which one helps. Each is
smoothed (in latent cells) and normalised like the paper's map, so that they exchange without touching a learning rate;
only ``Own``, the user's, is taken as it is.
Only ``TextRelevance`` and the paper's cost a pass of a network; what a reward says of positions comes with its score.

``Flawless``, ``DenseEvidence`` and ``SignedConsensus`` are the maps of the credits ``flaw_map``, ``dense_reward`` and
``signed_consensus``, see :mod:`vipo.training.credit`. They are that credit's own and not normalised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vipo import randomness
from vipo.errors import UserError
from vipo.options import ConsensusOptions, DeviationOptions, MapOptions, Normalization
from vipo.structuring.frames import align_frames
from vipo.structuring.maps import consensus_map, deviation_map, normalise, signed_consensus_map, smooth
from vipo.structuring.perceptual import PerceptualStructuring
from vipo.types import Generator, MapSource, Prompt, Reward, Rollout, Scores, sent
from vipo.user_answer import checked, not_negative
from vipo.user_file import SOURCE, answering


@dataclass(frozen=True)
class Perceptual:
    """The paper's map: what a vision backbone sees in each picture."""

    structuring: PerceptualStructuring

    def __call__(
        self, rollout: Rollout, advantage: Float[Tensor, " N"], scores: Scores | None = None
    ) -> Float[Tensor, "N T H W"]:
        return self.structuring(rollout.media, rollout.latent_grid)


@dataclass(frozen=True)
class RewardGradient:
    """Where the reward looks: the size of its gradient with respect to the pixels.

    Args:
        rewards, weights: what is trained on; every reward must be differentiable in its media.
        temporal_stride: pixel frames per latent frame (causal, as in ``align_frames``).
        batch_size: samples per backward pass.
    """

    rewards: Mapping[str, Reward]
    weights: Mapping[str, float]
    smoothing_sigma: float = MapOptions.smoothing_sigma
    normalization: Normalization = MapOptions.normalization
    temporal_stride: int = 1
    batch_size: int = 32

    def __call__(
        self, rollout: Rollout, advantage: Float[Tensor, " N"], scores: Scores | None = None
    ) -> Float[Tensor, "N T H W"]:
        """Raises:
        UserError: a reward has no gradient.
        """
        frames, height, width = rollout.latent_grid
        parts = [slice(at, at + self.batch_size) for at in range(0, len(rollout.media), self.batch_size)]
        gradients = [self._gradient(rollout.media[part], rollout.prompts[part]) for part in parts]
        squared = torch.cat(gradients).square().mean(1)  # (N, F, Y, X)
        by_frame = F.adaptive_avg_pool2d(squared, (height, width)).sqrt()
        aligned = align_frames(by_frame, frames, temporal_stride=self.temporal_stride)
        return normalise(smooth(aligned, self.smoothing_sigma), self.normalization)

    def _gradient(self, media: Float[Tensor, "n 3 F Y X"], prompts: Sequence[Prompt]) -> Float[Tensor, "n 3 F Y X"]:
        media = media.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            total = torch.zeros((), device=media.device)
            scored = torch.ones(len(media), dtype=torch.bool, device=media.device)
            for name, reward in self.rewards.items():
                values = reward(media, prompts)
                if not isinstance(values, Tensor) or not values.requires_grad:  # a list of numbers has none either
                    raise UserError(f"reward {name!r} has no gradient; structuring.sources takes another source then")
                values = values.to(media.device)
                scored &= values.isfinite()
                total = total + self.weights[name] * values[values.isfinite()].sum()
            gradient = torch.autograd.grad(total, media)[0]
        # The way back through a missing score may be NaN. Such a sample has advantage 0, so any finite map will do.
        return gradient.where(scored[:, None, None, None, None], torch.zeros_like(gradient))


@dataclass(frozen=True)
class TextRelevance:
    """Where the prompt matters to the generator: how much its velocity changes when the text is taken away.

    The clean latents are noised again to ``sigma``, with one noise for all samples (after DiffEdit, arXiv 2210.11427).
    """

    generator: Generator
    sigma: float = 0.6
    smoothing_sigma: float = MapOptions.smoothing_sigma
    normalization: Normalization = MapOptions.normalization
    batch_size: int = 64

    @torch.no_grad()
    def __call__(
        self, rollout: Rollout, advantage: Float[Tensor, " N"], scores: Scores | None = None
    ) -> Float[Tensor, "N T H W"]:
        clean = rollout.latents
        noise = randomness.normal(tuple(clean.shape[1:]), [(0,)], seed=0, purpose="text relevance")
        noisy = (1 - self.sigma) * clean + self.sigma * sent(noise, clean.device)
        without = self.generator.encode([""])
        changes = []
        for at in torch.arange(len(clean), device=clean.device).split(self.batch_size):
            sigma = torch.full((len(at),), self.sigma, device=clean.device)
            told = self.generator.velocity(noisy[at], sigma, rollout.conditioning.take(at))
            untold = self.generator.velocity(noisy[at], sigma, without.take(torch.zeros_like(at)))
            changes.append((told - untold).norm(dim=1))
        return normalise(smooth(torch.cat(changes), self.smoothing_sigma), self.normalization)


@dataclass(frozen=True)
class Compares:
    """A map that compares the samples of a group, smoothed and normalised as the paper's is."""

    smoothing_sigma: float = MapOptions.smoothing_sigma
    normalization: Normalization = MapOptions.normalization

    @property
    def finish(self) -> dict[str, Any]:
        """As arguments of the functions that make such a map."""
        return {"smoothing_sigma": self.smoothing_sigma, "normalization": self.normalization}


@dataclass(frozen=True)
class Deviation(Compares):
    """Where a sample differs from its group, :func:`vipo.structuring.deviation_map`."""

    power: float = DeviationOptions.power

    def __call__(
        self, rollout: Rollout, advantage: Float[Tensor, " N"], scores: Scores | None = None
    ) -> Float[Tensor, "N T H W"]:
        return deviation_map(rollout.latents, rollout.group_size, power=self.power, **self.finish)


@dataclass(frozen=True)
class Consensus(Compares):
    """Where a sample agrees with its better group mates, :func:`vipo.structuring.consensus_map`."""

    floor: float = ConsensusOptions.floor

    def __call__(
        self, rollout: Rollout, advantage: Float[Tensor, " N"], scores: Scores | None = None
    ) -> Float[Tensor, "N T H W"]:
        return consensus_map(rollout.latents, advantage, rollout.group_size, floor=self.floor, **self.finish)


class Disagreement(Compares):
    """Where the samples of a group differ from each other: the variance of their latents, one map for the group."""

    def __call__(
        self, rollout: Rollout, advantage: Float[Tensor, " N"], scores: Scores | None = None
    ) -> Float[Tensor, "N T H W"]:
        variance = rollout.latents.unflatten(0, (-1, rollout.group_size)).var(1, correction=0).sum(1)
        maps = normalise(smooth(variance, self.smoothing_sigma), self.normalization)
        return maps.repeat_interleave(rollout.group_size, 0)


@dataclass(frozen=True)
class SignedConsensus:
    """Where a sample agrees with its better group mates and where it does not, :func:`signed_consensus_map`."""

    smoothing_sigma: float = MapOptions.smoothing_sigma

    def __call__(
        self, rollout: Rollout, advantage: Float[Tensor, " N"], scores: Scores | None = None
    ) -> Float[Tensor, "N T H W"]:
        return signed_consensus_map(
            rollout.latents, advantage, rollout.group_size, smoothing_sigma=self.smoothing_sigma
        )


@dataclass(frozen=True)
class Evidence:
    """Where the rewards say they found their scores, for good or bad; a sample without evidence gets ones."""

    smoothing_sigma: float = MapOptions.smoothing_sigma
    normalization: Normalization = MapOptions.normalization

    def __call__(
        self, rollout: Rollout, advantage: Float[Tensor, " N"], scores: Scores | None = None
    ) -> Float[Tensor, "N T H W"]:
        size = sum(weight * found.abs() for weight, found in _told(scores, self.smoothing_sigma))
        return normalise(torch.as_tensor(size).nan_to_num(0.0), self.normalization)


@dataclass(frozen=True)
class Flawless:
    """1 - H(p), H the mean of the rewards' flaws by the weights of their evidence; ones without evidence."""

    smoothing_sigma: float = 0.0

    def __call__(
        self, rollout: Rollout, advantage: Float[Tensor, " N"], scores: Scores | None = None
    ) -> Float[Tensor, "N T H W"]:
        told = _told(scores, self.smoothing_sigma)
        flaws = sum(weight * (-found).clamp_min(0) for weight, found in told) / sum(weight for weight, _ in told)
        return 1 - torch.as_tensor(flaws).nan_to_num(0.0)


@dataclass(frozen=True)
class DenseEvidence:
    """e(p), the sum of the rewards' evidence by its weights; NaN without evidence."""

    smoothing_sigma: float = 0.0

    def __call__(
        self, rollout: Rollout, advantage: Float[Tensor, " N"], scores: Scores | None = None
    ) -> Float[Tensor, "N T H W"]:
        return torch.as_tensor(sum(weight * found for weight, found in _told(scores, self.smoothing_sigma)))


def _told(scores: Scores | None, smoothing_sigma: float) -> list[tuple[float, Float[Tensor, "N T H W"]]]:
    """Weight and evidence of each reward that has some."""
    if scores is None or not scores.evidence:
        raise UserError(
            "no reward gave evidence, which credit or structuring.sources take; name a reward that has a method"
            " with_evidence, such as emoji_match, with a weight of its evidence above 0"
        )
    return [(scores.evidence_weights[name], smooth(found, smoothing_sigma)) for name, found in scores.evidence.items()]


@dataclass(frozen=True)
class Own:
    """A source of the user's own, ``file.py:thing``: its map is taken as it is, once it is sound.

    Args:
        signed: the map may be below 0, which a credit of the user's own can make sense of.
    """

    name: str
    function: Callable[..., Any]
    signed: bool = False

    def __call__(
        self, rollout: Rollout, advantage: Float[Tensor, " N"], scores: Scores | None = None
    ) -> Float[Tensor, "N T H W"]:
        """Raises:
        UserError: it raised, or gave no finite map for each sample, or one that is negative and must not be.
        """
        with torch.no_grad(), answering(SOURCE, self.name):
            given = self.function(rollout, advantage, scores)
        maps = checked(SOURCE, self.name, given, [(len(rollout.latents), *rollout.latent_grid)], "(N, T, H, W)")
        maps = maps.detach().to(rollout.latents.device, torch.float32)
        return maps if self.signed else not_negative(SOURCE, self.name, maps)


@dataclass(frozen=True)
class Product:
    """Positions that every source finds important."""

    sources: Sequence[MapSource]
    normalization: Normalization = MapOptions.normalization

    def __call__(
        self, rollout: Rollout, advantage: Float[Tensor, " N"], scores: Scores | None = None
    ) -> Float[Tensor, "N T H W"]:
        maps = torch.stack([source(rollout, advantage, scores) for source in self.sources])
        return normalise(maps.prod(0), self.normalization)
