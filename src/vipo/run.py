"""A whole run: build, evaluate, train, keep a run directory, resume. The trainer only loops; this is its caller."""

from __future__ import annotations

import signal
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from vipo import checkpoint, structuring
from vipo.build import Session, build, keep_text, notices
from vipo.evaluate import Evaluation, evaluate
from vipo.files import write_text, written_whole
from vipo.generators.attention import scope
from vipo.launch import agreed, check_engine, open_engine
from vipo.lock import FolderLock
from vipo.map_sources import Perceptual, Product
from vipo.recipe import Recipe, load_recipe
from vipo.report.maps import clip_map_sheet, map_sheet
from vipo.report.pictures import save_sheet
from vipo.resume import Start, check_there, resumption
from vipo.rundir import RunDirectory
from vipo.samples import save_clips
from vipo.structuring import PerceptualStructuring
from vipo.types import FeatureMap, MapSource, RunFailed, TrainStep, UserError

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
        resume: go on with the run in ``output``; one that has no checkpoint yet begins again.
        checkpoint: go on from this one, by its folder's name or a path, instead of the latest; later ones are removed.
        allow_changes: keys or sections of the recipe that may differ from the run's, beyond those that always may
            (``vipo.resume.RULES``).

    Raises:
        UserError: ``output`` holds a run and ``resume`` is off, or holds none and it is on; another process writes
            there; its recipe differs where it may not; the launcher's processes are not the engine's.
    """

    def __init__(
        self,
        recipe: Recipe,
        output: Path,
        *,
        resume: bool = False,
        checkpoint: str | None = None,
        allow_changes: Sequence[str] = (),
        accelerator: Accelerator | None = None,
    ) -> None:
        if not resume and (checkpoint or allow_changes):
            raise UserError("--from and --allow-changes are for a run that goes on: add --resume")
        self.recipe, self.directory = recipe, RunDirectory(Path(output))
        self.stop, self.lock = StopRequest(), FolderLock(self.directory.root)
        self.accelerator = accelerator or open_engine(recipe.training.precision)
        check_engine(self.accelerator)
        self.start = agreed(self.accelerator, lambda: self._claim(resume, checkpoint, allow_changes))
        try:
            self._open()
        except BaseException:
            self.lock.release()
            raise

    def _claim(self, resume: bool, checkpoint: str | None, allow_changes: Sequence[str]) -> Start:
        """Take the folder and decide how to begin there; what is refused leaves everything as it was."""
        self.directory.check_place()
        if resume:
            check_there(self.directory)
        self.lock.take()
        try:
            if resume:
                return resumption(
                    self.recipe,
                    self.directory,
                    checkpoint=checkpoint,
                    allowed=allow_changes,
                    processes=self.processes,
                )
            self.directory.check_free()
        except BaseException:
            self.lock.release()
            raise
        return Start()

    def _open(self) -> None:
        """Build everything, then put it and the folder to where the run begins."""
        self.session: Session = build(self.recipe, accelerator=self.accelerator)
        if self.start.resumed:
            self._restore()
        elif self.writes:
            self.directory.start(self.recipe.to_yaml(), processes=self.processes)
        self._events = self.start.events  # to be told with the first iteration
        keep_text(self.session)
        self.notices = notices(self.session)
        self.accelerator.wait_for_everyone()
        self._evaluated = self.directory.evaluated()
        self.comparable_since = self.iteration if self.start.evaluates_anew else self.directory.comparable_since()
        board = str(self.directory.root / "tensorboard")
        self.board = SummaryWriter(board, purge_step=self.iteration) if self.writes else None

    @property
    def processes(self) -> int:
        """How many train together."""
        return int(self.accelerator.num_processes)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is worth saying at the start."""
        count = self.processes
        unlocked = () if self.lock.works else (f"No lock: {str(self.directory.root)!r} is on a file system without.",)
        return (f"{count} {'process' if count == 1 else 'processes'}.", *unlocked, *self.start.notes)

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes; the others only compute."""
        return bool(self.accelerator.is_main_process)

    @property
    def iteration(self) -> int:
        """Iterations done so far."""
        return self.session.trainer.iteration

    def _restore(self) -> None:
        """Weights first: a checkpoint that does not fit must leave the folder as it is."""
        chosen = self.start.checkpoint
        if chosen is not None:
            checkpoint.load(self.session.trainer, chosen)
        self.accelerator.wait_for_everyone()
        if self.writes:
            if chosen is not None:
                checkpoint.adopt(chosen, self.directory.checkpoints)
            self.directory.rewind(self.iteration, evaluates_anew=self.start.evaluates_anew)
            write_text(self.directory.recipe, self.recipe.to_yaml())  # some keys may have changed

    def __iter__(self) -> Iterator[TrainStep | Evaluated]:
        """Train to the recipe's last iteration, yielding each step and each evaluation as it is on disk.

        After a stop request the state is saved; ``finished`` says whether the run is complete.

        Raises:
            RunFailed: nothing was learned; the state is saved, and nothing is exported.
        """
        try:
            self._check_ours()
            for event in self._train():
                yield event
                self._check_ours()
            if self.finished and self.writes:
                with written_whole(self.directory.root / "export") as aside:
                    self.session.policy.export(self.session.generator, aside)
        finally:
            if self.board is not None:
                self.board.close()
            self.lock.release()

    def _check_ours(self) -> None:
        """Between two events anything may happen; what follows writes."""
        if self.writes:
            self.lock.check()

    def _train(self) -> Iterator[TrainStep | Evaluated]:
        with self.stop.listening():
            if self.finished:
                self._end_if(self.session.trainer.health.failure(self.iteration, last=True))
            yield from self._evaluate_if_due()
            stopping = self._stop_agreed()
            while not self.finished and not stopping:
                last = self.iteration + 1 >= self.recipe.training.iterations
                step = _with_notices(self._with_events(self.session.trainer.step(last=last)), self.notices)
                if self.writes:
                    self._keep(step)
                yield step
                stopping = self._stop_agreed()
                ends = stopping or self.finished or step.failure is not None
                if ends or self.iteration % self.recipe.training.checkpoint_every == 0:
                    self.save()
                self._end_if(step.failure)
                if not stopping:
                    yield from self._evaluate_if_due()

    def _with_events(self, step: TrainStep) -> TrainStep:
        """The first iteration after a resume tells what was changed."""
        events, self._events = self._events, ()
        return replace(step, events=(*events, *step.events)) if events else step

    def _end_if(self, failure: str | None) -> None:
        """End a run that has failed, once every process has come here: a launcher ends the others with the first."""
        if failure is None:
            return
        self.accelerator.wait_for_everyone()
        raise RunFailed(failure)

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
            recipe = self.recipe.model_dump(mode="json")
            checkpoint.save(self.session.trainer, self.directory.checkpoints, keep=kept, recipe=recipe)

    def _evaluate_if_due(self) -> Iterator[Evaluated]:
        every = self.recipe.evaluation.every
        due = self.iteration in (0, self.comparable_since) or self.finished
        due = due or (every is not None and self.iteration % every == 0)
        if due and self.iteration not in self._evaluated:
            event = self._evaluate()
            self._evaluated.add(self.iteration)
            if self.writes:
                self._keep_evaluation(event.evaluation)
            yield event

    def _evaluate(self) -> Evaluated:
        session, section = self.session, self.recipe.evaluation
        with scope(self.recipe.generator.attention), session.policy.averaged():
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
        self.directory.log_evaluation(self.iteration, evaluation, comparable_since=self.comparable_since)
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


def _with_notices(step: TrainStep, told: Sequence[str]) -> TrainStep:
    """What was to tell before the first iteration is the first event of that one."""
    return replace(step, events=(*told, *step.events)) if step.iteration == 0 else step


def _structuring(source: MapSource | None) -> PerceptualStructuring | None:
    """The perceptual part of a map source, if it has one."""
    sources = source.sources if isinstance(source, Product) else [source]
    return next((part.structuring for part in sources if isinstance(part, Perceptual)), None)


def components(source: PerceptualStructuring, pictures: torch.Tensor) -> torch.Tensor:
    """The oriented principal components (B, K, h, w) of pictures (B, 3, Y, X), as the map source sees them."""
    seen: FeatureMap = source.backbone(pictures)
    found = structuring.principal_components(seen.features, source.components)
    return structuring.oriented(found, source.orientation)


def train(
    recipe: Recipe,
    output: Path | str | None = None,
    *,
    resume: bool = False,
    checkpoint: str | None = None,
    allow_changes: Sequence[str] = (),
) -> Iterator[TrainStep]:
    """Train a recipe, yielding each iteration's :class:`TrainStep`.

    With ``output`` a run directory is kept (evaluations, checkpoints, samples, maps), as ``vipo train`` does; without
    it nothing is written. ``resume``, ``checkpoint`` and ``allow_changes`` are those of :class:`Run`.

    Raises:
        RunFailed: nothing was learned.
    """
    if output is None:
        session = build(recipe)
        keep_text(session)
        told = notices(session)
        for number in range(1, recipe.training.iterations + 1):
            step = _with_notices(session.trainer.step(last=number == recipe.training.iterations), told)
            yield step
            if step.failure:
                raise RunFailed(step.failure)
        return
    for event in Run(recipe, Path(output), resume=resume, checkpoint=checkpoint, allow_changes=allow_changes):
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
