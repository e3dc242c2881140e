"""Networks of published size with random weights, made where they are used: nothing is downloaded.

Configurations are those that ``vipo plan`` reads. The text encoders stay on the meta device, without storage, and
prompts are answered with noise of the right shape.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vipo import generators
from vipo.assemble import model_path
from vipo.generators.text import TextReader
from vipo.plan.blueprint import adapter_name, empty_network, empty_pipeline
from vipo.plan.published import model_config, table
from vipo.pretrained import DTYPES
from vipo.schema import GeneratorSection
from vipo.types import Batched

MADE = ("transformer", "vae")  # of a pipeline


def pipeline(section: GeneratorSection, device: torch.device | str) -> Any:
    """The pipeline that ``generator.path`` names, its network and autoencoder on ``device`` with random weights."""
    with torch.device("meta"):
        made = empty_pipeline(section)
    config, exact = model_config(model_path(section.path)), generators.adapter(adapter_name(section)).float32_parts
    for part in MADE:
        setattr(made, part, network(config[part], device, DTYPES["float32" if part in exact else section.dtype]))
    return made


def network(entry: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """A network of this class and config; tables that its class computes are as they should be."""
    with torch.device(device):
        made = empty_network(entry, dtype)
    return scatter(made)


@torch.no_grad()
def scatter(made: nn.Module) -> nn.Module:
    """Weights of unit gain, so that activations stay finite at any depth; norms and biases as their class has them."""
    for parameter in made.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    return made


def save_backbone(folder: Path, part: str, device: torch.device | str) -> Path:
    """A vision network of published size, named as in ``configs/parts.json``, as ``pretrained`` reads it."""
    made: Any = network(table("parts")[part], device, torch.float32)
    made.save_pretrained(folder / part)
    return folder / part


@dataclass(frozen=True)
class RandomText:
    """Says noise, the same for the same prompt, of the shape of a reader's longest prompts."""

    reader: TextReader

    def __call__(self, prompts: Sequence[str]) -> Batched:
        rows = [self._row(prompt) for prompt in prompts]
        return type(rows[0]).cat(rows)

    def _row(self, prompt: str) -> Batched:
        blank: Any = self.reader.blank(1)
        source = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
        values = {field.name: getattr(blank, field.name) for field in fields(blank)}
        return replace(
            blank,
            **{
                name: torch.randn(value.shape, generator=source).to(value)
                for name, value in values.items()
                if value.is_floating_point()
            },
        )
