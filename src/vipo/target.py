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

from vipo.build import build_generator, build_rewards, model_path, rate_notices
from vipo.evaluate import EVALUATION_SEED, Evaluation, Judgement, evaluate
from vipo.generators import attention, choose, makes_video
from vipo.generators.common import DiffusersGenerator
from vipo.generators.folder import pipeline_class, read_config
from vipo.generators.lora import attach_lora
from vipo.judged import Judges, Keeper, Models, judge_parts
from vipo.pretrained import fingerprint
from vipo.recipe import GeneratorSection, JudgeSection, parse_section
from vipo.rewards import build as build_reward
from vipo.rewards.user_file import is_user_file
from vipo.rollout import Solver, StepContext, sample_groups
from vipo.run import load_run
from vipo.rundir import RunDirectory
from vipo.types import Generator, Prompt, Reward, Rollout, UserError

PLACES = {"path", "text_cache", "offload_text"}  # of a generator section: they change no sample
BATCH = 64  # pictures, or frames of whole clips

# How a plain model is sampled unless told otherwise. Steps by adapter, as its diffusers pipeline has them.
PLAIN_STEPS: Mapping[str, int] = {"flux": 28, "sd3": 28, "flux2": 50, "qwen_image": 50, "z_image": 50, "wan": 50}
NOTHING = "is neither a run directory nor a diffusers pipeline, as a folder or on the hub"
PICTURE_SIDE = 1024  # pixels, where the autoencoder does not say
# A Wan's clips by its autoencoder's stride: emoji-wan, Wan2.1 at 480p, Wan2.2-TI2V-5B at 720p.
WAN_CLIPS: Mapping[int, Mapping[str, int]] = {
    4: {"height": 64, "width": 64, "frames": 17, "fps": 8},
    8: {"height": 480, "width": 832, "frames": 81, "fps": 16},
    16: {"height": 704, "width": 1280, "frames": 121, "fps": 24},
}


@dataclass(frozen=True)
class OwnReward:
    """A reward that comes with the model, a run's own for one, with which reward it is and its options."""

    reward: Reward
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """A generator ready to sample; with a ``reference``, also what it was before training.

    ``described`` is what its samples depend on beside the weights and the solver, ``fps`` the frames per second of its
    clips.
    """

    generator: Generator
    solver: Solver
    described: Mapping[str, Any]
    fps: float
    reference: Callable[[], AbstractContextManager[None]] | None = None  # inside, the generator is the base model
    evaluation_prompts: tuple[Prompt, ...] = ()
    rewards: Mapping[str, OwnReward] = field(default_factory=dict)
    attention: str = attention.AUTO

    def judged_by(self, sections: Mapping[str, JudgeSection]) -> Model:
        """The same model with these rewards to choose from.

        Raises:
            UserError: one of them cannot be built.
        """
        return replace(self, rewards=_owned(sections, build_rewards(sections, fps=self.fps).rewards))

    def notices(self, prompts: Sequence[Prompt], rewards: Sequence[str] = ()) -> list[str]:
        """What to tell before it samples: prompts that will be cut, and clips that a reward takes for others."""
        told = rate_notices({name: own.options for name, own in self.rewards.items() if name in rewards}, self.fps)
        if isinstance(self.generator, DiffusersGenerator):
            told += self.generator.cut_prompts(given=[prompt.text for prompt in prompts])
        return told

    @property
    def models(self) -> Models:
        """How to get at the base and, if there is one, the policy."""
        if self.reference is None:
            return {"base": nullcontext}
        return {"base": self.reference, "policy": nullcontext}

    @property
    def batch_size(self) -> int:
        """Samples at a time unless told otherwise."""
        _, latent_frames, _, _ = self.generator.latent_shape()
        return max(1, BATCH // (self.generator.temporal_stride * (latent_frames - 1) + 1))

    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        count: int,
        steps: int | None,
        seed: int,
        batch_size: int | None = None,
        base_tail: float = 0.0,
    ) -> Iterator[Rollout]:
        """``count`` samples of each prompt, about ``batch_size`` of them at a time, in order.

        The last share ``base_tail`` of the steps is the base model's: MixGRPO's hybrid inference (arXiv 2507.21802),
        which keeps what the policy composed and takes back what a hacked reward did to its surface.

        Raises:
            UserError: there is no base model for the tail.
        """
        solver, batch_size = self.solver.deterministic(steps), batch_size or self.batch_size
        part, around = max(1, batch_size // count), self._around(base_tail, solver.steps)
        for first in range(0, len(prompts), part):
            with attention.scope(self.attention):
                rollout = sample_groups(
                    self.generator,
                    prompts[first : first + part],
                    solver,
                    group_size=count,
                    seed=seed,
                    first_group=first,
                    batch_size=batch_size,
                    around=around,
                )
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
        count: int,
        steps: int | None,
        batch_size: int | None = None,
        keeper: Keeper | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Judgement:
        """Scores of the base model and, if something was trained, of the policy, on the same prompts and noise.

        Raises:
            UserError: a reward is unknown, has a fault or cannot be reached.
        """
        batch_size = batch_size or self.batch_size
        known = {name: entry.reward for name, entry in self.rewards.items()}
        told = {"media_fps": self.fps}
        judges = Judges({name: known[name] if name in known else build_reward(name, told) for name in rewards})

        def judge(part: Sequence[Prompt], first: int) -> Evaluation:
            with attention.scope(self.attention):
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


def open_target(
    target: str,
    *,
    size: int | None = None,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    fps: float | None = None,
    lora: Path | None = None,
) -> Model:
    """Load a run's policy, or a plain model, on request with a LoRA as the policy.

    Args:
        size: side in pixels of a plain model's square pictures, short for ``height`` and ``width``.
        height, width: pixels; None takes what a plain model was made for.
        frames: of a plain video model's clips, in pixel space; likewise.
        fps: frames per second of them, for rewards that depend on it; likewise.
        lora: safetensors file, or folder that holds one, for a plain model; see :mod:`vipo.generators.lora`.

    Raises:
        UserError: neither a run nor a pipeline that an adapter knows, a size that does not fit or fits only plain
            models, or a LoRA that does not fit.
    """
    side = {"size": size, "height": height, "width": width, "frames": frames, "fps": fps}
    given = {name: value for name, value in side.items() if value is not None}
    if RunDirectory(Path(target)).exists():
        if lora is not None:
            raise UserError(f"{target!r} is a run and has a policy of its own; give --lora with a pipeline folder")
        if given:
            raise UserError(f"{target!r} is a run and samples as it was trained; leave out --{' and --'.join(given)}")
        return _open_run(target)
    path = model_path(target)
    name = choose(None, pipeline_class(path, absent=NOTHING), path)
    section = _plain_section(path, name, given)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = build_generator(section, device=device)
    described = {"model": target, "lora": lora and str(lora), "generator": section.model_dump(exclude=PLACES)}
    reference = None if lora is None else _attach_lora(generator, lora)
    solver = Solver(steps=PLAIN_STEPS[name], shift=generator.shift)
    return Model(generator, solver, described, section.fps, reference)


def _open_run(target: str) -> Model:
    session = load_run(Path(target))
    described = {"model": target, "lora": None, "generator": session.recipe.generator.model_dump(exclude=PLACES)}
    rewards = _owned({**session.recipe.judges, **session.recipe.rewards}, session.judge.rewards)
    solver, reference = session.trainer.solver, session.policy.reference
    section, asked = session.recipe.generator, session.evaluation_prompts
    return Model(session.generator, solver, described, section.fps, reference, asked, rewards, section.attention)


def _owned(sections: Mapping[str, JudgeSection], built: Mapping[str, Reward]) -> dict[str, OwnReward]:
    """Rewards beside what they were built from."""
    return {
        name: OwnReward(reward, {"reward": sections[name].reward or name, **sections[name].options})
        for name, reward in built.items()
    }


def _attach_lora(generator: Generator, lora: Path) -> Callable[[], AbstractContextManager[None]]:
    """Load a LoRA into the generator's network; what is returned switches it off."""
    pipeline, network = getattr(generator, "pipeline", None), generator.network
    if not hasattr(pipeline, "lora_state_dict"):
        raise UserError(f"{type(generator).__name__} takes no LoRA; leave out --lora")
    attach_lora(pipeline, lora)

    @contextmanager
    def without() -> Iterator[None]:
        network.disable_lora()  # type: ignore[operator]
        try:
            yield
        finally:
            network.enable_lora()  # type: ignore[operator]

    return without


def _plain_section(path: str, name: str, given: Mapping[str, float]) -> GeneratorSection:
    """A plain model and the size of its media, as ``given`` or else what it was made for."""
    if "size" in given and {"height", "width"} & given.keys():
        raise UserError("--size is short for --height and --width, both that long; give it or them")
    square = {side: given["size"] for side in ("height", "width") if "size" in given}
    asked = {side: pixels for side, pixels in given.items() if side != "size"}
    options = {"name": name, "path": path, **_usual_media(path, name), **square, **asked}
    return parse_section(GeneratorSection, options, source="size")


def _usual_media(path: str, name: str) -> Mapping[str, int]:
    """What a pipeline's media measure unless told otherwise, from its autoencoder."""
    autoencoder = read_config(path, "vae")
    if makes_video(name):
        return WAN_CLIPS.get(int(autoencoder.get("scale_factor_spatial", 8)), WAN_CLIPS[8])
    side = int(autoencoder.get("sample_size", PICTURE_SIDE))
    return {"height": side, "width": side}
