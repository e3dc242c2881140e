"""Many runs in one folder, each a process of its own: what is finished is skipped, what broke off goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from vipo.report.run import read_run
from vipo.runs.combinations import Combination
from vipo.runs.directory import RunDirectory
from vipo.runs.pool import Ended, Pool, Task
from vipo.runs.rules import differences
from vipo.runs.stop import StopRequest

State = Literal["to begin", "broken off", "finished"]


def state_of(combination: Combination, folder: Path) -> State:
    """Whether a run is done as its recipe now says, or ended by its ``stop_when``, with its evaluation and its export.

    Raises:
        UserError: what is in its folder cannot be read.
    """
    directory = RunDirectory(folder)
    if not directory.exists():
        return "to begin"
    run = read_run(folder)
    wanted = run.iterations_done if run.stopped else combination.recipe.training.iterations
    whole = run.iterations_done == wanted and run.failure is None and (folder / "export").is_dir()
    evaluated = bool(run.evaluations) and run.evaluations[-1].iteration == wanted
    same = not differences(run.recipe, combination.recipe, folder)
    return "finished" if whole and evaluated and same else "broken off"


class Sweep:
    """Runs of one recipe in one folder; ``stop`` asks those under way to save and end.

    Args:
        words: what every `vipo train` is given beside its overrides and folder, such as ``--no-report``.
        jobs: how many run at a time.
    """

    def __init__(
        self, recipe: str, found: Sequence[Combination], root: Path, *, words: Sequence[str] = (), jobs: int = 1
    ) -> None:
        self.recipe, self.found, self.root, self.words = recipe, found, root, words
        self._pool = Pool(jobs)

    @property
    def stop(self) -> StopRequest:
        return self._pool.stop

    def states(self) -> dict[str, State]:
        """How far each run is."""
        return {one.name: state_of(one, self.root / one.name) for one in self.found}

    def run(self, begun: Callable[[str], None] = lambda _name: None) -> Iterator[Ended]:
        """Run what is not finished, yielding each as it ends; a failed one keeps no other from running.

        Args:
            begun: told the name of each run that begins.
        """
        states = self.states()
        for one in self.found:
            if states[one.name] == "finished":
                yield Ended(one.name, None, 0.0, self._log(one))
        self.root.mkdir(parents=True, exist_ok=True)
        waiting = [one for one in self.found if states[one.name] != "finished"]
        tasks = [Task(one.name, self._command(one, states[one.name]), self._log(one)) for one in waiting]
        yield from self._pool.run(tasks, begun)

    def _command(self, one: Combination, state: State) -> list[str]:
        resume = ["--resume"] if state == "broken off" else []
        folder = ["--output", str(self.root / one.name)]
        return [sys.executable, "-m", "vipo", "train", self.recipe, *one.overrides, *folder, *resume, *self.words]

    def _log(self, one: Combination) -> Path:
        """Beside the run's folder, which must be empty when the run begins."""
        return self.root / f"{one.name}.log"
