"""A whole run: build, evaluate, train, keep a run directory, resume. The trainer only loops; this is its caller."""

from __future__ import annotations

import signal
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from vipo import checkpoint, structuring
from vipo.build import Session, build, keep_text
from vipo.evaluate import Evaluation, evaluate
from vipo.files import write_text, written_whole
from vipo.map_sources import Perceptual, Product
from vipo.recipe import Recipe, load_recipe
from vipo.report.maps import clip_map_sheet, map_sheet
from vipo.report.pictures import save_sheet
from vipo.rundir import RunDirectory
from vipo.samples import save_clips
from vipo.structuring import PerceptualStructuring
from vipo.types import FeatureMap, MapSource, TrainStep, UserError

SHEET_COLUMNS = 8
MAP_ROWS, MAP_CLIPS = 6, 3
MAP_CAPTION = 120  # characters of a clip's prompt


@dataclass(frozen=True)
class Evaluated:
    """The policy was judged after ``iteration`` iterations (0: untrained)."""

    iteration: int
    evaluation: Evaluation


class StopRequest:
    """Ctrl-C or SIGTERM asks for a stop after the iteration in progress; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def _ask(self, _signal: int, _frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        signals = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self._ask) for number in signals]
        try:
            yield
        finally:
            for number, handler in zip(signals, before, strict=True):
                signal.signal(number, handler)


class Run:
    """One training run in one directory.

    Args:
        recipe: what to do.
        output: the run directory.
        resume: go on from the latest checkpoint in ``output``; without one, start.

    Raises:
        UserError: ``output`` holds a run and ``resume`` is off, or its recipe differs from this one.
    """

    def __init__(
        self, recipe: Recipe, output: Path, *, resume: bool = False, accelerator: Accelerator | None = None
    ) -> None:
        self.recipe, self.directory = recipe, RunDirectory(Path(output))
        self.stop = StopRequest()
        going_on = resume and self.directory.exists()
        if going_on:
            self._check_same_recipe()
        elif self.directory.has_progress():
            raise UserError(f"{str(output)!r} already holds a run; add --resume to go on, or choose another --output")
        self.session: Session = build(recipe, accelerator=accelerator)
        self.accelerator = self.session.trainer.accelerator
        if going_on:
            self._restore()
        elif self.writes:
            self.directory.start(recipe.to_yaml())
        keep_text(self.session)
        self.accelerator.wait_for_everyone()
        self._evaluated = self.directory.evaluated()
        board = str(self.directory.root / "tensorboard")
        self.board = SummaryWriter(board, purge_step=self.iteration) if self.writes else None

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes; the others only compute."""
        return bool(self.accelerator.is_main_process)

    @property
    def iteration(self) -> int:
        """Iterations done so far."""
        return self.session.trainer.iteration

    def _check_same_recipe(self) -> None:
        """Only what does not touch the trajectory may change between the parts of a run."""

        def essence(recipe: Recipe) -> dict[str, object]:
            whole = recipe.model_dump(mode="json")
            for free in ("iterations", "checkpoint_every", "keep_checkpoints", "maps_every"):
                whole["training"].pop(free)
            for free in ("text_cache", "offload_text", "fps"):
                whole["generator"].pop(free)
            return whole

        old, new = essence(load_recipe(self.directory.recipe)), essence(self.recipe)
        changed = [key for key in new if old.get(key) != new[key]]
        if changed:
            raise UserError(
                f"cannot resume {str(self.directory.root)!r}: {', '.join(changed)} differ from the recipe it began"
                " with; use the same recipe and overrides, or choose another --output"
            )

    def _restore(self) -> None:
        latest = self.directory.latest_checkpoint()
        if latest is not None:
            checkpoint.load(self.session.trainer, latest)
        self.accelerator.wait_for_everyone()
        if self.writes:
            self.directory.rewind(self.iteration)
            write_text(self.directory.recipe, self.recipe.to_yaml())  # it may ask for more iterations now

    def __iter__(self) -> Iterator[TrainStep | Evaluated]:
        """Train to the recipe's last iteration, yielding each step and each evaluation as it is on disk.

        After a stop request the state is saved; ``finished`` says whether the run is complete.
        """
        with self.stop.listening():
            yield from self._evaluate_if_due()
            stopping = self._stop_agreed()
            while not self.finished and not stopping:
                step = self.session.trainer.step()
                if self.writes:
                    self._keep(step)
                yield step
                stopping = self._stop_agreed()
                if self.iteration % self.recipe.training.checkpoint_every == 0 or stopping or self.finished:
                    self.save()
                if not stopping:
                    yield from self._evaluate_if_due()
        if self.finished and self.writes:
            with written_whole(self.directory.root / "export") as aside:
                self.session.policy.export(self.session.generator, aside)
        if self.board is not None:
            self.board.close()

    def _stop_agreed(self) -> bool:
        """Whether any process was asked to stop: all of them must leave the loop after the same iteration."""
        if self.accelerator.num_processes == 1:
            return self.stop.asked
        asked = torch.tensor([float(self.stop.asked)], device=self.accelerator.device)
        return bool(self.accelerator.gather(asked).any())

    @property
    def finished(self) -> bool:
        return self.iteration >= self.recipe.training.iterations

    def save(self) -> None:
        """Checkpoint now."""
        if self.writes:
            kept = self.recipe.training.keep_checkpoints
            checkpoint.save(self.session.trainer, self.directory.checkpoints, keep=kept)

    def _evaluate_if_due(self) -> Iterator[Evaluated]:
        every = self.recipe.evaluation.every
        due = self.iteration == 0 or self.finished or (every is not None and self.iteration % every == 0)
        if due and self.iteration not in self._evaluated:
            event = self._evaluate()
            self._evaluated.add(self.iteration)
            if self.writes:
                self._keep_evaluation(event.evaluation)
            yield event

    def _evaluate(self) -> Evaluated:
        session, section = self.session, self.recipe.evaluation
        with session.policy.averaged():
            evaluation = evaluate(
                session.generator,
                session.evaluation_prompts,
                session.judge,
                session.trainer.solver,
                samples_per_prompt=section.samples_per_prompt,
                steps=section.steps,
                batch_size=self.recipe.training.rollout_batch_size,
            )
        return Evaluated(self.iteration, evaluation)

    def _keep_evaluation(self, evaluation: Evaluation) -> None:
        assert self.board is not None
        sheet = self.directory.root / "samples" / f"step-{self.iteration:06d}.png"
        media, per_prompt = evaluation.media, evaluation.samples_per_prompt
        texts = [prompt.text for prompt in evaluation.prompts]
        scores = {key: values.tolist() for key, values in evaluation.scores.items()}
        if media.shape[2] > 1:
            fps = self.recipe.generator.fps
            save_clips(sheet.with_suffix(""), media, texts, samples_per_prompt=per_prompt, fps=fps)
        save_sheet(sheet, media, SHEET_COLUMNS, texts, scores)
        self.directory.log_evaluation(self.iteration, evaluation)
        for key, values in evaluation.scores.items():
            self.board.add_scalar(f"evaluation/{key}", float(values.nanmean()), self.iteration)
        self.board.add_images("samples", media[:16, :, media.shape[2] // 2], self.iteration)

    def _keep(self, step: TrainStep) -> None:
        assert self.board is not None
        self.directory.log_step(step)
        for key, value in step.metrics.items():
            self.board.add_scalar(key, value, step.iteration)
        if step.maps is not None and step.iteration % self.recipe.training.maps_every == 0:
            sheet = self._map_sheet(step)
            with written_whole(self.directory.root / "maps" / f"step-{step.iteration:06d}.png") as aside:
                sheet.save(aside, format="PNG")

    def _map_sheet(self, step: TrainStep) -> Image.Image:
        """The first sample of each of the first groups: picture, components (if the map has any), map, overlay."""
        assert step.maps is not None
        if step.maps.shape[1] > 1:
            return self._clip_map_sheet(step, step.maps)
        structuring = _structuring(self.session.trainer.map_source)
        group = self.recipe.prompts.group_size
        rows = list(range(0, len(step.rollout.prompts), group))[:MAP_ROWS]
        pictures = step.rollout.media[rows, :, 0]
        captions = [f"{step.rollout.prompts[i].text}\nreward {float(step.scores.total[i]):.3f}" for i in rows]
        parts = None if structuring is None else components(structuring, pictures)
        return map_sheet(pictures, parts, step.maps[rows, 0], captions)

    def _clip_map_sheet(self, step: TrainStep, maps: torch.Tensor) -> Image.Image:
        """The first sample of each of the first groups, over its latent frames."""
        rows = list(range(0, len(maps), self.recipe.prompts.group_size))[:MAP_CLIPS]
        texts = [textwrap.shorten(step.rollout.prompts[i].text, MAP_CAPTION, placeholder=" ...") for i in rows]
        captions = [f"{text}\nreward {float(step.scores.total[i]):.3f}" for i, text in zip(rows, texts, strict=True)]
        stride = self.session.generator.temporal_stride
        return clip_map_sheet(step.rollout.media[rows], maps[rows], captions, temporal_stride=stride)


def _structuring(source: MapSource | None) -> PerceptualStructuring | None:
    """The perceptual part of a map source, if it has one."""
    sources = source.sources if isinstance(source, Product) else [source]
    return next((part.structuring for part in sources if isinstance(part, Perceptual)), None)


def components(source: PerceptualStructuring, pictures: torch.Tensor) -> torch.Tensor:
    """The oriented principal components (B, K, h, w) of pictures (B, 3, Y, X), as the map source sees them."""
    seen: FeatureMap = source.backbone(pictures)
    found = structuring.principal_components(seen.features, source.components)
    return structuring.oriented(found, source.orientation)


def train(recipe: Recipe, output: Path | str | None = None, *, resume: bool = False) -> Iterator[TrainStep]:
    """Train a recipe, yielding each iteration's :class:`TrainStep`.

    With ``output`` a run directory is kept (evaluations, checkpoints, samples, maps), as ``vipo train`` does; without
    it nothing is written.
    """
    if output is None:
        session = build(recipe)
        keep_text(session)
        for _ in range(recipe.training.iterations):
            yield session.trainer.step()
        return
    for event in Run(recipe, Path(output), resume=resume):
        if isinstance(event, TrainStep):
            yield event


def load_run(root: Path, *, accelerator: Accelerator | None = None) -> Session:
    """A finished or interrupted run's model with its trained weights, ready to sample.

    Raises:
        UserError: not a run directory, or no checkpoint in it yet.
    """
    directory = RunDirectory(root)
    if not directory.exists():
        raise UserError(f"{str(root)!r} is not a run directory: it has no recipe.yaml")
    latest = directory.latest_checkpoint()
    if latest is None:
        raise UserError(f"{str(root)!r} has no complete checkpoint yet")
    session = build(load_recipe(directory.recipe), accelerator=accelerator, keep_reference=True)
    weights = checkpoint.load_policy(latest)
    session.policy.load(weights, weights if session.policy.ema else None)
    return session
