"""``vipo plan``."""

from __future__ import annotations

from typing import Annotated

import typer

from vipo.cli.arguments import Json, Overrides, Recipe
from vipo.cli.consoles import show
from vipo.errors import UserError

SHARDING = {"ddp": "none", "fsdp2": "fsdp2", "zero2": "zero2", "zero3": "zero3"}
"""How weights lie on several accelerators, and what a recipe calls it."""


def _sharding(engine: str) -> str:
    """Raises:
    UserError: there is no such engine.
    """
    if engine not in SHARDING:
        *most, last = SHARDING
        raise UserError(f"--engine {engine} is not known; take {', '.join(most)} or {last}")
    return SHARDING[engine]


def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="Accelerators of each machine, one process each.")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    memory: Annotated[str, typer.Option(help="Of each, like 80GB.")] = "80GB",
    utilisation: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the peak rate reached.")] = 0.31,
    tflops: Annotated[float, typer.Option(min=0.001, help="Peak rate of each; 989 is an H100 SXM in bf16.")] = 989.0,
    engine: Annotated[
        str | None,
        typer.Option(
            help="ddp: all weights on each; fsdp2 or zero3: a part on each; zero2: a part of what the optimiser keeps."
            " Default: the recipe's training.sharding."
        ),
    ] = None,
    batches: Annotated[bool, typer.Option("--batches", help="Propose batch sizes for the memory there is.")] = False,
    as_json: Json = False,
) -> None:
    """Say what a recipe will need, in memory and time, and what to change if it does not fit.

    Example: `vipo plan quickstart --gpus 1 --memory 8GB`

    Example: `vipo plan flux1-dev-vipo-hpsv2 --gpus 8 --nodes 2 --engine fsdp2 prompts.per_iteration=16`
    """
    from vipo.recipe import load_recipe

    sharding = [f"training.sharding={_sharding(engine)}"] if engine else []
    parsed = load_recipe(recipe, [*(overrides or []), *sharding])  # before the heavy imports

    from vipo import plan as planning
    from vipo.plan.show import memory_size, plan_view

    ledger = planning.Ledger()
    machine = planning.Machine(gpus, memory_size(memory), tflops, utilisation, nodes=nodes)
    found, advice = planning.plan(parsed, machine, ledger), planning.advise(parsed, machine, ledger)
    proposal = planning.propose(parsed, machine, ledger) if batches else None
    facts = {**found.as_json(), "advice": advice.as_json()}
    if proposal:
        facts["batches"] = proposal.as_json()
    show(facts, plan_view(found, advice, proposal), as_json=as_json)
