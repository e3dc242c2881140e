"""The model of a run, to sample from, evaluate or export."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vipo.assemble import Model, default_device, open_model
from vipo.errors import UserError
from vipo.recipe import check_generator_code, load_recipe, parse_recipe
from vipo.runs.best import BEST, best_checkpoint, best_told
from vipo.runs.directory import Layout, RunDirectory
from vipo.runs.guidance import check_guidance, guided
from vipo.runs.init import INIT, with_kept_init
from vipo.runs.inputs import others
from vipo.runs.rules import differences
from vipo.schema import Recipe
from vipo.training.checkpoint import load_policy
from vipo.training.saved import STATE, Head, named, read_head, verified

log = logging.getLogger(__name__)
SHAPED_BY = ("generator", "policy", "solver")  # sections that a model is opened with


@dataclass(frozen=True)
class Trained:
    """Weights that a run has saved, and the recipe that they are opened with.

    Args:
        checkpoint: a folder's name under ``checkpoints/``, a path, or ``best``; None takes the latest.
    """

    directory: RunDirectory
    recipe: Recipe
    checkpoint: str | None = None

    def path(self) -> Path:
        """The checkpoint's folder, as things are now.

        Raises:
            UserError: there is none; of the best, also if nothing is better than the untrained model.
        """
        if self.checkpoint == BEST:
            return best_checkpoint(self.directory, self.recipe.training.keep_best)
        if self.checkpoint is not None:
            return named(self.directory.checkpoints, self.checkpoint)
        latest = self.directory.latest_checkpoint()
        if latest is None:
            raise UserError(f"{str(self.directory.root)!r} has no complete checkpoint yet")
        return latest

    def export_folder(self, layout: Layout = "diffusers") -> Path:
        """Where it is exported to unless told otherwise: another checkpoint or layout does not take the usual's place.

        Raises:
            UserError: a checkpoint that lies in no run.
        """
        if not self.directory.exists():
            raise UserError(f"{str(self.directory.root)!r} lies in no run; say where to export it with --output FOLDER")
        return self.directory.export_folder(self.checkpoint, layout)

    def others(self, keys: Collection[str]) -> list[str]:
        """Of the files that the recipe names under these keys, those that are others than it was trained with."""
        return others(read_head(self.path()).inputs, self.recipe, keys)

    @property
    def told(self) -> list[str]:
        """Which one it is, where that is not plain."""
        judge = self.recipe.training.keep_best
        return [best_told(self.directory, judge)] if self.checkpoint == BEST and judge is not None else []


def is_checkpoint(folder: Path) -> bool:
    return (folder / STATE).is_file()


def find_trained(target: Path, checkpoint: str | None = None, *, allow_code: bool = True) -> Trained:
    """What a run's folder, or a checkpoint's, holds. A checkpoint that lies in no run has its recipe in itself.

    Args:
        allow_code: whether its generator may be Python code, ``file.py:thing``.

    Raises:
        UserError: neither of the two, there is no such checkpoint, or it names code and that is not allowed.
    """
    directory, above = RunDirectory(target), RunDirectory(target.resolve().parent.parent)
    if directory.exists():
        found = Trained(directory, load_recipe(directory.recipe), checkpoint)
    elif not is_checkpoint(target):
        raise UserError(f"{str(target)!r} is not a run directory: it has no recipe.yaml")
    elif checkpoint is not None:
        raise UserError(f"{str(target)!r} is one checkpoint; leave out --checkpoint, or give its run")
    elif above.exists() and target.resolve().parent == above.checkpoints.resolve():
        found = Trained(above, load_recipe(above.recipe), str(target))
    else:
        found = Trained(directory, _own_recipe(target), str(target))
    check_generator_code(found.recipe, str(target), allowed=allow_code)
    found.path()  # what is not there is told before a model is built
    return found


def _own_recipe(checkpoint: Path) -> Recipe:
    own = read_head(checkpoint).recipe
    if not own:
        raise UserError(f"checkpoint {str(checkpoint)!r} was saved without its recipe; give the run it belongs to")
    return parse_recipe(own, source=str(checkpoint))


def open_run(
    target: Path,
    *,
    checkpoint: str | None = None,
    guidance_scale: float | None = None,
    device: torch.device | str | None = None,
    keep_reference: bool = False,
) -> tuple[Recipe, Model]:
    """The recipe of a finished or interrupted run and its model with the trained weights, ready to sample.

    Generator, policy and solver are built, and nothing that only trains or scores. The weights are the moving average,
    where one was kept.

    Args:
        target: the run's folder, or a checkpoint's.
        checkpoint: of the run, instead of the latest; see :class:`Trained`.
        guidance_scale: instead of the recipe's.
        keep_reference: the policy can also be what it was before training, at the cost, for full weights, of a copy.

    Raises:
        UserError: neither a run nor a checkpoint, no such checkpoint in it, or it is damaged; guidance for a model that
            takes none.
    """
    trained = find_trained(target, checkpoint)
    return trained.recipe, open_trained(
        trained, guidance_scale=guidance_scale, device=device, keep_reference=keep_reference
    )


def open_trained(
    trained: Trained,
    *,
    guidance_scale: float | None = None,
    device: torch.device | str | None = None,
    keep_reference: bool = False,
) -> Model:
    """The model of :func:`open_run`."""
    recipe = _without_average(trained.recipe)
    recipe = recipe.model_copy(update={"generator": guided(recipe.generator, guidance_scale)})
    begun = with_kept_init(recipe, trained.directory.root)
    model = open_model(begun, device=device or default_device(), keep_reference=keep_reference)
    check_guidance(model.generator, guidance_scale)
    model.policy.begin().load(_weights(trained))
    return model


def _weights(trained: Trained) -> dict[str, Tensor]:
    """Those of the checkpoint; a run that is going on may remove it, for a later or a better, while it is being read.

    Raises:
        UserError: it is damaged.
    """
    while True:
        path = trained.path()
        try:
            head = verified(path)
            _tell_other_recipe(head, trained.recipe, trained.directory)
            return load_policy(path, head)
        except UserError:
            if path.exists():
                raise


def _tell_other_recipe(head: Head, recipe: Recipe, directory: RunDirectory) -> None:
    """A file that was edited, damaged, or of a resume whose iterations were lost samples other pictures."""
    found = differences(head.recipe, recipe, directory.root) if head.recipe else []
    told = [str(change) for change in found if change.path[0] in SHAPED_BY]
    if told:
        log.warning("%s is not what its checkpoint was trained with: %s", directory.recipe, ", ".join(told))
    begun = () if (directory.root / INIT).is_dir() else ("policy",)  # else the run has a copy of its own
    files = others(head.inputs, recipe, ("generator", *begun))
    if files:
        log.warning("not what the checkpoint was trained with, so it samples others: %s", ", ".join(files))


def _without_average(recipe: Recipe) -> Recipe:
    """What is loaded is the average: a second one would be another copy of the weights."""
    return recipe.model_copy(update={"policy": recipe.policy.model_copy(update={"ema_decay": None})})
