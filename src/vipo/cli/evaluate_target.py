"""What ``vipo evaluate`` does once it knows what to score: in one process or several, in a folder or in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from vipo.engine import Engine
from vipo.evaluation.folder import EvaluationFolder
from vipo.evaluation.records import Evaluation
from vipo.runs.target import Target
from vipo.types import Prompt


def evaluate_target(
    target: Target,
    prompts: Sequence[Prompt],
    rewards: Sequence[str],
    engine: Engine,
    *,
    samples_per_prompt: int,
    steps: int | None,
    batch_size: int | None,
    output: Path | None,
    resume: bool,
    pictures: bool,
    progress: Callable[[int], None],
) -> Evaluation:
    """Scores of the target, kept in ``output`` if there is one; every process gets all of them.

    Raises:
        UserError: a reward has a fault or cannot be reached, or ``output`` holds another evaluation.
    """
    batch_size = batch_size or target.batch_size
    folder = None
    if output is not None:
        settings = target.settings(
            prompts, rewards, samples_per_prompt=samples_per_prompt, steps=steps, batch_size=batch_size
        )
        folder = EvaluationFolder(output, settings, fps=target.fps, resume=resume, pictures=pictures)
        _begin(folder, engine)
    evaluation = target.evaluate(
        prompts,
        rewards,
        samples_per_prompt=samples_per_prompt,
        steps=steps,
        batch_size=batch_size,
        keeper=folder,
        progress=progress,
        ranks=engine,
    )
    if folder is not None and engine.is_main:
        folder.finish(evaluation)
    return evaluation


def _begin(folder: EvaluationFolder, engine: Engine) -> None:
    """Let nobody write before all have looked, nor a part before the settings are there. One process has no need."""
    if engine.ranks > 1:
        engine.wait()
        if engine.is_main:
            folder.begin()
        engine.wait()
