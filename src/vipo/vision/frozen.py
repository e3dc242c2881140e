"""A network out of transformers that is only looked through: safetensors only, nothing left random, no gradients."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from vipo.errors import UserError
from vipo.pretrained import dtype_named, folder_or_id, not_found, quiet

Network = TypeVar("Network", bound=nn.Module)


def load_frozen(user: str, pretrained: str | Path, classes: Mapping[str, str], *, dtype: str = "float32") -> Any:
    """The network in ``pretrained``, frozen.

    Args:
        user: who asks, for messages.
        pretrained: hub id or local folder with config.json and safetensors weights.
        classes: model_type in config.json -> name of the transformers class that reads it.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        UserError: nothing there, another kind of model, or weights that do not fill the network.
    """
    import transformers

    pretrained = folder_or_id(user, pretrained)
    kind = dtype_named(user, dtype)
    model_type = _model_type(user, pretrained)
    if model_type not in classes:
        raise UserError(f"{pretrained} holds a model of type {model_type!r}; {user} accepts {', '.join(classes)}")
    model_class = getattr(transformers, classes[model_type])
    with quiet():
        try:
            network, report = model_class.from_pretrained(
                str(pretrained), dtype=kind, use_safetensors=True, output_loading_info=True
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(not_found(user, pretrained, "safetensors weights", error)) from error
    if report["missing_keys"]:
        lacking = sorted(report["missing_keys"])
        raise UserError(
            f"{pretrained} lacks {len(lacking)} tensors of {classes[model_type]}, the first is {lacking[0]!r};"
            " is it a checkpoint of another model? Download it again or point pretrained= elsewhere"
        )
    return freeze(network)


def freeze(network: Network) -> Network:
    """Evaluation mode, no gradients, and weights in the memory layout in which convolutions are fast on CPU."""
    over_time = any(parameter.ndim == 5 for parameter in network.parameters())
    layout = torch.channels_last_3d if over_time else torch.channels_last
    frozen: Network = network.eval().requires_grad_(False).to(memory_format=layout)  # type: ignore[call-overload]
    return frozen


def _model_type(user: str, pretrained: str | Path) -> str:
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(str(pretrained))
    except (OSError, ValueError) as error:
        raise UserError(not_found(user, pretrained, "config.json", error)) from error
    if "model_type" not in config:
        raise UserError(not_found(user, pretrained, "config.json with a model_type", ValueError("none in there")))
    return str(config["model_type"])
