"""What ``generator.options`` of a recipe says, as adapters take it: two frozen records, made in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from vipo import registry
from vipo.errors import UserError
from vipo.options import Count, Options, Shift, Steps, said

Scale = Annotated[float, Field(allow_inf_nan=False)]

# The keys of a recipe that are fields of Guidance; all others are fields of AdapterOptions by the same name.
GUIDANCE: Mapping[str, str] = {
    "guidance_scale": "scale",
    "negative_prompt": "negative_prompt",
    "guidance_in_one_pass": "in_one_pass",
}
COMMON = (*GUIDANCE, "max_sequence_length", "decode_batch_size")  # what adapters take unless they say otherwise


@dataclass(frozen=True)
class Guidance(Options):
    """How far a velocity is led, and away from what; which scale is off is the adapter's to say."""

    scale: Annotated[Scale, said("how far, as the family's own pipeline counts it")]
    negative_prompt: Annotated[str, said("what guidance leads away from")] = ""
    in_one_pass: Annotated[bool, said("both halves in one call of the network; false halves the memory")] = True


@dataclass(frozen=True)
class AdapterOptions(Options):
    """All that an adapter is told beside its pipeline and the size of its media."""

    guidance: Guidance
    max_sequence_length: Annotated[Count | None, said("tokens of a prompt; null takes what the model was made for")] = (
        None
    )
    decode_batch_size: Annotated[Count, said("samples decoded at once")] = 16
    shift: Annotated[Shift | None, said("of the time schedule; null takes the scheduler's")] = None
    shift_steps: Annotated[Steps | None, said("solver steps that a fitted shift is for; null takes the model's")] = None


def read_options(adapter: str, usual: AdapterOptions, taken: Sequence[str], given: Mapping[str, Any]) -> AdapterOptions:
    """What is ``usual`` for an adapter, changed by what is ``given``, by the keys of a recipe.

    Raises:
        UserError: the adapter does not take a key, or a value does not fit it.
    """
    registry.check_options(adapter, given, taken)
    changes = {key: value for key, value in given.items() if key not in GUIDANCE}
    guidance = {GUIDANCE[key]: value for key, value in given.items() if key in GUIDANCE}
    whole = asdict(usual)
    try:
        return TypeAdapter(AdapterOptions).validate_python(
            {**whole, **changes, "guidance": {**whole["guidance"], **guidance}}
        )
    except ValidationError as error:
        raise UserError("; ".join(_explain(problem) for problem in error.errors())) from error


def _explain(problem: Any) -> str:
    name = problem["loc"][1] if problem["loc"][0] == "guidance" else problem["loc"][0]
    key = next((key for key, field in GUIDANCE.items() if field == name), name)
    return f"generator.options.{key}: {problem['msg']} (given: {problem['input']!r})"
