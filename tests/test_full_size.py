"""The published models at full size, without a byte of weights: counts, names of layers, LoRA files, sharding."""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from torch import nn

from vipo.generators import GENERATORS, adapter_of
from vipo.plan.blueprint import empty_network
from vipo.plan.published import table
from vipo.plan.sharding import sharding
from vipo.sharding import wrapped_blocks

# Transformer -> a hub id that has it.
TRANSFORMERS = {entry["transformer"]: hub for hub, entry in table("models").items()}
COUNTED = [name for name, entry in table("parts").items() if "billions" in entry]

# Linear layers of each named choice, by blocks. FLUX: 19 double blocks of 8 in attention, 4 in two feed-forwards and 2
# in norms, 38 single ones of 3, 2 and 1. SD 3.5 and Qwen-Image: the last block gives no text on. SD 3.5 medium: a
# second attention in 13 blocks.
LAYERS = {
    "flux.1-dev": {"attention": 19 * 8 + 38 * 3, "blocks": 19 * 14 + 38 * 6},
    "flux.1-schnell": {"attention": 19 * 8 + 38 * 3, "blocks": 19 * 14 + 38 * 6},
    "sd3.5-medium": {"attention": 24 * 8 - 1 + 13 * 4, "blocks": 24 * 14 - 3 + 13 * 4},
    "sd3.5-large": {"attention": 38 * 8 - 1, "blocks": 38 * 14 - 3},
    "wan2.1-1.3b": {"attention": 30 * 8, "blocks": 30 * 10},
    "wan2.1-14b": {"attention": 40 * 8, "blocks": 40 * 10},
    "wan2.2-5b": {"attention": 30 * 8, "blocks": 30 * 10},
    "flux.2-klein-4b": {"attention": 5 * 8 + 20 * 2, "blocks": 5 * 12 + 20 * 2},
    "flux.2-klein-9b": {"attention": 8 * 8 + 24 * 2, "blocks": 8 * 12 + 24 * 2},
    "qwen-image": {"attention": 60 * 8 - 2, "blocks": 60 * 14 - 4},
    "z-image": {"attention": 34 * 4, "blocks": 34 * 7 + 32},
}
# What only serves the text after the last block, which nobody reads, gets no gradient.
WITHOUT_GRADIENT = {"qwen-image": r"transformer_blocks\.59\.(attn\.(add_q_proj|to_add_out)|txt_mlp\..*)"}


@cache
def network(part: str) -> nn.Module:
    with torch.device("meta"):
        return empty_network(table("parts")[part], torch.float32)


def pipeline_of(part: str) -> str:
    return str(table("models")[TRANSFORMERS[part]]["pipeline"])


def targets_of(part: str) -> dict[str, str]:
    adapter = adapter_of(pipeline_of(part))
    assert adapter is not None
    module = import_module(GENERATORS[adapter].target.partition(":")[0])
    if hasattr(module, "LORA_TARGETS"):
        return dict(module.LORA_TARGETS)
    return dict(module.lora_targets(table("parts")[part]["config"]["num_layers"]))


def linear_layers(module: nn.Module, prefix: str = "") -> list[str]:
    return [f"{prefix}{name}" for name, part in module.named_modules() if isinstance(part, nn.Linear)]


@pytest.mark.parametrize("part", COUNTED)
def test_as_many_numbers_as_published(part: str) -> None:
    # With buffers: the table of positions is part of what is published as Stable Diffusion 3.5's size.
    # Tied weights count once.
    tensors = {id(tensor): tensor.numel() for tensor in network(part).state_dict(keep_vars=True).values()}
    numbers = sum(tensors.values())
    assert numbers / 1e9 == pytest.approx(table("parts")[part]["billions"], rel=2e-3)


def test_every_generator_has_a_published_model() -> None:
    planned = {adapter_of(entry["pipeline"]) for entry in table("models").values()}
    assert planned == set(GENERATORS)
    assert set(LAYERS) == set(TRANSFORMERS)


@pytest.mark.parametrize("part", TRANSFORMERS)
def test_a_named_choice_of_layers_is_what_it_says(part: str) -> None:
    linear, targets = linear_layers(network(part)), targets_of(part)
    chosen = {name: [layer for layer in linear if re.fullmatch(regex, layer)] for name, regex in targets.items()}
    assert {name: len(layers) for name, layers in chosen.items()} == LAYERS[part]
    assert set(chosen["attention"]) < set(chosen["blocks"])


@pytest.mark.parametrize("part", TRANSFORMERS)
def test_blocks_covers_attention_and_feed_forward_of_every_block(part: str) -> None:
    whole = network(part)
    regex = f"{targets_of(part)['blocks']}|{WITHOUT_GRADIENT.get(part, '$')}"
    names = {id(module): name for name, module in whole.named_modules()}
    for block in wrapped_blocks(whole):
        for layer in linear_layers(block, f"{names[id(block)]}."):
            assert re.fullmatch(regex, layer) or re.search(r"norm|mod", layer), layer


@pytest.mark.parametrize(
    "part", ["flux.1-dev", "sd3.5-medium", "wan2.1-1.3b", "flux.2-klein-4b", "qwen-image", "z-image"]
)
def test_a_lora_file_is_one_that_the_pipeline_reads(part: str) -> None:
    regex = targets_of(part)["blocks"]
    with torch.device("meta"):
        trained = empty_network(table("parts")[part], torch.float32)
        layers = [layer for layer in linear_layers(trained) if re.fullmatch(regex, layer)]
        inject_adapter_in_model(LoraConfig(r=4, target_modules=layers), trained)
    file = {f"transformer.{name}": value for name, value in get_peft_model_state_dict(trained).items()}
    assert set(file) == {f"transformer.{layer}.lora_{side}.weight" for layer in layers for side in "AB"}
    pipeline: Any = getattr(diffusers, pipeline_of(part))
    read = pipeline.lora_state_dict(dict(file))
    assert set(read[0] if isinstance(read, tuple) else read) == set(file)


@pytest.mark.parametrize("part", TRANSFORMERS)
def test_sharding_leaves_little_outside_the_blocks(part: str) -> None:
    units = sharding(network(part))
    assert units.parameters == sum(p.numel() for p in network(part).parameters())
    assert units.outside / units.parameters < 0.06
    master = 16 * units.parameters  # float32 weight, gradient and AdamW's two moments
    for ranks in (8, 16, 64):
        assert units.bytes_per_rank(ranks, 16) == pytest.approx(master / ranks, rel=1e-4)
    assert units.largest < 0.1 * units.parameters


def test_flux_at_full_size_in_figures() -> None:
    units = sharding(network("flux.1-dev"))
    assert {name: len(sizes) for name, sizes in units.units.items()} == {
        "FluxTransformerBlock": 19,
        "FluxSingleTransformerBlock": 38,
    }
    assert units.bytes_per_rank(8, 16) / 1e9 == pytest.approx(23.80, abs=0.01)
