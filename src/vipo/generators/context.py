"""One sample over several processes, each with its part of the tokens: ``training.context_parallel``.

diffusers does it (``enable_parallelism``): hooks cut a network's input where its class says so (``_cp_plan``) and
gather its output, so that every process of a team has the whole velocity; inside, the processes' attention exchanges
parts of all heads (ulysses) or keys and values (ring). Each process's gradient is that of its own tokens; whoever
trains has to sum them over the team.

Not here are diffusers' ``ulysses_anything`` and ``ring_anything``, which take any length: they have no backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vipo.errors import UserError
from vipo.generators.attention import AUTO, is_inference_only, processors
from vipo.options import ContextExchange
from vipo.pretrained import quiet

WITHOUT_SUMS = (
    "native"  # the backend that does not hand out its softmax's normaliser, which ring puts parts together by
)


def check(
    network: nn.Module, degree: int, exchange: ContextExchange, *, masked: bool = False, attention: str = AUTO
) -> None:
    """Whether a network can be shared by so many processes.

    Args:
        masked: whether its prompts are of any length and hidden by masks.
        attention: the backend that it is to have, for one that has none yet; ``auto`` is what it has.

    Raises:
        UserError: its class has no plan for it, its heads cannot be dealt, its attention or its masks do not allow it.
    """
    name, said = type(network).__name__, f"training.context_parallel={degree}"
    if getattr(network, "_cp_plan", None) is None or not hasattr(network, "enable_parallelism"):
        raise UserError(f"{said}: {name} has no plan (_cp_plan) for cutting its tokens; take 1")
    if masked:
        raise UserError(f"{said}: the prompts of {name} have any length, so their tokens cannot be cut evenly; take 1")
    heads = network.config.get("num_attention_heads")  # type: ignore[operator, union-attr]
    if exchange == "ulysses" and heads is not None and heads % degree:
        raise UserError(
            f"{said}: ulysses deals attention heads, and {name} has {heads}; take a divisor of that, or"
            " training.context_exchange=ring"
        )
    _check_backend(network, said, exchange, attention)


def _check_backend(network: nn.Module, said: str, exchange: ContextExchange, attention: str) -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    default = _AttentionBackendRegistry.get_active_backend()[0]
    own = [getattr(processor, "_attention_backend", None) for processor in processors(network)]
    used = {str(AttentionBackendName(one or default).value) for one in own} if attention == AUTO else {attention}
    able = {name for name in _AttentionBackendRegistry._supports_context_parallel if not is_inference_only(name)}
    if exchange == "ring":
        able.discard(WITHOUT_SUMS)
    if unable := sorted(used - able):
        named = "auto, or one of " if WITHOUT_SUMS in able else ""
        raise UserError(
            f"{said} with training.context_exchange={exchange} cannot be had with diffusers' attention backend"
            f" {unable[0]!r}; set generator.attention to {named}{', '.join(sorted(able))}"
        )


def install(network: nn.Module, mesh: Any, exchange: ContextExchange) -> None:
    """Share every pass of a network, which :func:`check` has let through, with adapters on it, before it is wrapped.

    Args:
        mesh: processes as (team, ring, ulysses), as :meth:`vipo.engine.Engine.context_mesh` gives them.

    Raises:
        UserError: there is no accelerator, which diffusers asks for.
    """
    from diffusers import ContextParallelConfig

    degree = mesh["ring"].size() * mesh["ulysses"].size()
    if torch.accelerator.device_count() == 0:
        raise UserError(
            f"training.context_parallel={degree} cannot be had on a CPU: diffusers shares samples over accelerators"
            " only; take 1"
        )
    degrees = {"ring_degree": degree} if exchange == "ring" else {"ulysses_degree": degree}
    with quiet("diffusers"):  # it says that this is experimental
        network.enable_parallelism(config=ContextParallelConfig(mesh=mesh, **degrees))  # type: ignore[operator]
    network.forward = _in_words(network.forward, degree)


def _in_words(forward: Callable[..., Any], degree: int) -> Callable[..., Any]:
    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        except AssertionError as error:
            if "divisible by mesh size" not in str(error):
                raise
            raise UserError(
                f"training.context_parallel={degree} cannot cut the tokens of a sample, or of its prompt, into so many"
                " equal parts; change generator.height, width or frames, or generator.options.max_sequence_length, or"
                " take another number"
            ) from error

    return call


@torch.no_grad()
def try_out(generator: Any) -> None:
    """One pass about nothing, where the generator can say what nothing is, so that a wrong size is told at once.

    Raises:
        UserError: its tokens cannot be cut.
    """
    if not hasattr(generator, "predict") or not hasattr(generator, "reader"):
        return
    device = generator.device
    latents = torch.zeros(1, *generator.latent_shape(), device=device)
    generator.predict(latents, torch.full((1,), 0.5, device=device), generator.reader.blank(1))
