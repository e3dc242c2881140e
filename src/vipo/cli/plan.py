"""``vipo plan``."""

from __future__ import annotations

from typing import Annotated

import typer

from vipo.cli.arguments import Json, Overrides, Recipe
from vipo.cli.consoles import show


def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="Accelerators, one process each.")] = 1,
    memory: Annotated[str, typer.Option(help="Of each, like 80GB.")] = "80GB",
    utilisation: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the peak rate reached.")] = 0.31,
    tflops: Annotated[float, typer.Option(min=0.001, help="Peak rate of each; 989 is an H100 SXM in bf16.")] = 989.0,
    sharded: Annotated[bool, typer.Option("--sharded", help="FSDP: spread the network over the GPUs.")] = False,
    batches: Annotated[bool, typer.Option("--batches", help="Propose batch sizes for the memory there is.")] = False,
    as_json: Json = False,
) -> None:
    """Say what a recipe will need, in memory and time, and what to change if it does not fit.

    Example: `vipo plan quickstart --gpus 1 --memory 8GB`
    """
    from vipo.recipe import load_recipe

    parsed = load_recipe(recipe, overrides or [])  # before the heavy imports, so that a slip is told at once

    from vipo import plan as planning
    from vipo.plan.show import memory_size, plan_view

    ledger = planning.Ledger()
    machine = planning.Machine(gpus, memory_size(memory), tflops, utilisation, sharded)
    found, advice = planning.plan(parsed, machine, ledger), planning.advise(parsed, machine, ledger)
    proposal = planning.propose(parsed, machine, ledger) if batches else None
    facts = {**found.as_json(), "advice": advice.as_json()}
    if proposal:
        facts["batches"] = proposal.as_json()
    show(facts, plan_view(found, advice, proposal), as_json=as_json)
