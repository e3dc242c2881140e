"""What a recipe may say: every key, its type, bounds, default and meaning; unknown keys are refused.

The options of a part are the part's own record, from :mod:`vipo.options`; a section here has what belongs to no part.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal, Self, get_type_hints

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from vipo import guards
from vipo.guards import GuardOptions
from vipo.options import (
    COMPARE_SAMPLES,
    ONE_NOISE,
    TIMEOUT,
    ContextExchange,
    Count,
    CreditName,
    MapOptions,
    NotNegative,
    Objective,
    OnTimeout,
    OptimizerOptions,
    Options,
    Quantization,
    Sharding,
    Solver,
    SourceOrFile,
    SourcesOptions,
    Steps,
    TextQuantization,
    TrackerName,
    needs_sources,
    own_apart,
    said,
)
from vipo.secrets import redacted
from vipo.user_file import is_user_file

SHOWN_CHARACTERS = 60  # of a wrong value, in an error
LONGEST_NAME = 200  # bytes of a run's name; file systems allow 255, and a temporary name is longer
MAX_SIDE = 16_384  # pixels
MAX_FPS = 240.0
USUAL_RANK, USUAL_TARGETS = 8, "blocks"  # of a new LoRA
ONE_DAY = 86_400.0  # seconds


class Section(BaseModel):
    """A part of a recipe: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Side = Annotated[int, Field(gt=0, le=MAX_SIDE)]


class GeneratorSection(Section):
    name: str | None = Field(
        None,
        description="adapter, see `vipo list generators`, or file.py:thing; null takes the one that reads the model's"
        " pipeline",
    )
    path: str = Field(description="pipeline folder, hub id, or embedded:NAME")
    height: Side = Field(description="pixels")
    width: Side = Field(description="pixels")
    frames: Count = Field(1, description="of a video, in pixel space; 1 for a picture")
    fps: float = Field(
        8.0,
        ge=0.1,
        le=MAX_FPS,
        description="frames per second of clips, in their files and for rewards that take media_fps",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the frozen weights; float16 with LoRA and training.precision=no only"
    )
    quantization: Quantization = Field(
        "none",
        description="of the frozen blocks, for a LoRA: nf4 (4 bits, bitsandbytes), int8 or float8 (torchao), or"
        " float8_storage (no library, coarser); computed in dtype",
    )
    text_quantization: TextQuantization = Field(
        "none",
        description="of the text encoders' blocks: int8 (torchao) or nf4 (4 bits, bitsandbytes); a LoRA learns to read"
        " those then",
    )
    options: dict[str, Any] = Field({}, description="the adapter's own, e.g. guidance_scale")
    attention: str = Field(
        "auto",
        description="auto: anything but cuDNN's attention; or a name that diffusers' set_attention_backend takes",
    )
    text_cache: str | None = Field(
        None, description="folder that keeps encoded prompts, for other runs too; null keeps them in memory"
    )
    offload_text: bool = Field(False, description="encode a run's prompts first, then move the encoders to the CPU")


class PromptsSection(Section):
    file: str = Field(
        description=".txt, .jsonl, .json, .csv, .tsv or .parquet file, set:NAME, embedded:NAME or hub:OWNER/NAME@COMMIT"
    )
    per_iteration: Count = Field(description="prompts, and so groups, per iteration over all processes")
    group_size: int = Field(ge=2, lt=2**31, description="pictures per prompt")


class JudgeSection(Section):
    reward: str | None = Field(None, description="which reward it is; null means that of its own name")
    options: dict[str, Any] = Field({}, description="the reward's own")


class RewardSection(JudgeSection):
    weight: float = Field(1.0, description="in the sum of several")
    evidence: NotNegative = Field(
        0.5,
        description="weight of its evidence, if it gives any and credit or structuring.sources take it; 0 asks none",
    )


def _weight_alone(value: Any) -> Any:
    """``redness: 1.0`` is short for ``redness: {weight: 1.0}``."""
    if isinstance(value, bool) or not isinstance(value, int | float | dict | RewardSection):
        raise ValueError("a reward's value is its weight, a number, or {weight: 1.0, reward: NAME, options: {...}}")
    return {"weight": value} if isinstance(value, int | float) else value


def _names_alone(value: Any, listed: str) -> Any:
    """``[a, b]`` is short for ``{a: {}, b: {}}``; ``listed`` says what it is a list of, and how one has options."""
    if not isinstance(value, list | tuple):
        return value
    if not all(isinstance(name, str) for name in value) or len(set(value)) < len(value):
        raise ValueError(f"a list of {listed}")
    return {name: {} for name in value}


Reward = Annotated[RewardSection, BeforeValidator(_weight_alone)]
Judges = Annotated[
    dict[str, JudgeSection],
    BeforeValidator(
        partial(_names_alone, listed="judges is names, each once; one with options is {NAME: {options: {...}}}")
    ),
]
Trackers = Annotated[
    dict[TrackerName, dict[str, Any]],
    BeforeValidator(
        partial(_names_alone, listed="trackers is names, each once; one with options is {NAME: {project: ...}}")
    ),
]


def _word_no(value: Any) -> Any:
    """YAML 1.1 reads the bare word ``no`` as false; here it is a name."""
    return "no" if value is False else value


def _folder_name(name: str) -> str:
    """A run's name is that of its default folder under ``runs``, which it must not leave."""
    unfit = name.startswith(".") or any(char in "/\\" or not char.isprintable() for char in name)
    if unfit or not name.strip() or len(name.encode()) > LONGEST_NAME:
        raise ValueError(
            "it names the run's folder: give letters, without a slash, a dot in front or a line break, at most"
            f" {LONGEST_NAME} bytes; another place is chosen with --output"
        )
    return name


Name = Annotated[str, AfterValidator(_folder_name)]
Precision = Annotated[Literal["no", "bf16"], BeforeValidator(_word_no)]


def _expression(value: str) -> str:
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return value


Expression = Annotated[str, AfterValidator(_expression)]

# Which generator.dtype goes with which policy.kind and training.precision, as tried on every family; what is not here
# fails inside the network. float16 has no place beside bfloat16 under autocast. Fully trained weights are float32, and
# without autocast they do not take the bfloat16 or float16 that the text encoders hand them.
DTYPES_OF: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("lora", "no"): ("float32", "bfloat16", "float16"),
    ("lora", "bf16"): ("float32", "bfloat16"),
    ("full", "no"): ("float32",),
    ("full", "bf16"): ("float32", "bfloat16"),
}


@dataclass(frozen=True, kw_only=True)
class StructuringSection(MapOptions):
    """Where the allocation map comes from, and how features become it."""

    sources: Annotated[
        tuple[SourceOrFile, ...],
        Field(min_length=1),
        said("see `vipo list sources`, or file.py:thing; several are multiplied"),
    ] = ("perceptual",)
    backbone: Annotated[str, said("see `vipo list backbones`, or file.py:thing")] = "efficientnet_lite"
    backbone_options: Annotated[dict[str, Any], said("the backbone's own, e.g. pretrained")] = field(
        default_factory=dict
    )
    source_options: Annotated[SourcesOptions, BeforeValidator(own_apart)] = field(default_factory=SourcesOptions)


class PolicySection(Section):
    kind: Literal["lora", "full"] = Field("lora", description="what is trained")
    init: str | None = Field(
        None, description="go on with this LoRA: a file, a folder (diffusers', PEFT's or an export) or a run"
    )
    rank: Count | None = Field(None, description=f"of the LoRA; null means {USUAL_RANK}, or that of policy.init")
    alpha: PositiveFloat | None = Field(
        None, description="of the LoRA; null means the rank, which scales by 1, or that of policy.init"
    )
    targets: Expression | None = Field(
        None,
        description="a named choice of the generator or a regular expression over layers; null means"
        f" {USUAL_TARGETS}, or the layers of policy.init",
    )
    ema_decay: float | None = Field(None, ge=0, lt=1, description="moving average used for evaluation and export")

    @model_validator(mode="before")
    @classmethod
    def _usual(cls, given: Any) -> Any:
        """What is left out is said by the LoRA that the policy begins with; without one it is the usual."""
        if not isinstance(given, dict) or given.get("init") is not None:
            return given
        usual = {"rank": USUAL_RANK, "targets": USUAL_TARGETS}
        return {**given, **{key: value for key, value in usual.items() if given.get(key) is None}}

    @model_validator(mode="after")
    def _init_is_a_lora(self) -> Self:
        if self.kind == "full" and self.init is not None:
            raise ValueError(
                f"init={self.init} goes with kind=lora; to go on with full weights give the exported folder as"
                " generator.path"
            )
        return self


class TrainingSection(Section):
    iterations: Count = Field(description="in all")
    precision: Precision = Field("bf16", description="autocast: no or bf16; trained weights stay float32")
    sharding: Sharding = Field(
        "none",
        description="over several processes: none (each has all weights), fsdp2 or zero3 (each has a part), or zero2"
        " (each has all weights and a part of what the optimiser keeps)",
    )
    context_parallel: Count = Field(
        1, description="processes that share each sample, each with its part of the tokens; see docs/scale.md"
    )
    context_exchange: ContextExchange = Field(
        "ulysses",
        description="what they exchange in attention: ulysses (parts of all heads), or ring (keys and values)",
    )
    timeout: float = Field(
        TIMEOUT, ge=1, le=ONE_DAY, description="seconds that processes wait for one that does not answer, then they end"
    )
    rollout_batch_size: Count | None = Field(None, description="samples per network call; null means all")
    prompts_at_once: Count | None = Field(
        None, description="sampled together; with fewer, a part is scored while the next is sampled; null means all"
    )
    replay_batch_size: Count | None = Field(None, description="transitions per replay; null means a whole step")
    keep_per_group: Count | None = Field(
        None, description="train on so many of each group, half best and half worst (best-of-n); null means all"
    )
    gradient_checkpointing: bool = Field(False, description="less memory, a second forward")
    compile: bool = Field(
        False,
        description="compile the network's blocks in the first passes, the first ratio still 1; see docs/speed.md",
    )
    checkpoint_every: Count = Field(10, description="iterations")
    keep_checkpoints: Count = Field(2, description="the newest so many stay")
    keep_best: str | None = Field(
        None, description="a reward or judge: the checkpoint of the evaluation with its highest mean stays too"
    )
    stop_when: str | None = Field(
        None,
        description="a judge or reward: stop once it is below its best evaluation by more than the 95 % interval;"
        " sets keep_best, if that is null",
    )
    max_skipped_in_a_row: Count = Field(
        3, description="updates skipped, or iterations without spread: an event, and the end if nothing was learned"
    )
    maps_every: Count = Field(10, description="iterations between map sheets, and between samples kept to explore")
    keep_rollouts: int = Field(
        10, ge=0, lt=2**31, description="of those samples, the first and the newest so many stay; 0 keeps none"
    )
    max_failed_share: float = Field(0.5, ge=0, lt=1, description="a reward failing on more samples stops the run")
    reward_retries: int = Field(2, ge=0, lt=2**31, description="further tries of a reward that cannot be reached")
    reward_pause_seconds: float = Field(15.0, ge=0, le=ONE_DAY, description="before each of them")
    reward_timeout: float | None = Field(
        None, ge=0.001, le=ONE_DAY, description="seconds that a call of a reward may take; null means any time"
    )
    on_reward_timeout: OnTimeout = Field(
        "stop", description="of a call that takes longer: stop the run, or mask its samples"
    )

    @model_validator(mode="before")
    @classmethod
    def _keep_what_is_watched(cls, given: Any) -> Any:
        """A run that ends because a score has fallen needs its weights from before."""
        watched = given.get("stop_when") if isinstance(given, dict) else None
        return given if watched is None or given.get("keep_best") is not None else {**given, "keep_best": watched}


def _guard(name: str) -> Any:
    return Field(guards.GUARDS[name].usual, description=guards.meaning(name))


class GuardsSection(Section):
    """What a run is watched for; a guard's value is its action alone, or a mapping of what is not usual."""

    gradient_norm: GuardOptions = _guard("gradient_norm")
    first_ratio: GuardOptions = _guard("first_ratio")
    clipped_fraction: GuardOptions = _guard("clipped_fraction")
    kl: GuardOptions = _guard("kl")
    kl_reference: GuardOptions = _guard("kl_reference")
    reward_spread: GuardOptions = _guard("reward_spread")
    flat_groups: GuardOptions = _guard("flat_groups")
    weights_still: GuardOptions = _guard("weights_still")
    saturation: GuardOptions = _guard("saturation")
    grid: GuardOptions = _guard("grid")
    diversity: GuardOptions = _guard("diversity")
    over_optimization: GuardOptions = _guard("over_optimization")

    @field_validator("*", mode="before")
    @classmethod
    def _read(cls, given: Any, info: Any) -> GuardOptions:  # a ValidationInfo, which cannot be checked at run time
        return guards.options_of(info.field_name, given)

    @property
    def options(self) -> dict[str, GuardOptions]:
        """By name."""
        return {name: getattr(self, name) for name in guards.GUARDS}


class EvaluationSection(Section):
    prompts: str = Field(description="as prompts.file")
    samples_per_prompt: Count = Field(2, description="each from its own fixed noise")
    steps: Steps | None = Field(None, description="null takes solver.steps")
    every: Count | None = Field(None, description="iterations; null evaluates before and after only")
    limit: Count | None = Field(None, description="use only the first so many prompts")


class Recipe(Section):
    """Everything that decides a run; ``vipo list keys`` explains each key."""

    name: Name = Field(description="of the run, and of its default folder")
    seed: int = Field(0, ge=0, lt=2**64, description="of every random draw")
    credit: CreditName = Field(
        "advantage_map", description="what an advantage is spread over, see `vipo list credits`, or file.py:thing"
    )
    credit_options: dict[str, Any] = Field({}, description="of a credit by file.py:thing")
    generator: GeneratorSection
    prompts: PromptsSection
    solver: Solver
    rewards: dict[str, Reward] = Field(description="trained on: name or file.py:function, to its weight")
    judges: Judges = Field({}, description="held-out rewards, measured and never trained on: a list, or with options")
    structuring: StructuringSection = Field(default_factory=StructuringSection)
    policy: PolicySection = Field(default_factory=PolicySection)
    objective: Objective
    optimizer: OptimizerOptions
    training: TrainingSection
    evaluation: EvaluationSection
    guards: GuardsSection = Field(default_factory=GuardsSection)
    tracking: Trackers = Field(
        {"tensorboard": {}},
        description="where the run can be followed: tensorboard, trackio, wandb, swanlab, a list, or with options of"
        " their init; [] for nowhere",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.rewards:
            raise ValueError("rewards is empty: name at least one, see `vipo list rewards`")
        if both := sorted(set(self.rewards) & set(self.judges)):
            raise ValueError(
                f"judges names {shown(both[0])}, which is trained on and evaluated in any case; take it out, or give"
                f" the judge a name of its own, e.g. judges={{held_out: {{reward: {both[0]}, options: {{...}}}}}}"
            )
        self._check_likelihood()
        self._check_step_weight()
        self._check_groups()
        at_once = self.generator.options.get("decode_batch_size", 1)
        if not isinstance(at_once, int) or at_once < 1:
            raise ValueError(
                f"generator.options.decode_batch_size={shown(at_once)} must be a whole number of samples, 1 or more"
            )
        self._check_dtype()
        self._check_quantization()
        self._check_context()
        self._check_counts()
        self._check_watched()
        self._check_guards()
        self._check_own()
        return self

    def _check_own(self) -> None:
        """What only the user's own parts take."""
        for key, name, options in (
            ("credit", self.credit, self.credit_options),
            ("objective.loss", self.objective.loss, self.objective.loss_options),
        ):
            if options and not is_user_file(name):
                raise ValueError(
                    f"{key}_options are of a {key} by file.py:thing, and {key}={name} is not; leave them out"
                )
        for name in self.structuring.source_options.own:
            if name not in self.structuring.sources:
                raise ValueError(
                    f"structuring.source_options has {shown(name)}, which structuring.sources do not name; add it"
                )

    def _check_dtype(self) -> None:
        kind, precision, dtype = self.policy.kind, self.training.precision, self.generator.dtype
        accepted = DTYPES_OF[kind, precision]
        if dtype not in accepted:
            others = [f"{p} with {', '.join(dtypes)}" for (k, p), dtypes in DTYPES_OF.items() if k == kind]
            raise ValueError(
                f"generator.dtype={dtype} does not go with policy.kind={kind} and training.precision={precision}; a"
                f" {kind} policy takes training.precision={' or '.join(others)}"
            )

    def _check_quantization(self) -> None:
        kind = self.generator.quantization
        if kind != "none" and self.policy.kind == "full":
            raise ValueError(
                f"generator.quantization={kind} is for weights that stay as they are, and policy.kind=full trains them"
                " all; take policy.kind=lora, or generator.quantization=none"
            )
        if kind == "float8_storage" and self.training.compile:
            raise ValueError(
                "training.compile=true makes one graph of each block, and generator.quantization=float8_storage casts"
                " its weights inside of it; take training.compile=false, or generator.quantization=float8 or int8"
            )
        if self.generator.text_quantization != "none" and self.policy.kind == "full":
            raise ValueError(
                f"generator.text_quantization={self.generator.text_quantization} does not go with policy.kind=full,"
                " which exports the whole pipeline; take policy.kind=lora, or generator.offload_text=true for room"
            )

    def _check_context(self) -> None:
        training = self.training
        if training.context_parallel > 1 and training.compile:
            raise ValueError(
                f"training.compile=true does not go with training.context_parallel={training.context_parallel}: the"
                " messages in each block's attention are not compiled; leave out one of the two"
            )
        if training.context_parallel > 1 and training.context_exchange == "ring" and training.gradient_checkpointing:
            raise ValueError(
                "training.context_exchange=ring does not go with training.gradient_checkpointing=true: its backward"
                " reads what was saved twice, and a checkpoint gives it once; take ulysses"
            )

    def _check_likelihood(self) -> None:
        """A ratio needs steps with a likelihood; a loss without one needs nothing of the solver."""
        if self.objective.loss == "matching" or is_user_file(self.objective.loss):  # the file's is asked when built
            return
        if self.solver.kind == "ode":
            raise ValueError(
                "solver.kind=ode has no likelihood to train on; choose dance, flow or cps, or objective.loss=matching"
            )
        if self.solver.eta == 0:
            raise ValueError("solver.eta=0 has no likelihood to train on; give a positive noise strength")
        if self.solver.trained_count < 1:
            raise ValueError(
                f"solver.train_fraction={self.solver.train_fraction:g} of {self.solver.stochastic_count} stochastic"
                " steps leaves no step to train on; raise it, or solver.steps or solver.window.size"
            )

    def _check_step_weight(self) -> None:
        """A step's weight comes from its noise, and without any there is none, or 0 / 0."""
        weight, solver = self.objective.step_weight, self.solver
        if weight != "equal" and self.objective.loss == "matching":
            raise ValueError(
                f"objective.step_weight={weight} weighs the solver's steps by their noise, and objective.loss=matching"
                " trains on noise levels that it draws, not on steps; take objective.step_weight=equal"
            )
        if weight != "equal" and (solver.eta == 0 or not solver.candidates):
            raise ValueError(
                f"objective.step_weight={weight} goes by the noise of the solver's steps, and solver.kind={solver.kind}"
                f" with eta={solver.eta:g} and {solver.steps} steps adds none; take objective.step_weight=equal"
            )

    @property
    def comparing(self) -> str | None:
        """What of the recipe compares the samples of a group position by position, to begin a sentence with."""
        if self.credit == "signed_consensus":
            return "credit is signed_consensus"
        between = sorted(COMPARE_SAMPLES & set(self.structuring.sources)) if needs_sources(self.credit) else []
        return f"structuring.sources names {between[0]}" if between else None

    @property
    def takes_evidence(self) -> bool:
        """Whether it trains on what rewards say of positions."""
        from_sources = needs_sources(self.credit) and "evidence" in self.structuring.sources
        return from_sources or self.credit in ("flaw_map", "dense_reward")

    def _check_groups(self) -> None:
        """The samples of a group must differ, and where a map takes all differences alike, by their steps alone."""
        needing = sorted(ONE_NOISE & set(self.structuring.sources)) if needs_sources(self.credit) else []
        if needing and not self.solver.same_noise:
            raise ValueError(
                f"structuring.sources names {needing[0]}, which compares the samples of a group, but with"
                " solver.same_noise=false they differ everywhere; set it to true or take another, such as consensus"
            )
        if self.solver.same_noise and (self.solver.kind == "ode" or self.solver.eta == 0):
            raise ValueError(
                "solver.same_noise=true without noise between the steps makes every sample of a group the same; set it"
                " to false, or take a solver.kind and solver.eta with noise"
            )

    def _check_counts(self) -> None:
        """Something must be left to train on in every optimiser step."""
        kept = self.training.keep_per_group or self.prompts.group_size
        if self.training.keep_per_group and (kept % 2 or kept > self.prompts.group_size):
            raise ValueError(
                f"training.keep_per_group={kept} must be even, half best and half worst, and at most"
                f" prompts.group_size={self.prompts.group_size}"
            )
        if self.optimizer.warmup >= self.training.iterations:
            raise ValueError(
                f"optimizer.warmup={self.optimizer.warmup} leaves no iteration at the full learning rate; it must be"
                f" less than training.iterations={self.training.iterations}"
            )
        samples = self.prompts.per_iteration * kept
        if self.optimizer.per_iteration > samples:
            raise ValueError(
                f"optimizer.per_iteration={self.optimizer.per_iteration} needs as many samples per iteration, but"
                f" prompts.per_iteration * prompts.group_size = {samples} samples"
            )

    def _check_watched(self) -> None:
        """What evaluations decide must be evaluated."""
        scores = [*self.judges, *self.rewards]
        for key in ("stop_when", "keep_best"):
            name = getattr(self.training, key)
            if name is not None and name not in scores:
                raise ValueError(
                    f"training.{key}={shown(name)} is none of the rewards and judges of this recipe, which are"
                    f" evaluated; give {' or '.join(scores)}, or null"
                )
        if self.training.stop_when is not None and self.evaluation.every is None:
            raise ValueError(
                f"training.stop_when={self.training.stop_when} can stop nothing with evaluation.every=null, which"
                " evaluates before and after only; set evaluation.every to a number of iterations"
            )

    def _check_guards(self) -> None:
        """A guard that is to act must be given what it goes by; one that only warns has nothing to say then."""
        no_ratio = self.objective.loss == "matching" and "objective.loss=matching"
        no_evaluation = self.evaluation.every is None and "evaluation.every=null"
        silent = {
            "first_ratio": no_ratio,
            "clipped_fraction": no_ratio,
            "kl": no_ratio,
            "kl_reference": self.objective.kl_weight == 0 and "objective.kl_weight=0",
            "over_optimization": no_evaluation if self.judges else "judges={}",
        }
        for name, cause in silent.items():
            action = getattr(self.guards, name).action
            if cause and action in ("skip", "stop"):
                raise ValueError(
                    f"guards.{name}={action} can never act, because with {cause} nothing is measured for it; change"
                    f" that, or take guards.{name}=warn"
                )

    def to_yaml(self) -> str:
        """The resolved recipe; loading it gives an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def shown(value: Any) -> str:
    """A wrong value in an error, shortened."""
    text = redacted(repr(value))
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} ..."


def keys_of(section: type[Any]) -> dict[str, FieldInfo]:
    """The keys of a section, whether it is a model or a record of options."""
    if issubclass(section, BaseModel):
        return dict(section.model_fields)
    hints, found = get_type_hints(section, include_extras=True), {}
    for entry in dataclasses.fields(section):
        hint = hints[entry.name]
        if entry.default is not dataclasses.MISSING:
            found[entry.name] = FieldInfo.from_annotated_attribute(hint, entry.default)
        elif entry.default_factory is not dataclasses.MISSING:
            found[entry.name] = FieldInfo.from_annotated_attribute(hint, entry.default_factory())
        else:
            found[entry.name] = FieldInfo.from_annotation(hint)
    return found


def nested_section(annotation: Any) -> type[Any] | None:
    """The section that a field of this type holds, if it holds one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel | Options):
        return annotation
    parts = (nested_section(part) for part in getattr(annotation, "__args__", ()))
    return next((part for part in parts if part), None)
