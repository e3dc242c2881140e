"""``generator.options`` as the adapters take it: the keys of a recipe, each adapter's own, to records."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from vipo.errors import UserError
from vipo.generators import GENERATORS, arguments, options
from vipo.generators.common import DiffusersGenerator
from vipo.generators.settings import COMMON, GUIDANCE, AdapterOptions, Guidance, read_options

USUAL = AdapterOptions(Guidance(4.5, negative_prompt=" ", in_one_pass=False), decode_batch_size=2)


def read(**given: Any) -> AdapterOptions:
    return read_options("Mine", USUAL, (*COMMON, "shift"), given)


def adapter(name: str) -> type[DiffusersGenerator]:
    module, attribute = GENERATORS[name].target.split(":")
    return getattr(import_module(module), attribute)


def test_what_is_not_given_is_the_adapters_usual() -> None:
    assert read() == USUAL
    assert read(guidance_scale=1, decode_batch_size=8) == AdapterOptions(
        Guidance(1.0, negative_prompt=" ", in_one_pass=False), decode_batch_size=8
    )
    with pytest.raises(FrozenInstanceError):
        read().guidance.scale = 1.0


def test_every_key_has_its_field() -> None:
    given = {"guidance_scale": 2.0, "negative_prompt": "grey", "guidance_in_one_pass": True}
    sizes = {"max_sequence_length": 64, "decode_batch_size": 3, "shift": 5.0}
    assert read(**given, **sizes) == AdapterOptions(Guidance(2.0, "grey", True), 64, 3, 5.0)
    assert read(max_sequence_length=None, shift=None) == USUAL
    assert set(GUIDANCE.values()) == {entry.name for entry in fields(Guidance)}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"guidance": 2}, r"Mine takes no option 'guidance'; it takes guidance_scale, negative_prompt, .*, shift"),
        ({"shift_steps": 4}, r"Mine takes no option 'shift_steps'"),
        ({"guidance_scale": "high"}, r"generator\.options\.guidance_scale: .*valid number.* \(given: 'high'\)"),
        ({"guidance_scale": float("nan")}, r"generator\.options\.guidance_scale: .*finite number"),
        ({"guidance_in_one_pass": "maybe"}, r"generator\.options\.guidance_in_one_pass: .*\(given: 'maybe'\)"),
        ({"negative_prompt": ["grey"]}, r"generator\.options\.negative_prompt: .*string.* \(given: \['grey'\]\)"),
        ({"decode_batch_size": 0}, r"generator\.options\.decode_batch_size: .*greater than 0 \(given: 0\)"),
        ({"max_sequence_length": 2.5}, r"generator\.options\.max_sequence_length: .*\(given: 2\.5\)"),
        ({"shift": 0}, r"generator\.options\.shift: .*\(given: 0\)"),
    ],
)
def test_what_does_not_fit_is_one_sentence(given: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told) as refused:
        read(**given)
    assert "\n" not in str(refused.value)


def test_it_is_told_before_the_weights_are_looked_for() -> None:
    load = adapter("flux").from_pretrained
    with pytest.raises(UserError, match="FluxGenerator takes no option 'negative_prompt'; it takes guidance_scale, m"):
        load("nowhere", device="cpu", dtype=torch.float32, height=24, width=40, negative_prompt="grey")


def test_a_recipes_arguments_are_the_constructors(model_folder: Path) -> None:
    from vipo.generators.flux import FluxGenerator

    given = arguments("flux", height=24, width=40, frames=1, given={"guidance_scale": 1.5, "decode_batch_size": 3})
    model = FluxGenerator.from_pretrained(model_folder, device="cpu", dtype=torch.float32, **given)
    assert model.options == AdapterOptions(Guidance(1.5), decode_batch_size=3) and model.guidance.scale == 1.5


@pytest.mark.parametrize("name", GENERATORS)
def test_every_adapter_takes_its_own_usual_options(name: str) -> None:
    """So what ``vipo`` lists as an adapter's options can be given, and what it takes by default is accepted."""
    own = adapter(name)
    assert options(name) == list(own.takes)
    flat = {key: getattr(own.usual.guidance, field) for key, field in GUIDANCE.items()}
    flat |= {entry.name: getattr(own.usual, entry.name) for entry in fields(AdapterOptions)}
    read = own.arguments({"height": 64, **{key: flat[key] for key in own.takes}})
    assert read == {"height": 64, "options": own.usual}


def test_the_published_defaults() -> None:
    scales = {name: adapter(name).usual.guidance.scale for name in GENERATORS}
    assert scales == {"flux": 3.5, "sd3": 4.5, "flux2": 4.0, "qwen_image": 4.0, "z_image": 5.0, "wan": 5.0}
    assert adapter("qwen_image").usual.guidance.negative_prompt == " "
    assert not adapter("wan").usual.guidance.in_one_pass and adapter("wan").usual.decode_batch_size == 1
