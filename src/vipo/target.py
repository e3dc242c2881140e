"""What ``vipo sample`` and ``vipo evaluate`` are pointed at: a run directory, or any pipeline folder or hub id."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vipo.build import build_generator, build_rewards, model_path
from vipo.evaluate import EVALUATION_SEED, Evaluation, evaluate
from vipo.policy import Policy
from vipo.recipe import GeneratorSection, RewardSection, parse_section
from vipo.rollout import Solver, sample_groups
from vipo.run import load_run
from vipo.rundir import RunDirectory
from vipo.types import Generator, Prompt, Rollout, UserError

BATCH = 64
PLAIN_STEPS = 28  # what FLUX.1-dev is usually sampled with
ADAPTERS = {"FluxPipeline": "flux"}  # pipeline class in model_index.json -> adapter


@dataclass(frozen=True)
class Model:
    """A generator ready to sample; with a policy, also what it was before training."""

    generator: Generator
    solver: Solver
    policy: Policy | None = None
    evaluation_prompts: tuple[Prompt, ...] = ()
    reward_names: list[str] = field(default_factory=list)

    def sample(self, prompts: Sequence[Prompt], *, count: int, steps: int | None, seed: int) -> Rollout:
        solver = self.solver.deterministic(steps)
        return sample_groups(self.generator, prompts, solver, group_size=count, seed=seed, batch_size=BATCH)

    def evaluate(
        self, prompts: Sequence[Prompt], rewards: Sequence[str], *, count: int, steps: int | None
    ) -> dict[str, Evaluation]:
        """Scores of the base model and, behind a run, of its policy, on the same prompts and noise."""
        suite = build_rewards(dict.fromkeys(rewards, RewardSection()))

        def judge() -> Evaluation:
            return evaluate(
                self.generator,
                prompts,
                suite,
                self.solver,
                samples_per_prompt=count,
                steps=steps,
                batch_size=BATCH,
                seed=EVALUATION_SEED,
            )

        with self._base():
            results = {"base": judge()}
        if self.policy is not None:
            results["policy"] = judge()
        return results

    @contextmanager
    def _base(self) -> Iterator[None]:
        if self.policy is None:
            yield
        else:
            with self.policy.reference():
                yield


def open_target(target: str, *, size: int | None = None) -> Model:
    """Load a run's policy, or a plain model.

    Raises:
        UserError: neither a run nor a pipeline that an adapter knows.
    """
    if RunDirectory(Path(target)).exists():
        session = load_run(Path(target))
        names = list(session.judge.rewards)
        return Model(session.generator, session.trainer.solver, session.policy, session.evaluation_prompts, names)
    path = model_path(target)
    side = _side(path) if size is None else size
    options = {"name": _adapter(path), "path": path, "height": side, "width": side}
    section = parse_section(GeneratorSection, options, source="size")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = build_generator(section, device=device)
    return Model(generator, Solver(steps=PLAIN_STEPS, shift=generator.shift))


def _adapter(path: str) -> str:
    """Which adapter reads the pipeline; a hub id, which cannot be looked into, is taken for FLUX."""
    index = Path(path) / "model_index.json"
    if not index.is_file():
        if Path(path).exists():
            raise UserError(f"{path!r} is neither a run directory nor a diffusers pipeline folder")
        return "flux"
    name = str(json.loads(index.read_text())["_class_name"])
    if name not in ADAPTERS:
        raise UserError(f"{path!r} is a {name}; vipo adapts {', '.join(ADAPTERS)}")
    return ADAPTERS[name]


def _side(path: str) -> int:
    """The side in pixels that a pipeline folder was made for, from its autoencoder; 1024 if it does not say."""
    config = Path(path) / "vae" / "config.json"
    return int(json.loads(config.read_text())["sample_size"]) if config.is_file() else 1024
