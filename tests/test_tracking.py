"""A run as its trackers see it: what TensorBoard is told, one that fails, resume, and the tools themselves."""

from __future__ import annotations

import json
import sys
import threading
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tiny
from vipo.engine import Engine
from vipo.errors import UserError
from vipo.evaluation.records import POLICY, Evaluation
from vipo.recipe import parse_recipe
from vipo.runs import tracking
from vipo.runs.run import Run
from vipo.runs.trackers import RECORD, TRACKERS, Board, Whose, check_trackers
from vipo.runs.tracking import Tracking
from vipo.schema import Recipe
from vipo.types import Prompt, TrainStep

SECRET = "sk-0123456789abcdef0123"  # looks like one


def board_of(root: Path) -> EventAccumulator:
    found = EventAccumulator(str(root / "tensorboard"))
    found.Reload()
    return found


@pytest.fixture
def recipe(tmp_path: Path, model_folder: Path) -> Recipe:
    Engine()  # Accelerate's trackers ask which process this is
    return parse_recipe(tiny.recipe(model_folder, tmp_path / "prompts.txt"))


def named(recipe: Recipe, *trackers: str) -> Recipe:
    return parse_recipe({**recipe.model_dump(mode="json"), "tracking": list(trackers)})


def test_tensorboard_is_told_of_a_run_without_being_named(finished: Path) -> None:
    board, lines = board_of(finished), tiny.lines(finished / "metrics.jsonl")
    assert [event.step for event in board.Scalars("loss")] == [0, 1]
    assert [event.value for event in board.Scalars("loss")] == pytest.approx([line["loss"] for line in lines])
    assert [event.step for event in board.Scalars("evaluation/brightness")] == [0, 2]
    assert [event.step for event in board.Images("samples")] == [0, 2]
    assert "recipe/text_summary" in board.Tags()["tensors"] and not (finished / RECORD).exists()


def test_tracking_is_off_by_a_word_and_a_slip_is_told(recipe: Recipe) -> None:
    assert named(recipe).tracking == {} and recipe.tracking == {"tensorboard": {}}
    with pytest.raises(UserError, match="tracking"):
        named(recipe, "tensorbord")
    with pytest.raises(UserError, match="list of trackers is names, each once"):
        named(recipe, "tensorboard", "tensorboard")


def test_nothing_is_written_where_tracking_is_off(recipe: Recipe, tmp_path: Path) -> None:
    off = Tracking(named(recipe), tmp_path / "run", iteration=0, processes=1)
    off.close()
    assert not (tmp_path / "run").exists()


def test_a_tool_that_is_not_there_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vipo.runs.trackers.find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"wandb, which is not installed: pip install 'vipo\[wandb\]'"):
        check_trackers({"wandb": {}})
    check_trackers({"tensorboard": {"flush_secs": 5}})
    with pytest.raises(UserError, match=r"takes no option 'flush_sec'.*Did you mean 'flush_secs'"):
        check_trackers({"tensorboard": {"flush_sec": 5}})


class Broken(Board):
    """A tracker whose network goes away."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:  # noqa: ARG002
        raise ConnectionError(f"no route with {SECRET}")


def test_a_tracker_that_fails_costs_itself_and_is_told_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recipe: Recipe
) -> None:
    monkeypatch.setitem(TRACKERS, "trackio", Broken)
    monkeypatch.setattr("vipo.runs.run.check_trackers", lambda _tracking: None)
    events = list(Run(named(recipe, "trackio", "tensorboard"), tmp_path / "run"))
    steps = [event for event in events if isinstance(event, TrainStep)]
    told = [line for step in steps for line in step.events]
    assert len(steps) == recipe.training.iterations and len(told) == 1 and steps[0].events == tuple(told)
    assert "tracking: trackio failed and is left out" in told[0] and SECRET not in told[0]
    board = board_of(tmp_path / "run")
    assert len(board.Scalars("loss")) == len(steps) and "events/text_summary" in board.Tags()["tensors"]


def test_a_tracker_that_never_finishes_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    held = threading.Event()
    monkeypatch.setattr(tracking, "CLOSING_SECONDS", 0.05)
    monkeypatch.setattr(Board, "close", lambda _board: held.wait())
    Tracking(recipe, tmp_path, iteration=0, processes=1).close()
    held.set()
    assert "did not finish within 0.05 seconds" in caplog.text


def test_clips_play_in_tensorboard(tmp_path: Path) -> None:
    board = Board(Whose("run", tmp_path, 0), {})
    clip = [Image.new("RGB", (8, 6), (40 * k, 0, 0)) for k in range(4)]
    board.clips("clips", [clip], ["red"], 8.0, 3)
    board.close()
    (shown,) = board_of(tmp_path).Images("clips/0")
    assert shown.step == 3 and (shown.width, shown.height) == (8, 6) and shown.encoded_image_string[:3] == b"GIF"


class Service(types.ModuleType):
    """A tool as far as the run's own code sees it: what it was told, by call."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.told: list[tuple[Any, ...]] = []
        self.config = types.SimpleNamespace(update=lambda values, **_: self.told.append(("config", values)))

    def init(self, **options: Any) -> Any:
        self.told.append(("init", options))
        return self

    def Image(self, picture: Image.Image, caption: str) -> tuple[str, str]:  # noqa: N802
        return (f"{picture.width}x{picture.height}", caption)

    def Video(self, file: str, caption: str) -> tuple[bytes, str]:  # noqa: N802
        return (Path(file).read_bytes()[:3], caption)

    def log(self, values: Any, step: int | None = None) -> None:
        self.told.append(("log", step, values))

    def define_metric(self, *_: Any, **__: Any) -> None: ...

    def alert(self, title: str, text: str) -> None:
        self.told.append(("alert", title, text))

    def finish(self) -> None:
        self.told.append(("finish",))


@pytest.mark.parametrize("kind", ["trackio", "wandb"])
def test_a_service_goes_on_with_the_run_it_had(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recipe: Recipe, kind: str
) -> None:
    tool = Service(kind)
    monkeypatch.setitem(sys.modules, kind, tool)
    tracked = recipe.model_copy(update={"tracking": {kind: {"project": "mine"}}, "name": "clean"})
    for _ in range(2):
        told = Tracking(tracked, tmp_path, iteration=0, processes=1)
        scores = {POLICY: {"redness": torch.tensor([0.25, 0.75])}}
        evaluation = Evaluation((Prompt("a"), Prompt("b")), 1, scores)
        told.evaluation(evaluation, torch.zeros(2, 3, 4, 6, 8, dtype=torch.uint8), fps=8.0, iteration=5)
        told.close()
    begun = [call[1] for call in tool.told if call[0] == "init"]
    assert begun[0] == begun[1] and begun[0]["project"] == "mine" and begun[0]["resume"] == "allow"
    known = json.loads((tmp_path / RECORD).read_text())["id"]
    assert known == begun[0]["id"] if kind == "wandb" else begun[0]["name"] == f"clean-{known[:8]}"
    logged = {key: value for call in tool.told if call[0] == "log" for key, value in call[2].items()}
    assert logged["evaluation/redness"] == 0.5 and tool.told[-1] == ("finish",)
    if kind == "wandb":
        assert logged["samples"] == [("8x6", "a"), ("8x6", "b")] and logged["iteration"] == 5
        assert logged["clips"][0] == (b"GIF", "a")
    else:
        assert logged["samples/1"] == ("8x6", "b") and logged["clips/0"] == (b"GIF", "a")


def test_the_settings_that_are_sent_hold_no_secret(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recipe: Recipe
) -> None:
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    tool = Service("wandb")
    monkeypatch.setitem(sys.modules, "wandb", tool)
    generator = recipe.generator.model_copy(update={"options": {"note": f"see {SECRET}", "api_key": "plain"}})
    Tracking(
        recipe.model_copy(update={"tracking": {"wandb": {}}, "generator": generator}),
        tmp_path,
        iteration=0,
        processes=1,
    ).close()
    (sent,) = [call[1] for call in tool.told if call[0] == "config"]
    assert sent["generator"]["options"] == {"note": "see ***", "api_key": "***"}
    assert sent["seed"] == recipe.seed and sent["environment"]["processes"] == 1 and SECRET not in str(tool.told)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trackio", "wandb", "swanlab"])
def test_the_tool_itself_takes_a_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recipe: Recipe, kind: str
) -> None:
    """Offline, with the real package where it is installed."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # it reads this when it is imported
    pytest.importorskip(kind)
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = {"swanlab": {"mode": "offline"}, "trackio": {"auto_log_cpu": False}}.get(kind, {})
    raw = {**recipe.model_dump(mode="json"), "tracking": {kind: options}}
    events = [event for event in Run(parse_recipe(raw), tmp_path / "run") if isinstance(event, TrainStep)]
    assert all(event.events == () for event in events)
    known = json.loads((tmp_path / "run" / RECORD).read_text())["id"]
    left = [path for path in tmp_path.rglob("*") if path.is_file() and "checkpoints" not in path.parts]
    assert any(known in str(path) or "trackio" in path.parts for path in left if path.suffix != ".json")
