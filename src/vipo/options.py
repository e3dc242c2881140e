"""The options of a run's parts, each declared once: type, bounds, default, unit and meaning.

A recipe holds these records as they are, pydantic checks them, ``vipo list keys`` prints them, and the part that uses
one takes it whole. No torch here, so that a wrong key is told before anything heavy is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from vipo.user_file import is_user_file

Kind = Literal["dance", "flow", "cps", "ode"]
Reduce = Literal["mean", "sum"]
Schedule = Literal["random", "sliding", "fixed"]
CreditKind = Literal["sample", "uniform", "reward_map", "advantage_map", "flaw_map", "dense_reward", "signed_consensus"]
Combination = Literal["advantage", "reward"]
LossKind = Literal["clipped", "guard", "matching"]
Ratio = Literal["local", "detached"]
StepWeight = Literal["equal", "noise_level", "gradient"]
Aggregation = Literal["variance", "average", "first"]
RateSchedule = Literal["constant", "cosine", "linear"]
Normalization = Literal["unit_mean", "minmax"]
Orientation = Literal["background", "border_distance", "border", "skewness", "energy", "release"]
Scope = Literal["frame", "clip"]
Sharding = Literal["none", "fsdp2", "zero2", "zero3"]
BUCKET = 2**26  # gradients that ZeRO reduces at once; DeepSpeed's own 5e8 are 2 GB that a LoRA never fills
ContextExchange = Literal["ulysses", "ring"]
Quantization = Literal["none", "nf4", "int8", "float8", "float8_storage"]
TextQuantization = Literal["none", "nf4", "int8"]
OptimizerKind = Literal["adamw", "adamw8bit"]
OnTimeout = Literal["stop", "mask"]
TrackerName = Literal["tensorboard", "trackio", "wandb", "swanlab"]
SourceName = Literal[
    "perceptual", "reward_gradient", "text_relevance", "disagreement", "deviation", "consensus", "evidence"
]

CREDIT_MEANINGS: Mapping[str, str] = {
    "sample": "one advantage for the whole picture (scalar GRPO)",
    "uniform": "a map of ones (ablation)",
    "reward_map": "the reward times an allocation map (ablation)",
    "advantage_map": "the group advantage times an allocation map (ViPO)",
    "flaw_map": "the group advantage times one minus the flaws that rewards with evidence see (ImageDoctor's code)",
    "dense_reward": "the reward plus its evidence, normalised in the group at each position (BoxFlow-GRPO)",
    "signed_consensus": "the group advantage times consensus before it is cut at 0: a position's sign may differ",
}
"""What each name of ``credit`` multiplies a ratio with, see :mod:`vipo.training.credit`."""

LOSS_MEANINGS: Mapping[str, str] = {
    "clipped": "clipped surrogate of the likelihood ratio, scalar or local (GRPO, ViPO)",
    "guard": "clipped surrogate without the bias of the ratio, one scale for every step (GRPO-Guard, arXiv 2510.22319)",
    "matching": "advantage-weighted flow matching, without a ratio: any solver samples (AWM, arXiv 2509.25050)",
}
"""What each name of ``objective.loss`` minimises, see :mod:`vipo.training.losses`."""

SOURCE_MEANINGS: Mapping[str, str] = {
    "perceptual": "principal components of what structuring.backbone sees in a picture (the paper)",
    "reward_gradient": "size of the reward's gradient by the pixels; needs differentiable rewards",
    "text_relevance": "change of the generator's velocity with the prompt; two more passes",
    "disagreement": "variance of the latents over the samples of a group, one map for all of them",
    "deviation": "squared distance of a sample's latents from the mean of its group",
    "consensus": "agreement of a sample's deviation with that of its better group mates, and not of its worse ones",
    "evidence": "size of what the rewards themselves say of each position; needs a reward with evidence",
}
"""Where each name of ``structuring.sources`` takes a map from, see :mod:`vipo.structuring.sources`."""

COMPARE_SAMPLES: frozenset[SourceName] = frozenset({"deviation", "disagreement", "consensus"})
"""Sources of maps that a whole group is needed for."""

ONE_NOISE: frozenset[SourceName] = frozenset({"deviation", "disagreement"})
"""Those of them that take every difference for the steps' doing, and so want samples that start from one noise."""

NEEDS_SOURCES: frozenset[CreditKind] = frozenset({"reward_map", "advantage_map"})
"""Credits that take what ``structuring.sources`` give; so may one of the user's own, see :func:`needs_sources`."""

NEEDS_MAPS: frozenset[CreditKind] = NEEDS_SOURCES | {"flaw_map", "dense_reward", "signed_consensus"}
"""Those, and the ones with a map of their own."""

SIGNED_MAPS: frozenset[CreditKind] = frozenset({"dense_reward", "signed_consensus"})
"""Credits whose map may be negative, and so turn a position's sign."""

NORMALISES_POSITIONS: frozenset[CreditKind] = frozenset({"reward_map", "dense_reward"})
"""Credits that compare a group's samples at each position."""


def needs_sources(credit: str) -> bool:
    """Whether a credit takes what ``structuring.sources`` give, as far as its name says: one of a file's may."""
    return credit in NEEDS_SOURCES or is_user_file(credit)


def _or_file(known: Any) -> Any:
    """What a recipe takes as a name: one of those that are ``known``, or ``file.py:thing``."""
    names = get_args(known)

    def check(given: str) -> str:
        if given in names or is_user_file(given):
            return given
        expected = ", ".join(map(repr, names))
        raise PydanticCustomError(
            "literal_error", "Input should be {expected} or file.py:thing", {"expected": expected}
        )

    return AfterValidator(check)


CreditName = Annotated[str, _or_file(CreditKind)]
SourceOrFile = Annotated[str, _or_file(SourceName)]

TIMEOUT = 1800.0  # seconds that processes wait for each other, unless a recipe says otherwise
MAX_STEPS = 1000  # of a solver: the models were trained with so many noise levels
Count = Annotated[int, Field(gt=0, lt=2**31)]
Steps = Annotated[int, Field(gt=0, le=MAX_STEPS)]
# Models have 1 to 12. Between these bounds no two of MAX_STEPS noise levels are one number in float32.
Shift = Annotated[float, Field(ge=0.01, le=100)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]


def said(meaning: str) -> Any:
    """The meaning of an option, beside it."""
    return Field(description=meaning)


@dataclass(frozen=True)
class Options:
    """A record of options: immutable, and a recipe may name no others."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Window(Options):
    """A run of consecutive stochastic steps (MixGRPO, arXiv 2507.21802); outside it the ODE is followed.

    ``random`` draws its first step once per iteration, ``sliding`` moves it by one every ``every`` iterations and
    starts over, ``fixed`` stays at ``first``. A random window of size 1 is Flash-GRPO's single stochastic step, which
    all samples of an iteration share (arXiv 2605.15980).
    """

    size: Annotated[Count, said("consecutive stochastic steps")] = 2
    starts: Annotated[Count, said("how many first steps it may begin at")] = 1
    first: Annotated[int, Field(ge=0, lt=2**31), said("the earliest step it may begin at")] = 0
    schedule: Annotated[Schedule, said("how the start is chosen: random, sliding or fixed")] = "random"
    every: Annotated[Count, said("iterations between moves of a sliding window")] = 1

    @property
    def places(self) -> range:
        """The steps it may begin at."""
        return range(self.first, self.first + (1 if self.schedule == "fixed" else self.starts))


@dataclass(frozen=True)
class Solver(Options):
    """How latents get from noise to picture: the sigma grid and its stochastic steps, see :mod:`vipo.sde`."""

    steps: Annotated[Steps, said("solver steps of a rollout")]
    shift: Annotated[Shift | None, said("time shift; null takes the model's own")] = None
    kind: Annotated[Kind, said("the stochastic step: dance, flow or cps; ode for losses without a ratio")] = "dance"
    eta: Annotated[NotNegative, said("its noise strength")] = 0.3
    window: Annotated[Window | None, said("which steps are stochastic; null means all but the last")] = None
    train_fraction: Annotated[Share, said("share of the stochastic steps trained, per sample, rounded down")] = 1.0
    same_noise: Annotated[bool, said("samples of a group start from one noise")] = True

    def __post_init__(self) -> None:
        last = self.steps - 1 if self.window is None else self.window.first + self.window.starts - 1 + self.window.size
        if last > self.steps - 1:
            raise ValueError(
                f"the window reaches step {last} of steps={self.steps}, but the last step is never stochastic:"
                " lower window.size, window.starts or window.first, or take more steps"
            )
        if self.kind == "cps" and self.eta > 1:
            raise ValueError(
                f"eta={self.eta:g} is more than all of the noise, of which kind=cps takes a share; give 1 or less"
            )

    def deterministic(self, steps: int | None = None) -> Solver:
        """The same grid without noise between the steps, each sample from its own start: for evaluation."""
        return replace(self, kind="ode", eta=0.0, window=None, steps=steps or self.steps, same_noise=False)

    @property
    def candidates(self) -> range:
        """Every step that is stochastic in some iteration."""
        if self.kind == "ode":
            return range(0)
        if self.window is None:
            return range(self.steps - 1)
        return range(self.window.first, self.window.places[-1] + self.window.size)

    @property
    def stochastic_count(self) -> int:
        """How many steps of an iteration are stochastic."""
        return len(self.candidates) if self.window is None else self.window.size

    @property
    def trained_count(self) -> int:
        """How many steps of each sample are trained on."""
        return int(self.train_fraction * self.stochastic_count)


@dataclass(frozen=True, kw_only=True)
class MapOptions(Options):
    """How features or latents become an allocation map, see :func:`vipo.structuring.allocation_map`."""

    components: Annotated[Count, said("principal components K")] = 3
    aggregation: Annotated[Aggregation, said("of the components: variance, average or first")] = "variance"
    smoothing_sigma: Annotated[NotNegative, said("Gaussian, in feature cells; 0 is off")] = 1.0
    normalization: Annotated[Normalization, said("unit_mean keeps the scalar learning rate's scale, or minmax")] = (
        "unit_mean"
    )
    orientation: Annotated[Orientation, said("what makes a map independent of signs, see docs/orientation.md")] = (
        "background"
    )
    scope: Annotated[Scope, said("one PCA per frame or per clip")] = "frame"


@dataclass(frozen=True, kw_only=True)
class SourceOptions(Options):
    """What a map source may be told apart from the others."""

    smoothing_sigma: Annotated[
        NotNegative | None, said("of this source alone, Gaussian; null takes structuring.smoothing_sigma")
    ] = None


@dataclass(frozen=True, kw_only=True)
class DeviationOptions(SourceOptions):
    power: Annotated[Positive, said("of the smoothed squared distance; 0.5 is its root, a flatter map")] = 1.0


@dataclass(frozen=True, kw_only=True)
class ConsensusOptions(SourceOptions):
    floor: Annotated[float, Field(ge=0, le=1), said("a of M = a + (1 - a) consensus: least weight of a position")] = 0.0


@dataclass(frozen=True, kw_only=True)
class SourcesOptions(Options):
    """The options of each map source, by its name."""

    perceptual: SourceOptions = field(default_factory=SourceOptions)
    reward_gradient: SourceOptions = field(default_factory=SourceOptions)
    text_relevance: SourceOptions = field(default_factory=SourceOptions)
    disagreement: SourceOptions = field(default_factory=SourceOptions)
    deviation: DeviationOptions = field(default_factory=DeviationOptions)
    consensus: ConsensusOptions = field(default_factory=ConsensusOptions)
    evidence: SourceOptions = field(default_factory=SourceOptions)
    own: Annotated[
        dict[str, dict[str, Any]], said("of a source by file.py:thing, which may stand beside the others too")
    ] = field(default_factory=dict)


def own_apart(given: Any) -> Any:
    """``{deviation: {}, file.py:thing: {}}`` is short for ``{deviation: {}, own: {file.py:thing: {}}}``."""
    if not isinstance(given, Mapping) or not isinstance(given.get("own", {}), Mapping):
        return given
    own = {name: options for name, options in given.items() if isinstance(name, str) and is_user_file(name)}
    rest = {name: options for name, options in given.items() if name not in own}
    return {**rest, "own": {**rest.get("own", {}), **own}} if own else given


@dataclass(frozen=True)
class Objective(Options):
    """The loss and what weighs in it. A channel sum moves a ratio further than a mean: give it its own clip range."""

    clip_range: Annotated[Positive, said("of the likelihood ratio; goes with ratio, reduce and credit")]
    advantage_clip: Annotated[Positive, said("bound on the weight of a ratio")] = 5.0
    reduce: Annotated[Reduce, said("log-probability over latent channels: mean or sum")] = "mean"
    combine: Annotated[Combination, said("several rewards: advantage normalises then sums, reward the reverse")] = (
        "advantage"
    )
    kl_weight: Annotated[NotNegative, said("weight of the divergence from the untrained model")] = 0.0
    loss: Annotated[str, _or_file(LossKind), said("see `vipo list losses`, or file.py:thing")] = "clipped"
    loss_options: Annotated[dict[str, Any], said("of a loss by file.py:thing")] = field(default_factory=dict)
    ratio: Annotated[Ratio, said("of local credit: local, or detached (the sample's value, local gradient)")] = "local"
    step_weight: Annotated[
        StepWeight, said("of a solver step: equal, noise_level (TempFlow-GRPO) or gradient (Flash-GRPO)")
    ] = "equal"
    matching_draws: Annotated[Count, said("noise levels per sample that the matching loss draws")] = 2


@dataclass(frozen=True)
class OptimizerOptions(Options):
    """AdamW and what guards it."""

    learning_rate: Annotated[Positive, said("of AdamW")]
    weight_decay: Annotated[NotNegative, said("of AdamW")] = 1e-4
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], said("of AdamW")
    ] = (0.9, 0.999)
    max_grad_norm: Annotated[Positive, said("gradients are clipped to this norm")] = 1.0
    guard_factor: Annotated[Positive, said("an update over so many median norms is skipped")] = 20.0
    per_iteration: Annotated[Count, said("optimiser steps per iteration; only the first is exactly on-policy")] = 1
    kind: Annotated[
        OptimizerKind, said("adamw, or adamw8bit: moments in 8 bits (bitsandbytes), of weights of 4096 numbers or more")
    ] = "adamw"
    schedule: Annotated[
        RateSchedule, said("of the learning rate over training.iterations: constant, cosine or linear")
    ] = "constant"
    warmup: Annotated[int, Field(ge=0, lt=2**31), said("first iterations, in which the learning rate rises")] = 0
    final: Annotated[
        float, Field(ge=0, le=1), said("share of the learning rate that cosine or linear comes down to")
    ] = 0.0

    def __post_init__(self) -> None:
        if self.final and self.schedule == "constant":
            raise ValueError(
                f"final={self.final:g} is what schedule=cosine or linear comes down to; with schedule=constant leave it"
                " out"
            )
