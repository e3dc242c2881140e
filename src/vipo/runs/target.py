"""What ``vipo sample`` and ``vipo evaluate`` are pointed at: a run directory, or any pipeline folder or hub id."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vipo.assemble import build_generator, build_rewards, default_device, rate_notices
from vipo.errors import UserError
from vipo.evaluation.evaluator import EVALUATION_SEED, Evaluator, Sampler
from vipo.evaluation.records import BASE, POLICY, Evaluation, Keeper, Models
from vipo.generators import attention
from vipo.generators.lora_file import is_lora
from vipo.options import Solver
from vipo.pretrained import fingerprint
from vipo.prompts.files import named_prompts
from vipo.ranks import ALONE, Ranks
from vipo.rollout import StepContext
from vipo.runs.directory import RunDirectory
from vipo.runs.guidance import check_guidance, guidance_note, guided, run_behind
from vipo.runs.plain import PLAIN_STEPS, plain_section, put_on_lora
from vipo.runs.trained import Trained, find_trained, is_checkpoint, open_trained
from vipo.schema import EvaluationSection, JudgeSection
from vipo.types import Generator, NamesCutPrompts, Prompt, Rollout
from vipo.user_file import file_of, is_user_file

log = logging.getLogger(__name__)

PLACES = {"path", "text_cache", "offload_text"}  # of a generator section: they change no sample
BATCH = 64  # pictures, or frames of whole clips


@dataclass(frozen=True)
class Target:
    """A generator ready to sample; with a ``reference``, also what it was before training.

    Args:
        described: what its samples depend on beside the weights and the solver.
        fps: frames per second of its clips.
        reference: inside, the generator is the base model.
        evaluation: where a run's evaluation prompts are.
        rewards: its own, built when they are asked for.
        told: what to tell of it in any case.
        others: of the files that a run's recipe names under these keys, those that have changed since, in words.
    """

    generator: Generator
    solver: Solver
    described: Mapping[str, Any]
    fps: float
    reference: Callable[[], AbstractContextManager[None]] | None = None
    evaluation: EvaluationSection | None = None
    rewards: Mapping[str, JudgeSection] = field(default_factory=dict)
    attention: str = attention.AUTO
    told: tuple[str, ...] = ()
    others: Callable[[Collection[str]], Sequence[str]] = lambda _keys: ()

    def with_rewards(self, sections: Mapping[str, JudgeSection]) -> Target:
        """The same model with these rewards to choose from."""
        return replace(self, rewards=sections, others=lambda _keys: ())

    def evaluation_prompts(self) -> list[Prompt]:
        """Those of the run; none without one.

        Raises:
            UserError: they cannot be read.
        """
        section = self.evaluation
        if section is None:
            return []
        for file in self.others(["evaluation.prompts"]):
            log.warning("not what the run was evaluated on: %s", file)
        return named_prompts(section.prompts)[: section.limit]

    def notices(self, prompts: Sequence[Prompt], rewards: Sequence[str] = ()) -> list[str]:
        """What to tell before it samples: a base in fewer bits, prompts that will be cut, clips taken for others."""
        options = {name: own.options for name, own in self.rewards.items() if name in rewards}
        told = [*self.told, *rate_notices(options, self.fps)]
        keys = [f"{section}.{name}" for section in ("rewards", "judges") for name in options]
        told += [f"not what this run was scored with, so scores are others: {file}" for file in self.others(keys)]
        kind = self.described["generator"]["quantization"]
        if kind != "none":
            told.append(
                f"the base is quantised ({kind}), as this run trained on it; its export fits the whole base too"
            )
        if isinstance(self.generator, NamesCutPrompts):
            told += self.generator.cut_prompts(given=[prompt.text for prompt in prompts])
        return told

    @property
    def models(self) -> Models:
        """How to get at the base and, if there is one, the policy."""
        if self.reference is None:
            return {BASE: nullcontext}
        return {BASE: self.reference, POLICY: nullcontext}

    @property
    def batch_size(self) -> int:
        """Samples at a time unless told otherwise."""
        _, latent_frames, _, _ = self.generator.latent_shape()
        return max(1, BATCH // (self.generator.temporal_stride * (latent_frames - 1) + 1))

    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        samples_per_prompt: int,
        steps: int | None,
        seed: int,
        batch_size: int | None = None,
        base_tail: float = 0.0,
        is_there: Callable[[range], bool] = lambda _rows: False,
    ) -> Iterator[Rollout]:
        """Samples of each prompt, about ``batch_size`` at a time, in order, but for those parts that are there already.

        The last share ``base_tail`` of the steps is the base model's: MixGRPO's hybrid inference (arXiv 2507.21802),
        which keeps what the policy composed and takes back what a hacked reward did to its surface.

        Raises:
            UserError: there is no base model for the tail.
        """
        around = self._around(base_tail, self.solver.deterministic(steps).steps)
        batch_size = batch_size or self.batch_size
        sampler = Sampler(self.generator, self.solver, samples_per_prompt, steps, batch_size, seed, around)
        at_once = max(1, batch_size // samples_per_prompt)
        for first in range(0, len(prompts), at_once):
            until = min(first + at_once, len(prompts))
            if is_there(range(first * samples_per_prompt, until * samples_per_prompt)):
                continue
            with attention.scope(self.attention):
                rollout = sampler(prompts[first : first + at_once], first)
            yield rollout

    def _around(self, base_tail: float, steps: int) -> StepContext:
        """The base model for the last ``base_tail`` of the steps, rounded to whole ones."""
        if not 0 <= base_tail <= 1:
            raise UserError(f"a base tail of {base_tail:g} is no share of the steps; give a number from 0 to 1")
        if base_tail and self.reference is None:
            raise UserError("a base tail needs a policy and its base model; give a run, or a plain model with --lora")
        base, first = self.reference or nullcontext, steps - round(base_tail * steps)
        return lambda step: base() if step >= first else nullcontext()

    def evaluate(
        self,
        prompts: Sequence[Prompt],
        rewards: Sequence[str],
        *,
        samples_per_prompt: int,
        steps: int | None,
        batch_size: int | None = None,
        keeper: Keeper | None = None,
        progress: Callable[[int], None] | None = None,
        ranks: Ranks = ALONE,
    ) -> Evaluation:
        """Scores of the base model and, if something was trained, of the policy, on the same prompts and noise.

        A reward that cannot be reached stops it: what is kept by then can be gone on with.

        Raises:
            UserError: a reward is unknown, has a fault or cannot be reached.
        """
        batch_size = batch_size or self.batch_size
        asked = {name: self.rewards.get(name, JudgeSection()) for name in rewards}
        evaluate = Evaluator(
            self.models,
            Sampler(self.generator, self.solver, samples_per_prompt, steps, batch_size),
            build_rewards(asked, fps=self.fps, trains=False, must_reach=True, retries=0),
            prompts_at_once=max(1, batch_size // samples_per_prompt),
            attention=self.attention,
            ranks=ranks,
        )
        return evaluate(prompts, keeper=keeper, progress=progress)

    def settings(
        self,
        prompts: Sequence[Prompt],
        rewards: Sequence[str],
        *,
        samples_per_prompt: int,
        steps: int | None,
        batch_size: int,
    ) -> dict[str, Any]:
        """All that the scores of :meth:`evaluate` depend on, for JSON; equal settings give equal scores."""
        listed = json.dumps([[prompt.text, dict(prompt.metadata)] for prompt in prompts], sort_keys=True, default=str)
        solver = self.solver.deterministic(steps)
        return {
            **self.described,
            **_code(self.described["generator"]["name"] or ""),
            "weights": fingerprint(self.generator.network),
            "sample_shape": list(self.generator.latent_shape()),
            "steps": solver.steps,
            "shift": solver.shift,
            "seed": EVALUATION_SEED,
            "samples_per_prompt": samples_per_prompt,
            "batch_size": batch_size,
            "prompts": hashlib.sha256(listed.encode()).hexdigest(),
            "rewards": {name: self._reward_settings(name) for name in rewards},
        }

    def _reward_settings(self, name: str) -> dict[str, Any]:
        own = self.rewards.get(name)
        options: dict[str, Any] = {} if own is None else {"reward": own.reward or name, **own.options}
        return {"options": options, **_code(str(options.get("reward", name)))}


def _code(name: str) -> dict[str, str]:
    """The checksum of the file that a part of the user's own is from; of any other part nothing."""
    if is_user_file(name) and (file := file_of(name)).is_file():
        return {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    return {}


def open_target(
    target: str,
    *,
    size: int | None = None,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    fps: float | None = None,
    dtype: str | None = None,
    guidance_scale: float | None = None,
    checkpoint: str | None = None,
    lora: Path | None = None,
    base: str | None = None,
    keep_reference: bool = True,
    allow_code: bool = True,
    device: torch.device | str | None = None,
) -> Target:
    """Load a run's policy, or a plain model, on request with a LoRA as the policy. No reward is built.

    Args:
        target: a run, a checkpoint of one, a pipeline, or with ``base`` a LoRA.
        size: side in pixels of a plain model's square pictures, short for ``height`` and ``width``.
        height, width: pixels; None takes what a plain model was made for.
        frames: of a plain video model's clips, in pixel space; likewise.
        fps: frames per second of them, for rewards that depend on it; likewise.
        dtype: of a plain model's weights, "float32", "bfloat16" or "float16"; None is float32.
        guidance_scale: instead of what a run was trained with, or a plain model's usual one.
        checkpoint: of a run: the name of its folder, a path, or ``best``; None takes the latest.
        lora: safetensors file, or folder that holds one, for a plain model; see :mod:`vipo.generators.lora`.
        base: the plain model that ``target``, then a LoRA, goes on.
        keep_reference: a run's policy can also be its base model, at the cost, for full weights, of a copy; without,
            it can only :meth:`Target.sample` as the policy.
        allow_code: whether a run's generator may be Python code, ``file.py:thing``.

    Raises:
        UserError: neither a run nor a pipeline that an adapter knows, a size that does not fit or fits only plain
            models, guidance for a model that takes none, no such checkpoint, or a LoRA that does not fit.
    """
    options = {"size": size, "height": height, "width": width, "frames": frames, "fps": fps, "dtype": dtype}
    given = {name: value for name, value in options.items() if value is not None}
    device = device or default_device()
    is_run = RunDirectory(Path(target)).exists() or is_checkpoint(Path(target))
    if base is not None:
        target, lora = _on_base(target, base, lora, is_run)
    elif is_run:
        _check_alone(target, lora, given)
        trained = find_trained(Path(target), checkpoint, allow_code=allow_code)
        return _open_run(trained, target, guidance_scale, keep_reference, device)
    elif is_lora(Path(target)):
        raise UserError(f"{target!r} is a LoRA; name the model that it goes on with --base MODEL")
    if checkpoint is not None:
        raise UserError(f"{target!r} is no run, so it has no checkpoints; leave out --checkpoint")
    return _open_plain(target, given, guidance_scale, lora, device)


def _on_base(target: str, base: str, lora: Path | None, is_run: bool) -> tuple[str, Path]:
    """The model and the LoRA on it."""
    if is_run or not is_lora(Path(target)):
        raise UserError(f"--base is for a LoRA, and {target!r} is none; leave it out, or give the LoRA in its place")
    if lora is not None:
        raise UserError(f"{target!r} is a LoRA, and --lora names a second one; give one of the two")
    return base, Path(target)


def _check_alone(target: str, lora: Path | None, given: Mapping[str, Any]) -> None:
    """A run has all that a plain model is told."""
    if lora is not None:
        raise UserError(f"{target!r} is a run and has a policy of its own; give --lora with a pipeline folder")
    if given:
        raise UserError(f"{target!r} is a run and samples as it was trained; leave out --{' and --'.join(given)}")


def _open_plain(
    target: str,
    given: Mapping[str, Any],
    guidance_scale: float | None,
    lora: Path | None,
    device: torch.device | str,
) -> Target:
    section = guided(plain_section(target, given), guidance_scale)
    generator = build_generator(section, device=str(device))
    check_guidance(generator, guidance_scale)
    described = {"model": target, "lora": lora and str(lora), "generator": section.model_dump(exclude=PLACES)}
    reference = None if lora is None else put_on_lora(generator, lora)
    solver = Solver(steps=PLAIN_STEPS[str(section.name)], shift=generator.shift)
    trained = run_behind(Path(target) if lora is None else lora)
    told = [] if trained is None else guidance_note(generator, trained)
    return Target(generator, solver, described, section.fps, reference, told=tuple(told))


def _open_run(
    trained: Trained, target: str, guidance_scale: float | None, keep_reference: bool, device: torch.device | str
) -> Target:
    recipe = trained.recipe
    model = open_trained(trained, guidance_scale=guidance_scale, device=device, keep_reference=keep_reference)
    section = guided(recipe.generator, guidance_scale)
    return Target(
        model.generator,
        model.solver,
        {"model": target, "lora": None, "generator": section.model_dump(exclude=PLACES)},
        recipe.generator.fps,
        model.policy.reference,
        recipe.evaluation,
        {**recipe.judges, **recipe.rewards},
        model.attention,
        (*trained.told, *guidance_note(model.generator, recipe.generator)),
        trained.others,
    )
