"""Where the LoRA is that a policy begins with, and what a recipe may say beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vipo.errors import UserError
from vipo.generators.lora import fitting_layers
from vipo.generators.weights import some
from vipo.types import LoraLayer

ACCEPTED = (
    "a LoRA's .safetensors file, the folder that holds one (with adapter_config.json, if PEFT wrote it), or a run that"
    " trained one"
)


def lora_place(named: str) -> Path:
    """The file or folder of a LoRA that ``policy.init`` names; of a run, its export.

    Raises:
        UserError: there is nothing there, or something else than a LoRA.
    """
    path = Path(named).expanduser()
    if not path.exists():
        raise UserError(f"policy.init={named} does not exist; give {ACCEPTED}")
    if (path / "recipe.yaml").is_file():  # a run
        path = path / "export"
        if not path.is_dir():
            raise UserError(f"policy.init={named} is a run without an export; write one with `vipo export {named}`")
    if (path / "model_index.json").is_file():
        raise UserError(
            f"policy.init={named} is a whole pipeline, no LoRA; to begin with its weights give {str(path)!r} as"
            " generator.path and leave out policy.init"
        )
    return path


def read_start(generator: Any, named: str, *, rank: int | None, targets: str | None) -> Mapping[str, LoraLayer]:
    """The layers of the LoRA that ``policy.init`` names, by the network's names for them.

    Args:
        rank, targets: what the recipe says of them, if it says anything; the file must agree.

    Raises:
        UserError: there is none, it does not wholly fit the network, or the recipe asks for another.
    """
    pipeline = getattr(generator, "pipeline", None)
    if not hasattr(pipeline, "lora_state_dict"):
        raise UserError(f"{type(generator).__name__} takes no LoRA; leave out policy.init")
    layers = fitting_layers(pipeline, lora_place(named))
    ranks = sorted({layer.rank for layer in layers.values()})
    if rank is not None and ranks != [rank]:
        held = " and ".join(map(str, ranks))
        raise UserError(f"policy.rank={rank}, but {named!r} has rank {held}; leave it out (or null) to take the file's")
    if targets is not None:
        _check_targets(generator.network, named, targets, layers)
    return layers


def _check_targets(network: Any, named: str, targets: str, layers: Mapping[str, LoraLayer]) -> None:
    """The file's layers are all that the recipe's ``targets`` mean, and no more."""
    from torch import nn

    linear = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    wanted = {name for name in linear if re.fullmatch(targets, name)}
    beside, lacking = sorted(layers.keys() - wanted), sorted(wanted - layers.keys())
    if beside or lacking:
        said = [f"has {some(beside, 'layer')} beside them"] * bool(beside)
        said += [f"lacks {some(lacking, 'layer')} of them"] * bool(lacking)
        raise UserError(
            f"policy.targets={targets!r}, but {named!r} {' and '.join(said)}; leave it out (or null) to train the"
            f" {len(layers)} layers of the file"
        )
