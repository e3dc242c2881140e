"""Measure the scorers of counts, quality and flaws: the numbers of ``src/vipo/embedded/judges/README.md``.

Scenes are fresh, each with one kind of flaw, against fresh clean ones.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from common import SHIPPED as PIPELINE
from flaw_data import KINDS, Flawed, FlawSource
from judge_art import VENDORS
from vipo import rewards
from vipo.embedded import VOCABULARY, make_caption
from vipo.types import Prompt, Reward

SCORERS = ("emoji_match", "emoji_judge", "emoji_count", "emoji_quality", "emoji_flaws", "emoji_clean")
NAMES = VOCABULARY.names


def auc(positive: Tensor, negative: Tensor) -> float:
    """How often a value of ``positive`` is above one of ``negative``; equal ones count half."""
    ordered = torch.cat([positive, negative]).double()
    _, inverse, counts = ordered.unique(return_inverse=True, return_counts=True)
    upper = counts.cumsum(0).double()
    rank = (upper - (counts - 1) / 2)[inverse]
    above = rank[: len(positive)].sum() - len(positive) * (len(positive) + 1) / 2
    return float(above / (len(positive) * len(negative)))


def captions(batch: Flawed) -> list[Prompt]:
    """A caption of each picture's named objects; its ground and relation are made up, the scorers here read neither."""
    return [Prompt(_caption([NAMES[i] for i in row.nonzero().flatten()])) for row in batch.named]


def _caption(names: Sequence[str]) -> str:
    return make_caption(names, "left" if len(names) == 2 else None, "white")


def media_of(batch: Flawed) -> Tensor:
    """(N, 3, 1, 64, 64) in [0, 1]."""
    return batch.images.float().div(255).unsqueeze(2)


def with_flaw(args: argparse.Namespace, vendors: Sequence[str], kind: str) -> Flawed:
    """Scenes of which each has this kind of flaw; ``clean`` for none."""
    vae = AutoencoderKL.from_pretrained(PIPELINE / "vae")
    planted = () if kind == "clean" else (kind,)
    source = FlawSource(args.art, vendors, vae, args.seed, plant=planted, clean=float(kind == "clean"), moved=0.2)
    parts: list[Flawed] = []
    while sum(map(len, parts)) < args.scenes:
        batch = source.batch(64)
        has = (batch.kinds > 0).flatten(1).any(1) | (kind == "clean")
        parts.append(batch.rows(has))
    return Flawed.join(parts).rows(slice(args.scenes))


def measure(args: argparse.Namespace) -> dict[str, dict[str, object]]:
    """Each scorer's mean by flaw and how well it tells flawed from clean; each flaw's place by ``emoji_flaws``."""
    built: dict[str, Reward] = {name: rewards.build(name) for name in args.scorers}
    report: dict[str, dict[str, object]] = {}
    for label, vendors in (("the judges' seven sets", VENDORS), ("Noto", ("google",))):
        sets = {kind: with_flaw(args, vendors, kind) for kind in ("clean", *KINDS)}
        scores = {
            kind: {name: r(media_of(batch), captions(batch)) for name, r in built.items()}
            for kind, batch in sets.items()
        }
        report[f"mean score, {label}"] = {
            kind: {name: round(float(value.mean()), 3) for name, value in row.items()} for kind, row in scores.items()
        }
        report[f"clean above flawed (AUC), {label}"] = {
            kind: {name: round(auc(scores["clean"][name], value), 3) for name, value in row.items()}
            for kind, row in scores.items()
            if kind != "clean"
        }
        report[f"places of flaws (AUC of emoji_flaws), {label}"] = places(built["emoji_flaws"], sets)
        report[f"counting, {label}"] = counting(built, sets)
    return report


def places(flaws: Reward, sets: dict[str, Flawed]) -> dict[str, object]:
    """AUC over all cells of all pictures with this flaw, wrong ones against the others, and against objects only."""
    found: dict[str, object] = {}
    for kind, batch in sets.items():
        if kind == "clean":
            continue
        heat = flaws.heat(media_of(batch), captions(batch))  # type: ignore[attr-defined]
        wrong = batch.kinds > 0
        shown = torch.nn.functional.interpolate(batch.cover.float().sum(1, keepdim=True), scale_factor=2)[:, 0] > 127
        against = shown & ~wrong
        found[kind] = {
            "all": round(auc(heat[wrong], heat[~wrong]), 3),
            "objects": round(auc(heat[wrong], heat[against]), 3) if against.any() and kind != "grain" else None,
        }
    return found


def counting(built: dict[str, Reward], sets: dict[str, Flawed]) -> dict[str, object]:
    """What ``emoji_count`` makes of 0 to 6 copies, over the scenes with duplicates and clean ones."""
    batch = Flawed.join([sets["clean"], sets["duplicate"]])
    index, weight = batch.spots[..., 0], batch.spots[..., 3]
    found: dict[str, list[float]] = {}
    counts = built["emoji_count"].counts(media_of(batch), captions(batch))  # type: ignore[attr-defined]
    for row in range(len(batch)):
        for k in batch.named[row].nonzero().flatten().tolist():
            there = int((index[row] == k).sum())
            if weight[row][index[row] == k].ge(0.95).all():
                found.setdefault(str(there), []).append(float(counts[row, k]))
    return {
        key: {"mean": round(float(torch.tensor(v).mean()), 2), "right": round(_right(v, int(key)), 2), "n": len(v)}
        for key, v in sorted(found.items())
    }


def _right(values: Sequence[float], there: int) -> float:
    return sum(round(value) == there for value in values) / len(values)


def main() -> None:
    """Command line: print everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--art", type=Path, default=Path("~/.cache/vipo/art"))
    parser.add_argument("--scorers", nargs="+", default=list(SCORERS))
    parser.add_argument("--scenes", type=int, default=96)
    parser.add_argument("--seed", type=int, default=77)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps(measure(args), indent=1))


if __name__ == "__main__":
    main()
