"""From a recipe to the parts it names: the only file that knows concrete classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from vipo import backbones, embedded, generators, map_sources, rewards
from vipo.generators import attention
from vipo.generators.folder import pipeline_class
from vipo.health import Health
from vipo.launch import check_engine, open_engine
from vipo.objective import NEEDS_MAPS
from vipo.policy import Policy
from vipo.prompts import SHIPPED, PromptSampler, read_prompts, shipped_set
from vipo.recipe import GeneratorSection, JudgeSection, Recipe, RewardSection, SourceName, StructuringSection
from vipo.rollout import Solver, Window
from vipo.structuring import PerceptualStructuring
from vipo.trainer import Objective, Trainer, Update
from vipo.types import Generator, MapSource, Prompt, Reward, Scores, UserError

EMBEDDED = "embedded:"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class RewardSuite:
    """Rewards with their weights as one :class:`vipo.types.Scorer`; stops the run if too many samples go unscored."""

    rewards: Mapping[str, Reward]
    weights: Mapping[str, float]
    max_failed_share: float = 1.0
    retries: int = 2
    pause_seconds: float = 15.0

    def __call__(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Scores:
        scores = rewards.score(
            self.rewards, self.weights, media, prompts, retries=self.retries, pause_seconds=self.pause_seconds
        )
        for name, values in scores.by_name.items():
            failed = float(values.isnan().float().mean())
            if failed > self.max_failed_share:
                raise UserError(
                    f"reward {name!r} left {failed:.0%} of the samples unscored, more than"
                    f" training.max_failed_share={self.max_failed_share:g}: {scores.failures[name]}"
                )
        return scores


@dataclass(frozen=True)
class Session:
    """Everything a recipe names, built and joined."""

    recipe: Recipe
    trainer: Trainer
    judge: RewardSuite  # the training rewards and the held-out judges together, for evaluation
    evaluation_prompts: tuple[Prompt, ...]

    @property
    def generator(self) -> Generator:
        return self.trainer.generator

    @property
    def policy(self) -> Policy:
        return self.trainer.policy


def prompt_file(name: str) -> Path:
    """A prompt file's path; ``embedded:NAME`` and a benchmark's ``set:NAME`` ship with the package."""
    if name.startswith(EMBEDDED):
        return Path(embedded.__file__).parent / f"{name.removeprefix(EMBEDDED)}.txt"
    if name.startswith(SHIPPED):
        return shipped_set(name.removeprefix(SHIPPED))
    return Path(name).expanduser()


def model_path(name: str) -> str:
    """A model's folder or hub id; ``embedded:NAME`` is one that ships with the package."""
    if not name.startswith(EMBEDDED):
        return str(Path(name).expanduser()) if name.startswith("~") else name
    try:
        return str(embedded.path(name.removeprefix(EMBEDDED)))
    except FileNotFoundError as error:
        raise UserError(str(error)) from error


def build_generator(section: GeneratorSection, *, device: str, precision: str = "no") -> Generator:
    """Load the model; ``precision`` is what it will be trained in, as ``training.precision`` has it.

    Raises:
        UserError: an unknown adapter, one that does not read this model, an option it does not take, weights that
            cannot be loaded, or attention that cannot be trained with here.
    """
    attention.check(section.attention)
    path = model_path(section.path)
    if section.name is not None:
        generators.entry(section.name)  # a slip in the name is told before the model is looked for
    name = generators.choose(section.name, pipeline_class(path), section.path)
    sizes = {"height": section.height, "width": section.width, "frames": section.frames}
    arguments = generators.arguments(name, **sizes, given=section.options)
    generator = generators.factory(name)(path, device=device, dtype=DTYPES[section.dtype], **arguments)
    worked_in = torch.bfloat16 if precision == "bf16" else DTYPES[section.dtype]
    attention.install(generator.network, section.attention, dtype=worked_in)
    return generator


def build_structuring(section: StructuringSection, *, temporal_stride: int, device: str) -> PerceptualStructuring:
    """The backbone and how its features become a map."""
    options: dict[str, Any] = section.model_dump(exclude={"sources", "backbone", "backbone_options", "orientation"})
    if section.orientation is not None:
        options["orientation"] = section.orientation
    backbone = backbones.build(section.backbone, **section.backbone_options)
    if isinstance(backbone, torch.nn.Module):
        backbone.to(device)
    return PerceptualStructuring(backbone, temporal_stride=temporal_stride, **options)


def build_map_source(section: StructuringSection, generator: Generator, scorer: RewardSuite, device: str) -> MapSource:
    """What the recipe's ``structuring.sources`` name; several are multiplied."""
    stride = generator.temporal_stride
    shaped: dict[str, Any] = {"smoothing_sigma": section.smoothing_sigma, "normalization": section.normalization}
    makers: dict[SourceName, Callable[[], MapSource]] = {
        "perceptual": lambda: map_sources.Perceptual(build_structuring(section, temporal_stride=stride, device=device)),
        "reward_gradient": lambda: map_sources.RewardGradient(
            scorer.rewards, scorer.weights, temporal_stride=stride, **shaped
        ),
        "text_relevance": lambda: map_sources.TextRelevance(generator, **shaped),
        "disagreement": lambda: map_sources.Disagreement(**shaped),
        "deviation": lambda: map_sources.Deviation(**shaped),
    }
    sources = [makers[name]() for name in section.sources]
    return sources[0] if len(sources) == 1 else map_sources.Product(sources, section.normalization)


def build_rewards(sections: Mapping[str, JudgeSection], *, fps: float, **policy: Any) -> RewardSuite:
    """Rewards by name with their weights.

    Args:
        fps: frames per second of the clips, for rewards that take ``media_fps`` and whose options do not say it.
        policy: what :class:`RewardSuite` does about failures.
    """
    told = {"media_fps": fps}
    return RewardSuite(
        {name: rewards.build(section.reward or name, told, **section.options) for name, section in sections.items()},
        {name: section.weight if isinstance(section, RewardSection) else 1.0 for name, section in sections.items()},
        **policy,
    )


def build_solver(recipe: Recipe, generator: Generator) -> Solver:
    """The recipe's solver; its shift defaults to the model's."""
    options = recipe.solver.model_dump(exclude={"window", "shift"})
    window = Window(**recipe.solver.window.model_dump()) if recipe.solver.window else None
    return Solver(shift=recipe.solver.shift or generator.shift, window=window, **options)


def build_policy(recipe: Recipe, generator: Generator, *, keep_reference: bool) -> Policy:
    """LoRA or full weights on the generator's network."""
    section = recipe.policy
    if section.kind == "full":
        return Policy.full(generator.network, ema_decay=section.ema_decay, keep_reference=keep_reference)
    named = generator.lora_targets
    return Policy.lora(
        generator.network,
        rank=section.rank,
        alpha=section.alpha or float(section.rank),
        targets=named.get(section.targets, section.targets),
        seed=recipe.seed,
        ema_decay=section.ema_decay,
    )


def keep_text(session: Session) -> None:
    """Let the generator encode each prompt once only; with ``generator.offload_text`` all of this process's now.

    Raises:
        UserError: ``generator.text_cache`` cannot be made.
    """
    from vipo.generators.common import DiffusersGenerator
    from vipo.generators.text_cache import prepare

    section, generator = session.recipe.generator, session.generator
    if isinstance(generator, DiffusersGenerator):
        folder = None if section.text_cache is None else Path(section.text_cache).expanduser()
        ahead = _texts(session) if section.offload_text else []
        with attention.scope(section.attention):
            prepare(generator, ahead, folder=folder, offload=section.offload_text)


def _texts(session: Session) -> list[str]:
    """What this process will ask its text encoders about, from the present iteration to the recipe's last."""
    trainer, recipe = session.trainer, session.recipe
    first = trainer.accelerator.process_index * trainer.groups_here
    dealt = [
        prompt
        for iteration in range(trainer.iteration, recipe.training.iterations)
        for prompt in trainer.prompts.groups(iteration)[first : first + trainer.groups_here]
    ]
    without_text = [""] if "text_relevance" in recipe.structuring.sources else []
    return [prompt.text for prompt in (*dealt, *session.evaluation_prompts)] + without_text


def _remedies(recipe: Recipe, generator: Generator) -> list[str]:
    """What a new run of this recipe can be given where the gradient is not finite."""
    section, found = recipe.generator, []
    if attention.takes_backend(generator.network) and section.attention != attention.EXACT:
        found.append(f"generator.attention={attention.EXACT}")
    if section.dtype != "float32":  # only float32 weights are sure to work without autocast
        found.append("generator.dtype=float32 training.precision=no")
    elif recipe.training.precision != "no":
        found.append("training.precision=no")
    return found


def notices(session: Session) -> list[str]:
    """What to tell before the first iteration: prompts that will be cut, and clips that a reward takes for others."""
    from vipo.generators.common import DiffusersGenerator

    recipe, generator = session.recipe, session.generator
    sections = {**recipe.judges, **recipe.rewards}
    told = rate_notices({name: section.options for name, section in sections.items()}, recipe.generator.fps)
    if isinstance(generator, DiffusersGenerator):
        dealt = [prompt.text for prompt in session.trainer.prompts.dealt(recipe.training.iterations)]
        told += generator.cut_prompts(training=dealt, evaluation=[prompt.text for prompt in session.evaluation_prompts])
    return told


def rates_clips(recipe: Recipe) -> bool:
    """Whether a score depends on ``generator.fps``: a reward takes ``media_fps`` and is not given another."""
    sections = {**recipe.judges, **recipe.rewards}
    asking = (section.reward or name for name, section in sections.items() if "media_fps" not in section.options)
    return any(rewards.takes(name, "media_fps") for name in asking)


def rate_notices(options: Mapping[str, Mapping[str, Any]], fps: float) -> list[str]:
    """A sentence for each reward, by name, whose options have a ``media_fps`` that is not the clips' own rate."""
    rates = {name: given["media_fps"] for name, given in options.items() if "media_fps" in given}
    return [
        f"reward {name!r} has media_fps={rate}, but the clips have {fps:g} frames per second; left out, it is theirs"
        for name, rate in rates.items()
        if rate != fps
    ]


def build(recipe: Recipe, *, accelerator: Accelerator | None = None, keep_reference: bool = False) -> Session:
    """Build and join everything a recipe names; nothing is sampled or written yet.

    With ``keep_reference`` the policy can also be what it was before training, which costs full weights a second copy;
    a recipe with a KL term keeps it anyway.

    Raises:
        UserError: a name, file or option in the recipe is wrong, or the launcher's processes are not the engine's.
    """
    accelerator = accelerator or open_engine(recipe.training.precision)
    check_engine(accelerator)
    training_prompts = read_prompts(prompt_file(recipe.prompts.file))
    evaluation_prompts = read_prompts(prompt_file(recipe.evaluation.prompts))[: recipe.evaluation.limit]
    trying: dict[str, Any] = {
        "retries": recipe.training.reward_retries,
        "pause_seconds": recipe.training.reward_pause_seconds,
    }
    fps = recipe.generator.fps
    scorer = build_rewards(recipe.rewards, fps=fps, max_failed_share=recipe.training.max_failed_share, **trying)
    held_out = build_rewards(recipe.judges, fps=fps)
    device = str(accelerator.device)
    generator = build_generator(recipe.generator, device=device, precision=recipe.training.precision)
    solver = build_solver(recipe, generator)
    map_source: MapSource | None = None
    if recipe.credit in NEEDS_MAPS:
        map_source = build_map_source(recipe.structuring, generator, scorer, device)
    keep_reference = keep_reference or recipe.objective.kl_weight > 0
    policy = build_policy(recipe, generator, keep_reference=keep_reference)
    if recipe.training.gradient_checkpointing:
        generator.network.enable_gradient_checkpointing()  # type: ignore[operator]
    trainer = Trainer(
        accelerator=accelerator,
        generator=generator,
        policy=policy,
        prompts=PromptSampler(training_prompts, per_iteration=recipe.prompts.per_iteration, seed=recipe.seed),
        scorer=scorer,
        map_source=map_source,
        solver=solver,
        objective=Objective(credit=recipe.credit, **recipe.objective.model_dump()),
        update=Update(batch_size=recipe.training.replay_batch_size, **recipe.optimizer.model_dump()),
        group_size=recipe.prompts.group_size,
        seed=recipe.seed,
        rollout_batch_size=recipe.training.rollout_batch_size,
        prompts_at_once=recipe.training.prompts_at_once,
        keep_per_group=recipe.training.keep_per_group,
        attention=recipe.generator.attention,
        health=Health(recipe.training.max_skipped_in_a_row, _remedies(recipe, generator)),
    )
    judge = RewardSuite({**scorer.rewards, **held_out.rewards}, {**scorer.weights, **held_out.weights}, **trying)
    return Session(recipe, trainer, judge, tuple(evaluation_prompts))
