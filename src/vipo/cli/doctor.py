"""``vipo doctor``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from vipo.cli.arguments import Json
from vipo.cli.consoles import console, show

if TYPE_CHECKING:
    from vipo.doctor import Device, Findings

KERNELS = ("native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math", "flash", "_flash_3", "flex")
"""Why one of these cannot be trained with is told on a GPU; the others are not expected there."""


def doctor(
    offline: Annotated[bool, typer.Option("--offline", help="Do not ask whether the hub answers.")] = False,
    as_json: Json = False,
) -> None:
    """Say what this machine can run: devices, attention tried forwards and backwards, extras, the hub, disk.

    Example: `vipo doctor`
    """
    from rich.table import Table

    from vipo.doctor import advice, examine

    found = examine(offline=offline)
    told = advice(found)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _lines(found):
        table.add_row(name, value)
    show({**found.as_json(), "advice": told}, table, as_json=as_json)
    for line in () if as_json else told:
        console.print(f"- {line}", soft_wrap=True)


def _lines(found: Findings) -> Iterator[tuple[str, str]]:
    packages = found.environment["packages"]
    yield "python", f"{found.environment['python']} on {found.environment['system']}"
    yield "packages", ", ".join(f"{name} {version}" for name, version in packages.items())
    for device in found.devices:
        yield device.kind, f"{device.name}, {_size(device.free)} of {_size(device.memory)} free{_bf16(device)}"
        yield "  attention", _works(device)
        for name in KERNELS if device.kind.startswith("cuda") else ():
            if why := device.attention.get(name):
                yield "", f"not {name}: {why}"
    yield "processes", ", ".join(found.communication) or "this PyTorch cannot join processes"
    for extra in found.extras:
        wanted = f"lacks {', '.join(extra.missing)}: {extra.install}"
        yield f"vipo[{extra.name}]", "installed" if not extra.missing else wanted
    yield "hub", f"{found.hub}; cache {found.cache}"
    for place, free in found.disk_free.items():
        yield "disk", f"{_size(free)} free in {place}"


def _works(device: Device) -> str:
    """The backends that train here."""
    working = [name for name, why in device.attention.items() if not why]
    return f"{', '.join(working) or 'nothing'} can be trained with, in bfloat16"


def _bf16(device: Device) -> str:
    return "" if device.bf16 else ", no bfloat16"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
