"""What text encoders say, as records of one row per prompt."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from vipo.types import Batched


@dataclass(frozen=True)
class Conditioning(Batched):
    """A sequence of embeddings of one length, padding included."""

    prompt_embeds: Float[Tensor, "N L D"]


@dataclass(frozen=True)
class PooledConditioning(Conditioning):
    """A sequence, and one vector for the whole prompt."""

    pooled: Float[Tensor, "N P"]


@dataclass(frozen=True)
class PaddedConditioning(Conditioning):
    """A sequence that is zero after the prompt's last token; the network reads no padding."""

    words: Int[Tensor, " N"]  # tokens before the zeros

    def lengths(self) -> list[int]:
        """Words of each row; waits for the device, but saves reading padding."""
        return list(self.words.tolist())


class BlankConditioning(PaddedConditioning):
    """Rows without padding, whose length is their shape's: a plan has no values to look at."""

    def lengths(self) -> list[int]:
        return [self.prompt_embeds.shape[1]] * len(self.prompt_embeds)
