"""``vipo sample`` and ``vipo export``: what leaves a run."""

from __future__ import annotations

from pathlib import Path

from terminal import Vipo


def test_pictures_are_sampled_from_a_run_and_from_a_plain_model(
    vipo: Vipo, finished: Path, model_folder: Path, tmp_path: Path
) -> None:
    ours = vipo("sample", finished, "--prompts", "a cat", "--count", 2, "--output", tmp_path / "ours")
    assert ours.code == 0 and len(list((tmp_path / "ours").glob("*.png"))) == 2, ours
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
        "00000-0-a-cat.png", "00000-1-a-cat.png", "00001-0-a-dog.png", "00001-1-a-dog.png"
    ]  # fmt: skip
    assert vipo(*plain, "--output", tmp_path / "p", "--names", "prompt").code == 0
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == [
        "A cat-0.png", "A cat-1.png", "a dog-0.png", "a dog-1.png"
    ]  # fmt: skip


def test_export_writes_what_training_wrote(vipo: Vipo, finished: Path, tmp_path: Path) -> None:
    assert vipo("export", finished, "--output", tmp_path / "out").code == 0
    name = "pytorch_lora_weights.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (finished / "export" / name).read_bytes()
