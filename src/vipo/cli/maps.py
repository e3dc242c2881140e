"""``vipo maps``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vipo.cli.consoles import console
from vipo.errors import UserError


def maps(
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="PNG, JPEG, WebP, GIF, TIFF; mp4 with vipo[video]. With --ui also a run's folder."),
    ] = None,
    backbone: Annotated[str, typer.Option(help="See `vipo list backbones`.")] = "efficientnet_lite",
    output: Annotated[Path, typer.Option(help="Folder for the sheets.")] = Path("maps"),
    components: Annotated[int, typer.Option(min=1, help="Principal components.")] = 3,
    aggregation: Annotated[str, typer.Option(help="variance, average or first.")] = "variance",
    orientation: Annotated[str | None, typer.Option(help="See docs/orientation.md.")] = None,
    smoothing_sigma: Annotated[float, typer.Option(min=0, help="In feature cells; 0 is off.")] = 1.0,
    pretrained: Annotated[str | None, typer.Option(help="Weights for dinov2, resnet or sam: hub id or folder.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Input side for the backbone, in pixels.")] = None,
    temporal_stride: Annotated[int, typer.Option(min=1, help="Pixel frames per latent frame, for clips.")] = 1,
    scope: Annotated[str, typer.Option(help="frame or clip: one basis per frame, or for all frames.")] = "frame",
    ui: Annotated[
        bool, typer.Option("--ui", help="Explore in the browser, pictures and runs (needs vipo[ui]).")
    ] = False,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Of --ui; 0, the default, takes a free one.")
    ] = None,
) -> None:
    """Show what the allocation map sees in pictures or clips of yours.

    A picture is seen as a viewer shows it: turned as its EXIF says, 16 bits in full; what is transparent is white. At
    most 67108864 pixels (8192 x 8192, over all frames) of a file are read.

    Example: `vipo maps photo.jpg clip.gif --output maps`

    Example: `vipo maps --ui photo.jpg runs/quickstart`
    """
    how: dict[str, Any] = {
        "components": components,
        "aggregation": aggregation,
        "orientation": orientation,
        "smoothing_sigma": smoothing_sigma,
        "scope": scope,
    }
    seen_by = _given({"pretrained": pretrained, "resolution": resolution})
    if ui:
        chosen = {"backbone": backbone, "backbone_options": seen_by, **_given(how)}
        _explore(files or [], chosen, temporal_stride, output, port or 0)
        return
    if port is not None:
        raise UserError("--port is of the page that --ui serves; add --ui, or leave it out")
    if not files:
        raise UserError("vipo maps needs pictures or clips: name some, or add --ui to choose them in the browser")
    from vipo.cli.show_maps import show_maps

    for path in show_maps(
        files, output, backbone=backbone, backbone_options=seen_by, temporal_stride=temporal_stride, **_given(how)
    ):
        console.print(str(path), soft_wrap=True)


def _explore(named: list[Path], chosen: dict[str, Any], temporal_stride: int, output: Path, port: int) -> None:
    from vipo.explorer.serve import serve
    from vipo.explorer.settings import settings_of
    from vipo.explorer.start import opening_of

    opening = opening_of(named, settings_of(chosen, temporal_stride), output)
    serve(opening, port, lambda at: console.print(f"{at} Ctrl-C ends it", highlight=False, soft_wrap=True))


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}
