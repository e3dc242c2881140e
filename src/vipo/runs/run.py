"""A whole run: build, evaluate, train, keep a run directory, resume. The trainer only loops; this is its caller."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from PIL import Image
from torch import Tensor

from vipo.assemble import Session, build, engine_of, keep_text, notices
from vipo.engine import Engine
from vipo.errors import RunFailed, UserError
from vipo.evaluation.records import POLICY, Evaluation
from vipo.files import remove, written_whole
from vipo.media.pictures import save_png
from vipo.media.recordings import ROLLOUTS, prune_recordings, save_recording
from vipo.report.page import write_report
from vipo.rewards import go_by_rate
from vipo.runs.agreement import check_agreed
from vipo.runs.best import best_so_far, best_told, fallen, spared
from vipo.runs.directory import Past, RunDirectory
from vipo.runs.evaluating import evaluate_run, save_evaluation
from vipo.runs.exporting import add_card
from vipo.runs.init import keep_init, with_kept_init
from vipo.runs.inputs import fingerprints
from vipo.runs.lock import FolderLock
from vipo.runs.opening import settle
from vipo.runs.over_optimization import JudgeWatch
from vipo.runs.resume import Ending, Start, beginning, resumption
from vipo.runs.step_records import factors_of, recorded_step
from vipo.runs.step_sheets import step_sheet
from vipo.runs.stop import StopRequest
from vipo.runs.trackers import check_trackers
from vipo.runs.tracking import Tracking
from vipo.runs.trained import Trained
from vipo.schema import Recipe
from vipo.training.checkpoint import load, save
from vipo.training.saved import STATE, prune
from vipo.types import TrainStep

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluated:
    """The policy was evaluated after ``iteration`` iterations (0: untrained)."""

    iteration: int
    evaluation: Evaluation
    best_by: str | None = None  # the score by which it is the best so far, if training.keep_best names one

    @property
    def scores(self) -> Mapping[str, Tensor]:
        """Those of the policy, by reward."""
        return self.evaluation.scores[POLICY]


@dataclass(frozen=True)
class RunStep(TrainStep):
    """One iteration as :func:`train` yields it: with the evaluations since the one before.

    In a run directory the first iteration has that of the untrained weights, and each after which the weights are
    evaluated has theirs; their ``iteration`` tells them apart.
    """

    evaluations: tuple[Evaluated, ...] = ()


class Run:
    """One training run in one directory.

    Args:
        recipe: what to do.
        output: the run directory.
        resume: go on with the run in ``output``; one that has no checkpoint yet begins again.
        checkpoint: go on from this one, by its folder's name or a path, instead of the latest; later ones are removed.
        allow_changes: keys or sections of the recipe that may differ from the run's, beyond those that always may
            (``vipo.runs.rules.RULES``).

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
        engine: Engine | None = None,
    ) -> None:
        if not resume and (checkpoint or allow_changes):
            raise UserError("--from and --allow-changes are for a run that goes on: add --resume")
        self.recipe, self.directory = recipe, RunDirectory(Path(output))
        self.stop, self.lock = StopRequest(), FolderLock(self.directory.root)
        self.engine = engine or engine_of(recipe)

        def claim() -> Start:
            """Lock the folder and decide how to begin there; nothing in it is changed yet."""
            check_trackers(recipe.tracking)
            self.lock.take(make=not resume)
            inputs = fingerprints(recipe)
            past = self.directory.past(checkpoint)
            if not resume:
                return beginning(past, inputs)
            scored = {**recipe.judges, **recipe.rewards}
            by_rate = go_by_rate({name: (one.reward or name, one.options) for name, one in scored.items()})
            return resumption(
                recipe,
                past,
                inputs,
                allowed=allow_changes,
                scores_by_rate=by_rate,
                processes=self.processes,
                ending=self._ending(past),
            )

        try:
            self.start = self.engine.agreed(claim)
            self._check_agreed()
            self.session: Session = build(
                with_kept_init(self.recipe, self.directory.root) if self.start.resumed else self.recipe,
                engine=self.engine,
            )
            if (saved := self.start.saved) is not None:  # first: one that does not fit must leave the folder as it is
                averages = bool(self.session.policy.ema)
                self.session.trainer.restore(load(saved.path, saved.head, averages=averages))
            self.engine.wait()
            if self.writes:
                settle(self.directory.root, self.start, self.recipe.to_yaml(), processes=self.processes)
                self._prune()  # a kill may have left one too many
                keep_init(recipe, self.directory.root, anew=not self.start.resumed)
            self._events = self.start.events  # to be told with the first iteration
            keep_text(self.session)
            self.notices = notices(self.session)
            self.engine.wait()
            self.stopped: str | None = None
            self._evaluated, self.comparable_since = set(self.start.evaluated), self.start.comparable_since
            self.tracking = self._tracked() if self.writes else None
        except BaseException:
            self.lock.release()
            raise

    def _ending(self, past: Past) -> Ending | None:
        """Whether this recipe would end the run where it goes on, as it may have done before."""
        if past.saved is None or not past.owns_saved:
            return None
        name, done = self.recipe.training.stop_when, past.saved.head.iteration
        if name is not None and (why := fallen(self.directory, name, done)):
            return Ending(why, "training.stop_when=null")
        over = self._over_optimized(done) is not None
        return Ending("stopped by its guard over_optimization", "guards.over_optimization=warn") if over else None

    def _tracked(self) -> Tracking:
        return Tracking(self.recipe, self.directory.root, iteration=self.iteration, processes=self.processes)

    def _check_agreed(self) -> None:
        """Every process must see what the main one began with."""
        saved, shared = self.start.saved, self.start.resumed or self.engine.in_step
        inputs = fingerprints(self.recipe) if self.processes > 1 else {}
        state = None if saved is None else saved.path / STATE
        check_agreed(self.engine, self.recipe, inputs, self.directory.root, shared=shared, state=state)

    @property
    def processes(self) -> int:
        """How many train together."""
        return self.engine.ranks

    @property
    def notes(self) -> tuple[str, ...]:
        """What is worth saying at the start."""
        count = self.processes
        unlocked = () if self.lock.works else (f"No lock: {str(self.directory.root)!r} is on a file system without.",)
        return (f"{count} {'process' if count == 1 else 'processes'}.", *unlocked, *self.start.notes)

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes; the others only compute."""
        return self.engine.is_main

    @property
    def iteration(self) -> int:
        """Iterations done so far."""
        return self.session.trainer.iteration

    def __iter__(self) -> Iterator[TrainStep | Evaluated]:
        """Train to the recipe's last iteration, yielding each step and each evaluation as it is on disk.

        After a stop request the state is saved; ``over`` says whether the run has come to its end: ``finished``, or
        ``stopped`` by ``training.stop_when``.

        Raises:
            RunFailed: nothing was learned, and the state is saved; or another process is lost. Nothing is exported.
        """
        try:
            self._check_ours()
            with self.engine.waiting():
                for event in self._train():
                    yield event
                    self._check_ours()
                if self.over:
                    self._export()
        finally:
            if self.tracking is not None:
                self.tracking.close()
            self.lock.release()

    def _check_ours(self) -> None:
        """Between two events anything may happen; what follows writes."""
        if self.writes:
            self.lock.check()

    def _train(self) -> Iterator[TrainStep | Evaluated]:
        with self.stop.listening():
            if self.finished:
                self._end_if(self.session.trainer.health.failure(self.iteration, last=True))
            yield from self._evaluate_and_watch()
            stopping = self._stop_agreed()
            while not self.over and not stopping:
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
                    yield from self._evaluate_and_watch()

    def _export(self) -> None:
        """Weights and their card. Every process takes part: what is sharded is put together for the one that writes."""
        if not self.writes:
            self.session.policy.export(self.session.generator, None)
            return
        with written_whole(self.directory.root / "export") as aside:
            self.session.policy.export(self.session.generator, aside)
            trained = Trained(self.directory, self.recipe)
            for sentence in add_card(aside, trained, self.iteration, self.session.model):
                log.warning(sentence)

    def _with_events(self, step: TrainStep) -> TrainStep:
        """The first iteration after a resume tells what was changed; any, what went wrong with tracking."""
        events, self._events = self._events, ()
        if self.tracking is not None:
            events += self.tracking.told()
        return replace(step, events=(*events, *step.events)) if events else step

    def _end_if(self, failure: str | None) -> None:
        """End a run that has failed, once every process has come here: a launcher ends the others with the first."""
        if failure is None:
            return
        self.engine.wait()
        raise RunFailed(failure)

    def _stop_agreed(self) -> bool:
        """Whether any process was asked to stop: all of them must leave the loop after the same iteration."""
        return self.engine.any(self.stop.asked)

    @property
    def finished(self) -> bool:
        return self.iteration >= self.recipe.training.iterations

    @property
    def over(self) -> bool:
        """Whether there is nothing to go on with: all iterations are done, or a score has fallen (``stopped``)."""
        return self.finished or self.stopped is not None

    @property
    def best(self) -> str | None:
        """The best checkpoint in a sentence, where ``training.keep_best`` keeps one."""
        name = self.recipe.training.keep_best
        return None if name is None else best_told(self.directory, name)

    def _prune(self) -> None:
        training = self.recipe.training
        prune(self.directory.checkpoints, training.keep_checkpoints, spared(self.directory, training.keep_best))

    def save(self) -> None:
        """Checkpoint now."""
        save(
            self.session.trainer.state(),
            self.directory.checkpoints,
            engine=self.engine,
            keep=self.recipe.training.keep_checkpoints,
            spared=spared(self.directory, self.recipe.training.keep_best) if self.writes else (),
            recipe=self.recipe.model_dump(mode="json"),
            inputs=self.start.inputs,
            logs=self.directory.checksums(self.iteration) if self.writes else None,
        )
        if self.writes:
            for folder in self.directory.exports_of_latest():  # of a run that had ended and goes on: of older weights
                remove(folder)

    def _evaluate_and_watch(self) -> Iterator[Evaluated]:
        """Evaluate if that is due, and end the run if a judge has fallen too far and the recipe says so."""
        yield from self._evaluate_if_due()
        if self.recipe.guards.over_optimization.action != "stop":
            return
        failure = self.engine.agreed(lambda: self._over_optimized(self.iteration))
        if failure is not None:
            self.save()
        self._end_if(failure)

    def _over_optimized(self, iteration: int) -> str | None:
        records = self.directory.evaluations()
        return self._watch.failure(records) if records and records[-1].iteration == iteration else None

    @property
    def _watch(self) -> JudgeWatch:
        weights = {name: section.weight for name, section in self.recipe.rewards.items()}
        return JudgeWatch(self.recipe.guards.over_optimization, list(self.recipe.judges), weights)

    @property
    def evaluation_due(self) -> bool:
        """Whether the present weights are to be evaluated, and were not yet."""
        return self._is_due() and self.iteration not in self._evaluated

    def _is_due(self) -> bool:
        every = self.recipe.evaluation.every
        due = self.iteration in (0, self.comparable_since) or self.finished
        return due or (every is not None and self.iteration % every == 0)

    def _evaluate_if_due(self) -> Iterator[Evaluated]:
        if not self._is_due():
            return
        new = self._evaluate() if self.evaluation_due else None
        best_by = self._keep_best()
        self._stop_if_fallen()
        if new is not None:
            yield Evaluated(self.iteration, new, best_by)

    def _evaluate(self) -> Evaluation:
        """The present weights', on record."""
        evaluation, media = evaluate_run(self.session)
        self._evaluated.add(self.iteration)
        if self.writes:
            self._keep_evaluation(Evaluated(self.iteration, evaluation), media)
        return evaluation

    def _keep_best(self) -> str | None:
        """Keep the evaluated weights if they are the best so far; the score by which they are."""
        name = self.recipe.training.keep_best
        if name is None:
            return None
        best = self.engine.agreed(lambda: best_so_far(self.directory, name, [self.iteration]))
        if best is None or best.iteration != self.iteration:
            return None
        if not best.is_untrained:
            self._save_if_missing()
        if self.writes:
            self._prune()  # the one that was the best before
        return name

    def _save_if_missing(self) -> None:
        if not self.engine.agreed(lambda: self.iteration in self.directory.kept()):
            self.save()

    def _stop_if_fallen(self) -> None:
        """End the run here if ``training.stop_when`` says so; the main process looks, and all do as it says."""
        name = self.recipe.training.stop_when
        if name is None or self.finished:
            return
        self.stopped = self.engine.agreed(lambda: fallen(self.directory, name, self.iteration))
        if self.stopped is not None:
            self._save_if_missing()
            if self.writes:
                self.directory.log_stop(self.iteration, self.stopped)
                self._tell([self.stopped])

    def _keep_evaluation(self, event: Evaluated, media: Tensor) -> None:
        assert self.tracking is not None
        sheet, fps = self.directory.root / "samples" / f"step-{self.iteration:06d}.png", self.recipe.generator.fps
        save_evaluation(sheet, event.evaluation, media, fps=fps)
        since, watch = self.comparable_since, self._watch.events
        self.directory.log_evaluation(self.iteration, event.evaluation, comparable_since=since, watch=watch)
        self.tracking.evaluation(event.evaluation, media, fps=fps, iteration=self.iteration)
        self._tell(self.directory.evaluation_events(self.iteration))

    def _tell(self, events: Sequence[str]) -> None:
        """Trackers, what the log has already."""
        assert self.tracking is not None
        self.tracking.events(events, self.iteration)

    def _keep(self, step: TrainStep) -> None:
        assert self.tracking is not None
        self.directory.log_step(step)
        due = step.iteration % self.recipe.training.maps_every == 0
        self.tracking.step(step, self._keep_maps(step) if due else None)

    def _keep_maps(self, step: TrainStep) -> Image.Image | None:
        """Write the sheet of its maps, if it has any, and what is kept for looking closer; the sheet."""
        name, factors = f"step-{step.iteration:06d}.png", factors_of(step, self.session)
        if keep := self.recipe.training.keep_rollouts:
            folder = self.directory.root / ROLLOUTS
            save_recording(folder / name, recorded_step(step, self.session, factors))
            prune_recordings(folder, keep)
        if step.maps is None:
            return None
        sheet = step_sheet(step, step.maps, self.session, factors)
        save_png(self.directory.root / "maps" / name, sheet)
        return sheet


def _with_notices(step: TrainStep, told: Sequence[str]) -> TrainStep:
    """What was to tell before the first iteration is the first event of that one."""
    return replace(step, events=(*told, *step.events)) if step.iteration == 0 else step


def train(
    recipe: Recipe,
    output: Path | str | None = None,
    *,
    resume: bool = False,
    checkpoint: str | None = None,
    allow_changes: Sequence[str] = (),
    report: bool = True,
) -> Iterator[RunStep]:
    """Train a recipe, yielding each iteration's :class:`TrainStep`.

    With ``output`` a run directory is kept as ``vipo train`` keeps it (evaluations, checkpoints, samples, maps, export,
    and with ``report`` a report.html at the end), and what is yielded has the evaluations too
    (:attr:`RunStep.evaluations`); without it nothing is evaluated or written. ``resume``, ``checkpoint`` and
    ``allow_changes`` are those of :class:`Run`.

    Raises:
        UserError: as :class:`Run`, or a reward has a fault.
        RunFailed: nothing was learned.
    """
    if output is None:
        yield from _in_memory(recipe)
        return
    run = Run(recipe, Path(output), resume=resume, checkpoint=checkpoint, allow_changes=allow_changes)
    yield from _with_evaluations(run)
    if report and run.over and run.writes:
        write_report(run.directory.root)


def _in_memory(recipe: Recipe) -> Iterator[RunStep]:
    session = build(recipe)
    keep_text(session)
    told = notices(session)
    for number in range(1, recipe.training.iterations + 1):
        step = _with_notices(session.trainer.step(last=number == recipe.training.iterations), told)
        yield _run_step(step)
        if step.failure:
            raise RunFailed(step.failure)


def _with_evaluations(run: Run) -> Iterator[RunStep]:
    """A run's steps, each as soon as it is there, but after the evaluation that is due after it."""
    found: list[Evaluated] = []
    held: TrainStep | None = None
    try:
        for event in run:
            if isinstance(event, TrainStep):
                held = event
            else:
                found.append(event)
            if held is not None and not run.evaluation_due:
                step, held = _run_step(held, found), None
                found.clear()
                yield step
    except Exception:
        if held is not None:  # what ended the run came after this step
            yield _run_step(held, found)
        raise
    if held is not None:  # a stop was asked for, and comes before an evaluation
        yield _run_step(held, found)


def _run_step(step: TrainStep, evaluations: Sequence[Evaluated] = ()) -> RunStep:
    parts = {field.name: getattr(step, field.name) for field in fields(TrainStep)}
    return RunStep(**parts, evaluations=tuple(evaluations))
