"""The paper's six claims and ours, each decided by intervals and by nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cells import Cell, Table, effect_cell, t_cell
from results import Results, Spread, gain, levels, paired
from tables import CLIP_SCORES, SCALAR_CLIPS, SCALAR_GROUPS, SCALAR_REDNESS, SCORES, kept_more
from vipo.report.svg import signed

Verdict = Literal["holds", "does not hold", "cannot be told apart", "not measured yet"]
FEWEST_SEEDS = 2
"""With one seed an interval covers the prompts only, and says nothing about training again."""
STRUCTURE = ("edges_kept", "features_kept", "emoji_judge", "emoji_layout")
RANGE = "1e-4"  # the published one; at a wide one clipping does not act, and a map of ones is scalar GRPO
SHIPPED = "source-deviation-perceptual"  # what the recipes have as ``structuring.sources``
LOWER = "-rate-1e-3"  # the better learning rate of the shipped map; the other one is scalar GRPO's better one
HIGHER = "-rate-2e-3"  # twice the clip recipe's own
FROM_PAPER = "abcdefn"


@dataclass(frozen=True)
class Part:
    """One difference that a claim speaks of. ``above``: the claim wants it above zero, not below."""

    what: str
    effect: Spread | None
    above: bool = True

    @property
    def verdict(self) -> Verdict:
        if self.effect is None:
            return "not measured yet"
        t = self.effect.t or (self.effect.low, self.effect.high)
        low, high = min(self.effect.low, t[0]), max(self.effect.high, t[1])
        if self.effect.seeds < FEWEST_SEEDS or low <= 0 <= high:
            return "cannot be told apart"
        return "holds" if (low > 0) == self.above else "does not hold"


@dataclass(frozen=True)
class Claim:
    """It holds if every part does, and does not hold if one part does not."""

    letter: str
    text: str
    parts: tuple[Part, ...]

    @property
    def verdict(self) -> Verdict:
        found = {part.verdict for part in self.parts}
        order: tuple[Verdict, ...] = ("does not hold", "not measured yet", "cannot be told apart")
        return next((verdict for verdict in order if verdict in found), "holds")


def claims(results: Results) -> list[Claim]:
    """Those of the paper, and ours."""
    trained, judges = SCORES[0], SCORES[1:]
    held_out = [_versus(results, "vipo", "sample", score) for score in judges]
    fallen = [_below_start(results, "sample", score) for score in judges]
    ones = _versus(results, f"uniform-clip-{RANGE}", f"sample-clip-{RANGE}", trained, above=False)
    rates = ((SHIPPED + LOWER, "sample" + LOWER), (SHIPPED, "sample"), (SHIPPED + LOWER, "sample"))
    shipped = [_versus(results, *pair, score) for pair in rates for score in SCORES]
    return [
        Claim("a", "ViPO beats scalar GRPO on the reward", (_versus(results, "vipo", "sample", trained),)),
        Claim(
            "b",
            "ViPO beats scalar GRPO on held-out judges, where scalar GRPO falls below the untrained model",
            (*held_out, *fallen),
        ),
        Claim("c", "A map of ones is no better than scalar GRPO", (ones,)),
        Claim("d", "An advantage map beats a reward map", (_versus(results, "vipo", "reward-map", trained),)),
        Claim("e", "Variance beats average aggregation", (_versus(results, "vipo", "average", trained),)),
        Claim("f", "Under redness ViPO keeps structure at equal redness", _kept(results)),
        Claim(
            "g",
            "Not the paper's: deviation x its map beats scalar GRPO, at either rate or each at its own",
            tuple(shipped),
        ),
        *groups_claims(results),
    ]


def groups_claims(results: Results) -> list[Claim]:
    """What full groups say at everyone's best rate, which is 1e-3."""
    trained = SCORES[0]

    def against(credit: str, *after: int) -> tuple[Part, ...]:
        pair = (f"groups-{credit}-1e-3", SCALAR_GROUPS)
        return tuple(_versus(results, *pair, trained, after=k) for k in after)

    dense = (*against("flaw-map", 48), *against("dense-reward", 48), *against("signed-consensus", 48))
    kept = ("emoji_count", "emoji_quality", "emoji_flaws", "emoji_judge", "emoji_layout")
    lost = [_below_start(results, "groups-quickstart-clean", name, above=True) for name in kept]
    beyond = [_versus(results, "groups-quickstart-clean", "groups-noise", name) for name in kept]
    mapped = [
        _versus(results, "groups-quickstart-clean", "groups-sample-clean", name)
        for name in ("emoji_quality", "emoji_flaws")
    ]
    ratio = _versus(results, f"detached-clip-{RANGE}", f"vipo-clip-{RANGE}", trained)
    paper_on_clips = [_versus(results, "clips-vipo", SCALAR_CLIPS, score) for score in CLIP_SCORES[:2]]
    clip_rates = (
        ("clips-deviation", SCALAR_CLIPS),
        ("clips-deviation" + HIGHER, SCALAR_CLIPS + HIGHER),
        ("clips-deviation", SCALAR_CLIPS + HIGHER),
    )
    on_clips = [_versus(results, *pair, score) for pair in clip_rates for score in CLIP_SCORES[:2]]
    coming_down = [
        _versus(results, "groups-consensus-cosine", scalar, trained, after=48)
        for scalar in ("groups-sample-cosine", SCALAR_GROUPS)
    ]
    own_noises = [
        _versus(results, "groups-consensus-own-noises", "groups-sample-own-noises", trained, after=k) for k in (16, 48)
    ]
    return [
        Claim("h", "Not the paper's: consensus is ahead of scalar GRPO early", against("consensus", 8, 16)),
        Claim("i", "Not the paper's: consensus is ahead of scalar GRPO in the end", against("consensus", 48)),
        Claim("j", "Not the paper's: dense credit beats scalar GRPO in the end", dense),
        Claim("k", "What the quickstart ships raises every judge", tuple(lost)),
        Claim("l", "Trained on clean pictures too, its map keeps more of what judges of flaws see", tuple(mapped)),
        Claim("m", "It raises every judge more than a reward that teaches nothing does", tuple(beyond)),
        Claim("n", "ViPO beats scalar GRPO on clips, in both rewards", tuple(paper_on_clips)),
        Claim(
            "o",
            "Not the paper's: deviation beats scalar GRPO on clips, in both rewards, at either rate or across them",
            tuple(on_clips),
        ),
        Claim("p", "Not the paper's: under its clip range a detached ratio learns more than its local one", (ratio,)),
        Claim(
            "q",
            "Not the paper's: at a rate that comes down, consensus ends above scalar GRPO at that and at its best one",
            tuple(coming_down),
        ),
        Claim(
            "r",
            "Not the paper's: where samples start from a noise each, consensus beats scalar GRPO, early and in the end",
            tuple(own_noises),
        ),
    ]


def _versus(
    results: Results, arm: str, other: str, score: str, *, above: bool = True, after: int | None = None
) -> Part:
    """After so many iterations; at the last that both arms were evaluated at."""
    shared = [k for k in results.iterations(arm) if k in results.iterations(other) and after in (None, k)]
    what = f"{score}: {arm} minus {other}"
    if not shared:
        return Part(what, None, above)
    return Part(f"{what}, {shared[-1]} iterations", paired(results, arm, other, score, shared[-1]), above)


def _below_start(results: Results, arm: str, score: str, *, above: bool = False) -> Part:
    found = results.iterations(arm)
    what = f"{score}: {arm} minus untrained"
    if not found:
        return Part(what, None, above)
    return Part(f"{what}, {found[-1]} iterations", gain(results, arm, score, found[-1]), above)


def _kept(results: Results) -> tuple[Part, ...]:
    """At the largest gain in redness that every run of the two methods reached."""
    reached = levels(results, (SCALAR_REDNESS, "redness-vipo"), (1.0,))
    at = f"at {signed(reached[0].gain)} redness" if reached else "at equal redness"
    what = {name: f"{name}: redness-vipo minus {SCALAR_REDNESS} {at}" for name in STRUCTURE}
    return tuple(
        Part(text, kept_more(reached[0], name, "redness-vipo") if reached else None) for name, text in what.items()
    )


def claims_table(found: list[Claim]) -> Table:
    note = "A difference cannot be told from none where one of its 95 % intervals holds zero, or where it rests on one "
    note += (
        "seed. In brackets a bootstrap over seeds and prompts; t is Student's, which knows how few seeds there are. "
    )
    note += "A claim of several parts holds if all do, and does not if one does not."
    lines: list[tuple[Cell, ...]] = []
    for claim in found:
        for number, part in enumerate(claim.parts):
            head = ((f"({claim.letter}) {claim.text}", ""), (claim.verdict, "")) if number == 0 else (("", ""),) * 2
            seeds = str(part.effect.seeds) if part.effect else "0"
            found = (effect_cell(part.effect), t_cell(part.effect), (seeds, ""))
            lines.append((*head, (part.what, ""), *found, (part.verdict, "")))
    columns = ("Claim", "Verdict", "Difference", "Mean [95 %]", "t [95 %]", "Seeds", "By itself")
    return Table("claims", "The claims", note, columns, tuple(lines))
