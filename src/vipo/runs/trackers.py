"""The tools that can show a run while it goes on, each behind the same few words; Accelerate's trackers do the sending.

A step is the number of iterations done before: an evaluation stands beside the iteration that comes after it.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from vipo.engine import open_tracker
from vipo.errors import UserError
from vipo.files import write_text
from vipo.media.clips import Clip, save_gif
from vipo.options import TrackerName
from vipo.registry import check_options, load, parameters
from vipo.threads import started

PROJECT = "vipo"  # what runs are gathered under unless the recipe says otherwise
BOARD = "tensorboard"
RECORD = "tracking.json"
LONGEST_ID = 21  # characters; SwanLab takes no more


@dataclass(frozen=True)
class Whose:
    """Which run is followed: what a tool calls it, where its folder is, from which iteration on it is written."""

    name: str
    root: Path
    iteration: int

    @property
    def id(self) -> str:
        """The run's own among the tools' runs; kept in its folder, so that a resume goes on where it was."""
        record = self.root / RECORD
        if not record.exists():
            write_text(record, json.dumps({"id": uuid.uuid4().hex[:LONGEST_ID]}) + "\n")
        return str(json.loads(record.read_text(encoding="utf-8"))["id"])


@runtime_checkable
class Tracker(Protocol):
    """One tool, following one run. Each call may raise whatever the tool does."""

    def recipe(self, settings: Mapping[str, Any], text: str) -> None:
        """What was run, as nested plain values and as YAML."""

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def pictures(self, key: str, pictures: Sequence[Image.Image], captions: Sequence[str], step: int) -> None:
        """Pictures of one size, each with its caption where the tool has any."""

    def clips(self, key: str, clips: Sequence[Clip], captions: Sequence[str], fps: float, step: int) -> None:
        """Clips that play."""

    def events(self, text: str, step: int) -> None:
        """What fired in an iteration, a line each."""

    def close(self) -> None:
        """Send what is left; may wait for a network."""


class Board:
    """TensorBoard: files in the run's folder. It has no captions."""

    def __init__(self, whose: Whose, options: Mapping[str, Any]) -> None:
        self.tracker = open_tracker(BOARD, BOARD, whose.root, {"purge_step": whose.iteration, **options})
        self.at = whose.iteration

    def recipe(self, settings: Mapping[str, Any], text: str) -> None:  # noqa: ARG002 - its table of settings is a file
        self.tracker.log({"recipe": _verbatim(text)}, step=self.at)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.tracker.log(dict(values), step=step)

    def pictures(self, key: str, pictures: Sequence[Image.Image], captions: Sequence[str], step: int) -> None:  # noqa: ARG002
        rows = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
        self.tracker.log_images({key: rows}, step=step, dataformats="NHWC")

    def clips(self, key: str, clips: Sequence[Clip], captions: Sequence[str], fps: float, step: int) -> None:  # noqa: ARG002
        """Its own ``add_video`` would need moviepy; what it writes is a GIF in the place of a picture."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        for number, clip in enumerate(clips):
            buffer = BytesIO()
            save_gif(buffer, clip, fps)
            width, height = clip[0].size
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=buffer.getvalue())
            summary = Summary(value=[Summary.Value(tag=f"{key}/{number}", image=image)])
            self.tracker.tracker.file_writer.add_summary(summary, step)

    def events(self, text: str, step: int) -> None:
        self.tracker.log({"events": _verbatim(text)}, step=step)

    def close(self) -> None:
        self.tracker.finish()


class Service:
    """A tool with ``init``, ``Image`` and ``Video`` of its own, as Weights & Biases has set the fashion."""

    kind: TrackerName

    def __init__(self, whose: Whose, options: Mapping[str, Any]) -> None:
        given = {"project": PROJECT, **self.begins(whose), **options}
        self.tool = import_module(self.kind)
        self.tracker = self.opened(given.pop("project"), whose.root, given)

    def opened(self, project: str, root: Path, options: Mapping[str, Any]) -> Any:
        return open_tracker(self.kind, project, root, options)

    @staticmethod
    def begins(whose: Whose) -> dict[str, Any]:
        """Options by which its ``init`` finds the run of before a resume."""
        raise NotImplementedError

    def recipe(self, settings: Mapping[str, Any], text: str) -> None:  # noqa: ARG002 - it shows the values as a table
        self.tracker.store_init_configuration(dict(settings))

    def scalars(self, values: Mapping[str, Any], step: int) -> None:
        self.tracker.log(dict(values), step=step)

    def media(self, key: str, shown: list[Any], step: int) -> None:
        self.scalars({key: shown}, step)

    def pictures(self, key: str, pictures: Sequence[Image.Image], captions: Sequence[str], step: int) -> None:
        shown = [self.tool.Image(one, caption=text) for one, text in zip(pictures, captions, strict=True)]
        self.media(key, shown, step)

    def clips(self, key: str, clips: Sequence[Clip], captions: Sequence[str], fps: float, step: int) -> None:
        """As GIF files, the one format that all of them take without an encoder; they copy a file when it is logged."""
        with TemporaryDirectory() as folder:
            files = [Path(folder) / f"{number}.gif" for number in range(len(clips))]
            for file, clip in zip(files, clips, strict=True):
                save_gif(file, clip, fps)
            shown = [self.tool.Video(str(file), caption=text) for file, text in zip(files, captions, strict=True)]
            self.media(key, shown, step)

    def events(self, text: str, step: int) -> None:
        self.tracker.tracker.alert(title=f"iteration {step}", text=text)

    def close(self) -> None:
        self.tracker.finish()


class Trackio(Service):
    """Local files first (``trackio show``), a Space or server where its environment variables say so."""

    kind = "trackio"

    @staticmethod
    def begins(whose: Whose) -> dict[str, Any]:
        return {"name": f"{whose.name}-{whose.id[:8]}", "resume": "allow"}  # it knows runs by their names

    def media(self, key: str, shown: list[Any], step: int) -> None:
        """It takes one thing under one name; of a list it would keep nothing."""
        self.scalars({f"{key}/{number}": one for number, one in enumerate(shown)}, step)


class Wandb(Service):
    """Weights & Biases. Its own steps only grow, and after a resume iterations come again: so they are a metric."""

    kind = "wandb"

    def __init__(self, whose: Whose, options: Mapping[str, Any]) -> None:
        super().__init__(whose, options)
        self.tracker.tracker.define_metric("*", step_metric="iteration")

    @staticmethod
    def begins(whose: Whose) -> dict[str, Any]:
        return {"name": whose.name, "id": whose.id, "resume": "allow", "dir": str(whose.root)}

    def scalars(self, values: Mapping[str, Any], step: int) -> None:
        self.tracker.log({**values, "iteration": step})


class Swanlab(Service):
    """SwanLab. Of a step that comes again after a resume it keeps the first value."""

    kind = "swanlab"

    def opened(self, project: str, root: Path, options: Mapping[str, Any]) -> Any:
        """On a thread: from the main one it would take Ctrl-C for itself, and could be closed from there only."""
        return started(partial(super().opened, project, root, options), self.kind).result()

    @staticmethod
    def begins(whose: Whose) -> dict[str, Any]:
        return {"name": whose.name, "id": whose.id, "resume": "allow", "log_dir": str(whose.root / "swanlog")}

    def events(self, text: str, step: int) -> None:
        self.scalars({"events": self.tool.Text(text)}, step)


TRACKERS: Mapping[TrackerName, type[Board] | type[Service]] = {
    "tensorboard": Board,
    "trackio": Trackio,
    "wandb": Wandb,
    "swanlab": Swanlab,
}


def check_trackers(tracking: Mapping[TrackerName, Mapping[str, Any]]) -> None:
    """Refuse a tool that is not installed, or an option that its ``init`` does not take.

    Raises:
        UserError: that.
    """
    for name, options in tracking.items():
        if name != BOARD and find_spec(name) is None:
            raise UserError(
                f"tracking names {name}, which is not installed: pip install 'vipo[{name}]', or take it out of tracking"
            )
        if options:  # otherwise the import can wait
            start = "torch.utils.tensorboard:SummaryWriter" if name == BOARD else f"{name}:init"
            taken = parameters(load(start))
            taken.pop("log_dir" if name == BOARD else "config", None)  # which folder, and what was run, the run says
            check_options(f"tracker {name!r}", options, taken)


def _verbatim(text: str) -> str:
    """As Markdown shows it unchanged."""
    return "\n".join(f"    {line}" for line in text.splitlines())
