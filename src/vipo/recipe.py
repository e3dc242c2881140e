"""The typed schema of a recipe: YAML in, a frozen and fully checked :class:`Recipe` out. Unknown keys are refused.

A recipe may start from another one (``extends: other.yaml``, relative to itself, or the name of a shipped one) and
change some keys; the command line changes more of them (``key=value``, dots for nested keys).
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    ValidationError,
    model_validator,
)

from vipo.objective import NEEDS_MAPS, CreditKind
from vipo.prompts import is_unicode
from vipo.rollout import Schedule, Solver, Window
from vipo.sde import Kind, Reduce
from vipo.structuring import Aggregation, Normalization, Orientation, Scope
from vipo.types import UserError

Combination = Literal["advantage", "reward"]

SHOWN_CHARACTERS = 60  # of a wrong value, in an error
LONGEST_NAME = 200  # bytes of a run's name; file systems allow 255, and a temporary name is longer
MAX_SIDE = 16_384  # pixels
MAX_STEPS = 1000  # of a solver: the models were trained with so many noise levels
MAX_FPS = 240.0
ONE_DAY = 86_400.0  # seconds


class Section(BaseModel):
    """A part of a recipe: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)
Count = Annotated[int, Field(gt=0, lt=2**31)]
Side = Annotated[int, Field(gt=0, le=MAX_SIDE)]
Steps = Annotated[int, Field(gt=0, le=MAX_STEPS)]
SourceName = Literal["perceptual", "reward_gradient", "text_relevance", "disagreement", "deviation"]


class GeneratorSection(Section):
    name: str | None = Field(
        None, description="adapter, see `vipo list generators`; null takes the one that reads the model's pipeline"
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
    file: str = Field(description=".txt, .jsonl, .json, .csv, .tsv or .parquet file, set:NAME or embedded:NAME")
    per_iteration: Count = Field(description="prompts, and so groups, per iteration over all processes")
    group_size: int = Field(ge=2, lt=2**31, description="pictures per prompt")


class WindowSection(Section):
    size: Count = Field(2, description="consecutive stochastic steps")
    starts: Count = Field(1, description="how many first steps it may begin at")
    first: int = Field(0, ge=0, lt=2**31, description="the earliest step it may begin at")
    schedule: Schedule = Field("random", description="how the start is chosen: random, sliding or fixed")
    every: Count = Field(1, description="iterations between moves of a sliding window")


class SolverSection(Section):
    steps: Steps = Field(description="solver steps of a rollout")
    shift: PositiveFloat | None = Field(None, description="time shift; null takes the model's own")
    kind: Kind = Field("dance", description="the stochastic step: dance, flow or cps")
    eta: float = Field(0.3, ge=0, description="its noise strength")
    window: WindowSection | None = Field(None, description="which steps are stochastic; null means all but the last")
    train_fraction: float = Field(1.0, gt=0, le=1, description="share of the stochastic steps trained, per sample")
    same_noise: bool = Field(True, description="samples of a group start from one noise")


class JudgeSection(Section):
    reward: str | None = Field(None, description="which reward it is; null means that of its own name")
    options: dict[str, Any] = Field({}, description="the reward's own")


class RewardSection(JudgeSection):
    weight: float = Field(1.0, description="in the sum of several")


def _weight_alone(value: Any) -> Any:
    """``redness: 1.0`` is short for ``redness: {weight: 1.0}``."""
    if isinstance(value, bool) or not isinstance(value, int | float | dict | RewardSection):
        raise ValueError("a reward's value is its weight, a number, or {weight: 1.0, reward: NAME, options: {...}}")
    return {"weight": value} if isinstance(value, int | float) else value


def _names_alone(value: Any) -> Any:
    """``[a, b]`` is short for ``{a: {}, b: {}}``."""
    if not isinstance(value, list | tuple):
        return value
    if not all(isinstance(name, str) for name in value) or len(set(value)) < len(value):
        raise ValueError("a list of judges is names, each once; one with options is {NAME: {options: {...}}}")
    return {name: {} for name in value}


Reward = Annotated[RewardSection, BeforeValidator(_weight_alone)]
Judges = Annotated[dict[str, JudgeSection], BeforeValidator(_names_alone)]


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


class StructuringSection(Section):
    sources: tuple[SourceName, ...] = Field(
        ("perceptual",),
        min_length=1,
        description="perceptual (the paper), deviation, disagreement, reward_gradient, text_relevance; or several",
    )
    backbone: str = Field("efficientnet_lite", description="see `vipo list backbones`")
    backbone_options: dict[str, Any] = Field({}, description="the backbone's own, e.g. pretrained")
    components: Count = Field(3, description="principal components K")
    aggregation: Aggregation = Field("variance", description="of the components")
    smoothing_sigma: float = Field(1.0, ge=0, description="Gaussian, in feature cells; 0 is off")
    normalization: Normalization = Field("unit_mean", description="unit_mean keeps the scalar learning rate's scale")
    orientation: Orientation | None = Field(None, description="null takes the measured best, see docs/orientation.md")
    scope: Scope = Field("frame", description="one PCA per frame or per clip")


class PolicySection(Section):
    kind: Literal["lora", "full"] = Field("lora", description="what is trained")
    rank: Count = Field(8, description="of the LoRA")
    alpha: PositiveFloat | None = Field(None, description="of the LoRA; null means the rank, which scales by 1")
    targets: Expression = Field(
        "blocks", description="a named choice of the generator or a regular expression over layers"
    )
    ema_decay: float | None = Field(None, ge=0, lt=1, description="moving average used for evaluation and export")


class ObjectiveSection(Section):
    clip_range: PositiveFloat = Field(description="of the likelihood ratio; goes with reduce and credit")
    advantage_clip: PositiveFloat = Field(5.0, description="bound on the weight of a ratio")
    reduce: Reduce = Field("mean", description="log-probability over latent channels: mean or sum")
    combine: Combination = Field("advantage", description="several rewards: normalise then sum, or sum then normalise")
    kl_weight: float = Field(0.0, ge=0, description="weight of the divergence from the untrained model")


Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSection(Section):
    learning_rate: PositiveFloat = Field(description="of AdamW")
    weight_decay: float = Field(1e-4, ge=0, description="of AdamW")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="of AdamW, each from 0 to below 1")
    max_grad_norm: PositiveFloat = Field(1.0, description="gradients are clipped to this norm")
    guard_factor: PositiveFloat = Field(20.0, description="an update over so many median norms is skipped")
    per_iteration: Count = Field(1, description="optimiser steps per iteration")


class TrainingSection(Section):
    iterations: Count = Field(description="in all")
    precision: Precision = Field("bf16", description="autocast: no or bf16; trained weights stay float32")
    rollout_batch_size: Count | None = Field(None, description="samples per network call; null means all")
    prompts_at_once: Count | None = Field(
        None, description="sampled together; with fewer, a part is scored while the next is sampled; null means all"
    )
    replay_batch_size: Count | None = Field(None, description="transitions per replay; null means a whole step")
    keep_per_group: Count | None = Field(
        None, description="train on so many of each group, half best and half worst (best-of-n); null means all"
    )
    gradient_checkpointing: bool = Field(False, description="less memory, a second forward")
    checkpoint_every: Count = Field(10, description="iterations")
    keep_checkpoints: Count = Field(2, description="the newest so many stay")
    max_skipped_in_a_row: Count = Field(
        3, description="updates skipped, or iterations without spread: an event, and the end if nothing was learned"
    )
    maps_every: Count = Field(10, description="iterations between pictures of allocation maps")
    max_failed_share: float = Field(0.5, ge=0, lt=1, description="a reward failing on more samples stops the run")
    reward_retries: int = Field(2, ge=0, lt=2**31, description="further tries of a reward that cannot be reached")
    reward_pause_seconds: float = Field(15.0, ge=0, le=ONE_DAY, description="before each of them")


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
    credit: CreditKind = Field("advantage_map", description="sample, uniform, reward_map or advantage_map (ViPO)")
    generator: GeneratorSection
    prompts: PromptsSection
    solver: SolverSection
    rewards: dict[str, Reward] = Field(description="trained on: name or file.py:function, to its weight")
    judges: Judges = Field({}, description="held-out rewards, measured and never trained on: a list, or with options")
    structuring: StructuringSection = Field(default_factory=StructuringSection)
    policy: PolicySection = Field(default_factory=PolicySection)
    objective: ObjectiveSection
    optimizer: OptimizerSection
    training: TrainingSection
    evaluation: EvaluationSection

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.rewards:
            raise ValueError("rewards is empty: name at least one, see `vipo list rewards`")
        if self.solver.kind == "ode":
            raise ValueError("solver.kind=ode has no likelihood to train on; choose dance, flow or cps")
        if self.solver.eta == 0:
            raise ValueError("solver.eta=0 has no likelihood to train on; give a positive noise strength")
        between = {"deviation", "disagreement"} & set(self.structuring.sources)
        if between and self.credit in NEEDS_MAPS and not self.solver.same_noise:
            raise ValueError(
                f"structuring.sources names {sorted(between)[0]}, which compares the samples of a group, but with"
                " solver.same_noise=false they differ everywhere; set it to true or take another source"
            )
        at_once = self.generator.options.get("decode_batch_size", 1)
        if not isinstance(at_once, int) or at_once < 1:
            raise ValueError(
                f"generator.options.decode_batch_size={shown(at_once)} must be a whole number of samples, 1 or more"
            )
        self._check_dtype()
        self._check_counts()
        return self

    def _check_dtype(self) -> None:
        kind, precision, dtype = self.policy.kind, self.training.precision, self.generator.dtype
        accepted = DTYPES_OF[kind, precision]
        if dtype not in accepted:
            others = [f"{p} with {', '.join(dtypes)}" for (k, p), dtypes in DTYPES_OF.items() if k == kind]
            raise ValueError(
                f"generator.dtype={dtype} does not go with policy.kind={kind} and training.precision={precision}; a"
                f" {kind} policy takes training.precision={' or '.join(others)}"
            )

    def _check_counts(self) -> None:
        """Something must be left to train on in every optimiser step."""
        window = Window(**self.solver.window.model_dump()) if self.solver.window else None
        solver = Solver(steps=self.solver.steps, shift=self.solver.shift or 1.0, window=window)
        stochastic = len(solver.stochastic_steps(self.seed, 0))
        if int(self.solver.train_fraction * stochastic) < 1:
            raise ValueError(
                f"solver.train_fraction={self.solver.train_fraction:g} of {stochastic} stochastic steps leaves no step"
                " to train on; raise it, or solver.steps or solver.window.size"
            )
        kept = self.training.keep_per_group or self.prompts.group_size
        if self.training.keep_per_group and (kept % 2 or kept > self.prompts.group_size):
            raise ValueError(
                f"training.keep_per_group={kept} must be even, half best and half worst, and at most"
                f" prompts.group_size={self.prompts.group_size}"
            )
        samples = self.prompts.per_iteration * kept
        if self.optimizer.per_iteration > samples:
            raise ValueError(
                f"optimizer.per_iteration={self.optimizer.per_iteration} needs as many samples per iteration, but"
                f" prompts.per_iteration * prompts.group_size = {samples} samples"
            )

    def to_yaml(self) -> str:
        """The resolved recipe; loading it gives an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def shipped_recipes() -> dict[str, Path]:
    """Recipes that come with the package, by name."""
    here = Path(__file__).parent
    folder = here / "recipes" if (here / "recipes").is_dir() else here.parents[1] / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file (or the name of a shipped one) and apply ``key=value`` overrides.

    Raises:
        UserError: the file is missing or is not YAML, a key is unknown (the nearest known one is named), or a value
            does not fit.
    """
    raw = _read(_locate(path))
    for override in overrides:
        apply_override(raw, override)
    return parse_recipe(raw, source=str(path))


def parse_recipe(raw: Mapping[str, Any], *, source: str = "recipe") -> Recipe:
    """Check a nested mapping and freeze it."""
    return parse_section(Recipe, raw, source=source)


def parse_section(section: type[S], raw: Mapping[str, Any], *, source: str) -> S:
    """Check one section alone, for values that do not come from a recipe; ``source`` begins the message."""
    for problem in _unsound(raw, ""):
        raise UserError(f"{source}: {problem}")
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        problems = "; ".join(_explain(problem) for problem in error.errors())
        raise UserError(f"{source}: {problems}") from error


def _unsound(value: Any, where: str) -> Iterator[str]:
    """What no recipe may hold at any depth, options included: numbers that are none, text that is no Unicode."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _unsound(key, where)
            yield from _unsound(entry, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for place, entry in enumerate(value):
            yield from _unsound(entry, f"{where}.{place}")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{where}: {value} is not a finite number; give one"
    elif isinstance(value, str) and not is_unicode(value):
        yield f"{where or 'a key'}: {shown(value)} holds half of a character, which no file can; write it again"


class _JudgesFile(Section):
    judges: Judges


def read_judges(path: str | Path) -> dict[str, JudgeSection]:
    """A YAML file of rewards with options, written as under ``judges`` in a recipe.

    Raises:
        UserError: the file is missing or is not such a list.
    """
    if not Path(path).is_file():
        raise UserError(f"judges file {str(path)!r} does not exist; give a YAML file, or names separated by commas")
    return parse_section(_JudgesFile, {"judges": _parsed(Path(path), "judges file")}, source=str(path)).judges


def _parsed(path: Path, what: str) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: not UTF-8, no such date
        raise UserError(f"{what} {str(path)!r} cannot be read: {' '.join(str(error).split())}") from error


def _locate(path: str | Path) -> Path:
    if Path(path).is_file():
        return Path(path)
    shipped = shipped_recipes()
    if str(path) in shipped:
        return shipped[str(path)]
    raise UserError(f"recipe {str(path)!r} does not exist; give a YAML file or one of {', '.join(shipped)}")


def _read(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe as a mapping, with what it extends; ``children`` are the recipes that extend it."""
    if path.resolve() in children:
        raise UserError(f"recipe {str(path)!r} extends itself, by way of {', '.join(c.name for c in children)}")
    raw = _parsed(path, "recipe")
    if not isinstance(raw, dict):
        raise UserError(f"recipe {str(path)!r} must be a mapping of keys to values")
    if "extends" in raw:
        parent = _parent(path, raw.pop("extends"))
        return _merge(_read(parent, (*children, path.resolve())), raw)
    return raw


def _parent(child: Path, named: Any) -> Path:
    """The recipe that ``child`` extends: a file beside it, else a shipped one of that name."""
    if isinstance(named, str) and (child.parent / named).is_file():
        return child.parent / named
    shipped = shipped_recipes()
    if isinstance(named, str) and named in shipped:
        return shipped[named]
    raise UserError(
        f"recipe {str(child)!r} extends {shown(named)}, but there is no such file in {str(child.parent)!r} and no"
        f" shipped recipe of that name; give a YAML file or one of {', '.join(shipped)}"
    )


def _merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """``change`` over ``base``, nested keys one by one; ``rewards`` and ``judges`` are replaced whole."""
    merged = dict(base)
    for key, value in change.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict) and key not in ("rewards", "judges")
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one ``key=value``, dots for nested keys, in a nested mapping."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {shown(override)} is not of the form key=value, e.g. optimizer.learning_rate=1e-4")
    *parents, leaf = key.split(".")
    node = raw
    for parent in parents:
        child = node.get(parent)
        node[parent] = dict(child) if isinstance(child, dict) else {}
        node = node[parent]
    try:
        node[leaf] = _number(yaml.safe_load(text))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"override {shown(override)}: {shown(text)} is not a YAML value") from error


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 (no dot) as text; people mean the number."""
    scientific = isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value)
    return float(value) if scientific else value


def shown(value: Any) -> str:
    """A wrong value in an error, shortened."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} ..."


def _explain(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _known_keys(problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.0)
        return f"unknown key {where!r}; the nearest known one is {near[0]!r}" if near else f"unknown key {where!r}"
    if problem["type"] == "missing":
        return f"{where} is required"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"{where}: {message} (given: {shown(problem['input'])})" if where else message


def nested_section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field of this type holds, if it holds one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    parts = (nested_section(part) for part in getattr(annotation, "__args__", ()))
    return next((part for part in parts if part), None)


def _known_keys(location: Sequence[Any]) -> list[str]:
    """The keys of the section at ``location``."""
    section: type[BaseModel] = Recipe
    for part in location:
        if part in section.model_fields:  # else it is the name that a reward was given
            nested = nested_section(section.model_fields[part].annotation)
            if nested is None:
                return []
            section = nested
    return list(section.model_fields)
