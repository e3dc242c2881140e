"""From a recipe to the parts it names: the only file that knows which class each name stands for.

First a :class:`Model` (generator, policy, solver), all that sampling, evaluation and export need. A :class:`Session` is
a model and what trains it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from vipo import embedded, generators, rewards
from vipo.backbones.perceptual import perceptual
from vipo.engine import STAGES, Engine
from vipo.errors import UserError
from vipo.evaluation.estimate import FEWEST_PROMPTS
from vipo.generators import attention, compiled, context, in_parts
from vipo.generators.folder import pipeline_class
from vipo.generators.own import build as build_own
from vipo.options import CreditKind, Sharding, Solver, needs_sources
from vipo.policy import Policy
from vipo.pretrained import DTYPES
from vipo.prompts.files import EMBEDDED, named_prompts
from vipo.prompts.sampler import PromptSampler
from vipo.rewards.answer import Locating
from vipo.rewards.evidence import EvidenceGrid
from vipo.rewards.scoring import Patience
from vipo.rewards.suite import RewardSuite
from vipo.schema import GeneratorSection, JudgeSection, PolicySection, Recipe, RewardSection, StructuringSection
from vipo.structuring import sources
from vipo.training.credit import OwnCredit, takes_maps
from vipo.training.health import Health
from vipo.training.trainer import Trainer
from vipo.training.watch import Watch
from vipo.types import Generator, KeepsText, MapSource, NamesCutPrompts, Prompt
from vipo.user_file import CREDIT, SOURCE, is_user_file, load_part


@dataclass(frozen=True)
class Model:
    """A generator, what is trained of it, and how it is sampled.

    Args:
        attention: as ``generator.attention``: what holds while the network works, see :mod:`vipo.generators.attention`.
    """

    generator: Generator
    policy: Policy
    solver: Solver
    attention: str = attention.AUTO


@dataclass(frozen=True)
class Session:
    """Everything a recipe names, built and joined.

    Args:
        evaluation_scorer: the training rewards and the held-out judges together.
    """

    recipe: Recipe
    model: Model
    engine: Engine
    trainer: Trainer
    evaluation_scorer: RewardSuite
    evaluation_prompts: tuple[Prompt, ...]

    @property
    def generator(self) -> Generator:
        return self.model.generator

    @property
    def policy(self) -> Policy:
        return self.model.policy


def model_path(name: str) -> str:
    """A model's folder or hub id; ``embedded:NAME`` is one that ships with the package."""
    if not name.startswith(EMBEDDED):
        return str(Path(name).expanduser()) if name.startswith("~") else name
    try:
        return str(embedded.path(name.removeprefix(EMBEDDED)))
    except FileNotFoundError as error:
        raise UserError(str(error)) from error


def build_generator(
    section: GeneratorSection, *, device: str, precision: str = "no", pipeline: Any = None
) -> Generator:
    """Load the model, or adapt a ``pipeline`` that is there already, whose attention is then not tried.

    Args:
        precision: what it will be trained in, as ``training.precision`` has it.

    Raises:
        UserError: an unknown adapter, one that does not read this model, an option it does not take, weights that
            cannot be loaded, or attention that cannot be trained with here.
    """
    attention.check(section.attention)
    path = model_path(section.path)
    sizes = {"height": section.height, "width": section.width, "frames": section.frames}
    fewer = {"quantization": section.quantization, "text_quantization": section.text_quantization}
    loading: dict[str, Any] = {"device": device, "dtype": DTYPES[section.dtype], **fewer}
    if section.name is not None and is_user_file(section.name):
        generator = build_own(section.name, path, {**loading, **sizes}, section.options, pipeline=pipeline)
    else:
        generator = _adapted(section, path, loading, sizes, pipeline)
    if pipeline is not None:
        return generator
    worked_in = torch.bfloat16 if precision == "bf16" else DTYPES[section.dtype]
    masked = getattr(generator, "masks_text", False)
    attention.install(generator.network, section.attention, dtype=worked_in, masked=masked)
    return generator


def _adapted(
    section: GeneratorSection, path: str, loading: Mapping[str, Any], sizes: Mapping[str, int], pipeline: Any
) -> Generator:
    """By one of this package's adapters."""
    if section.name is not None:
        generators.entry(section.name)  # a slip in the name is told before the model is looked for
    found = pipeline_class(path) if pipeline is None else type(pipeline).__name__
    name = generators.choose(section.name, found, section.path)
    arguments = generators.arguments(name, **sizes, given=section.options)
    if pipeline is None:
        return generators.factory(name)(path, **loading, **arguments)
    adapter = generators.adapter(name)
    adapted: Generator = adapter(pipeline, **adapter.arguments(arguments))
    return adapted


def build_map_source(
    section: StructuringSection, generator: Generator, scorer: RewardSuite, device: str, *, signed: bool = False
) -> MapSource:
    """What the recipe's ``structuring.sources`` name; several are multiplied.

    Args:
        signed: a source of the user's own may give weights below 0, if it is the only one.
    """
    stride = generator.temporal_stride
    told: Any = section.source_options

    def width(name: str) -> float:
        given = getattr(told, name).smoothing_sigma
        return section.smoothing_sigma if given is None else float(given)

    def shaped(name: str) -> dict[str, Any]:
        return {"smoothing_sigma": width(name), "normalization": section.normalization}

    def seen() -> MapSource:
        how = replace(section, smoothing_sigma=width("perceptual"))
        named = perceptual(section.backbone, section.backbone_options, how, temporal_stride=stride, device=device)
        return sources.Perceptual(named)

    makers: Mapping[str, Callable[[], MapSource]] = {
        "perceptual": seen,
        "reward_gradient": lambda: sources.RewardGradient(
            scorer.rewards, scorer.weights, temporal_stride=stride, **shaped("reward_gradient")
        ),
        "text_relevance": lambda: sources.TextRelevance(generator, **shaped("text_relevance")),
        "disagreement": lambda: sources.Disagreement(**shaped("disagreement")),
        "deviation": lambda: sources.Deviation(power=told.deviation.power, **shaped("deviation")),
        "consensus": lambda: sources.Consensus(floor=told.consensus.floor, **shaped("consensus")),
        "evidence": lambda: sources.Evidence(**shaped("evidence")),
    }

    def own(name: str) -> MapSource:
        how = {"smoothing_sigma": section.smoothing_sigma, "normalization": section.normalization}
        offered = {"temporal_stride": stride, **how}
        alone = len(section.sources) == 1  # a product of maps is cut at 0, which would lose the sign
        return sources.Own(name, load_part(SOURCE, name, offered, **told.own.get(name, {})), signed and alone)

    named = [makers[name]() if name in makers else own(name) for name in section.sources]
    return named[0] if len(named) == 1 else sources.Product(named, section.normalization)


def _credit(recipe: Recipe) -> CreditKind | OwnCredit:
    """The recipe's credit; of a file, what the file has under that name."""
    if is_user_file(recipe.credit):
        return OwnCredit(recipe.credit, load_part(CREDIT, recipe.credit, **recipe.credit_options))
    return cast("CreditKind", recipe.credit)


def _map_source(
    recipe: Recipe, credit: CreditKind | OwnCredit, generator: Generator, scorer: RewardSuite, device: str
) -> MapSource | None:
    """Where the maps of the recipe's credit come from; None for a credit without."""
    section, options = recipe.structuring, recipe.structuring.source_options
    if recipe.credit == "signed_consensus":
        given = options.consensus.smoothing_sigma
        return sources.SignedConsensus(section.smoothing_sigma if given is None else given)
    smoothed = options.evidence.smoothing_sigma or 0.0  # the formulas have none
    if recipe.credit == "flaw_map":
        return sources.Flawless(smoothed)
    if recipe.credit == "dense_reward":
        return sources.DenseEvidence(smoothed)
    own = isinstance(credit, OwnCredit)
    return build_map_source(section, generator, scorer, device, signed=own) if takes_maps(credit) else None


def _asked_for_evidence(recipe: Recipe, scorer: RewardSuite) -> dict[str, float]:
    """The rewards whose evidence is taken, with its weights.

    Raises:
        UserError: it is to be taken, and no reward gives any.
    """
    if not recipe.takes_evidence:
        return {}
    weights = {name: section.evidence for name, section in recipe.rewards.items() if section.evidence > 0}
    found = {name: weight for name, weight in weights.items() if isinstance(scorer.rewards[name], Locating)}
    if not found:
        asking = f"credit={recipe.credit}" if not needs_sources(recipe.credit) else "structuring.sources=[evidence]"
        raise UserError(
            f"{asking} takes evidence, and of {', '.join(recipe.rewards)} none gives any with a weight above 0; name a"
            " reward that has a method with_evidence, such as emoji_match (docs/rewards.md, Dense rewards)"
        )
    return found


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
    return replace(recipe.solver, shift=generator.shift if recipe.solver.shift is None else recipe.solver.shift)


def build_policy(recipe: Recipe, generator: Generator, *, keep_reference: bool) -> Policy:
    """LoRA or full weights on the generator's network."""
    section = recipe.policy
    if section.kind == "full":
        return Policy.full(generator.network, ema_decay=section.ema_decay, keep_reference=keep_reference)
    named = generator.lora_targets
    if section.init is not None:
        return _policy_from(section.init, section, generator, keep_reference)
    assert section.rank is not None and section.targets is not None  # the schema fills them in
    return Policy.lora(
        generator.network,
        rank=section.rank,
        alpha=section.alpha or float(section.rank),
        targets=named.get(section.targets, section.targets),
        seed=recipe.seed,
        ema_decay=section.ema_decay,
    )


def _policy_from(init: str, section: PolicySection, generator: Generator, keep_reference: bool) -> Policy:
    """A LoRA that exists already; also in a plan, whose networks have no storage, its file is read."""
    from vipo.generators.lora_start import read_start  # PEFT takes seconds

    targets = None if section.targets is None else generator.lora_targets.get(section.targets, section.targets)
    with torch.device("cpu"):
        layers = read_start(generator, init, rank=section.rank, targets=targets)
    return Policy.lora_from(
        generator.network, layers, alpha=section.alpha, ema_decay=section.ema_decay, keep_reference=keep_reference
    )


def keep_text(session: Session) -> None:
    """Let the generator encode each prompt once only; with ``generator.offload_text`` all of this process's now.

    Raises:
        UserError: ``generator.text_cache`` cannot be made, or the generator can do neither.
    """
    section, generator = session.recipe.generator, session.generator
    if isinstance(generator, KeepsText):
        folder = None if section.text_cache is None else Path(section.text_cache).expanduser()
        ahead = _texts(session) if section.offload_text else []
        with attention.scope(section.attention):
            generator.keep_text(ahead, folder=folder, offload=section.offload_text)
    elif section.text_cache is not None or section.offload_text:
        raise UserError(
            f"{type(generator).__name__} has no keep_text(ahead, *, folder, offload), which generator.text_cache and"
            " generator.offload_text ask for; leave them out or add it"
        )


def _texts(session: Session) -> list[str]:
    """What this process will ask its text encoders about, from the present iteration to the recipe's last."""
    trainer, recipe = session.trainer, session.recipe
    groups = trainer.share.groups
    dealt = [
        prompt
        for iteration in range(trainer.iteration, recipe.training.iterations)
        for prompt in trainer.prompts.groups(iteration)[groups.start : groups.stop]
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


def _watch(recipe: Recipe) -> Watch:
    return Watch(recipe.guards.options, recipe.objective.clip_range)


def notices(session: Session) -> list[str]:
    """What to tell before the first iteration: prompts that will be cut, and clips that a reward takes for others."""
    recipe, generator = session.recipe, session.generator
    sections = {**recipe.judges, **recipe.rewards}
    told = rate_notices({name: section.options for name, section in sections.items()}, recipe.generator.fps)
    if isinstance(generator, NamesCutPrompts):
        dealt = [prompt.text for prompt in session.trainer.prompts.dealt(recipe.training.iterations)]
        told += generator.cut_prompts(training=dealt, evaluation=[prompt.text for prompt in session.evaluation_prompts])
    return told


def rate_notices(options: Mapping[str, Mapping[str, Any]], fps: float) -> list[str]:
    """A sentence for each reward, by name, whose options have a ``media_fps`` that is not the clips' own rate."""
    rates = {name: given["media_fps"] for name, given in options.items() if "media_fps" in given}
    return [
        f"reward {name!r} has media_fps={rate}, but the clips have {fps:g} frames per second; left out, it is theirs"
        for name, rate in rates.items()
        if rate != fps
    ]


def open_model(
    recipe: Recipe, *, device: torch.device | str, keep_reference: bool = False, pipeline: Any = None
) -> Model:
    """The model that a recipe trains, untrained; no reward, backbone or optimiser is built for it.

    With ``keep_reference`` the policy can also be what it was before training, which costs full weights a second copy.
    A ``pipeline`` takes the place of what ``generator.path`` holds.

    Raises:
        UserError: a name, file or option in the recipe is wrong.
    """
    precision = recipe.training.precision
    generator = build_generator(recipe.generator, device=str(device), precision=precision, pipeline=pipeline)
    policy = build_policy(recipe, generator, keep_reference=keep_reference)
    return Model(generator, policy, build_solver(recipe, generator), recipe.generator.attention)


def open_to_train(recipe: Recipe, *, device: torch.device | str, pipeline: Any = None) -> Model:
    """:func:`open_model` for a session or a plan: with what it is compared with, and checkpointed if it is to be.

    A compiled network's checkpoints are part of what is compiled (:mod:`vipo.generators.compiled`).
    """
    compared = recipe.objective.kl_weight > 0
    model = open_model(recipe, device=device, keep_reference=compared, pipeline=pipeline)
    if recipe.training.gradient_checkpointing and not recipe.training.compile:
        _checkpointed(model.generator.network)
    return model


def _checkpointed(network: Any) -> None:
    """Raises:
    UserError: it cannot be; every network of diffusers can.
    """
    if not hasattr(network, "enable_gradient_checkpointing"):
        raise UserError(
            f"training.gradient_checkpointing asks {type(network).__name__} for enable_gradient_checkpointing(), which"
            " it does not have; leave it out, or add that"
        )
    network.enable_gradient_checkpointing()


def engine_of(recipe: Recipe) -> Engine:
    """The processes that a recipe is trained by, as the launcher set them up.

    Raises:
        UserError: they are not what it says, or the recipe asks them for what they cannot do.
    """
    training = recipe.training
    return Engine(
        precision=training.precision,
        sharding=training.sharding,
        context_parallel=training.context_parallel,
        timeout=training.timeout,
    )


def check_sharding(recipe: Recipe, sharding: Sharding) -> None:
    """Whether what a recipe trains can be cut over several processes as ``sharding`` cuts.

    Raises:
        UserError: FSDP2 cuts neither weights that are cast for each pass nor moments of 8 bits, ZeRO no quantised
            ones; ZeRO shares no samples; or blocks cannot be compiled as they are cut.
    """
    stage, kind = STAGES.get(sharding, 0), recipe.generator.quantization
    cut = ("none",) if stage else ("none", *in_parts.KINDS)
    keys = {
        f"generator.quantization={kind}": kind in cut,
        f"optimizer.kind={recipe.optimizer.kind}": recipe.optimizer.kind == "adamw",
    }
    asked = [key for key, can_be_cut in keys.items() if not can_be_cut]
    if sharding != "none" and asked:
        raise UserError(
            f"{asked[0]} is for weights that lie whole on a GPU, and sharding={sharding} cuts them; take"
            " training.sharding=none, a copy on each GPU, or leave it out (training.sharding=fsdp2 takes"
            f" generator.quantization={', '.join(in_parts.KINDS)}, and optimizer.kind=adamw)"
        )
    if stage and recipe.training.context_parallel > 1:
        raise UserError(
            f"training.context_parallel={recipe.training.context_parallel} shares samples among processes that have all"
            " weights, or parts of FSDP2's; take training.sharding=fsdp2"
        )
    if recipe.training.compile and (stage == 3 or (sharding != "none" and kind == "nf4")):
        what = "gathers weights" if stage == 3 else "puts weights of nf4 together"
        remedy = "training.sharding=fsdp2" if stage == 3 else "generator.quantization=int8"
        raise UserError(
            f"training.compile=true makes one graph of each block, and sharding={sharding} {what} inside of it; take"
            f" training.compile=false, or {remedy}"
        )


def _share_samples(recipe: Recipe, model: Model, engine: Engine) -> None:
    """Let the processes of a team work on the same samples, if the recipe says so.

    Raises:
        UserError: the engine has no such teams, or the model cannot be shared.
    """
    degree, exchange = recipe.training.context_parallel, recipe.training.context_exchange
    if engine.context_parallel != degree:
        raise UserError(
            f"training.context_parallel={degree}, but the engine has teams of {engine.context_parallel} process(es);"
            f" make it with Engine(context_parallel={degree})"
        )
    if degree > 1:
        network = model.generator.network
        context.check(network, degree, exchange, masked=getattr(model.generator, "masks_text", False))
        context.install(network, engine.context_mesh(exchange), exchange)


def _check_watchable(recipe: Recipe, prompts: int) -> None:
    """Raises:
    UserError: too few evaluation prompts for an interval that could stop the run.
    """
    watching = [f"training.stop_when={recipe.training.stop_when}"] if recipe.training.stop_when is not None else []
    if recipe.guards.over_optimization.action == "stop":
        watching.append("guards.over_optimization=stop")
    if watching and prompts < FEWEST_PROMPTS:
        raise UserError(
            f"{watching[0]} goes by an interval over prompts, for which the evaluation's {prompts} are too few; give"
            f" evaluation.prompts (and evaluation.limit) at least {FEWEST_PROMPTS}, or leave it out"
        )


def build(recipe: Recipe, *, engine: Engine | None = None, pipeline: Any = None) -> Session:
    """Build and join everything a recipe names; nothing is sampled or written yet.

    A ``pipeline``, on the engine's device, takes the place of what ``generator.path`` holds.

    Raises:
        UserError: a name, file or option in the recipe is wrong, or the launcher's processes are not the engine's.
    """
    engine = engine or engine_of(recipe)
    check_sharding(recipe, engine.sharding)
    check_groups_whole(recipe, engine.teams)
    training_prompts = named_prompts(recipe.prompts.file)
    evaluation_prompts = named_prompts(recipe.evaluation.prompts)[: recipe.evaluation.limit]
    _check_watchable(recipe, len(evaluation_prompts))
    training, fps = recipe.training, recipe.generator.fps
    trying: dict[str, Any] = {"retries": training.reward_retries, "pause_seconds": training.reward_pause_seconds}
    trying["patience"] = Patience(training.reward_timeout, training.on_reward_timeout)
    scorer = build_rewards(recipe.rewards, fps=fps, max_failed_share=training.max_failed_share, **trying)
    held_out = build_rewards(recipe.judges, fps=fps)
    located = _asked_for_evidence(recipe, scorer)
    model = open_to_train(recipe, device=engine.device, pipeline=pipeline)
    if engine.in_step or training.compile:
        in_parts.take_apart(model.generator.network, four_bit=engine.in_step)
    if training.compile:  # with the adapters on it, and before the engine wraps it
        compiled.install(model.generator.network, engine.device, checkpointed=training.gradient_checkpointing)
    _share_samples(recipe, model, engine)
    credit = _credit(recipe)
    map_source = _map_source(recipe, credit, model.generator, scorer, str(engine.device))
    if located:
        generator = model.generator
        where = EvidenceGrid(located, generator.latent_shape()[1:], generator.temporal_stride)
        scorer = replace(scorer, evidence=where)
    trainer = Trainer(
        engine=engine,
        generator=model.generator,
        policy=model.policy,
        prompts=PromptSampler(training_prompts, per_iteration=recipe.prompts.per_iteration, seed=recipe.seed),
        scorer=scorer,
        map_source=map_source,
        credit=credit,
        solver=model.solver,
        objective=recipe.objective,
        optimizer=recipe.optimizer,
        group_size=recipe.prompts.group_size,
        seed=recipe.seed,
        rollout_batch_size=training.rollout_batch_size,
        replay_batch_size=training.replay_batch_size,
        prompts_at_once=training.prompts_at_once,
        keep_per_group=training.keep_per_group,
        iterations=training.iterations,
        attention=recipe.generator.attention,
        health=Health(training.max_skipped_in_a_row, _remedies(recipe, model.generator), _watch(recipe)),
    )
    if engine.context_parallel > 1:
        with attention.scope(recipe.generator.attention):
            context.try_out(model.generator)
    evaluation_scorer = RewardSuite(
        {**scorer.rewards, **held_out.rewards}, {**scorer.weights, **held_out.weights}, trains=False, **trying
    )
    return Session(recipe, model, engine, trainer, evaluation_scorer, tuple(evaluation_prompts))


def check_groups_whole(recipe: Recipe, teams: int) -> None:
    """Raises:
    UserError: more ``teams`` than groups, and what the recipe compares in a group would be split over them.
    """
    own = [name for name in (recipe.credit, *recipe.structuring.sources) if is_user_file(name)]
    comparing = f"{recipe.comparing}, which compares" if recipe.comparing else None
    comparing = comparing or (f"the recipe names {own[0]}, which may compare" if own else None)
    if comparing and teams > recipe.prompts.per_iteration:
        raise UserError(
            f"{comparing} the samples of a group, but {teams} processes split"
            f" {recipe.prompts.per_iteration} groups; take another, or prompts.per_iteration={teams}"
        )


def default_device() -> torch.device:
    """Where a model works that nobody trains: the accelerator, if there is one."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")
