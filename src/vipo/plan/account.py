"""The account of one process (one accelerator): which bytes lie there in which phase, and how long an iteration takes.

An iteration goes through phases: sample, decode, score, map, update, step. What is resident is there in all of them;
the worst phase decides whether a recipe fits. Seconds are floating-point operations over peak rate times utilisation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException

from vipo.plan import passes
from vipo.plan.blueprint import Blueprint, conditioning, draw
from vipo.plan.judging import Judge, judges_of
from vipo.plan.passes import Cost
from vipo.recipe import Recipe
from vipo.types import UserError

Items = Mapping[str, int]  # what lies there -> bytes
FLOAT = 4  # bytes of a float32 number
ADAM_STATES = 2  # moments that AdamW keeps of every trained number


@dataclass(frozen=True)
class Machine:
    """What a recipe is to run on.

    Args:
        gpus: accelerators, one process each.
        memory: bytes of each.
        tflops: 1e12 operations per second of each at best; 989 is an H100 SXM, bfloat16 without sparsity.
        utilisation: the share of that which is reached.
        sharded: weights, gradients and optimiser state are spread over the accelerators (FSDP2), else each has all.
        link: bytes per second between accelerators; 450e9 is NVLink 4, one direction.
    """

    gpus: int = 1
    memory: int = 80 * 10**9
    tflops: float = 989.0
    utilisation: float = 0.35
    sharded: bool = False
    link: float = 450e9

    def seconds(self, flops: float) -> float:
        return flops / (self.tflops * 1e12 * self.utilisation)


@dataclass(frozen=True)
class Work:
    """What one process does in an iteration, in numbers of passes."""

    samples: int
    groups: int
    recorded: int  # transitions
    trained: int  # of them
    passes: float  # samples x steps through the network, on average over the places of a window
    calls: float  # of the network while sampling
    sampled_at_once: int
    replayed_at_once: int


@dataclass(frozen=True)
class Plan:
    """What a recipe needs on a machine, per process."""

    recipe: str
    machine: Machine
    resident: Items
    phases: Mapping[str, Items]  # what each phase adds to that
    seconds: Mapping[str, float]  # of an iteration, by what is done
    iterations: int
    notes: tuple[str, ...]

    def total(self, phase: str) -> int:
        """Bytes in a phase."""
        return sum(self.resident.values()) + sum(self.phases[phase].values())

    @property
    def worst(self) -> str:
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> int:
        return self.total(self.worst)

    @property
    def fits(self) -> bool:
        return self.peak <= self.machine.memory

    @property
    def iteration_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def hours(self) -> float:
        return self.iteration_seconds * self.iterations / 3600

    def as_json(self) -> dict[str, Any]:
        """All figures, for programs."""
        return {
            "recipe": self.recipe,
            "machine": {field.name: getattr(self.machine, field.name) for field in fields(Machine)},
            "resident_bytes": dict(self.resident),
            "phase_bytes": {name: dict(items) for name, items in self.phases.items()},
            "peak_bytes": self.peak,
            "peak_phase": self.worst,
            "fits": self.fits,
            "iteration_seconds": dict(self.seconds),
            "iterations": self.iterations,
            "hours": self.hours,
            "notes": list(self.notes),
        }


def work_of(recipe: Recipe, gpus: int) -> Work:
    """Passes of one process in an iteration, as :func:`vipo.rollout.sample_groups` and the trainer make them.

    Raises:
        UserError: the prompts cannot be dealt to so many processes.
    """
    prompts, solver, training = recipe.prompts, recipe.solver, recipe.training
    if prompts.per_iteration % gpus:
        raise UserError(
            f"prompts.per_iteration={prompts.per_iteration} cannot be dealt to {gpus} GPUs; plan with a number of GPUs"
            f" that divides it, or add prompts.per_iteration={math.ceil(prompts.per_iteration / gpus) * gpus}"
        )
    groups = prompts.per_iteration // gpus
    samples, window = groups * prompts.group_size, solver.window
    firsts, stochastic = [0], solver.steps - 1
    if window is not None:
        firsts = [window.first + place for place in range(1 if window.schedule == "fixed" else window.starts)]
        stochastic = window.size
    at_once = min(training.prompts_at_once or groups, groups) * prompts.group_size
    sampled = min(training.rollout_batch_size or at_once, at_once)
    made, calls = 0.0, 0.0
    for first in firsts:
        shared = min(first, solver.steps - 1) if solver.same_noise else 0
        made += (shared * groups + (solver.steps - shared) * samples) / len(firsts)
        calls += (shared * math.ceil(groups / sampled) + (solver.steps - shared) * math.ceil(samples / sampled)) / len(
            firsts
        )
    kept = groups * (training.keep_per_group or prompts.group_size)
    share = math.ceil(kept / recipe.optimizer.per_iteration)
    trained = int(solver.train_fraction * stochastic)
    replayed = min(training.replay_batch_size or share, share * trained)
    return Work(samples, groups, samples * trained, kept * trained, made, calls, sampled, replayed)


class Ledger:
    """Draws recipes and measures their passes, each once however often it is asked for.

    Args:
        like_cuda: autocast casts as on CUDA; False is as on the CPU, to compare with what was measured there.
    """

    def __init__(self, *, like_cuda: bool = True) -> None:
        self.like_cuda = like_cuda
        self._drawn: dict[str, Blueprint] = {}
        self._costs: dict[tuple[Any, ...], Cost] = {}

    def drawn(self, recipe: Recipe) -> tuple[str, Blueprint]:
        """The blueprint, and a name for all that its passes depend on."""
        generator = recipe.generator.model_dump(exclude={"offload_text", "text_cache"})
        generator["options"].pop("decode_batch_size", None)
        training = recipe.training
        settings = [recipe.objective.reduce, training.precision, training.gradient_checkpointing]
        compared = recipe.objective.kl_weight > 0
        parts = [generator, recipe.policy.model_dump(), recipe.solver.model_dump(), settings, compared]
        key = json.dumps(parts, default=str)
        if key not in self._drawn:
            self._drawn[key] = draw(recipe)
        return key, self._drawn[key]

    def cost(self, recipe: Recipe, what: str, batch: int, *, sharded: bool = False) -> Cost:
        """Of :func:`passes.sampling`, ``replaying`` or ``decoding``."""
        key, drawn = self.drawn(recipe)
        if (key, what, batch, sharded) not in self._costs:
            dtype = torch.bfloat16 if sharded and recipe.training.precision == "bf16" else torch.float32
            measure = getattr(passes, what)
            try:
                with drawn.mode, passes.in_dtype(drawn, dtype):
                    self._costs[key, what, batch, sharded] = measure(drawn, batch, like_cuda=self.like_cuda)
            except DataDependentOutputException as error:
                raise UserError(
                    f"the generator of {recipe.generator.path!r} cannot be planned: its adapter decides by the values"
                    f" of tensors ({error}), which a plan does not have; plan another one, or let it decide by shapes"
                ) from error
        return self._costs[key, what, batch, sharded]


def plan(recipe: Recipe, machine: Machine, ledger: Ledger | None = None) -> Plan:
    """What ``recipe`` needs on ``machine``.

    Raises:
        UserError: the model cannot be planned, or the recipe does not fit the number of processes.
    """
    return Accountant(recipe, machine, ledger or Ledger()).plan()


class Accountant:
    """Puts a plan together."""

    def __init__(self, recipe: Recipe, machine: Machine, ledger: Ledger) -> None:
        self.recipe, self.machine, self.ledger = recipe, machine, ledger
        self.work = work_of(recipe, machine.gpus)
        self.drawn = ledger.drawn(recipe)[1]
        self.judges, self.uncounted = judges_of(recipe)
        self.over = machine.gpus if machine.sharded else 1  # processes that share the network

    def plan(self) -> Plan:
        notes = [f"not counted: {', '.join(self.uncounted)}"] if self.uncounted else []
        return Plan(
            recipe=self.recipe.name,
            machine=self.machine,
            resident=_present(self.resident()),
            phases={name: _present(items) for name, items in self.phases().items()},
            seconds={name: value for name, value in self.seconds().items() if value},
            iterations=self.recipe.training.iterations,
            notes=tuple(notes),
        )

    @cached_property
    def trained_bytes(self) -> int:
        return sum(parameter.numel() * FLOAT for parameter in self.drawn.policy.parameters.values())

    @cached_property
    def compute_size(self) -> int:
        """Bytes of a trained number when FSDP has gathered it."""
        return 2 if self.recipe.training.precision == "bf16" else FLOAT

    def shared(self, size: int) -> int:
        """This process's part of what belongs to the network."""
        return math.ceil(size / self.over)

    def resident(self) -> dict[str, int]:
        policy, pipeline = self.drawn.policy, self.drawn.generator.pipeline
        frozen = [tensor for tensor in self.drawn.network.parameters() if not tensor.requires_grad]
        several = self.machine.gpus > 1 and not self.machine.sharded
        offloaded = getattr(self.recipe.generator, "offload_text", False)
        encoders = [tensor for part in self.drawn.generator.text_encoders for tensor in part.parameters()]
        return {
            "frozen weights": self.shared(_bytes(frozen)),
            "trained weights": self.shared(self.trained_bytes),
            "AdamW state": self.shared(ADAM_STATES * self.trained_bytes),
            "reference copy": self.shared(_bytes(policy._base.values())),
            "moving average": self.shared(_bytes(policy.ema.values())),
            "gradient buckets": self.trained_bytes if several else 0,  # DDP's own copy, for its messages
            "autoencoder": _bytes(pipeline.vae.parameters()),
            "text encoders": 0 if offloaded else _bytes(encoders),
            "rewards and judges": sum(
                judge.bytes for judge in self.judges if not judge.offload and not judge.is_backbone
            ),
            "backbone": sum(judge.bytes for judge in self.judges if judge.is_backbone),
            **self.storage(),
        }

    def storage(self) -> dict[str, int]:
        """The rollout's record, all of it, though it fills up only while sampling."""
        samples, shape = self.work.samples, self.drawn.generator.latent_shape()
        numbers, positions = math.prod(shape), math.prod(shape[1:])
        with self.drawn.mode:
            rows = _bytes(v for v in vars(conditioning(self.drawn.generator, 1)).values() if isinstance(v, Tensor))
        return {
            # z, z' and the log-probability of each position; every sample is recorded, whichever are trained on
            "recorded transitions": self.work.recorded * (2 * numbers + positions) * FLOAT,
            "latents": samples * numbers * FLOAT,
            "encoded prompts": samples * rows,
            "media": samples * self.media_bytes,
        }

    @cached_property
    def media_bytes(self) -> int:
        section = self.recipe.generator
        return 3 * section.frames * section.height * section.width * FLOAT

    def cost(self, what: str, batch: int) -> Cost:
        return self.ledger.cost(self.recipe, what, batch, sharded=self.machine.sharded and what != "decoding")

    @cached_property
    def decoded_at_once(self) -> int:
        usual = self.drawn.generator.decode_batch_size
        return min(int(self.recipe.generator.options.get("decode_batch_size", usual)), self.work.samples)

    def phases(self) -> dict[str, dict[str, int]]:
        gradients = {"gradients": self.shared(self.trained_bytes)}
        media = self.work.samples * self.media_bytes
        decoding = self.cost("decoding", self.decoded_at_once).bytes
        return {
            "sample": {"network pass": self.cost("sampling", self.work.sampled_at_once).bytes, **self.gathered(1)},
            # Parts are joined, halved and clamped: two more copies of the media at worst.
            "decode": {"autoencoder pass": max(decoding, 2 * media)},
            "score": _judging(judge for judge in self.judges if not judge.is_backbone),
            "map": _judging(judge for judge in self.judges if judge.is_backbone),
            "update": {
                **gradients,
                "forward and backward": self.cost("replaying", self.work.replayed_at_once).bytes,
                **self.gathered(2),
            },
            # AdamW over lists of tensors, as accelerators run it, takes the square roots of all second moments at once.
            "step": {**gradients, "square roots": self.shared(self.trained_bytes)},
        }

    def gathered(self, kinds: int) -> dict[str, int]:
        """What FSDP has whole: everything outside the blocks, this block and the next; twice with gradients."""
        if not self.machine.sharded:
            return {}
        sizes = [sum(p.numel() * self._size(p) for p in block.parameters()) for block in self.drawn.blocks]
        outside = sum(p.numel() * self._size(p) for p in self.drawn.network.parameters()) - sum(sizes)
        return {"gathered weights": outside + kinds * max(sizes, default=0) + max(sizes, default=0)}

    def _size(self, parameter: Tensor) -> int:
        return self.compute_size if parameter.requires_grad else parameter.element_size()

    def seconds(self) -> dict[str, float]:
        machine, work = self.machine, self.work
        one = {
            "sample": self.cost("sampling", work.sampled_at_once).flops / work.sampled_at_once * work.passes,
            "decode": self.cost("decoding", self.decoded_at_once).flops / self.decoded_at_once * work.samples,
            "update": self.cost("replaying", work.replayed_at_once).flops / work.replayed_at_once * work.trained,
            "score": sum(judge.flops * work.samples for judge in self.judges if judge.trains),
        }
        if self.recipe.objective.kl_weight:
            one["update"] += self.cost("sampling", work.sampled_at_once).flops / work.sampled_at_once * work.trained
        return {**{name: machine.seconds(flops) for name, flops in one.items()}, "communicate": self.communication()}

    def communication(self) -> float:
        """Seconds for messages between accelerators, if nothing is computed meanwhile."""
        others = (self.machine.gpus - 1) / self.machine.gpus
        if not self.machine.sharded:
            return 2 * others * self.trained_bytes * self.recipe.optimizer.per_iteration / self.machine.link
        whole = sum(p.numel() * self._size(p) for p in self.drawn.network.parameters())
        gradients = self.trained_bytes // FLOAT * self.compute_size
        replays = math.ceil(self.work.trained / self.work.replayed_at_once)
        return others * (whole * (self.work.calls + 2 * replays) + gradients * replays) / self.machine.link


def _judging(judges: Iterable[Judge]) -> dict[str, int]:
    """The judge that needs most while it works."""
    return {"network pass": max((judge.working for judge in judges), default=0)}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _present(items: Mapping[str, int]) -> dict[str, int]:
    return {name: size for name, size in items.items() if size}
