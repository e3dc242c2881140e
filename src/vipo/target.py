"""What ``vipo sample`` and ``vipo evaluate`` are pointed at: a run directory, or any pipeline folder or hub id."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from vipo.build import build_generator, build_rewards, model_path
from vipo.evaluate import EVALUATION_SEED, Evaluation, Judgement, evaluate
from vipo.generators import GENERATORS, adapter_of
from vipo.judged import Judges, Keeper, Models, judge_parts
from vipo.recipe import GeneratorSection, JudgeSection, parse_section
from vipo.rewards import build as build_reward
from vipo.rewards.user_file import is_user_file
from vipo.rollout import Solver, sample_groups
from vipo.run import load_run
from vipo.rundir import RunDirectory
from vipo.types import Generator, Prompt, Reward, Rollout, UserError

BATCH = 64
PLAIN_STEPS = 28  # what FLUX.1-dev is usually sampled with
PROBED = 64  # elements of each tensor that a fingerprint looks at


@dataclass(frozen=True)
class OwnReward:
    """A reward that comes with the model, a run's own for one, with which reward it is and its options."""

    reward: Reward
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """A generator ready to sample; with a ``reference``, also what it was before training.

    ``described`` is what its samples depend on beside the weights and the solver.
    """

    generator: Generator
    solver: Solver
    described: Mapping[str, Any]
    reference: Callable[[], AbstractContextManager[None]] | None = None  # inside, the generator is the base model
    evaluation_prompts: tuple[Prompt, ...] = ()
    rewards: Mapping[str, OwnReward] = field(default_factory=dict)

    def judged_by(self, sections: Mapping[str, JudgeSection]) -> Model:
        """The same model with these rewards to choose from.

        Raises:
            UserError: one of them cannot be built.
        """
        return replace(self, rewards=_owned(sections, build_rewards(sections).rewards))

    @property
    def models(self) -> Models:
        """How to get at the base and, if there is one, the policy."""
        if self.reference is None:
            return {"base": nullcontext}
        return {"base": self.reference, "policy": nullcontext}

    def sample(
        self, prompts: Sequence[Prompt], *, count: int, steps: int | None, seed: int, batch_size: int = BATCH
    ) -> Iterator[Rollout]:
        """``count`` samples of each prompt, about ``batch_size`` of them at a time, in order."""
        solver, part = self.solver.deterministic(steps), max(1, batch_size // count)
        for first in range(0, len(prompts), part):
            yield sample_groups(
                self.generator,
                prompts[first : first + part],
                solver,
                group_size=count,
                seed=seed,
                first_group=first,
                batch_size=batch_size,
            )

    def evaluate(
        self,
        prompts: Sequence[Prompt],
        rewards: Sequence[str],
        *,
        count: int,
        steps: int | None,
        batch_size: int = BATCH,
        keeper: Keeper | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Judgement:
        """Scores of the base model and, if something was trained, of the policy, on the same prompts and noise.

        Raises:
            UserError: a reward is unknown, has a fault or cannot be reached.
        """
        known = {name: entry.reward for name, entry in self.rewards.items()}
        judges = Judges({name: known[name] if name in known else build_reward(name) for name in rewards})

        def judge(part: Sequence[Prompt], first: int) -> Evaluation:
            return evaluate(
                self.generator,
                part,
                judges,
                self.solver,
                samples_per_prompt=count,
                steps=steps,
                batch_size=batch_size,
                first_prompt=first,
            )

        return judge_parts(
            self.models,
            judge,
            prompts,
            samples_per_prompt=count,
            batch_size=batch_size,
            keeper=keeper,
            progress=progress,
        )

    def settings(
        self, prompts: Sequence[Prompt], rewards: Sequence[str], *, count: int, steps: int | None, batch_size: int
    ) -> dict[str, Any]:
        """All that the scores of :meth:`evaluate` depend on, for JSON; equal settings give equal scores."""
        listed = json.dumps([[prompt.text, dict(prompt.metadata)] for prompt in prompts], sort_keys=True, default=str)
        solver = self.solver.deterministic(steps)
        return {
            **self.described,
            "weights": fingerprint(self.generator.network),
            "sample_shape": list(self.generator.latent_shape()),
            "steps": solver.steps,
            "shift": solver.shift,
            "seed": EVALUATION_SEED,
            "samples_per_prompt": count,
            "batch_size": batch_size,
            "prompts": hashlib.sha256(listed.encode()).hexdigest(),
            "rewards": {name: self._reward_settings(name) for name in rewards},
        }

    def _reward_settings(self, name: str) -> dict[str, Any]:
        options: dict[str, Any] = dict(self.rewards[name].options) if name in self.rewards else {}
        source = str(options.get("reward", name))
        file = Path(source.rpartition(":")[0]).expanduser()
        if is_user_file(source) and file.is_file():
            return {"options": options, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        return {"options": options}


def fingerprint(network: torch.nn.Module) -> str:
    """A digest of a network's weights from some elements of every tensor, the same on every device."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        flat = tensor.detach().flatten()
        probes = flat[:: max(1, len(flat) // PROBED)].double().cpu().numpy()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + probes.tobytes())
    return digest.hexdigest()


def open_target(target: str, *, size: int | None = None, lora: Path | None = None) -> Model:
    """Load a run's policy, or a plain model, on request with a LoRA as the policy.

    Args:
        size: side in pixels of a plain model's pictures; None takes what it was made for.
        lora: diffusers-format file, or folder that holds one, for a plain model.

    Raises:
        UserError: neither a run nor a pipeline that an adapter knows, or a LoRA that does not fit.
    """
    if RunDirectory(Path(target)).exists():
        if lora is not None:
            raise UserError(f"{target!r} is a run and has a policy of its own; give --lora with a pipeline folder")
        return _open_run(target)
    path = model_path(target)
    side = _side(path) if size is None else size
    options = {"name": _adapter(path), "path": path, "height": side, "width": side}
    section = parse_section(GeneratorSection, options, source="size")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = build_generator(section, device=device)
    described = {"model": target, "lora": lora and str(lora), "generator": section.model_dump(exclude={"path"})}
    reference = None if lora is None else _attach_lora(generator, lora)
    return Model(generator, Solver(steps=PLAIN_STEPS, shift=generator.shift), described, reference)


def _open_run(target: str) -> Model:
    session = load_run(Path(target))
    described = {"model": target, "lora": None, "generator": session.recipe.generator.model_dump(exclude={"path"})}
    rewards = _owned({**session.recipe.judges, **session.recipe.rewards}, session.judge.rewards)
    solver, reference = session.trainer.solver, session.policy.reference
    return Model(session.generator, solver, described, reference, session.evaluation_prompts, rewards)


def _owned(sections: Mapping[str, JudgeSection], built: Mapping[str, Reward]) -> dict[str, OwnReward]:
    """Rewards beside what they were built from."""
    return {
        name: OwnReward(reward, {"reward": sections[name].reward or name, **sections[name].options})
        for name, reward in built.items()
    }


def _attach_lora(generator: Generator, lora: Path) -> Callable[[], AbstractContextManager[None]]:
    """Load a LoRA into the generator's pipeline; what is returned switches it off."""
    pipeline: Any = getattr(generator, "pipeline", None)
    if not hasattr(pipeline, "load_lora_weights"):
        raise UserError(f"{type(generator).__name__} takes no LoRA; leave out --lora")
    if not lora.exists():
        raise UserError(f"LoRA {str(lora)!r} does not exist; give a .safetensors file or the folder that holds one")
    try:
        pipeline.load_lora_weights(str(lora))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"LoRA {str(lora)!r} could not be loaded into this model: {_line(error)}") from error
    if not any(isinstance(module, BaseTunerLayer) for module in generator.network.modules()):
        raise UserError(f"LoRA {str(lora)!r} changes no layer of this model; was it made for another one?")

    @contextmanager
    def without() -> Iterator[None]:
        pipeline.disable_lora()
        try:
            yield
        finally:
            pipeline.enable_lora()

    return without


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _adapter(path: str) -> str:
    """Which adapter reads the pipeline; a hub id, which cannot be looked into, is taken for FLUX."""
    index = Path(path) / "model_index.json"
    if not index.is_file():
        if Path(path).exists():
            raise UserError(f"{path!r} is neither a run directory nor a diffusers pipeline folder")
        return "flux"
    name = str(json.loads(index.read_text())["_class_name"])
    adapter = adapter_of(name)
    if adapter is None:
        known = ", ".join(sorted(pipeline for entry in GENERATORS.values() for pipeline in entry.pipelines))
        raise UserError(f"{path!r} is a {name}; vipo adapts {known}")
    return adapter


def _side(path: str) -> int:
    """The side in pixels that a pipeline folder was made for, from its autoencoder; 1024 if it does not say."""
    config = Path(path) / "vae" / "config.json"
    return int(json.loads(config.read_text())["sample_size"]) if config.is_file() else 1024
