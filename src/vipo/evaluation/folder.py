"""The folder that an evaluation writes and goes on from.

``settings.json`` (what is compared with what), ``parts/`` (scores of consecutive prompts, each written whole, so that a
killed evaluation loses at most one of them), and at the end ``evaluation.json`` (everything), ``scores.csv`` (one row
per sample), ``summary.csv``, ``sheet-base.png``, ``sheet-policy.png`` and ``before-after.png``; ``pictures/`` if asked
for.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vipo.environment import environment
from vipo.errors import UserError
from vipo.evaluation.estimate import ESTIMATES, summary
from vipo.evaluation.records import Evaluation, Part, Scored, plain
from vipo.files import write_text, written_whole
from vipo.media.clips import cut
from vipo.media.pictures import labelled_grid, save_png
from vipo.media.samples import FPS, save_samples
from vipo.media.sheets import load_sheet, save_sheet

SHEET_PROMPTS = 16  # how many prompts the sheets show, with their first sample
TYPED = ("model", "lora")  # settings as they were typed: the weights tell whether it is the same model


class EvaluationFolder:
    """Where one evaluation is kept.

    Args:
        root: the folder.
        settings: everything the scores depend on, as JSON.
        fps: frames per second of clips among the pictures.
        resume: go on with the evaluation in ``root``; without one, start.
        pictures: keep every picture too.

    Several processes can write their parts into one folder, if each has made this before one has begun, and that one
    finishes.

    Raises:
        UserError: ``root`` holds an evaluation and ``resume`` is off, or it is one with other settings.
    """

    def __init__(
        self,
        root: Path,
        settings: Mapping[str, Any],
        *,
        fps: float = FPS,
        resume: bool = False,
        pictures: bool = False,
    ) -> None:
        self.root, self.fps, self.pictures = root, fps, pictures
        self.settings = {**settings, "packages": environment()["packages"]}
        self._settings_file = root / "settings.json"
        if root.exists() and not root.is_dir():
            raise UserError(f"{str(root)!r} is a file, not a folder; choose another --output")
        self._goes_on = self._settings_file.is_file()
        if self._goes_on:
            self._check(resume)

    def _check(self, resume: bool) -> None:
        if not resume:
            raise UserError(
                f"{str(self.root)!r} already holds an evaluation; add --resume to go on, or choose another --output"
            )
        old = _read_json(self._settings_file)
        new = json.loads(_json(self.settings))
        changed = [key for key in {**old, **new} if key not in TYPED and old.get(key) != new.get(key)]
        if changed:
            raise UserError(
                f"cannot resume {str(self.root)!r}: its {', '.join(changed)} differ from what is asked for now;"
                " give the same arguments as before, or choose another --output"
            )
        self.settings = old

    def _part(self, first: int) -> Path:
        return self.root / "parts" / f"{first:06d}"

    def read(self, first: int) -> Part | None:
        """What the evaluation that goes on has of the prompts from ``first`` on, with every picture if asked for."""
        file = self._part(first) / "scores.json"
        part = Part(**_read_json(file)) if self._goes_on and file.is_file() else None
        return None if part is None or (self.pictures and not self._has_pictures(part)) else part

    def _has_pictures(self, part: Part) -> bool:
        """Whether it was kept with ``pictures`` too."""
        return all(
            self._has_pictures_of(model, part.first, len(next(iter(by_reward.values()))))
            for model, by_reward in part.scores.items()
        )

    def _has_pictures_of(self, model: str, first: int, samples: int) -> bool:
        folder = self.root / "pictures" / model
        each = len(list(folder.glob(f"{first:05d}-*.*")))  # as many of every prompt as of the first
        names = (f"{first + i // each:05d}-{i % each}" for i in range(samples)) if each else ()
        return each > 0 and all(any(folder.glob(f"{name}.*")) for name in names)

    def begin(self) -> None:
        """Write what the evaluation depends on, if it is not there: from now on the folder takes no other."""
        if not self._settings_file.is_file():
            write_text(self._settings_file, _json(self.settings))

    def keep(self, part: Part, results: Mapping[str, Scored]) -> None:
        """Write one part: its scores, its share of the sheets and, if asked for, every picture."""
        self.begin()
        for model, result in results.items() if self.pictures else ():
            names = [
                f"{part.first + i // result.samples_per_prompt:05d}-{i % result.samples_per_prompt}"
                for i in range(len(result.media))
            ]
            save_samples(self.root / "pictures" / model, result.media, names, fps=self.fps)
        with written_whole(self._part(part.first)) as aside:
            aside.mkdir()
            for model, result in results.items():
                _save_tiles(aside / f"{model}.png", result, SHEET_PROMPTS - part.first)
            write_text(aside / "scores.json", _json(asdict(part)))

    def finish(self, evaluation: Evaluation) -> None:
        """Write what people and programs read, from the parts alone."""
        write_text(self.root / "evaluation.json", _json(self._document(evaluation)))
        write_text(self.root / "scores.csv", _csv(_score_rows(evaluation)))
        write_text(self.root / "summary.csv", _csv(_summary_rows(evaluation)))
        self._write_sheets(evaluation)

    def _document(self, evaluation: Evaluation) -> dict[str, Any]:
        return {
            "settings": self.settings,
            "environment": environment(),
            "summary": summary(evaluation),
            "failures": list(evaluation.failures),
            "prompts": [asdict(prompt) for prompt in evaluation.prompts],
            "scores": {
                model: {name: _rows(plain(values), evaluation.samples_per_prompt) for name, values in by_reward.items()}
                for model, by_reward in evaluation.scores.items()
            },
        }

    def _write_sheets(self, evaluation: Evaluation) -> None:
        shown = min(SHEET_PROMPTS, len(evaluation.prompts))
        columns = []
        for model, by_reward in evaluation.scores.items():
            samples = [frames for file in sorted(self.root.glob(f"parts/*/{model}.png")) for frames in _samples(file)]
            columns.append([frames[len(frames) // 2] for frames in samples])
            media = torch.cat([torch.cat([_media(frame) for frame in frames], 2) for frames in samples])
            first = {name: values[:: evaluation.samples_per_prompt][:shown] for name, values in by_reward.items()}
            texts = [prompt.text for prompt in evaluation.prompts[:shown]]
            save_sheet(self.root / f"sheet-{model}.png", media, texts, first)
        rows = list(zip(*columns, strict=True))
        labels = [prompt.text for prompt in evaluation.prompts[:shown]]
        save_png(self.root / "before-after.png", labelled_grid(rows, labels, list(evaluation.scores)))


def _save_tiles(path: Path, result: Scored, room: int) -> None:
    """The first sample of the first ``room`` prompts, losslessly; nothing if there is no room left on the sheets."""
    shown = slice(0, max(0, room) * result.samples_per_prompt, result.samples_per_prompt)
    media, texts = result.media[shown], [prompt.text for prompt in result.prompts[shown]]
    if texts:
        save_sheet(path, media, texts, {name: values[shown] for name, values in result.scores.items()})


def _samples(file: Path) -> list[list[Image.Image]]:
    """Every sample of a sheet, as its frames."""
    tiles, info = load_sheet(file)
    return [cut(tile, info["frames"]) for tile in tiles]


def _media(tile: Image.Image) -> Float[Tensor, "1 3 1 Y X"]:
    width, height = tile.size
    pixels = torch.frombuffer(bytearray(tile.tobytes()), dtype=torch.uint8).reshape(height, width, 3)
    return pixels.permute(2, 0, 1)[None, :, None].float() / 255


def _rows(values: Sequence[float | None], samples_per_prompt: int) -> list[list[float | None]]:
    return [list(values[start : start + samples_per_prompt]) for start in range(0, len(values), samples_per_prompt)]


def _score_rows(evaluation: Evaluation) -> list[list[Any]]:
    """One row per model, prompt and sample; an empty cell is a sample without a score."""
    names = list(next(iter(evaluation.scores.values())))
    rows: list[list[Any]] = [["model", "prompt_index", "prompt", "sample", *names]]
    for model, by_reward in evaluation.scores.items():
        values = [plain(by_reward[name]) for name in names]
        for i, numbers in enumerate(zip(*values, strict=True)):
            prompt, sample = divmod(i, evaluation.samples_per_prompt)
            rows.append([model, prompt, evaluation.prompts[prompt].text, sample, *numbers])
    return rows


def _summary_rows(evaluation: Evaluation) -> list[list[Any]]:
    head = ["reward", "model", "scored", "samples", *ESTIMATES]
    rows: list[list[Any]] = [[*head, *(f"gain_{key}" for key in ESTIMATES)]]
    for row in summary(evaluation):
        gain = row["gain"] or {}
        rows.append([*(row[key] for key in head), *(gain.get(key) for key in ESTIMATES)])
    return rows


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    """Rows that end with a newline. Written with a carriage return too, so that a cell with either is quoted."""
    buffer = io.StringIO()
    written = []
    for row in rows:
        csv.writer(buffer, lineterminator="\r\n").writerow(row)
        written.append(buffer.getvalue().removesuffix("\r\n") + "\n")
        buffer.seek(buffer.truncate(0))
    return "".join(written)


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{str(file)!r} cannot be read ({error}); delete it, or choose another --output") from error
    return content
