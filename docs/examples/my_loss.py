"""A loss of your own: the likelihood ratio times the weight, with a square in place of the clip."""

from dataclasses import dataclass

from vipo.training.losses import Clipped, Cost


@dataclass(frozen=True)
class Soft(Clipped):
    """Rows, the pass of the network and the ratio are those of ``clipped``; options are objective.loss_options."""

    stiffness: float = 1e3

    def surrogate(self, new, old, weight) -> Cost:  # log-probabilities and weights, (R,) or (R, T, H, W)
        """-mean(ratio * weight) + stiffness * mean((ratio - 1)^2)."""
        ratio = (new - old).exp()
        loss = -(ratio * weight).mean() + self.stiffness * (ratio - 1).square().mean()
        outside = ((ratio - 1).abs() > self.objective.clip_range).float().mean()
        numbers = {"loss": loss, "clipped_fraction": outside, "approx_kl": (ratio - 1 - new + old).mean()}
        return Cost(loss, {name: number.detach() for name, number in numbers.items()}, (new - old).detach().abs().max())
