"""``vipo sample`` and ``vipo export``: what leaves a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from terminal import Vipo, assert_refused
from vipo.errors import UserError
from vipo.files import CannotWrite
from vipo.media import sheets
from vipo.media.sheets import FirstSamples, load_sheet
from vipo.runs import sampled
from vipo.runs.sampled import SampleFolder


def test_pictures_are_sampled_from_a_run_and_from_a_plain_model(
    vipo: Vipo, finished: Path, model_folder: Path, tmp_path: Path
) -> None:
    ours = vipo("sample", finished, "--prompts", "a cat", "--count", 2, "--output", tmp_path / "ours")
    assert ours.code == 0 and "all on sheet.png" in " ".join(ours.out.split()), ours
    tiles, info = load_sheet(tmp_path / "ours" / "sheet.png")
    for tile, file in zip(tiles, sorted((tmp_path / "ours").glob("0*.png")), strict=True):
        with Image.open(file) as opened:
            assert opened.tobytes() == tile.tobytes()
    assert info["prompts"] == ["a cat", "a cat"]
    plain = ["sample", model_folder, "--prompts", "a cat", "--steps", 2, "--size", 32, "--output", tmp_path / "plain"]
    assert vipo(*plain).code == 0 and len(list((tmp_path / "plain").glob("*.png"))) == 1


def test_samples_are_named_by_number_or_by_prompt(vipo: Vipo, model_folder: Path, tmp_path: Path) -> None:
    plain = [
        "sample",
        model_folder,
        "--steps",
        1,
        "--size",
        32,
        "--prompts",
        "A cat",
        "--prompts",
        "a dog",
        "--count",
        2,
    ]
    assert vipo(*plain, "--output", tmp_path / "n", "--batch", 2).code == 0
    assert sorted(path.name for path in (tmp_path / "n").iterdir()) == [
        "00000-0-a-cat.png", "00000-1-a-cat.png", "00001-0-a-dog.png", "00001-1-a-dog.png", "sheet.json", "sheet.png"
    ]  # fmt: skip
    assert vipo(*plain, "--output", tmp_path / "p", "--names", "prompt").code == 0
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == [
        "A cat-0.png", "A cat-1.png", "a dog-0.png", "a dog-1.png"
    ]  # fmt: skip


def test_a_prompt_that_comes_again_is_sampled_once_where_it_names_the_file(
    vipo: Vipo, model_folder: Path, tmp_path: Path
) -> None:
    words = ["sample", model_folder, "--steps", 1, "--size", 32, "--names", "prompt", "--output", tmp_path / "p"]
    result = vipo(*words, *["--prompts", "a dog", "--prompts", "A cat", "--prompts", "a dog"], "--count", 2)
    assert result.code == 0 and "4 samples in" in result.out, result
    assert "1 of 3 prompts came before; named by prompt, each is sampled once" in " ".join(result.err.split())
    names = ["A cat-0.png", "A cat-1.png", "a dog-0.png", "a dog-1.png"]
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == names
    numbered = vipo(*words[:6], "--output", tmp_path / "n", "--prompts", "a dog", "--prompts", "a dog")
    assert "2 samples in" in numbered.out and len(list((tmp_path / "n").glob("0*.png"))) == 2


def test_what_is_of_clips_is_refused_for_pictures_and_a_rate_that_no_clip_has(
    vipo: Vipo, finished: Path, model_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for option in (["--fps", 12], ["--video", "mp4"], ["--video", "webp"]):
        refused = vipo("sample", finished, "--prompts", "a cat", "--output", out, *option)
        assert_refused(refused, f"makes single pictures, written as png; leave out {option[0]}")
    plain = ["--prompts", "a cat", "--steps", 1, "--size", 32]
    refused = vipo("evaluate", model_folder, *plain, "--rewards", "redness", "--fps", 12)
    assert_refused(refused, "makes single pictures, which have no frames per second; leave out --fps")
    clips = ["sample", "embedded:emoji-wan", *plain, "--frames", 5, "--output", out]
    for rate in ("5000", "inf"):
        assert_refused(vipo(*clips, "--fps", rate), "is more than the 240 frames per second of a clip at most")
    assert not out.exists()


def test_export_writes_what_training_wrote(vipo: Vipo, finished: Path, tmp_path: Path) -> None:
    assert vipo("export", finished, "--output", tmp_path / "out").code == 0
    name = "pytorch_lora_weights.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (finished / "export" / name).read_bytes()


def test_sampling_goes_on_where_it_was_and_only_with_the_same_arguments(
    vipo: Vipo, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ["sample", model_folder, "--steps", 1, "--size", 32, "--count", 2, "--batch", 2]
    plain += ["--prompts", "a cat", "--prompts", "a dog", "--prompts", "a car", "--output"]
    assert vipo(*plain, tmp_path / "whole").code == 0
    save = sampled.save_samples

    def interrupted(*args: Any, **options: Any) -> None:
        save(*args, **options)
        if (tmp_path / "s" / "00001-1-a-dog.png").exists():
            raise CannotWrite("no space is left")

    with monkeypatch.context() as patched:
        patched.setattr(sampled, "save_samples", interrupted)
        assert_refused(vipo(*plain, tmp_path / "s"), "no space is left")
    record = tmp_path / ".s.samples.json"
    assert record.is_file() and len(list((tmp_path / "s").iterdir())) == 4
    kept = tmp_path / "s" / "00000-0-a-cat.png"
    before = kept.stat().st_mtime_ns
    assert_refused(vipo(*plain, tmp_path / "s", "--resume", "--seed", 1), "its seed differ")
    assert_refused(vipo(*plain, tmp_path / "s", "--resume", "--prompts", "a hat"), "its prompts differ")
    assert vipo(*plain, tmp_path / "s", "--resume").code == 0
    drawn, whole = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("s", "whole"))
    assert drawn == whole and len(whole) == 8
    assert kept.stat().st_mtime_ns == before  # it was not drawn again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s", "whole"]  # nothing is left beside what is complete
    assert_refused(vipo(*plain, tmp_path / "s", "--resume"), "nothing in", "leave out --resume")


def test_samples_of_before_do_not_pass_for_new_ones_and_a_folder_may_be_all_that_is_writable(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [tmp_path / "s" / f"{name}.png" for name in "ab"]
    paths[0].parent.mkdir()

    def folder(resume: bool, **settings: int) -> SampleFolder:
        return SampleFolder(tmp_path / "s", settings, paths, resume=resume)

    old = folder(False, seed=0)
    old.begin()
    for path in paths:
        path.write_bytes(b"drawn with seed 0")
    old.begin()
    assert folder(True, seed=0).files(range(2)) == paths
    folder(False, seed=1).begin()
    paths[0].write_bytes(b"drawn with seed 1, then interrupted")
    again = folder(True, seed=1)
    assert again.files(range(1)) == paths[:1] and again.files(range(1, 2)) == []
    again.begin()
    assert paths[0].exists()
    for damage in (b"[1]", b"{", b"\xff", b"3", b"[" * 10**5):
        (tmp_path / ".s.samples.json").write_bytes(damage)
        with pytest.raises(UserError, match=r"is damaged .*leave out --resume"):
            folder(True, seed=1)
    long = tmp_path / ("s" * 245)  # a name that has no room for more: the folder is all that can be written to
    long.mkdir()
    paths = [long / "a.png"]
    SampleFolder(long, {"seed": 2}, paths, resume=False).begin()
    assert "cannot be gone on with by --resume" in caplog.text
    with pytest.raises(UserError, match="nothing in"):
        SampleFolder(long, {"seed": 2}, paths, resume=True)


def test_a_sheet_of_samples_shows_the_first_that_fit_and_some_frames_of_a_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sheets, "MOST_PIXELS", 3 * 8 * 4 * 6)
    shown = FirstSamples()
    level = torch.arange(17).view(1, 1, 17, 1, 1) / 17
    for prompt in ("a cat", "a dog"):
        shown.add(level.expand(2, 3, 17, 4, 6), [prompt, prompt])
    assert shown.save(tmp_path / "sheet.png") == 3
    tiles, info = load_sheet(tmp_path / "sheet.png")
    assert info["prompts"] == ["a cat", "a cat", "a dog"] and info["frames"] == 8
    frames = [tiles[0].getpixel((6 * k, 0))[0] for k in range(8)]
    assert frames[0] == 0 and frames[-1] == round(16 / 17 * 255) and frames == sorted(set(frames))
