"""Frozen weights in fewer bits: ``generator.quantization``, by the libraries that diffusers loads with.

Quantised are the linear layers inside a network's repeated blocks (the classes in its ``_no_split_modules``), which are
nearly all of it; its embedders, its last norm and its output keep ``generator.dtype``, norms and biases too. What is
computed, is computed in that dtype: a layer's weight is made whole for the moment of its product.

=============== ======================================================== =============
``nf4``         4-bit normal floats, a scale per 64 (arXiv 2305.14314)   bitsandbytes
``int8``        8-bit integers, a scale per output                       torchao
``float8``      e4m3 floats, a scale per output                          torchao
``float8_storage`` e4m3 floats without a scale, cast for each pass       none
=============== ======================================================== =============

Text encoders, which transformers loads, can be ``nf4`` or ``int8`` too (``generator.text_quantization``). A T5 casts
the input of its ``wo`` to whatever dtype that weight has: as ``nf4``, whose dtype is a storage's, it stays whole, and
so it does in float16, where its class keeps it in float32. torchao's tensors have the dtype that they stand for.

``float8_storage`` is diffusers' layerwise casting, which leaves what a class lists in
``_skip_layerwise_casting_patterns`` as it is: in FLUX all modulation, a quarter of its weights.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vipo.errors import UserError
from vipo.options import Quantization, TextQuantization
from vipo.pretrained import quiet

LIBRARIES: Mapping[str, str] = {"nf4": "bitsandbytes", "int8": "torchao", "float8": "torchao"}
STORED = torch.float8_e4m3fn
Loaded = tuple[nn.Module, Any]  # a network, and the report of what was found for it


def check(kind: Quantization, key: str = "quantization") -> None:
    """Look whether the library is there, before anything large is loaded.

    Raises:
        UserError: it is not.
    """
    library = LIBRARIES.get(kind)
    if library is not None and find_spec(library) is None:
        raise UserError(
            f"generator.{key}={kind} needs {library}, which is not installed: pip install 'vipo[{library}]'"
            " ('vipo[quantization]' has both libraries)"
            + ("; generator.quantization=float8_storage needs none" if key == "quantization" else "")
        )


def kept_in_float32(network: nn.Module, dtype: torch.dtype) -> set[str]:
    """Last names of the modules that stay float32 where a network is loaded in ``dtype``, as its class says.

    diffusers means always, transformers in float16 only, whose range they would leave.
    """
    listed = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    always = not type(network).__module__.startswith("transformers.")
    return listed if always or dtype == torch.float16 else set()


def layers(network: nn.Module, kind: Quantization, dtype: torch.dtype) -> list[str]:
    """The names of a network's linear layers in its repeated blocks, but for those that stay whole."""
    kept = kept_in_float32(network, torch.float16 if kind == "nf4" else dtype)
    kinds = set(getattr(network, "_no_split_modules", None) or ())
    blocks = [f"{name}." for name, module in network.named_modules() if type(module).__name__ in kinds]
    return [n for n in _linear(network) if n.startswith(tuple(blocks)) and not kept & set(n.split("."))]


def _linear(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]


def load(
    network: Any, place: Path, kind: Quantization, *, dtype: torch.dtype, device: str, read: Callable[..., Loaded]
) -> Loaded:
    """A diffusers network, quantised weight by weight while it is read, so that it is never whole in the memory.

    Args:
        network: its class.
        place: its folder.
        device: where it will work.
        read: its ``from_pretrained``, the folder given.

    Raises:
        RuntimeError: something else was quantised than should be.
    """
    if kind == "float8_storage":
        loaded, report = read()
        store_in_float8(loaded, dtype)
        return loaded, report
    with torch.device("meta"):
        empty = network.from_config(network.load_config(str(place)))
    wanted = layers(empty, kind, dtype)
    if kind == "nf4":
        loaded, report = _read_nf4(read, [n for n in _linear(empty) if n not in set(wanted)], dtype, device)
    else:
        loaded, report = _read_torchao(read, kind, wanted, device)
    _check_quantised(loaded, wanted, f"generator.quantization={kind}")
    return loaded, report


def load_text(
    network: Any, place: Path, kind: TextQuantization, *, dtype: torch.dtype, device: str, read: Callable[..., Loaded]
) -> Loaded:
    """A text encoder, quantised while transformers reads it; the arguments are those of :func:`load`.

    Raises:
        RuntimeError: something else was quantised than should be.
    """
    with torch.device("meta"):
        empty = network(network.config_class.from_pretrained(str(place)))
    wanted = layers(empty, kind, dtype)
    with quiet(LIBRARIES[kind]):
        config = _text_config(kind, wanted, [name for name in _linear(empty) if name not in set(wanted)], dtype)
        loaded, report = read(quantization_config=config, device_map={"": device})
        _quantise_rest(loaded, kind, wanted)
    _check_quantised(loaded, wanted, f"generator.text_quantization={kind}")
    _settle(loaded)
    return loaded, report


def _text_config(kind: TextQuantization, wanted: list[str], outside: list[str], dtype: torch.dtype) -> Any:
    """What transformers is to do; by itself it leaves out more, such as an encoder's last layer."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind == "int8":
        return TorchAoConfig(_by_name(kind, wanted), modules_to_not_convert=[])
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=outside
    )


def _quantise_rest(network: nn.Module, kind: TextQuantization, wanted: list[str]) -> None:
    """What transformers leaves out for being kept in float32, which in ``int8`` it is not."""
    rest = {name for name in wanted if not is_quantised(network.get_submodule(name))}
    if rest and kind == "int8":
        from torchao.quantization import quantize_

        quantize_(network, _torchao_config(kind), filter_fn=lambda _, name: name in rest)


def _check_quantised(network: nn.Module, wanted: list[str], said: str) -> None:
    if (found := [name for name, module in network.named_modules() if is_quantised(module)]) != wanted:
        odd = sorted(set(found) ^ set(wanted))[:3]
        raise RuntimeError(f"{said} did not quantise the layers that it should: {odd}")


def store_in_float8(network: Any, dtype: torch.dtype) -> None:
    """Keep weights in 8 bits between passes, but for those that the class leaves out; before a LoRA is put on."""
    network.enable_layerwise_casting(storage_dtype=STORED, compute_dtype=dtype)


def is_quantised(module: nn.Module) -> bool:
    """Whether it is a linear layer with fewer bits than its dtype says."""
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or weight is None:
        return False
    return weight.dtype is torch.uint8 or is_traceable_wrapper_subclass(weight)


def _read_nf4(read: Callable[..., Loaded], outside: list[str], dtype: torch.dtype, device: str) -> Loaded:
    from diffusers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    with _four_bit(outside, device), quiet("bitsandbytes"):
        loaded, report = read(quantization_config=config, device_map={"": device})
    _settle(loaded)
    return loaded, report


def _read_torchao(read: Callable[..., Loaded], kind: Quantization, wanted: list[str], device: str) -> Loaded:
    from diffusers import TorchAoConfig

    with quiet("torchao"):
        config = TorchAoConfig(_by_name(kind, wanted))
        # To diffusers a map to the CPU says that weights are offloaded, and these it does not quantise.
        there = {} if _is_cpu(device) else {"device_map": {"": device}}
        return read(quantization_config=config, **there)


def _by_name(kind: Quantization, wanted: list[str]) -> Any:
    """torchao's kind for the weights of the layers ``wanted``.

    By full name: "proj_out" would also be the one in every block. And a layer's own name would be its bias's too, which
    transformers then quantises and torchao cannot add.
    """
    from torchao.quantization import FqnToConfig

    return FqnToConfig(OrderedDict.fromkeys([f"{name}.weight" for name in wanted], _torchao_config(kind)))


def _torchao_config(kind: Quantization) -> Any:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig()


def _is_cpu(device: str) -> bool:
    return torch.device(device).type == "cpu"


@contextmanager
def _four_bit(outside: list[str], device: str) -> Iterator[None]:
    """Inside, diffusers leaves exactly the layers ``outside`` as they are, and quantises on a CPU too.

    What it is told to leave it looks up by last names as well, and "proj_out" is FLUX's output and a layer of every
    single block. And it asks for a GPU, though bitsandbytes needs none.
    """
    from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING as KNOWN

    usual: Any = KNOWN["bitsandbytes_4bit"]

    class ByName(usual):  # type: ignore[misc]
        def validate_environment(self, *args: Any, **options: Any) -> None:
            if not _is_cpu(device):
                super().validate_environment(*args, **options)

        def _process_model_before_weight_loading(self, model: nn.Module, **options: Any) -> None:
            kept = {name: model.get_submodule(name) for name in outside}
            super()._process_model_before_weight_loading(model, **options)
            for name, module in kept.items():
                model.set_submodule(name, module)

    KNOWN["bitsandbytes_4bit"] = ByName
    try:
        yield
    finally:
        KNOWN["bitsandbytes_4bit"] = usual


def _settle(network: Any) -> None:
    """Undo what stands in the way of training on the device where the weights are.

    PEFT's ``prepare_model_for_kbit_training`` is not called: a policy freezes and thaws by itself, and casting what is
    not quantised to float32 would part it from the rest where there is no autocast.
    """
    vars(network).pop(
        "hf_device_map", None
    )  # Accelerate compares it with its own device, by a number that a CPU does not have
    for module in network.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # packs weights for sampling, and has no backward from then on
