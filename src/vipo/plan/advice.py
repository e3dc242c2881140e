"""What to change so that a recipe fits, cheapest first; and, if it fits, what costs time without need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vipo.assemble import check_sharding
from vipo.errors import UserError
from vipo.generators import options
from vipo.plan.account import Accountant, Machine, Plan, plan
from vipo.plan.blueprint import adapter_name, is_own
from vipo.plan.ledger import Ledger
from vipo.plan.published import table
from vipo.plan.work import work_of
from vipo.recipe import parse_recipe
from vipo.schema import Recipe

ALL = ("read", "sample", "decode", "score", "map", "update", "step")  # phases of an iteration
Path = tuple[str, ...]  # of a key in a recipe
SHARDING: Path = ("training", "sharding")
LORA = (
    "trains a LoRA instead of every weight, which needs a higher optimizer.learning_rate: flux1-dev-lora-24gb has 3e-4"
)


@dataclass(frozen=True)
class Change:
    """One key of the recipe to change.

    Args:
        path, value: the key and what it becomes.
        helps: phases that may need less then.
        warning: what it changes beside memory and time.
    """

    path: Path
    value: Any
    helps: tuple[str, ...] = ALL
    warning: str = ""

    def __str__(self) -> str:
        spelled = str(self.value).lower() if isinstance(self.value, bool) else str(self.value)
        text = f"{'.'.join(self.path)}={spelled}"
        return f"{text} ({self.warning})" if self.warning else text

    def apply(self, recipe: Recipe) -> Recipe:
        raw = recipe.model_dump(mode="json")
        *parents, leaf = self.path
        node = raw
        for parent in parents:
            node = node[parent]
        node[leaf] = self.value
        return parse_recipe(raw, source=recipe.name)


@dataclass(frozen=True)
class Advice:
    """Changes to make together, and the plan with them; without changes, there is nothing to gain or nothing helps."""

    changes: tuple[Change, ...]
    plan: Plan
    seconds: float  # that an iteration gets longer; negative: shorter

    def as_json(self) -> dict[str, Any]:
        return {
            "changes": [str(change) for change in self.changes],
            "iteration_seconds_more": self.seconds,
            "plan": self.plan.as_json(),
        }


def advise(recipe: Recipe, machine: Machine, ledger: Ledger | None = None) -> Advice:
    """How to make ``recipe`` fit on ``machine`` at the least cost, or how to make it faster where there is room.

    While it does not fit, the cheapest change that may help the worst phase is tried, and kept if it does. In the end
    changes that are not needed any more are dropped, the dearest first.
    """
    ledger = ledger or Ledger()
    base = plan(recipe, machine, ledger)
    if base.fits:
        return _advice(recipe, machine, _faster(recipe, machine, ledger, base), ledger, base)
    left, chosen, best = _candidates(recipe, machine, ledger), list[Change](), base
    while not best.fits:
        change = next((candidate for candidate in left if best.worst in candidate.helps), None)
        if change is None:
            break
        left.remove(change)
        with_it = [*(other for other in chosen if other.path != change.path), change]
        if not _trains(recipe, machine, with_it):
            continue
        tried = _planned(recipe, machine, with_it, ledger)
        if tried.peak < best.peak:
            chosen, best = with_it, tried
    for change in reversed(chosen):
        rest = [other for other in chosen if other is not change]
        if best.fits and _planned(recipe, machine, rest, ledger).fits:
            chosen = rest
    return _advice(recipe, machine, chosen, ledger, base)


def _faster(recipe: Recipe, machine: Machine, ledger: Ledger, base: Plan) -> list[Change]:
    """What can be turned off, the largest saving first."""
    chosen: list[Change] = []
    savers = [Change(SHARDING, "none")] if recipe.training.sharding != "none" else []
    if recipe.training.gradient_checkpointing:
        savers.insert(0, Change(("training", "gradient_checkpointing"), False))
    for change in savers:
        tried = _planned(recipe, machine, [*chosen, change], ledger)
        if tried.fits and tried.iteration_seconds < base.iteration_seconds:
            chosen.append(change)
    return chosen


def _advice(recipe: Recipe, machine: Machine, changes: Sequence[Change], ledger: Ledger, base: Plan) -> Advice:
    found = _planned(recipe, machine, changes, ledger)
    return Advice(tuple(changes), found, found.iteration_seconds - base.iteration_seconds)


def _trains(recipe: Recipe, machine: Machine, changes: Sequence[Change]) -> bool:
    """Whether a recipe may have these changes, and an engine takes it with them."""
    try:
        changed = _changed(recipe, changes)
        check_sharding(changed, machine.sharding(changed))
    except UserError:
        return False
    return True


def _planned(recipe: Recipe, machine: Machine, changes: Sequence[Change], ledger: Ledger) -> Plan:
    return plan(_changed(recipe, changes), machine, ledger)


def _changed(recipe: Recipe, changes: Sequence[Change]) -> Recipe:
    for change in changes:
        recipe = change.apply(recipe)
    return recipe


def _candidates(recipe: Recipe, machine: Machine, ledger: Ledger) -> list[Change]:
    """By the seconds that each adds to an iteration; what changes the training comes last."""
    possible = [change for change in _costly(recipe, machine) if _trains(recipe, machine, [change])]
    costly = [(account_seconds(recipe, machine, change, ledger), change) for change in possible]
    paid = [change for _, change in sorted(costly, key=lambda pair: pair[0])]
    return [*_free(recipe, machine), *paid, *_other_training(recipe)]


def account_seconds(recipe: Recipe, machine: Machine, change: Change, ledger: Ledger) -> float:
    """What a costly change adds to an iteration: messages for sharding, a second forward for checkpointing."""
    now = Accountant(recipe, machine, ledger)
    if change.path == SHARDING:
        return Accountant(change.apply(recipe), machine, ledger).communication() - now.communication()
    again = now.cost("sampling", now.work.sampled_at_once).flops / now.work.sampled_at_once
    return machine.seconds(again * now.work.trained)


def _free(recipe: Recipe, machine: Machine) -> Iterator[Change]:
    """Changes that cost no operations: each does the same in smaller parts, or puts aside what is not in use."""
    work, section = work_of(recipe, machine.processes), recipe.generator
    if not section.offload_text and not is_own(section):  # the user's own may have no keep_text, which that asks for
        yield Change(("generator", "offload_text"), True)
    for home in ("judges", "rewards"):
        for name, entry in getattr(recipe, home).items():
            if (entry.reward or name) in table("judges") and not entry.options.get("offload"):
                yield Change((home, name, "options", "offload"), True)
    if recipe.policy.kind == "lora" and section.dtype == "float32":
        yield Change(("generator", "dtype"), "bfloat16")
    if work.replayed_at_once > 1:
        yield Change(("training", "replay_batch_size"), 1, helps=("update",))
    if work.sampled_at_once > 1:
        yield Change(("training", "rollout_batch_size"), 1, helps=("sample",))
    taken = [] if is_own(section) else options(adapter_name(section))
    if "decode_batch_size" in taken and section.options.get("decode_batch_size") != 1:
        yield Change(("generator", "options", "decode_batch_size"), 1, helps=("decode",))
    if "guidance_in_one_pass" in taken and section.options.get("guidance_in_one_pass") is not False:
        yield Change(("generator", "options", "guidance_in_one_pass"), False, helps=("sample", "update"))


def _costly(recipe: Recipe, machine: Machine) -> Iterator[Change]:
    if not recipe.training.gradient_checkpointing:
        yield Change(("training", "gradient_checkpointing"), True, helps=("update",))
    if machine.processes > 1 and recipe.training.sharding == "none":
        yield Change(SHARDING, "fsdp2")


def _other_training(recipe: Recipe) -> Iterator[Change]:
    yield from _fewer_text_bits(recipe, "int8", "prompts read in 8 bits")
    if recipe.policy.kind == "lora" and recipe.generator.quantization == "none":
        yield Change(("generator", "quantization"), "nf4", warning="a LoRA on a base in 4 bits")
    yield from _fewer_text_bits(recipe, "nf4", "prompts read in 4 bits")
    if recipe.policy.kind == "full":
        yield Change(("policy", "kind"), "lora", warning=LORA)


def _fewer_text_bits(recipe: Recipe, kind: str, warning: str) -> Iterator[Change]:
    """``int8`` changes what is read by a hundredth and comes early; ``nf4`` by far more, for little more memory."""
    more = {"int8": ("none",), "nf4": ("none", "int8")}[kind]
    if recipe.policy.kind == "lora" and recipe.generator.text_quantization in more:
        helps = ("read",) if recipe.generator.offload_text else ALL
        yield Change(("generator", "text_quantization"), kind, helps, warning=warning)
