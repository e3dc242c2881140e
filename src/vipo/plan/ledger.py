"""Draws recipes and measures what passes through their networks cost, each once however often it is asked for."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from torch._subclasses.fake_tensor import DataDependentOutputException

from vipo.errors import UserError
from vipo.plan import passes
from vipo.plan.blueprint import Blueprint, draw
from vipo.plan.passes import Cost
from vipo.schema import Recipe


class Ledger:
    """What has been drawn and measured.

    Args:
        like_cuda: autocast casts as on CUDA; False is as on the CPU, to compare with what was measured there.
    """

    def __init__(self, *, like_cuda: bool = True) -> None:
        self.like_cuda = like_cuda
        self._drawn: dict[tuple[str, str], Blueprint] = {}
        self._costs: dict[tuple[Any, ...], Cost] = {}

    def drawn(self, recipe: Recipe) -> tuple[str, Blueprint]:
        """The blueprint, and a name for all that its passes depend on."""
        generator = recipe.generator.model_dump(exclude={"offload_text", "text_cache", "text_quantization"})
        generator["options"].pop("decode_batch_size", None)
        training = recipe.training
        settings = [recipe.credit == "sample", training.precision, training.gradient_checkpointing, training.sharding]
        parts = [generator, recipe.policy.model_dump(), asdict(recipe.solver), asdict(recipe.objective), settings]
        key = json.dumps(parts, default=str)
        drawing = key, recipe.generator.text_quantization  # passes are the network's: prompts are encoded before
        if drawing not in self._drawn:
            self._drawn[drawing] = draw(recipe)
        return key, self._drawn[drawing]

    def cost(self, recipe: Recipe, what: str, batch: int) -> Cost:
        """Of :func:`passes.sampling`, ``replaying`` or ``decoding``."""
        key, drawn = self.drawn(recipe)
        if (key, what, batch) not in self._costs:
            measure = getattr(passes, what)
            try:
                self._costs[key, what, batch] = measure(drawn, batch, like_cuda=self.like_cuda)
            except DataDependentOutputException as error:
                raise UserError(
                    f"the generator of {recipe.generator.path!r} cannot be planned: its adapter decides by the values"
                    f" of tensors ({error}), which a plan does not have; plan another one, or let it decide by shapes"
                ) from error
        return self._costs[key, what, batch]
