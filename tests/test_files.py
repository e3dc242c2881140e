"""Files that others may read as the umask says, whatever library wrote them; and what a line is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import tiny
from vipo.files import complete_lines, lines, read_lines, settle_header, usual_permissions, write_text, written_whole
from vipo.policy import Policy
from vipo.rewards import convert
from vipo.training import checkpoint

UMASKS = {0o022: (0o644, 0o755), 0o027: (0o640, 0o750), 0o077: (0o600, 0o700), 0o002: (0o664, 0o775)}
RARE = ["\x85", "\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r"]  # ends of lines elsewhere


@pytest.fixture(params=UMASKS, ids=lambda mask: f"{mask:03o}")
def modes(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """Of any new file and any new folder under this umask."""
    before = os.umask(request.param)
    yield UMASKS[request.param]
    os.umask(before)


def check(root: Path, modes: tuple[int, int], least: int) -> None:
    """Every file and folder below ``root``, and itself."""
    found = [root, *root.rglob("*")]
    assert sum(path.suffix == ".safetensors" for path in found) >= least
    wrong = {str(path): f"{path.stat().st_mode & 0o777:o}" for path in found if _mode(path) != modes[path.is_dir()]}
    assert not wrong


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_checkpoint_can_be_read_by_whom_the_umask_lets(
    model_folder: Path, tmp_path: Path, modes: tuple[int, int]
) -> None:
    trainer = tiny.trainer(model_folder, policy=lambda model: tiny.lora(model, ema_decay=0.5))
    check(checkpoint.save(trainer.state(), tmp_path / "checkpoints"), modes, 3)


@pytest.mark.parametrize("build", [tiny.lora, lambda model: Policy.full(model.network)], ids=["lora", "full"])
def test_an_export_can_be_read_by_whom_the_umask_lets(
    model_folder: Path, tmp_path: Path, modes: tuple[int, int], build: Callable[..., Policy]
) -> None:
    """Also one that is written where it stays, and over an older one."""
    model = tiny.generator(model_folder)
    policy = build(model)
    for _ in range(2):
        policy.export(model, tmp_path / "export")
    with written_whole(tmp_path / "whole") as aside:
        policy.export(model, aside)
    for folder in ("export", "whole"):
        check(tmp_path / folder, modes, 1 if policy.is_lora else 4)


def test_an_export_leaves_the_permissions_of_other_files_alone(model_folder: Path, tmp_path: Path) -> None:
    model = tiny.generator(model_folder)
    (tmp_path / "own.safetensors").write_bytes(b"")
    (tmp_path / "own.safetensors").chmod(0o600)
    tiny.lora(model).export(model, tmp_path)
    assert _mode(tmp_path / "own.safetensors") == 0o600


def test_a_shared_text_cache_can_be_read_by_whom_the_umask_lets(
    model_folder: Path, tmp_path: Path, modes: tuple[int, int]
) -> None:
    tiny.generator(model_folder).keep_text(tiny.PROMPTS, folder=tmp_path / "text")
    check(tmp_path / "text", modes, len(tiny.PROMPTS))


def test_a_converted_reward_can_be_read_by_whom_the_umask_lets(
    tmp_path: Path, modes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(convert.CONVERTIBLE, "aesthetic", lambda *_: None)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "head.pth")
    written = convert.convert_reward("aesthetic", tmp_path / "head.pth", tmp_path / "out" / "head.safetensors")
    check(written.parent, modes, 1)


def test_files_that_others_may_read_are_left_as_they_are(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        for name, mode in (("program", 0o755), ("shared", 0o660), ("own", 0o600)):
            (tmp_path / name).touch()
            (tmp_path / name).chmod(mode)
        usual_permissions(tmp_path.iterdir())
    finally:
        os.umask(before)
    assert {path.name: _mode(path) for path in tmp_path.iterdir()} == {"program": 0o755, "shared": 0o660, "own": 0o644}


def test_what_replaces_a_file_has_the_usual_permissions_too(tmp_path: Path, modes: tuple[int, int]) -> None:
    for _ in range(2):
        with written_whole(tmp_path / "one.safetensors") as aside:
            save_file({"a": torch.zeros(1)}, aside)
    assert [(path.name, _mode(path)) for path in tmp_path.iterdir()] == [("one.safetensors", modes[0])]


@pytest.mark.parametrize("rare", RARE, ids=ascii)
def test_only_newlines_end_a_line(tmp_path: Path, rare: str) -> None:
    text = f"a{rare}b\r\nc{rare}d\n\ne"
    assert lines(text) == [f"a{rare}b", f"c{rare}d", "", "e"]
    write_text(tmp_path / "text", text)
    assert read_lines(tmp_path / "text") == lines(text)
    assert complete_lines(tmp_path / "text") == [f"a{rare}b", f"c{rare}d"]


def test_a_log_of_which_no_line_was_finished_has_none(tmp_path: Path) -> None:
    for text in ("", "half", "\n"):
        write_text(tmp_path / "log", text)
        assert complete_lines(tmp_path / "log") == []
    (tmp_path / "log").write_bytes(b"\xffwhole\nha\xff")
    assert complete_lines(tmp_path / "log", errors="replace") == ["\ufffdwhole"]


def test_a_header_settles_to_one_order_and_the_tensors_stay(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, 2)}
    metadata = {key: "x" * place for place, key in enumerate("zyxwvutsrq")}
    for name in ("one", "two"):
        save_file(tensors, tmp_path / name, metadata)
        settle_header(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with safe_open(tmp_path / "one", "pt") as opened:
        assert opened.metadata() == metadata
        assert all(torch.equal(opened.get_tensor(name), tensor) for name, tensor in tensors.items())
