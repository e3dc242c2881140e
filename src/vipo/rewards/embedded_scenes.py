"""Scorers that notice what a person notices in pictures of the embedded vocabulary: crowds, grain, broken objects.

    EmojiCount     are there as many of each object as the caption says, and nothing else?
    EmojiQuality   is the picture clean: no grain, blur, wrong colours, cut or torn objects?
    EmojiFlaws     where is it wrong, under its caption?
    EmojiClean     count x quality, to train on

Every caption of the vocabulary asks for one of each object it names. The first three are judges and share one network,
which never saw the generator's drawings; EmojiClean has another network, which saw no others. Pictures are resized to
64 px, videos scored frame by frame and averaged. Data and accuracy: ``vipo/embedded/judges/README.md``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vipo.embedded import VOCABULARY
from vipo.rewards.embedded import load_shipped, named_objects
from vipo.rewards.embedded_networks import PICTURE_SIZE, CleanNetwork, CriticNetwork, Reading
from vipo.types import Prompt
from vipo.vision.preprocess import resize

OBJECTS = len(VOCABULARY.names)


def count_score(counts: Float[Tensor, "B K"], named: Bool[Tensor, "B K"]) -> Float[Tensor, " B"]:
    """How right the numbers are, 0 to 1: 1 for one of each named object and nothing else; NaN where none is named.

    An object there ``n`` times instead of once gets min(n, 1) / max(n, 1): a half for two, nothing for none. Their mean
    is multiplied by named / (named + strays).
    """
    asked = named.sum(1)
    right = counts.clamp_max(1) / counts.clamp_min(1)
    strays = (counts * ~named).sum(1)
    score: Tensor = (right * named).sum(1) / (asked + strays)
    return torch.where(asked > 0, score, torch.nan)


class Critic:
    """The network of the three judges.

    Args:
        batch_size: pictures per forward pass.
    """

    def __init__(self, *, batch_size: int = 64) -> None:
        self.batch_size = batch_size
        self.network: nn.Module = load_shipped(CriticNetwork(OBJECTS), "critic")

    def read(
        self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]
    ) -> Iterator[tuple[Reading, Float[Tensor, "B 32 32"], Bool[Tensor, "B K"]]]:
        """Readings, flaw logits and named objects of all frames, part by part."""
        network = self.network.to(media.device)
        return ((*network(part, named), named) for part, named in _parts(media, prompts, self.batch_size))


def _parts(
    media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt], size: int
) -> Iterator[tuple[Float[Tensor, "B 3 64 64"], Bool[Tensor, "B K"]]]:
    """All frames, those of a clip one after the other, at most ``size`` at a time, and what their captions name."""
    images = resize(media.transpose(1, 2).flatten(0, 1), (PICTURE_SIZE, PICTURE_SIZE))
    named = named_objects(prompts).to(media.device).repeat_interleave(media.shape[2], 0)
    return zip(images.split(size), named.split(size), strict=True)


def _by_clip(values: Iterable[Tensor], media: Float[Tensor, "N 3 F Y X"]) -> Tensor:
    """Values of parts of all frames to means over the frames of each clip."""
    return torch.cat(list(values)).unflatten(0, (len(media), -1)).mean(1)


class EmojiCount(Critic):
    """The held-out judge of numbers, in [0, 1]: see ``count_score``."""

    def __call__(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Float[Tensor, " N"]:
        read = self.read(media, prompts)
        return _by_clip((count_score(reading.counts(named), named) for reading, _, named in read), media)

    def counts(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Float[Tensor, "N K"]:
        """How many there are of each vocabulary object, given which of them the captions name."""
        return _by_clip((reading.counts(named) for reading, _, named in self.read(media, prompts)), media)


class EmojiQuality(Critic):
    """The held-out judge of picture quality, in [0, 1], which forgives what the generator's autoencoder softens.

    The captions decide nothing but whether there is a score.
    """

    def __call__(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Float[Tensor, " N"]:
        return _by_clip((_worth(reading, named) for reading, _, named in self.read(media, prompts)), media)


class EmojiFlaws(Critic):
    """The held-out judge of places, in [0, 1]: one minus the mean of ``heat``."""

    def __call__(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Float[Tensor, " N"]:
        return 1 - self.heat(media, prompts).mean((1, 2))

    def with_evidence(
        self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, "N F 32 32"]]:
        """Scores, and minus the flaws of each frame."""
        flaws = self._flaws(media, prompts)
        return 1 - flaws.mean((1, 2, 3)), -flaws

    def heat(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Float[Tensor, "N 32 32"]:
        """Probability that a place is wrong under the caption: a copy too many, an object nobody named, a cut, blurred,
        torn or wrongly coloured one, a grainy ground. NaN without a caption of the vocabulary."""
        return self._flaws(media, prompts).mean(1)

    def _flaws(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Float[Tensor, "N F 32 32"]:
        read = self.read(media, prompts)
        heats = [logits.sigmoid().where(named.any(1)[:, None, None], torch.nan) for _, logits, named in read]
        return torch.cat(heats).unflatten(0, (len(media), -1))


class EmojiClean:
    """The reward for whole, clean pictures with one of each named object and nothing else, in [0, 1].

    Args:
        batch_size: pictures per forward pass.
    """

    def __init__(self, *, batch_size: int = 64) -> None:
        self.batch_size = batch_size
        self.network: nn.Module = load_shipped(CleanNetwork(OBJECTS), "clean")

    def __call__(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Float[Tensor, " N"]:
        network = self.network.to(media.device)
        return _by_clip((self._score(network(p), named) for p, named in _parts(media, prompts, self.batch_size)), media)

    def _score(self, reading: Reading, named: Bool[Tensor, "B K"]) -> Float[Tensor, " B"]:
        return count_score(reading.counts(named), named) * _worth(reading, named)


def _worth(reading: Reading, named: Bool[Tensor, "B K"]) -> Float[Tensor, " B"]:
    return reading.worth[:, 0].sigmoid().where(named.any(1), torch.nan)
