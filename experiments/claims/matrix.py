"""Which arms there are, how long each is trained, and what is measured on it.

An arm is a recipe, the keys that all arms share (``COMMON``) and those of its own. Everything else, prompts, noise and
iterations, is equal between arms of one seed. ``tables.py`` says which arms make which table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from measures import structure

Measures = Callable[[Any, Any], dict[str, list[float]]]


@dataclass(frozen=True)
class Setting:
    """How much is spent on each arm."""

    seeds: int
    iterations: int
    every: int  # iterations between evaluations, and all that the short arms get
    prompts: int  # of evaluation


SETTING = Setting(seeds=3, iterations=24, every=12, prompts=64)
QUICK = Setting(seeds=1, iterations=2, every=1, prompts=8)

RATE = "2e-3"
"""Scalar GRPO's best of 5e-4, 1e-3, 2e-3 and 4e-3 after 12 and after 24 iterations."""
COMMON = ("prompts.group_size=8", "evaluation.samples_per_prompt=3", "structuring.sources=[perceptual]")
COMMON += (f"optimizer.learning_rate={RATE}",)
"""48 pictures an iteration instead of the quickstart's 96, so more arms for the same time; and the paper's map."""
SCORED = {"quickstart.yaml": ("rewards={emoji_match: 1.0}", "judges=[emoji_judge, emoji_layout]")}
"""What arms of a recipe are trained on and judged by, unless they say otherwise: one reward, and two others watch."""
UNPINNED = {"quickstart.yaml": ("rewards={emoji_match: 1.0}", "judges=[emoji_judge, emoji_layout]")}
"""What a recipe itself said while arms did not pin it yet: so were results trained whose overrides do not name it."""


@dataclass(frozen=True)
class Arm:
    """One thing to train.

    recipe: file in ``recipes/``. changes: its own keys. every: iterations between evaluations, if not the setting's.
    measures: more numbers per prompt, from the untrained and the present evaluation. seeds: if not the setting's.
    short: trained up to the first evaluation only, to be compared with the others there.
    iterations: if not the setting's. untrained: the arm that has the untrained model's scores.
    shared: keys of all arms of its table.
    """

    changes: tuple[str, ...] = ()
    recipe: str = "quickstart.yaml"
    every: int | None = None
    measures: Measures | None = None
    seeds: int | None = None
    short: bool = False
    iterations: int | None = None
    trained: bool = True
    untrained: str = "untrained"
    shared: tuple[str, ...] = ()

    @property
    def overrides(self) -> tuple[str, ...]:
        return COMMON + SCORED.get(self.recipe, ()) + self.shared + self.changes


def structuring(short: bool = True, **changes: object) -> Arm:
    return Arm(tuple(f"structuring.{key}={value}" for key, value in changes.items()), short=short)


def source(*names: str, short: bool = True) -> Arm:
    return structuring(short, sources=f"[{', '.join(names)}]")


def backbone(stride: int, resolution: int) -> Arm:
    return structuring(backbone_options=f"{{stride: {stride}, resolution: {resolution}}}")


def clipped(credit: str, clip_range: str, *more: str, seeds: int | None = None) -> Arm:
    """Four optimiser steps an iteration at half the learning rate: three of them are off-policy, so clipping acts."""
    keys = ("optimizer.per_iteration=4", "optimizer.learning_rate=1e-3", f"objective.clip_range={clip_range}", *more)
    return Arm((f"credit={credit}", *keys), seeds=seeds, short=True)


def rate(arm: Arm, learning_rate: str, seeds: int | None = None) -> Arm:
    return replace(arm, changes=(*arm.changes, f"optimizer.learning_rate={learning_rate}"), seeds=seeds)


def redness(*changes: str) -> Arm:
    """Half the learning rate: the reward is easy, and what matters is the way there."""
    keys = ("optimizer.learning_rate=1e-3", *changes)
    return Arm(keys, recipe="redness.yaml", every=4, measures=structure, seeds=5)


def clips(*changes: str, learning_rate: str = "1e-3", seeds: int | None = None) -> Arm:
    """The clip recipe, 32 clips an iteration, at its own rate or another, judged on all of its evaluation prompts."""
    keys = (f"optimizer.learning_rate={learning_rate}", *changes)
    recipe = "quickstart-video.yaml"
    return Arm(keys, recipe=recipe, every=8, iterations=16, seeds=seeds, untrained="clips-untrained")


WATCHED = "emoji_judge, emoji_layout, emoji_count, emoji_quality, emoji_flaws"
LEVELS = {"iterations": 48, "every": 8}
CREDITS: dict[str, tuple[str, ...]] = {
    "sample": ("credit=sample",),
    "perceptual": ("structuring.sources=[perceptual]",),
    "deviation": ("structuring.sources=[deviation]",),
    "consensus": ("structuring.sources=[consensus]",),
    "consensus-perceptual": ("structuring.sources=[consensus, perceptual]",),
    "flaw-map": ("credit=flaw_map",),
    "dense-reward": ("credit=dense_reward",),
    "signed-consensus": ("credit=signed_consensus",),
    "quickstart": ("structuring.sources=[deviation, perceptual]",),
}
"""Scalar GRPO, the paper's map, three of our own, the three families of dense rewards, and the quickstart's product."""


SLOW = ("sample", "consensus", "perceptual", "quickstart")
"""What is tried at half the rate, too."""
DECAYED = ("sample", "consensus")
"""What is tried with a rate that begins high and comes down: 2e-3 learns fastest and keeps least."""
OWN_NOISES = ("sample", "consensus")
"""What is tried in groups whose samples start from a noise each."""


def full_groups(credit: str, learning_rate: str, *changes: str, judges: str = WATCHED, seeds: int | None = None) -> Arm:
    """The quickstart's own 96 pictures an iteration in groups of 16, evaluated every eight of 48 iterations."""
    shared = ("prompts.group_size=16", f"judges=[{judges}]")
    own = (*CREDITS[credit], f"optimizer.learning_rate={learning_rate}", *changes)
    return Arm(own, shared=shared, seeds=seeds, untrained="groups-untrained", **LEVELS)


def control(reward: str, seeds: int | None = None) -> Arm:
    """Scalar GRPO on a reward that teaches nothing; the real one watches."""
    rewards = f"rewards={{experiments/claims/controls.py:{reward}: 1.0}}"
    return full_groups("sample", "1e-3", rewards, judges=f"emoji_match, {WATCHED}", seeds=seeds)


def clean(credit: str, learning_rate: str, seeds: int | None = None) -> Arm:
    """Trained on ``emoji_clean`` as well, whose optimum is one whole copy of each thing on a clean ground."""
    return full_groups(credit, learning_rate, "rewards={emoji_match: 1.0, emoji_clean: 2.0}", seeds=seeds)


SCALAR, PAPER = Arm(("credit=sample",)), Arm()
DEVIATION, BOTH = source("deviation", short=False), source("deviation", "perceptual", short=False)

ARMS: dict[str, Arm] = {
    "untrained": Arm(trained=False, seeds=1),
    "sample": replace(SCALAR, seeds=5),
    "vipo": replace(PAPER, seeds=5),
    "source-deviation": DEVIATION,
    "source-deviation-perceptual": replace(BOTH, seeds=5),
    "sample-rate-1e-3": rate(SCALAR, "1e-3", seeds=5),
    "vipo-rate-1e-3": rate(PAPER, "1e-3", seeds=5),
    "source-deviation-rate-1e-3": rate(DEVIATION, "1e-3"),
    "source-deviation-perceptual-rate-1e-3": rate(BOTH, "1e-3", seeds=5),
    "sample-rate-5e-4": replace(rate(SCALAR, "5e-4", seeds=1), short=True),
    "sample-rate-4e-3": rate(SCALAR, "4e-3", seeds=1),
    "vipo-rate-4e-3": rate(PAPER, "4e-3", seeds=1),
    "source-deviation-rate-4e-3": rate(DEVIATION, "4e-3", seeds=1),
    "source-disagreement": source("disagreement"),
    "source-text": source("text_relevance"),
    "source-gradient": source("reward_gradient"),
    "source-gradient-perceptual": source("reward_gradient", "perceptual"),
    "reward-map": Arm(("credit=reward_map",), short=True, seeds=5),
    "average": replace(structuring(aggregation="average"), seeds=5),
    "minmax": structuring(normalization="minmax"),
    "stride-16": backbone(16, 128),
    "stride-32": backbone(32, 224),
    "sample-clip-1e-4": clipped("sample", "1e-4", seeds=5),
    "uniform-clip-1e-4": clipped("uniform", "1e-4", seeds=5),
    "vipo-clip-1e-4": clipped("advantage_map", "1e-4", seeds=5),
    "detached-clip-1e-4": clipped("advantage_map", "1e-4", "objective.ratio=detached", seeds=5),
    "redness-sample": redness("credit=sample"),
    "redness-vipo": redness(),
    "redness-deviation": redness("structuring.sources=[deviation]"),
    "sample-clip-1e-2": clipped("sample", "1e-2", seeds=1),
    "uniform-clip-1e-2": clipped("uniform", "1e-2", seeds=1),
    "vipo-clip-1e-2": clipped("advantage_map", "1e-2", seeds=1),
    "detached-clip-1e-2": clipped("advantage_map", "1e-2", "objective.ratio=detached", seeds=1),
    "components-1": structuring(components=1),
    "components-2": structuring(components=2),
    "components-5": structuring(components=5),
    "components-8": structuring(components=8),
    "first": structuring(aggregation="first"),
    "sigma-0": structuring(smoothing_sigma=0),
    "sigma-0.5": structuring(smoothing_sigma=0.5),
    "sigma-2": structuring(smoothing_sigma=2),
    "orientation-border": structuring(orientation="border"),
    "orientation-skewness": structuring(orientation="skewness"),
    "orientation-release": structuring(orientation="release"),
    "groups-untrained": replace(full_groups("sample", "1e-3", seeds=1), trained=False),
    **{f"groups-{credit}-1e-3": full_groups(credit, "1e-3", seeds=5) for credit in CREDITS},
    **{f"groups-{credit}-2e-3": full_groups(credit, "2e-3", seeds=5) for credit in CREDITS},
    **{f"groups-{credit}-5e-4": full_groups(credit, "5e-4") for credit in SLOW},
    **{f"groups-{credit}-cosine": full_groups(credit, "2e-3", "optimizer.schedule=cosine") for credit in DECAYED},
    **{f"groups-{credit}-own-noises": full_groups(credit, "1e-3", "solver.same_noise=false") for credit in OWN_NOISES},
    "groups-sample-clean": clean("sample", "1e-3", seeds=5),
    "groups-consensus-clean": clean("consensus", "1e-3"),
    "groups-quickstart-clean": clean("quickstart", "1e-3", seeds=5),
    "groups-consensus-clean-2e-3": clean("consensus", "2e-3"),
    "groups-noise": control("noise", seeds=5),
    "groups-shuffled": control("Shuffled"),
    "clips-untrained": replace(clips(), trained=False, seeds=1),
    "clips-sample": clips("credit=sample"),
    "clips-vipo": clips(),
    "clips-deviation": clips("structuring.sources=[deviation]"),
    "clips-consensus": clips("structuring.sources=[consensus]"),
    "clips-sample-rate-2e-3": clips("credit=sample", learning_rate="2e-3", seeds=5),
    "clips-vipo-rate-2e-3": clips(learning_rate="2e-3"),
    "clips-deviation-rate-2e-3": clips("structuring.sources=[deviation]", learning_rate="2e-3", seeds=5),
}
"""Name -> arm, the most telling ones first: results are made in this order."""

BLOCKS = (13, 22, 26, 29, len(ARMS) - 41, len(ARMS) - 22, len(ARMS) - 8, len(ARMS))
"""Up to which arm each block of them goes; a block is trained with every seed before the next begins."""
