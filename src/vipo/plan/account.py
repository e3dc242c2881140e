"""The account of one process (one accelerator): which bytes lie there in which phase, and how long an iteration takes.

An iteration goes through phases: sample, decode, score, map, update, step; before the first, prompts may be read. What
is resident is there in all of them; the worst phase decides whether a recipe fits. Seconds are floating-point
operations over peak rate times utilisation, but no fewer than the host needs to call the operators.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from vipo.assemble import check_groups_whole, check_sharding
from vipo.generators import context
from vipo.options import BUCKET, Sharding
from vipo.plan.blueprint import adapter_name, conditioning, is_own
from vipo.plan.judging import Judge, judges_of
from vipo.plan.ledger import Ledger
from vipo.plan.passes import Cost, row_bytes
from vipo.plan.work import work_of
from vipo.schema import Recipe

Items = Mapping[str, int]  # what lies there -> bytes
FLOAT = 4  # bytes of a float32 number
ADAM_STATES = 2  # moments that AdamW keeps of every trained number
LEAST, SCALED = 4096, 256  # adamw8bit: numbers of a weight whose moments are in 8 bits, and those that share a scale


@dataclass(frozen=True)
class Machine:
    """What a recipe is to run on.

    Args:
        gpus: accelerators of each node, one process each.
        memory: bytes of each.
        tflops: 1e12 operations per second of each at best; 989 is an H100 SXM, bfloat16 without sparsity.
        utilisation: the share of that which is reached; docs/plan.md says where the default is from.
        operator: seconds in which the host calls one operator; a pass does not end before its last one is called.
        link: bytes per second between accelerators of a node; 450e9 is NVLink 4, one direction.
        nodes: machines.
        between: bytes per second from each accelerator to another node; 50e9 is InfiniBand NDR, 400 Gbit/s each.
    """

    gpus: int = 1
    memory: int = 80 * 10**9
    tflops: float = 989.0
    utilisation: float = 0.31
    link: float = 450e9
    operator: float = 5.0e-6
    nodes: int = 1
    between: float = 50e9

    @property
    def processes(self) -> int:
        return self.gpus * self.nodes

    def sharding(self, recipe: Recipe) -> Sharding:
        """What is cut over its processes; none where there is one."""
        return recipe.training.sharding if self.processes > 1 else "none"

    @property
    def slowest_link(self) -> float:
        """Bytes per second of the link that messages of all processes wait for."""
        return self.link if self.nodes == 1 else min(self.link, self.between)

    def seconds(self, flops: float) -> float:
        return flops / (self.tflops * 1e12 * self.utilisation)

    def lasts(self, one: Cost) -> float:
        """Seconds of a pass."""
        return max(self.seconds(one.flops), one.operators * self.operator)


@dataclass(frozen=True)
class Plan:
    """What a recipe needs on a machine, per process."""

    recipe: str
    machine: Machine
    sharding: Sharding  # as of Machine.sharding
    context_parallel: int  # processes that share each sample
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

    @property
    def launch(self) -> str:
        """How to start it; on several nodes the same on each, with an address that all of them reach."""
        machine = self.machine
        sharding = "" if self.sharding == "none" else f" training.sharding={self.sharding}"
        if self.context_parallel > 1:
            sharding += f" training.context_parallel={self.context_parallel}"
        if machine.processes == 1:
            return f"vipo train {self.recipe}"
        several = f"--nnodes {machine.nodes} --rdzv_backend c10d --rdzv_endpoint HOST:29500 "
        nodes = several if machine.nodes > 1 else ""
        return f"torchrun {nodes}--nproc_per_node {machine.gpus} -m vipo train {self.recipe}{sharding}"

    def as_json(self) -> dict[str, Any]:
        """All figures, for programs."""
        return {
            "recipe": self.recipe,
            "machine": {field.name: getattr(self.machine, field.name) for field in fields(Machine)},
            "sharding": self.sharding,
            "context_parallel": self.context_parallel,
            "launch": self.launch,
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
        self.sharding = machine.sharding(recipe)
        check_sharding(recipe, self.sharding)
        self.work = work_of(recipe, machine.processes)
        check_groups_whole(recipe, machine.processes // recipe.training.context_parallel)
        self.drawn = ledger.drawn(recipe)[1]
        self.team = recipe.training.context_parallel  # processes that share each pass
        if self.team > 1:
            masked = getattr(self.drawn.generator, "masks_text", False)
            exchange, named = recipe.training.context_exchange, recipe.generator.attention
            context.check(self.drawn.network, self.team, exchange, masked=masked, attention=named)
        self.judges, self.uncounted = judges_of(recipe)
        self.sharded = self.sharding in ("fsdp2", "zero3")  # the network's weights
        self.is_zero = self.sharding in ("zero2", "zero3")

    def plan(self) -> Plan:
        notes = [f"not counted: {', '.join(self.uncounted)}"] if self.uncounted else []
        if is_own(section := self.recipe.generator):
            notes.append(f"generator {section.name} is counted as {adapter_name(section)}, which reads its pipeline")
        if self.team > 1:
            notes.append(f"not counted: messages within each team of {self.team} processes, in every block's attention")
        return Plan(
            recipe=self.recipe.name,
            machine=self.machine,
            sharding=self.sharding,
            context_parallel=self.team,
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
    def adam_bytes(self) -> int:
        """AdamW's two moments of everything that is trained."""
        if self.recipe.optimizer.kind == "adamw":
            return ADAM_STATES * self.trained_bytes
        sizes = [parameter.numel() for parameter in self.drawn.policy.parameters.values()]
        each = [n + FLOAT * math.ceil(n / SCALED) if n >= LEAST else FLOAT * n for n in sizes]
        return ADAM_STATES * sum(each)

    def cut(self, size: int) -> int:
        """This process's part of gradients and of what the optimiser keeps."""
        return math.ceil(size / (1 if self.sharding == "none" else self.machine.processes))

    def shared(self, size: int) -> int:
        """This process's part of what is cut as the network's weights are."""
        return self.cut(size) if self.sharded else size

    def resident(self) -> dict[str, int]:
        policy, pipeline = self.drawn.policy, self.drawn.generator.pipeline
        frozen = [tensor for tensor in self.drawn.network.parameters() if not tensor.requires_grad]
        several = self.machine.processes > 1 and self.sharding == "none"
        return {
            "frozen weights": self.shared(_bytes(frozen)),
            "trained weights": self.shared(self.trained_bytes),
            "AdamW state": self.cut(self.adam_bytes),
            "weights to step": self.cut(self.trained_bytes) if self.is_zero else 0,  # ZeRO's, beside the network's
            "reference copy": self.shared(_bytes(policy.base.values())),
            "moving average": self.shared(_bytes(policy.ema.values())),
            # DDP's own copy of them, for its messages; ZeRO fills one bucket after the other.
            "gradient buckets": self.trained_bytes if several else FLOAT * BUCKET * self.is_zero,
            "autoencoder": _bytes(pipeline.vae.parameters()),
            "text encoders": 0 if self.recipe.generator.offload_text else self.encoder_bytes,
            "rewards and judges": sum(
                judge.bytes for judge in self.judges if not judge.offload and not judge.is_backbone
            ),
            "backbone": sum(judge.bytes for judge in self.judges if judge.is_backbone),
            **self.storage(),
        }

    @cached_property
    def encoder_bytes(self) -> int:
        return sum(_bytes(encoder.parameters()) for encoder in self.drawn.generator.text_encoders)

    def storage(self) -> dict[str, int]:
        """The rollout's record, all of it, though it fills up only while sampling."""
        samples, latents = self.work.samples, math.prod(self.drawn.generator.latent_shape()) * FLOAT
        with self.drawn.mode:
            encoded = _bytes(v for v in vars(conditioning(self.drawn.generator, 1)).values() if isinstance(v, Tensor))
        return {
            "recorded transitions": self.work.recorded * row_bytes(self.drawn),  # whichever of them are trained on
            "latents": samples * latents,
            "encoded prompts": samples * encoded,
            "media": samples * self.media_bytes,
        }

    @cached_property
    def media_bytes(self) -> int:
        section = self.recipe.generator
        return 3 * section.frames * section.height * section.width * FLOAT

    def cost(self, what: str, batch: int) -> Cost:
        """Of a pass; a team cuts the network's by tokens, and what is outside its blocks counts as if it were too."""
        whole = self.ledger.cost(self.recipe, what, batch)
        if what == "decoding" or self.team == 1:
            return whole
        return replace(whole, bytes=math.ceil(whole.bytes / self.team), flops=whole.flops // self.team)

    @cached_property
    def decoded_at_once(self) -> int:
        usual = self.drawn.generator.options.decode_batch_size
        return min(int(self.recipe.generator.options.get("decode_batch_size", usual)), self.work.samples)

    def phases(self) -> dict[str, dict[str, int]]:
        held = {"gradients": self.cut(self.trained_bytes), "drawn rows": self.drawn_rows}
        media = self.work.samples * self.media_bytes
        decoding = self.cost("decoding", self.decoded_at_once).bytes
        return {
            # Before the first iteration, without what encoding takes: encoders that leave afterwards.
            "read": {"text encoders": self.encoder_bytes if self.recipe.generator.offload_text else 0},
            "sample": {"network pass": self.cost("sampling", self.work.sampled_at_once).bytes, **self.gathered(1)},
            # Parts are joined, halved and clamped: two more copies of the media at worst.
            "decode": {"autoencoder pass": max(decoding, 2 * media)},
            "score": _judging(judge for judge in self.judges if not judge.is_backbone),
            "map": _judging(judge for judge in self.judges if judge.is_backbone),
            "update": {
                **held,
                "forward and backward": self.update_bytes(),
                **self.gathered(2),
            },
            # AdamW over lists of tensors, as accelerators run it, takes the square roots of all second moments at once.
            "step": {
                **held,
                "square roots": self.cut(self.trained_bytes),
                "gradients in a row": self.cut(self.trained_bytes) if self.sharding == "zero2" else 0,
            },
        }

    def update_bytes(self) -> int:
        """The worst pass of an update. The untrained weights take the place of a copy of the present ones."""
        trained, batch = self.cost("replaying", self.work.replayed_at_once).bytes, self.work.replayed_at_once
        if not self.drawn.policy.base:
            return trained
        return max(trained, self.shared(self.trained_bytes) + self.cost("sampling", batch).bytes)

    @cached_property
    def drawn_rows(self) -> int:
        """Bytes of rows that a loss draws instead of having them recorded."""
        loss = self.drawn.loss
        return 0 if loss.keep_steps else self.work.samples * loss.rows_per_sample * row_bytes(self.drawn)

    def gathered(self, kinds: int) -> dict[str, int]:
        """What FSDP has whole: everything outside the blocks, this block and the next; twice with gradients.

        ZeRO-3 gathers layer by layer, so that is more than it needs.
        """
        if not self.sharded:
            return {}
        sizes = [_bytes(block.parameters()) for block in self.drawn.blocks]
        outside = _bytes(self.drawn.network.parameters()) - sum(sizes)
        return {"gathered weights": outside + kinds * max(sizes, default=0) + max(sizes, default=0)}

    def seconds(self) -> dict[str, float]:
        machine, work = self.machine, self.work
        sampling = machine.lasts(self.cost("sampling", work.sampled_at_once)) / work.sampled_at_once
        replaying = machine.lasts(self.cost("replaying", work.replayed_at_once)) / work.replayed_at_once
        decoding = machine.lasts(self.cost("decoding", self.decoded_at_once)) / self.decoded_at_once
        return {
            "sample": sampling * work.passes,
            "decode": decoding * work.samples,
            "update": (replaying + (sampling if self.recipe.objective.kl_weight else 0)) * work.trained,
            "score": machine.seconds(sum(judge.flops * work.samples for judge in self.judges if judge.trains)),
            "communicate": self.communication(),
        }

    def communication(self) -> float:
        """Seconds for messages between accelerators, if nothing is computed meanwhile."""
        others = 1 - 1 / self.machine.processes
        steps, gradients, replays = self.recipe.optimizer.per_iteration, self.trained_bytes, self.work.replays
        if self.sharding == "none":
            return 2 * others * gradients * steps / self.machine.slowest_link
        if self.sharding == "zero2":  # reduced with every pass; what was stepped is gathered
            return others * gradients * (replays + steps) / self.machine.slowest_link
        whole = _bytes(self.drawn.network.parameters())
        gathers = self.work.calls + (3 if self.recipe.objective.kl_weight else 2) * replays
        return others * (whole * gathers + gradients * replays) / self.machine.slowest_link


def _judging(judges: Iterable[Judge]) -> dict[str, int]:
    """The judge that needs most while it works."""
    return {"network pass": max((judge.working for judge in judges), default=0)}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _present(items: Mapping[str, int]) -> dict[str, int]:
    return {name: size for name, size in items.items() if size}
