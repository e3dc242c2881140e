"""What is trained: a LoRA or the full weights, in float32; the reference policy; a moving average; export.

Weights are read from the live network whenever they are asked for: an engine may replace every parameter by a shard of
it (FSDP2 does), and what was kept from before would be a network that nobody trains.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vipo.errors import UserError
from vipo.sharding import is_whole, local, own_part, settle, shape_of, spread_like, stored, whole
from vipo.types import Generator, LoraLayer

if TYPE_CHECKING:  # only a LoRA needs PEFT, which takes seconds to import
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer


ADAPTER = "default"
CHECKED_AT_ONCE = 1 << 20  # elements
PROBED = 64  # elements of each trained tensor


class Policy:
    """The trainable weights of a network, its reference, and their moving average.

    Build one with :meth:`lora`, :meth:`lora_from` or :meth:`full`, and call :meth:`begin` once the network is as it
    will be trained. Trainable weights are float32 whatever the rest is. What goes in and out of a policy is whole, also
    where its parameters are shards; every process then has to ask.

    The reference is the policy as it was before training. A new LoRA adds nothing yet, so it is the network without it;
    every other start is kept as a copy, unless it is never asked for (``keep_reference``).
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        is_lora: bool,
        is_new: bool = True,
        ema_decay: float | None = None,
        keep_reference: bool = True,
    ) -> None:
        self.network = network
        self.is_lora = is_lora
        self.ema_decay = ema_decay
        self.starts_without = is_lora and is_new
        self.keep_reference = keep_reference and not self.starts_without
        self.ema: dict[str, Tensor] = {}
        self.base: dict[str, Tensor] = {}
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    @classmethod
    def lora(
        cls, network: nn.Module, *, rank: int, alpha: float, targets: str, seed: int, ema_decay: float | None = None
    ) -> Policy:
        """Low-rank updates on every linear layer whose name fully matches the regular expression ``targets``.

        Raises:
            UserError: no linear layer matches, or ``targets`` is no regular expression.
        """
        from peft import LoraConfig

        try:
            wanted = re.compile(targets)
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"LoRA targets {targets!r} is no regular expression: {error}") from error
        linear = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
        chosen = [name for name in linear if wanted.fullmatch(name)]
        if not chosen:
            raise UserError(
                f"LoRA targets {targets!r} match none of the {len(linear)} linear layers, e.g. {list(linear)[:3]}"
            )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            _inject(network, LoraConfig(r=rank, lora_alpha=alpha, target_modules=chosen), chosen)
            if any(linear[name].weight.dtype is torch.float8_e4m3fn for name in chosen):
                for layer in _adapters(network).values():  # PEFT has rounded what it drew, to 3 bits
                    layer.lora_A.float()
                    layer.lora_B.float()
                    layer.reset_lora_parameters(ADAPTER, True)
        return cls(network, is_lora=True, ema_decay=ema_decay)

    @classmethod
    def lora_from(
        cls,
        network: nn.Module,
        layers: Mapping[str, LoraLayer],
        *,
        alpha: float | None = None,
        ema_decay: float | None = None,
        keep_reference: bool = True,
    ) -> Policy:
        """A LoRA that exists already, to be trained on.

        Args:
            layers: by the network's names for them; each keeps its rank.
            alpha: None leaves each layer its own. Another one changes how fast the layers learn and not what they add:
                B is scaled so that alpha / rank * B A stays the same.
        """
        from peft import LoraConfig

        ranks = {f"^{re.escape(name)}": layer.rank for name, layer in layers.items()}
        names = "|".join(re.escape(name) for name in layers)  # whole names: in a list, ends of names count too
        _inject(network, LoraConfig(r=1, lora_alpha=1, rank_pattern=ranks, target_modules=names), layers)
        for name, adapter in _adapters(network).items():
            _fill(adapter, layers[name], layers[name].scale if alpha is None else alpha / layers[name].rank)
        return cls(network, is_lora=True, is_new=False, ema_decay=ema_decay, keep_reference=keep_reference)

    @classmethod
    def full(cls, network: nn.Module, *, ema_decay: float | None = None, keep_reference: bool = True) -> Policy:
        """Every weight is trained; the reference policy is a second copy of them, unless it is never asked for."""
        network.requires_grad_(True)
        return cls(network, is_lora=False, ema_decay=ema_decay, keep_reference=keep_reference)

    def begin(self) -> Policy:
        """Keep the copies that the present weights are the start of: the reference, and the moving average."""
        self.base = self._copied() if self.keep_reference else {}
        self.ema = self._copied() if self.ema_decay is not None else {}
        return self

    def _copied(self) -> dict[str, Tensor]:
        """This process's parts of the trained weights, by name."""
        return {name: own_part(parameter).clone() for name, parameter in self.parameters.items()}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters as they are now, by name."""
        settle(self.network)
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the network is what it was before post-training.

        Raises:
            ValueError: weights whose start was not kept.
        """
        if not self.starts_without:
            if not self.base:
                raise ValueError("no copy of the first weights was kept: keep_reference=True and begin() keep one")
            with self._swapped(self.base):
                yield
            return
        layers = _adapters(self.network).values()
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the network has the moving average's weights, if one is kept."""
        with self._swapped(self.ema):
            yield

    @contextmanager
    def _swapped(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        kept = self._copied() if weights else {}
        self._write(weights)
        try:
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, parts: Mapping[str, Tensor]) -> None:
        live = self.parameters
        for name, part in parts.items():
            own_part(live[name]).copy_(part)

    @torch.no_grad()
    def update_average(self) -> None:
        """ema <- decay * ema + (1 - decay) * weights; call once per optimiser step."""
        live = self.parameters if self.ema else {}
        for name, average in self.ema.items():
            assert self.ema_decay is not None
            average.lerp_(own_part(live[name]), 1 - self.ema_decay)

    @torch.no_grad()
    def fingerprint(self) -> tuple[int, ...]:
        """Numbers for the bits of all trained tensors, or of this process's parts: other weights give others."""
        return tuple(torch.cat([_checksums(local(parameter)) for parameter in self.parameters.values()]).tolist())

    @torch.no_grad()
    def probe(self) -> Float[Tensor, " K"]:
        """A copy of a few elements of each trained tensor, or of this process's parts, evenly spread over it."""
        flat = (local(parameter).detach().flatten() for parameter in self.parameters.values())
        return torch.cat([values[:: max(1, len(values) // PROBED)][:PROBED] for values in flat])

    @torch.no_grad()
    def gradient_peaks(self) -> dict[str, Tensor]:
        """The largest absolute value of each gradient, or of this process's part, by name; NaN if one is in there."""
        found = {name: local(p.grad) for name, p in self.parameters.items() if p.grad is not None}
        held = {name: gradient for name, gradient in found.items() if gradient.numel()}  # a process may hold no part
        peaks = dict(zip(held, torch._foreach_norm(list(held.values()), math.inf), strict=True)) if held else {}
        return {name: peaks.get(name, gradient.new_zeros(())) for name, gradient in found.items()}

    def state(self) -> dict[str, Tensor]:
        """The trained weights by name, whole."""
        return {name: whole(parameter).detach() for name, parameter in self.parameters.items()}

    def averages(self) -> dict[str, Tensor]:
        """The moving average by name, whole; empty if none is kept."""
        live = self.parameters if self.ema else {}
        return {name: whole(average, live[name]) for name, average in self.ema.items()}

    def stored(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The trained weights and their moving average as a checkpoint takes them: tensors in use, or cut in rows."""
        live = self.parameters
        weights = {name: stored(parameter, parameter) for name, parameter in live.items()}
        return weights, {name: stored(average, live[name]) for name, average in self.ema.items()}

    def load(self, weights: Mapping[str, Tensor], ema: Mapping[str, Tensor] | None = None) -> None:
        """Put trained weights back.

        Raises:
            UserError: the names or shapes are not those of this policy.
        """
        live = self.parameters
        ours = {name: shape_of(p) for name, p in live.items()}
        theirs = {name: tuple(w.shape) for name, w in weights.items()}
        if ours != theirs:
            odd = sorted(ours.items() ^ theirs.items())[:3]
            raise UserError(f"these weights do not fit this policy (was the recipe changed?); they differ in {odd}")
        self._write({name: spread_like(value, live[name]) for name, value in weights.items()})
        for name, value in (ema or {}).items():
            self.ema[name].copy_(spread_like(value, live[name]))

    def export(self, generator: Generator, folder: Path | None, *, dtype: torch.dtype | None = None) -> None:
        """Write the (averaged) weights so that plain diffusers loads them.

        Args:
            folder: None on a process that only helps to put sharded weights together.
            dtype: of the written weights; None writes them as they are, what is trained in float32.

        Raises:
            UserError: a weight is too large for ``dtype``.
        """
        with self.averaged():
            weights = self._lora_layers() if self.is_lora else self._all_weights(keep=folder is not None)
            if folder is None:
                return
            weights = weights if dtype is None else {name: _cast(name, value, dtype) for name, value in weights.items()}
            folder.mkdir(parents=True, exist_ok=True)
            if self.is_lora:
                generator.save_lora(folder, weights)
            else:
                generator.save_pretrained(folder, weights)

    def _all_weights(self, *, keep: bool) -> dict[str, Tensor]:
        """Every tensor of the network, whole one after the other; without ``keep`` only to help the process that does.

        What is put together goes to the CPU: the accelerator has room for parts.
        """
        settle(self.network)
        found = {}
        for name, tensor in self.network.state_dict(keep_vars=True).items():
            value = whole(tensor).detach()
            if keep:
                found[name] = value if is_whole(tensor) else value.cpu()
        return found

    def _lora_layers(self) -> dict[str, Tensor]:
        """LoRA layers with alpha / rank folded into B, because a loader that is told no alpha takes a scale of 1."""
        from peft import get_peft_model_state_dict

        scales = {f"{name}.lora_B.weight": layer.scaling[ADAPTER] for name, layer in _adapters(self.network).items()}
        held = get_peft_model_state_dict(self.network, self.network.state_dict(keep_vars=True))
        layers = {name: whole(value).detach() for name, value in held.items()}
        return {name: value * scales.get(name, 1.0) for name, value in layers.items()}


def _cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in another type; what holds no fractions stays as it is."""
    if not value.is_floating_point():
        return value
    found = value.to(dtype)
    if bool((value.isfinite() & ~found.isfinite()).any()):
        kind = str(dtype).removeprefix("torch.")
        raise UserError(f"{name} has numbers that are too large for {kind}; export it as bfloat16 or float32")
    return found


def _checksums(values: Tensor) -> Tensor:
    """Sums of float32 bits, each times the odd number of its place, modulo 2^64; one for a part, to save memory."""
    parts = values.detach().flatten().view(torch.int32).split(CHECKED_AT_ONCE)
    odd = 2 * torch.arange(len(parts[0]), device=values.device) + 1
    return torch.stack([(part * odd[: len(part)]).sum() for part in parts])


def _inject(network: nn.Module, config: LoraConfig, names: Iterable[str]) -> None:
    """Put adapters on the layers of these names, in float32 like what they are trained in."""
    from peft import inject_adapter_in_model

    from vipo.low_rank import LowRank

    if all(_is_plain(network.get_submodule(name)) for name in names):  # PEFT has layers of its own for quantised ones
        config._register_custom_module({nn.Linear: LowRank})
    inject_adapter_in_model(config, network)


def _is_plain(layer: nn.Module) -> bool:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and layer.weight.dtype in dtypes


@torch.no_grad()
def _fill(adapter: Any, layer: LoraLayer, scale: float) -> None:
    """Give an adapter a layer's weights, and another scale than the layer's only with another B."""
    adapter.scaling[ADAPTER] = scale
    up = layer.up if scale == layer.scale else layer.up.float() * (layer.scale / scale)
    for half, value in ((adapter.lora_A, layer.down), (adapter.lora_B, up)):
        weight = half[ADAPTER].weight
        weight.data = weight.data.float().copy_(value.reshape(weight.shape))


def _adapters(network: nn.Module) -> dict[str, BaseTunerLayer]:
    """The layers that carry a LoRA, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}
