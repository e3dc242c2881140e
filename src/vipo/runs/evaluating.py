"""A run's evaluations: its fixed prompts, part by part over all processes, and the sheets and clips that show them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from vipo.assemble import Session
from vipo.errors import UserError
from vipo.evaluation.evaluator import Evaluator, Sampler
from vipo.evaluation.records import POLICY, Evaluation, Part, Scored
from vipo.media.pictures import to_bytes
from vipo.media.samples import save_clips
from vipo.media.sheets import save_sheet
from vipo.ranks import everyones_rows
from vipo.schema import Recipe

PIXELS_AT_ONCE = 1 << 26  # of media, all frames counted: 64 pictures of 1024 x 1024, 800 MB as float32


class Shown:
    """The media of this process's parts, as bytes in the memory of the CPU: a run's sheet shows every sample."""

    def __init__(self) -> None:
        self.parts: dict[int, UInt8[Tensor, "n 3 F Y X"]] = {}

    def read(self, _first: int) -> Part | None:
        """Nothing is known: the weights are others each time."""
        return None

    def keep(self, part: Part, results: Mapping[str, Scored]) -> None:
        self.parts[part.first] = to_bytes(results[POLICY].media).cpu()

    def rows(self) -> UInt8[Tensor, "n 3 F Y X"]:
        """All of this process's samples, in their order."""
        return torch.cat([self.parts[first] for first in sorted(self.parts)])


def evaluate_run(session: Session) -> tuple[Evaluation, UInt8[Tensor, "N 3 F Y X"]]:
    """Scores of the averaged weights by training rewards and judges, and on the main process the media of all samples.

    Raises:
        UserError: a reward has a fault, or scored no sample at all.
    """
    recipe, engine, shown = session.recipe, session.engine, Shown()
    prompts, samples_per_prompt = session.evaluation_prompts, recipe.evaluation.samples_per_prompt
    at_once = prompts_at_once(recipe, len(prompts), engine.teams)
    evaluate = Evaluator(
        {POLICY: session.policy.averaged},
        Sampler(
            session.generator,
            session.model.solver,
            samples_per_prompt,
            recipe.evaluation.steps,
            recipe.training.rollout_batch_size,
            at_least=at_once * samples_per_prompt if engine.in_step else 0,
        ),
        session.evaluation_scorer,
        at_once,
        attention=recipe.generator.attention,
        ranks=engine,
    )
    evaluation = evaluate(prompts, keeper=shown)
    _check_scored(evaluation)
    rows = shown.rows()
    of_each = everyones_rows(rows, engine, at_once=at_once * samples_per_prompt, wanted=engine.is_main)
    media = torch.cat(of_each)[: len(prompts) * samples_per_prompt] if engine.is_main else rows[:0]
    return evaluation, media


def prompts_at_once(recipe: Recipe, prompts: int, ranks: int) -> int:
    """How many of the evaluation's prompts make a part: as many as fit into ``PIXELS_AT_ONCE``, and one at least.

    With a ``rollout_batch_size`` parts are made of whole batches, so that each network call has the samples it would
    have without parts; but of several processes each gets a share.
    """
    section, samples_per_prompt = recipe.generator, recipe.evaluation.samples_per_prompt
    fitting = PIXELS_AT_ONCE // (section.height * section.width * section.frames * samples_per_prompt)
    batch_size = recipe.training.rollout_batch_size or 1
    whole = math.lcm(batch_size, samples_per_prompt) // samples_per_prompt  # prompts that fill batches
    return min(whole * max(1, fitting // whole), math.ceil(prompts / ranks))


def _check_scored(evaluation: Evaluation) -> None:
    for name, values in evaluation.scores[POLICY].items():
        if not bool(values.isfinite().any()):
            why = next((told for told in evaluation.failures if told.startswith(f"{POLICY}: {name} ")), "")
            raise UserError(
                f"reward {name!r} gave no finite score for any of the {len(values)} samples of the evaluation ({why});"
                " check the reward on a picture you know"
            )


def save_evaluation(sheet: Path, evaluation: Evaluation, media: UInt8[Tensor, "N 3 F Y X"], *, fps: float) -> None:
    """Write the contact sheet with its JSON and, of clips, files to open and to see move."""
    texts = evaluation.texts
    if media.shape[2] > 1:
        save_clips(sheet.with_suffix(""), media, texts, samples_per_prompt=evaluation.samples_per_prompt, fps=fps)
    save_sheet(sheet, media, texts, evaluation.scores[POLICY])
