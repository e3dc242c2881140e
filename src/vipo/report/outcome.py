"""Did it work? The untrained model against the trained one, picture by picture, with a plain verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vipo.errors import UserError
from vipo.evaluation.estimate import FEWEST_PROMPTS, Estimate, estimate, paired, paired_prompts, pairs
from vipo.evaluation.records import EvaluationRecord
from vipo.report.run import RunRecord

Verdict = Literal["rose in this run", "within noise", "fell in this run", "too few prompts to tell"]
Role = Literal["trained on", "held-out judge", "measured"]


@dataclass(frozen=True)
class Change:
    """One score before and after training. ``gain`` is estimated from the paired differences, prompt by prompt."""

    name: str
    role: Role
    base: Estimate
    trained: Estimate
    gain: Estimate
    differences: Tensor  # (N,), one per picture, NaN where either score is missing
    scored: int  # pictures with both scores
    verdict: Verdict


def verdict_of(gain: Estimate, prompts: int) -> Verdict:
    """The verdict on one run's paired gain, whose 95 % interval is over its ``prompts`` prompts, not over seeds."""
    if prompts < FEWEST_PROMPTS:
        return "too few prompts to tell"
    if gain.low > 0:
        return "rose in this run"
    return "fell in this run" if gain.high < 0 else "within noise"


def before_and_after(run: RunRecord) -> tuple[EvaluationRecord, EvaluationRecord] | None:
    """The evaluation of the untrained model and the last one; None while there is no second."""
    if len(run.evaluations) < 2:
        return None
    return run.evaluations[0], run.evaluations[-1]


def check_pairs(first: EvaluationRecord, second: EvaluationRecord, what: str) -> None:
    """Pictures of the same row must share their prompt, or differences mean nothing.

    Raises:
        UserError: they do not.
    """
    if first.prompts != second.prompts or first.samples_per_prompt != second.samples_per_prompt:
        raise UserError(
            f"{what} were evaluated on different prompts ({len(first.prompts)} and {len(second.prompts)} pictures), "
            "so they cannot be compared picture by picture; evaluate both on the same prompt file"
        )


def role_of(run: RunRecord, name: str) -> Role:
    """Whether a score was optimised, held out, or merely measured."""
    if name in run.rewards:
        return "trained on"
    return "held-out judge" if name in (run.recipe.get("judges") or ()) else "measured"


def changes(run: RunRecord) -> list[Change]:
    """Every score that both evaluations have; what was trained on comes first. Empty while there is no second one.

    Raises:
        UserError: the two evaluations are of different prompts.
    """
    pair = before_and_after(run)
    if pair is None:
        return []
    base, last = pair
    check_pairs(base, last, f"iteration {base.iteration} and iteration {last.iteration} of {run.name!r}")
    found = [change_of(name, role_of(run, name), base, last) for name in base.values if name in last.values]
    order = ("trained on", "held-out judge", "measured")
    return sorted((change for change in found if change), key=lambda change: order.index(change.role))


def change_of(name: str, role: Role, base: EvaluationRecord, last: EvaluationRecord) -> Change | None:
    """The change of one score; None if no picture has it in both evaluations."""
    samples_per_prompt = base.samples_per_prompt
    before, after = base.values[name], last.values[name]
    differences = after - before
    scored = pairs(after, before)
    if not scored:
        return None
    gain = paired(after, before, samples_per_prompt)
    verdict = verdict_of(gain, paired_prompts(after, before, samples_per_prompt))
    of_pairs = (row.where(differences.isfinite(), torch.nan) for row in (before, after))  # so that the means add up
    base_mean, trained_mean = (estimate(row, samples_per_prompt) for row in of_pairs)
    return Change(name, role, base_mean, trained_mean, gain, differences, scored, verdict)


def total_change(base: EvaluationRecord, last: EvaluationRecord, weights: Mapping[str, float]) -> Tensor | None:
    """Per prompt, the mean change of the weighted sum that was trained on; None if it was not evaluated."""
    if not weights or not all(name in base.values and name in last.values for name in weights):
        return None
    parts = [weight * (last.values[name] - base.values[name]) for name, weight in weights.items()]
    return torch.stack(parts).sum(0).unflatten(0, (-1, last.samples_per_prompt)).nanmean(1)


def headline(found: list[Change], noun: str = "picture") -> str:
    """The outcome in one or two sentences; ``noun`` is what a sample is called."""
    trained = [change for change in found if change.role == "trained on"]
    judges = [change for change in found if change.role == "held-out judge"]
    if not trained:
        return "No score that was trained on was evaluated before and after, so there is no verdict."
    sentences = [f"{_listed(trained)}, which {'were' if len(trained) > 1 else 'was'} trained on, {_said(trained)}."]
    if not judges:
        return f"{sentences[0]} No held-out judge watched, so a gain may be the reward's weakness, not better {noun}s."
    sentences.append(f"The held-out {'judge' if len(judges) == 1 else 'judges'} {_listed(judges)} {_said(judges)}.")
    gained = any(change.verdict == "rose in this run" for change in trained)
    if gained and any(change.verdict == "fell in this run" for change in judges):
        sentences.append(f"A reward that rises while a judge falls is the mark of reward hacking: look at the {noun}s.")
    return " ".join(sentences)


def _listed(group: list[Change]) -> str:
    names = [change.name for change in group]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _said(group: list[Change]) -> str:
    words: dict[Verdict, str] = {
        "rose in this run": "rose in this run",
        "fell in this run": "fell in this run",
        "within noise": "stayed within noise",
        "too few prompts to tell": "had too few prompts to tell",
    }
    if len(group) == 1 or len({change.verdict for change in group}) == 1:
        return words[group[0].verdict]
    counted = {verdict: [change.name for change in group if change.verdict == verdict] for verdict in words}
    parts = [f"{', '.join(names)} {words[verdict]}" for verdict, names in counted.items() if names]
    return f"went different ways: {'; '.join(parts)}"
