"""Samples as files in a folder, gone on with where they were interrupted."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vipo.errors import UserError
from vipo.files import CannotWrite, write_text
from vipo.media.reading import read_media
from vipo.media.samples import VideoFormat, save_samples
from vipo.media.sheets import FirstSamples
from vipo.runs.target import Target
from vipo.types import Prompt

log = logging.getLogger(__name__)


def sample_into(
    root: Path,
    target: Target,
    prompts: Sequence[Prompt],
    names: Sequence[str],
    *,
    samples_per_prompt: int,
    steps: int | None,
    seed: int,
    batch_size: int | None,
    base_tail: float,
    video: VideoFormat,
    fps: float | None,
    resume: bool,
    sheet: bool,
) -> int | None:
    """Write a file for every sample, or with ``resume`` for those that are not there; how many are on the sheet.

    Args:
        names: of the files, one per sample, without their ending.
        fps: of video files; None takes the target's.
        sheet: whether to write ``sheet.png`` of the first of all; None is returned without.

    Raises:
        UserError: as :class:`SampleFolder`, or as :meth:`vipo.runs.target.Target.sample`.
    """
    how: dict[str, Any] = {"samples_per_prompt": samples_per_prompt, "steps": steps}
    files: dict[str, Any] = {"video": video, "fps": fps or target.fps}
    whole = target.settings(prompts, [], **how, batch_size=batch_size or target.batch_size)
    ending = "png" if target.generator.latent_shape()[1] == 1 else video
    paths = [root / f"{name}.{ending}" for name in names]
    folder = SampleFolder(root, {**whole, "seed": seed, "base_tail": base_tail, **files}, paths, resume=resume)
    shown = FirstSamples()

    def is_there(rows: range) -> bool:
        there = folder.files(rows)
        for row, file in zip(rows, there, strict=False) if not shown.is_full else ():
            shown.add(read_media(file)[None], [prompts[row // samples_per_prompt].text])
        return bool(there)

    how |= {"seed": seed, "batch_size": batch_size, "base_tail": base_tail}
    for part in target.sample(prompts, **how, is_there=is_there):
        folder.begin()
        rows = slice(part.first_sample, part.first_sample + len(part.media))
        save_samples(root, part.media, names[rows], **files)
        shown.add(part.media, [prompt.text for prompt in part.prompts])
    on_sheet = shown.save(root / "sheet.png") if sheet else None
    folder.end()
    return on_sheet


class SampleFolder:
    """Which samples are there already, of those that the same arguments would draw now.

    What they depend on is kept beside the folder, in a hidden file, until all of them are there: whoever reads the
    folder finds samples alone in it.
    Without ``resume`` files of the same names are removed before the first is drawn, else they would pass for new ones.

    Args:
        settings: all that the samples depend on, for JSON.
        paths: of the files, one per sample.

    Raises:
        UserError: with ``resume``, there is nothing to go on with, or it was drawn from something else.
    """

    def __init__(self, root: Path, settings: Mapping[str, Any], paths: Sequence[Path], *, resume: bool) -> None:
        self._paths, self._resumes, self._begun = paths, resume, resume
        kept, now = root.resolve().with_name(f".{root.resolve().name}.samples.json"), json.loads(json.dumps(settings))
        self._kept, self._settings = kept, json.dumps(now, indent=2)
        if not resume:
            return
        try:
            before = dict(json.loads(kept.read_text(encoding="utf-8")))
        except OSError as error:
            raise UserError(
                f"there is nothing in {str(root)!r} to go on with, as no sampling into it was interrupted; leave out"
                " --resume"
            ) from error
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{str(kept)!r} is damaged ({error}); leave out --resume to draw all anew") from error
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if changed:
            raise UserError(
                f"cannot go on in {str(root)!r}: its {', '.join(changed)} differ from what is asked for now; give the"
                " same arguments as before, or choose another --output"
            )

    def begin(self) -> None:
        """Write what they depend on, before the first is written; later calls do nothing."""
        if self._begun:
            return
        self._begun = True
        for path in self._paths:
            path.unlink(missing_ok=True)
        try:
            write_text(self._kept, self._settings)
        except CannotWrite as error:  # the folder itself may be all that can be written to, such as a mounted one
            log.warning("these samples cannot be gone on with by --resume: %s", error)

    def end(self) -> None:
        """All are there, so there is nothing to go on with."""
        with suppress(OSError):  # where it could not be written, it cannot be removed
            self._kept.unlink()

    def files(self, rows: range) -> list[Path]:
        """Those of these samples, if all of them are there to go on with; else none."""
        there = [self._paths[row] for row in rows if self._resumes and self._paths[row].is_file()]
        return there if len(there) == len(rows) else []
