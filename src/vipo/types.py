"""What is handed from room to room: frozen records, the protocols of the parts, and the legend of shapes.

Legend, used in every annotation and docstring of the package:

====== =====================================================================================
N      samples in a batch; N = P * G when it is a whole iteration, groups are consecutive
P, G   prompts per iteration, samples per prompt (the group size)
R      recorded rows, over all samples; a transition is one solver step of one sample
C      latent channels
T H W  latent frames, latent height, latent width; an image is T = 1
F      video frames in pixel space
Y X    picture height and width in pixels
B D    pictures seen by a backbone, width of its features
h w    height and width of a backbone's feature grid
====== =====================================================================================

Latents are always ``(N, C, T, H, W)``. Media are always ``(N, 3, F, Y, X)``, float32 in [0, 1]. Anything a model wants
otherwise (token packing, value ranges, time scaling) happens inside that model's adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

Grid = tuple[int, int]  # (H, W)
LatentGrid = tuple[int, int, int]  # (T, H, W)


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor there. What the host sends to an accelerator waits for none of the work that is queued there."""
    return tensor.to(device, non_blocking=tensor.device.type == "cpu")


@dataclass(frozen=True)
class Prompt:
    """One line of the prompt file. ``index`` is its place in the file, ``metadata`` whatever stood beside it."""

    text: str
    index: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Batched:
    """A record whose fields are all tensors with the same leading dimension; it can be indexed and moved as one."""

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(**{f.name: change(getattr(self, f.name)) for f in fields(self)})

    def take(self, index: Int[Tensor, " k"]) -> Self:
        """The rows ``index``, in that order."""
        return self._map(lambda tensor: tensor[sent(index, tensor.device)])

    def to(self, device: torch.device | str) -> Self:
        return self._map(lambda tensor: sent(tensor, device))

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        return cls(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)})


@dataclass(frozen=True)
class Transitions(Batched):
    """The solver steps that will be trained on, flat over samples and steps: ``z`` at ``sigma`` went to ``z'``."""

    sample: Int[Tensor, " R"]  # which of the rollout's N samples
    step: Int[Tensor, " R"]  # which solver step of it
    sigma: Float[Tensor, " R"]
    sigma_next: Float[Tensor, " R"]
    latents: Float[Tensor, "R C T H W"]
    next_latents: Float[Tensor, "R C T H W"]
    log_prob: Float[Tensor, "R T H W"]  # under the weights that sampled it
    mean: Float[Tensor, "R c T H W"]  # of the step, under the same weights; c = C if the loss asked for it, else 0


@dataclass(frozen=True)
class Rollout:
    """One iteration's samples. ``media`` is decoded from the last step's clean prediction, not from a noisy latent."""

    prompts: tuple[Prompt, ...]  # N of them, groups consecutive
    group_size: int
    conditioning: Batched  # N rows, as the generator encoded them
    latents: Float[Tensor, "N C T H W"]  # the clean prediction
    media: Float[Tensor, "N 3 F Y X"]
    transitions: Transitions
    model_passes: int  # samples x steps actually run through the network, for the cost account
    sigmas: Float[Tensor, " levels"]  # the solver's grid, from 1 to 0
    first_sample: int = 0  # number of the first sample among those of all processes

    @property
    def latent_grid(self) -> LatentGrid:
        frames, height, width = self.latents.shape[2:]
        return frames, height, width

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Rollouts of consecutive groups as one."""
        offset, recorded = 0, []
        for part in parts:
            recorded.append(replace(part.transitions, sample=part.transitions.sample + offset))
            offset += len(part.prompts)
        return cls(
            prompts=tuple(prompt for part in parts for prompt in part.prompts),
            group_size=parts[0].group_size,
            conditioning=type(parts[0].conditioning).cat([part.conditioning for part in parts]),
            latents=torch.cat([part.latents for part in parts]),
            media=torch.cat([part.media for part in parts]),
            transitions=Transitions.cat(recorded),
            model_passes=sum(part.model_passes for part in parts),
            sigmas=parts[0].sigmas,
            first_sample=parts[0].first_sample,
        )


@dataclass(frozen=True)
class Scores:
    """Rewards of one rollout by name. NaN marks a sample that got no score; it is masked out, never replaced."""

    by_name: Mapping[str, Float[Tensor, " N"]]
    weights: Mapping[str, float]
    failures: Mapping[str, str] = field(default_factory=dict)  # reward name -> why its NaNs are there
    evidence: Mapping[str, Float[Tensor, "N T H W"]] = field(
        default_factory=dict
    )  # in [-1, 1]; a sample of NaN has none
    evidence_weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def total(self) -> Float[Tensor, " N"]:
        """The weighted sum of the raw rewards; NaN where any part is."""
        return torch.stack([self.weights[name] * values for name, values in self.by_name.items()]).sum(0)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Scores of consecutive groups as one."""
        failures: dict[str, str] = {}
        for part in parts:
            for name, why in part.failures.items():
                failures[name] = f"{failures[name]}; {why}" if name in failures else why
        by_name = {name: torch.cat([part.by_name[name] for part in parts]) for name in parts[0].by_name}
        evidence = {name: torch.cat([part.evidence[name] for part in parts]) for name in parts[0].evidence}
        return cls(by_name, parts[0].weights, failures, evidence, parts[0].evidence_weights)


@dataclass(frozen=True)
class FeatureMap:
    """What a backbone saw: one feature vector per cell. ``stride`` is the cell's side in input pixels."""

    features: Float[Tensor, "B D h w"]
    stride: int


@dataclass(frozen=True)
class TrainStep:
    """What one iteration did. ``metrics`` is reproducible bit for bit; ``seconds`` (wall time by phase) is not."""

    iteration: int
    metrics: Mapping[str, float]
    seconds: Mapping[str, float]
    events: tuple[str, ...]  # every guard that fired and what a resume changed, in words
    rollout: Rollout
    scores: Scores
    advantage: Float[Tensor, " N"]  # over all rewards, 0 for a sample without a score
    maps: Float[Tensor, "N T H W"] | None  # None for credits that use no map
    weight: Float[Tensor, "N *position"]  # of its ratio, before a solver step's factor; 0 of a sample not trained on
    failure: str | None = None  # why the run must end here, in words: nothing was learned


@runtime_checkable
class Generator(Protocol):
    """A text-to-image or text-to-video rectified-flow model behind one interface. One file per diffusers pipeline."""

    network: torch.nn.Module  # the denoiser: the only part that is trained
    temporal_stride: int  # pixel frames per latent frame; 1 for images
    shift: float  # the schedule shift the model ships with
    lora_targets: Mapping[str, str]  # named choices of linear layers, as regular expressions

    def encode(self, prompts: Sequence[str]) -> Batched:
        """Text to conditioning, one row per prompt."""

    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, T, H, W) of one sample."""

    def velocity(
        self, latents: Float[Tensor, "N C T H W"], sigma: Float[Tensor, " N"], conditioning: Any
    ) -> Float[Tensor, "N C T H W"]:
        """u = e - x at noise level sigma in [0, 1], guidance included, float32."""

    def decode(self, latents: Float[Tensor, "N C T H W"]) -> Float[Tensor, "N 3 F Y X"]:
        """Clean latents to media in [0, 1], float32."""

    def save_lora(self, folder: Path, layers: Mapping[str, Tensor]) -> None:
        """Write LoRA layers so that the plain diffusers pipeline's ``load_lora_weights(folder)`` reads them."""

    def save_pretrained(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the pipeline, its network with ``weights``, so that its ``from_pretrained(folder)`` reads it."""


@runtime_checkable
class KeepsText(Protocol):
    """A generator that can encode each prompt once only. One that cannot is asked again wherever a prompt is used."""

    def keep_text(self, ahead: Sequence[str], *, folder: Path | None, offload: bool) -> object:
        """From now on keep what was encoded, also in ``folder``; encode ``ahead`` now, and then, with ``offload``, let
        the text encoders leave the accelerator."""


@runtime_checkable
class NamesCutPrompts(Protocol):
    """A generator that knows how much of a prompt it reads."""

    def cut_prompts(self, **texts: Sequence[str]) -> list[str]:
        """A sentence for each kind of prompt, ``training`` for one, of which some are longer than it reads."""


@runtime_checkable
class KnowsPatches(Protocol):
    """A generator that knows which pixels one token of its network paints."""

    @property
    def patch_period(self) -> Grid:
        """Rows and columns of pixels: the autoencoder's stride times the patch."""


@runtime_checkable
class Reward(Protocol):
    """Scores media against prompts: one float per sample, higher is better, NaN where no score could be given.

    A dense reward has one method more, ``with_evidence(media, prompts)``, which returns ``(scores, evidence)`` of one
    pass: the scores of ``__call__``, and (N, T, H, W) numbers, -1 where the sample is at fault to 1 where it earned its
    score, at any resolution; see ``vipo.rewards.answer.Locating``.
    """

    def __call__(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Float[Tensor, " N"]: ...


@runtime_checkable
class Backbone(Protocol):
    """A frozen vision network: pictures in [0, 1] of any size to a grid of features."""

    def __call__(self, images: Float[Tensor, "B 3 Y X"]) -> FeatureMap: ...


@runtime_checkable
class MapSource(Protocol):
    """A rollout, its advantages, NaN for no score, and its scores, to one weight per latent position.

    The weight is not negative, but for the credits in ``SIGNED_MAPS``. See ``vipo.structuring.sources``.
    """

    def __call__(
        self, rollout: Rollout, advantage: Float[Tensor, " N"], scores: Scores | None = None
    ) -> Float[Tensor, "N T H W"]: ...


@runtime_checkable
class Scorer(Protocol):
    """All rewards of a run at once."""

    def __call__(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Scores: ...


@dataclass(frozen=True)
class LoraLayer:
    """What a LoRA adds to one layer's weight: ``scale`` * ``up`` @ ``down``."""

    down: Tensor
    up: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def halves(self) -> tuple[tuple[str, Tensor], tuple[str, Tensor]]:
        """Both by PEFT's names for them, to be taken with a scale of 1."""
        up = self.up if self.scale == 1 else (self.up.float() * self.scale).to(self.up.dtype)
        return ("lora_A", self.down), ("lora_B", up)
