"""What this machine can run: devices, attention tried forwards and backwards, extras, the hub, disk."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from vipo.environment import environment
from vipo.files import nearest_folder
from vipo.generators import attention
from vipo.offline import hub_is_silent

FOR_DEVELOPERS = ("dev", "docs")


@dataclass(frozen=True)
class Device:
    """One that can be trained on. ``attention`` is each backend of diffusers in bfloat16: empty, or why not.

    Args:
        memory, free: bytes; of a CPU the machine's.
    """

    name: str
    kind: str
    memory: int
    free: int
    bf16: bool
    attention: Mapping[str, str]


@dataclass(frozen=True)
class Extra:
    """An optional part of the package, which of its needs are not installed, and the line that installs it."""

    name: str
    missing: tuple[str, ...]
    install: str


@dataclass(frozen=True)
class Findings:
    """Everything that was looked at."""

    environment: Mapping[str, Any]
    devices: tuple[Device, ...]
    communication: tuple[str, ...]
    extras: tuple[Extra, ...]
    hub: str
    cache: str
    disk_free: Mapping[str, int]  # folder -> bytes

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def examine(*, offline: bool = False) -> Findings:
    """Look at this machine; ``offline`` does not ask the hub. Nothing is downloaded or written."""
    from huggingface_hub.constants import HF_HUB_CACHE

    places = {str(nearest_folder(Path(folder))) for folder in (HF_HUB_CACHE, Path.cwd())}
    return Findings(
        environment(),
        tuple(_devices()),
        tuple(_communication()),
        tuple(extras()),
        "not asked" if offline else hub(),
        HF_HUB_CACHE,
        {place: shutil.disk_usage(place).free for place in sorted(places)},
    )


def _devices() -> list[Device]:
    gpus = [_gpu(index) for index in range(torch.cuda.device_count())]
    if gpus or not torch.backends.mps.is_available():
        return gpus or [_cpu()]
    tried = attention.survey(torch.device("mps"), torch.bfloat16)
    total, free = _memory()
    return [Device("Apple GPU", "mps", total, free, True, tried)]


def _gpu(index: int) -> Device:
    free, total = torch.cuda.mem_get_info(index)
    with torch.cuda.device(index):
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    tried = attention.survey(torch.device("cuda", index), torch.bfloat16)
    return Device(torch.cuda.get_device_name(index), f"cuda:{index}", total, free, bf16, tried)


def _cpu() -> Device:
    total, free = _memory()
    tried = attention.survey(torch.device("cpu"), torch.bfloat16)
    return Device(f"{torch.get_num_threads()} threads", "cpu", total, free, True, tried)


def _memory() -> tuple[int, int]:
    """Bytes of the machine's memory, and how many are free."""
    import psutil  # type: ignore[import-untyped]

    found = psutil.virtual_memory()
    return int(found.total), int(found.available)


def _communication() -> list[str]:
    """Backends of torch.distributed that this build has."""
    if not torch.distributed.is_available():
        return []
    known = {"nccl": torch.distributed.is_nccl_available(), "gloo": torch.distributed.is_gloo_available()}
    return [name for name, there in known.items() if there]


def extras() -> list[Extra]:
    """The extras of the installed package, but those for its developers."""
    wanted: dict[str, list[Requirement]] = {}
    for line in requires("vipo") or []:
        need = Requirement(line)
        for part in str(need.marker or "").split("extra == ")[1:]:
            wanted.setdefault(part.strip("\"') "), []).append(need)
    names = sorted(set(wanted) - set(FOR_DEVELOPERS))
    missing = {name: tuple(sorted(filter(None, map(_lack, wanted[name])))) for name in names}
    return [Extra(name, lacking, f"pip install 'vipo[{name}]'") for name, lacking in missing.items()]


def _lack(need: Requirement) -> str:
    """The package where it is not installed, with the version it should have where it has another; else empty."""
    try:
        there = version(need.name)
    except PackageNotFoundError:
        return need.name
    fits = need.specifier.contains(there, prereleases=True)
    return "" if fits else f"{need.name}{need.specifier} (here is {there})"


def hub() -> str:
    """Whether the hub answers, in words."""
    from huggingface_hub import constants, get_token

    if (silent := hub_is_silent()) is not None:
        return silent
    token = "with a token" if get_token() else "without a token: gated models need `hf auth login`"
    return f"{constants.ENDPOINT} answers, {token}"


def advice(found: Findings) -> list[str]:
    """What is wrong or missing, and what to do about it."""
    told = []
    for device in found.devices:
        if device.attention.get("native"):
            told.append(
                f"{device.kind}: PyTorch's own attention fails ({device.attention['native']}); set generator.attention"
                f" to {attention.EXACT}"
            )
        if device.kind.startswith("cuda") and not device.bf16:
            told.append(f"{device.kind}: {device.name} has no bfloat16; set training.precision=no")
    if all(device.kind == "cpu" for device in found.devices):
        told.append("no GPU: the quickstarts run here; for a full-size recipe `vipo plan RECIPE` says what it needs")
    if len(found.devices) > 1 and "nccl" not in found.communication:
        told.append("this PyTorch has no NCCL: training on several GPUs needs a build that has it")
    if "does not answer" in found.hub:
        told.append(
            "the hub cannot be reached: HF_HUB_OFFLINE=1 saves asking it, and `vipo fetch RECIPE` says what is here"
        )
    return told
