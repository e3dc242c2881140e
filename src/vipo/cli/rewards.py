"""``vipo serve-reward`` and ``vipo convert-reward``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vipo.cli.consoles import console


def serve_reward(
    name: Annotated[str, typer.Argument(help="See `vipo list rewards`, or file.py:function.")],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="The reward's options and their values (docs/rewards.md)."),
    ] = None,
    host: Annotated[str, typer.Option(help="Anything but this machine needs --token-env.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8421,
    token_env: Annotated[str | None, typer.Option(help="Environment variable with the bearer token.")] = None,
    max_megabytes: Annotated[float, typer.Option(help="Longest request.")] = 256,
    device: Annotated[str | None, typer.Option(help="Default: the accelerator if there is one.")] = None,
) -> None:
    """Serve a reward to runs in other processes, which name it as the reward `remote` with `url`.

    Example: `vipo serve-reward jpeg_compressibility quality=90 --port 8421`
    """
    from vipo.recipe import apply_override

    parsed: dict[str, Any] = {}
    for option in options or []:
        apply_override(parsed, option)

    from vipo.rewards.server import serve

    serve(name, parsed, host=host, port=port, token_env=token_env, max_megabytes=max_megabytes, device=device)


def convert_reward(
    name: Annotated[str, typer.Argument(help="hpsv2.1, imagereward or aesthetic.")],
    source: Annotated[Path, typer.Argument(help="The published checkpoint.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
) -> None:
    """Turn a published pickle checkpoint into safetensors, once; code in it is never run.

    Example: `vipo convert-reward hpsv2.1 HPS_v2.1_compressed.pt hpsv2.1.safetensors`
    """
    from vipo.rewards import convert

    console.print(str(convert.convert_reward(name, source, target)), soft_wrap=True)
