"""The model of a run, to sample from, evaluate or export."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from vipo.assemble import Model, default_device, open_model
from vipo.errors import UserError
from vipo.recipe import load_recipe
from vipo.runs.directory import RunDirectory
from vipo.runs.init import with_kept_init
from vipo.runs.rules import differences
from vipo.schema import Recipe
from vipo.training.checkpoint import load_policy
from vipo.training.saved import Head, verified

log = logging.getLogger(__name__)
SHAPED_BY = ("generator", "policy", "solver")  # sections that a model is opened with


def open_run(
    root: Path, *, device: torch.device | str | None = None, keep_reference: bool = False
) -> tuple[Recipe, Model]:
    """The recipe of a finished or interrupted run and its model with the trained weights, ready to sample.

    Generator, policy and solver are built, and nothing that only trains or scores. The weights are the moving average,
    where one was kept.

    Args:
        keep_reference: the policy can also be what it was before training, at the cost, for full weights, of a copy.

    Raises:
        UserError: not a run directory, no checkpoint in it yet, or the latest is damaged.
    """
    directory = RunDirectory(root)
    if not directory.exists():
        raise UserError(f"{str(root)!r} is not a run directory: it has no recipe.yaml")
    if directory.latest_checkpoint() is None:
        raise UserError(f"{str(root)!r} has no complete checkpoint yet")
    recipe = load_recipe(directory.recipe)
    begun = with_kept_init(_without_average(recipe), root)
    model = open_model(begun, device=device or default_device(), keep_reference=keep_reference)
    model.policy.begin().load(_weights(directory, recipe))
    return recipe, model


def _weights(directory: RunDirectory, recipe: Recipe) -> dict[str, Tensor]:
    """The latest ones; a run that is going on may remove a checkpoint while it is being read.

    Raises:
        UserError: the latest is damaged.
    """
    while (latest := directory.latest_checkpoint()) is not None:
        try:
            head = verified(latest)
            _tell_other_recipe(head, recipe, directory)
            return load_policy(latest, head)
        except UserError:
            if latest.exists():
                raise
    raise UserError(f"{str(directory.root)!r} has no complete checkpoint any more")


def _tell_other_recipe(head: Head, recipe: Recipe, directory: RunDirectory) -> None:
    """A file that was edited, damaged, or of a resume whose iterations were lost samples other pictures."""
    found = differences(head.recipe, recipe, directory.root) if head.recipe else []
    told = [str(change) for change in found if change.path[0] in SHAPED_BY]
    if told:
        log.warning("%s is not what its checkpoint was trained with: %s", directory.recipe, ", ".join(told))


def _without_average(recipe: Recipe) -> Recipe:
    """What is loaded is the average: a second one would be another copy of the weights."""
    return recipe.model_copy(update={"policy": recipe.policy.model_copy(update={"ema_decay": None})})
