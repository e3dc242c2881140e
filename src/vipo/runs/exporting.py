"""Write a run's policy where people work: weights under the names of diffusers or ComfyUI, and a card beside them."""

from __future__ import annotations

from pathlib import Path

import torch

from vipo.assemble import Model
from vipo.errors import UserError
from vipo.files import written_whole
from vipo.generators.comfyui import family_of, rename_for_comfyui
from vipo.runs.card import write_card
from vipo.runs.directory import Layout
from vipo.runs.trained import Trained, open_trained
from vipo.training.saved import read_head


def write_export(trained: Trained, folder: Path, *, layout: Layout, dtype: torch.dtype | None) -> list[str]:
    """Write ``folder``, whole or not at all; what its card had to do without, in words.

    Args:
        layout: of a LoRA's names.
        dtype: of the weights; None leaves them as they are.

    Raises:
        UserError: the names of this layout are not known for the run's policy; a weight is too large for ``dtype``.
    """
    renamed = layout == "comfyui"
    if renamed and trained.recipe.policy.kind == "full":
        raise UserError("ComfyUI's names are for a LoRA, and this run trained all weights; take --format diffusers")
    model, iteration = _opened(trained)
    family = family_of(model.generator) if renamed else None
    with written_whole(folder) as aside:
        model.policy.export(model.generator, aside, dtype=dtype)
        if family is not None:
            rename_for_comfyui(aside, family)
        return add_card(aside, trained, iteration, model, layout)


def add_card(folder: Path, trained: Trained, iteration: int, model: Model, layout: Layout = "diffusers") -> list[str]:
    """:func:`vipo.runs.card.write_card` beside weights; a generator without a diffusers pipeline has none."""
    pipeline = getattr(model.generator, "pipeline", None)
    return [] if pipeline is None else write_card(folder, trained, iteration, type(pipeline), layout)


def _opened(trained: Trained) -> tuple[Model, int]:
    """The model and the iteration that its weights are of; the latest of a run that goes on may be another by then."""
    while True:
        iteration = read_head(trained.path()).iteration
        model = open_trained(trained)
        if read_head(trained.path()).iteration == iteration:
            return model, iteration
