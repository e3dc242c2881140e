"""A whole run and its directory: killed, stopped, resumed, refused."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import FluxPipeline
from PIL import Image, ImageSequence
from rich.console import Console
from safetensors.torch import load_file

import gloo
import tiny
import tiny_wan
from vipo.assemble import Model, Session
from vipo.cli.progress import follow
from vipo.environment import environment
from vipo.errors import UserError
from vipo.evaluation.evaluator import Sampler, scored
from vipo.generators.text_cache import TextCache
from vipo.media.clips import cut
from vipo.media.pictures import to_uint8
from vipo.media.sheets import load_sheet
from vipo.recipe import parse_recipe
from vipo.report.page import write_report
from vipo.report.run import read_run
from vipo.runs.directory import RunDirectory
from vipo.runs.run import Evaluated, Run, train
from vipo.runs.trained import open_run
from vipo.schema import Recipe
from vipo.training.saved import list_checkpoints
from vipo.types import Prompt, TrainStep

KILLER = """
import os, signal
from pathlib import Path
CALLS = 0
def reward(media, prompts):
    global CALLS
    CALLS += 1
    marker, at, number = os.environ.get("KILL_MARKER"), int(os.environ.get("KILL_AT", 0)), os.environ.get("KILL_WITH")
    if marker and CALLS == at and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), int(number))
    red, green, blue = media.mean((2, 3, 4)).unbind(1)
    return red - (green + blue) / 2
"""


@pytest.fixture
def raw(tmp_path: Path, model_folder: Path) -> dict[str, Any]:
    (tmp_path / "killer.py").write_text(KILLER)
    rewards = {f"{tmp_path / 'killer.py'}:reward": 1.0}
    return tiny.recipe(model_folder, tmp_path / "prompts.txt", rewards=rewards, policy__ema_decay=0.9)


def outcome(folder: Path) -> dict[str, bytes]:
    """What must not depend on whether the run was interrupted."""
    kept = ["metrics.jsonl", "evaluations.jsonl", "recipe.yaml", "export/pytorch_lora_weights.safetensors"]
    last = list_checkpoints(folder / "checkpoints")[-1]
    names = kept + [str(path.relative_to(folder)) for path in sorted(last.iterdir())]
    return {name: (folder / name).read_bytes() for name in names}


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(".partial")]


def test_a_run_leaves_what_it_promises(tmp_path: Path, raw: dict[str, Any], model_folder: Path) -> None:
    raw |= {"credit": "advantage_map", "structuring": {"backbone": "efficientnet_lite"}}
    raw["training"] |= {"iterations": 3, "maps_every": 1, "keep_rollouts": 1}
    run = Run(parse_recipe(raw), tmp_path / "run")
    events = list(run)
    assert [type(event) for event in events] == [Evaluated, TrainStep, TrainStep, Evaluated, TrainStep, Evaluated]
    root = tmp_path / "run"
    metrics = tiny.lines(root / "metrics.jsonl")
    assert [line["iteration"] for line in metrics] == [0, 1, 2] and metrics[0]["events"] == []
    assert [line["iteration"] for line in tiny.lines(root / "timing.jsonl")] == [0, 1, 2]
    assert [line["iteration"] for line in tiny.lines(root / "evaluations.jsonl")] == [0, 2, 3]
    assert json.loads((root / "environment.json").read_text())["packages"]["torch"] == torch.__version__
    assert sorted(path.name for path in (root / "maps").iterdir()) == [f"step-00000{k}.png" for k in range(3)]
    assert sorted(path.name for path in (root / "rollouts").glob("*.png")) == [f"step-00000{k}.png" for k in (0, 2)]
    assert {path.name for path in (root / "samples").glob("*.png")} == {f"step-00000{k}.png" for k in (0, 2, 3)}
    assert [path.name for path in list_checkpoints(root / "checkpoints")] == ["step-000002", "step-000003"]
    FluxPipeline.from_pretrained(model_folder).load_lora_weights(str(root / "export"))
    assert not leftovers(root)


def test_the_environment_has_torchs_local_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")  # which a package's metadata may leave out
    assert environment(2)["packages"]["torch"] == "2.11.0+cu130" and environment(2)["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("call", [6])  # evaluation, 2 iterations, evaluation, iteration 2 and, dying, iteration 3
def test_a_killed_and_resumed_run_ends_byte_for_byte_like_an_undisturbed_one(
    tmp_path: Path, raw: dict[str, Any], call: int
) -> None:
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", raw)
    killed, calm = tmp_path / "killed", tmp_path / "calm"
    arguments = ["train", recipe, "--allow-code", "--no-report", "--output", killed]
    deadly = {"KILL_MARKER": str(tmp_path / "marker"), "KILL_AT": str(call), "KILL_WITH": str(int(signal.SIGKILL))}
    first = tiny.command_line(*arguments, **deadly)
    first.communicate(timeout=100)
    assert first.returncode == -signal.SIGKILL
    logged = [line["iteration"] for line in tiny.lines(killed / "metrics.jsonl")]
    assert logged == [0, 1, 2]  # one more than the checkpoint of iteration 2 holds
    second = tiny.command_line(*arguments, "--resume")
    _, errors = second.communicate(timeout=100)
    assert second.returncode == 0, errors
    tiny.run_all(raw, calm)
    assert outcome(killed) == outcome(calm)
    assert not leftovers(killed)


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path, raw: dict[str, Any]) -> None:
    recipe, output = tiny.write_recipe(tmp_path / "recipe.yaml", raw), tmp_path / "my run"
    stop = {"KILL_MARKER": str(tmp_path / "marker"), "KILL_AT": "2", "KILL_WITH": str(int(signal.SIGINT))}
    rewards = f"rewards={{{tmp_path / 'killer.py'}:reward: 1.0}}"
    overrides = ["structuring.sources=[perceptual]", "name=red [bold] things", rewards]
    process = tiny.command_line("train", recipe, *overrides, "--no-report", "--output", output, **stop)
    said, errors = process.communicate(timeout=100)
    assert process.returncode == 130, errors
    assert "Traceback" not in said + errors and "1 process.\n" in said
    assert [path.name for path in list_checkpoints(output / "checkpoints")] == ["step-000001"]
    (command,) = (line for line in said.splitlines() if line.endswith(" --resume --no-report"))
    assert all(shlex.quote(word) in command for word in overrides)
    pasted = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert pasted.returncode == 0 and "4/4 reward" in pasted.stdout, pasted
    assert parse_recipe(yaml.safe_load((output / "recipe.yaml").read_text())).name == "red [bold] things"
    assert not (output / "report.html").exists()


@pytest.mark.parametrize("when", [0, 1, 3])
def test_a_run_stopped_by_a_signal_goes_on_as_if_it_had_not_been(
    tmp_path: Path, raw: dict[str, Any], when: int
) -> None:
    stopped = Run(parse_recipe(raw), tmp_path / "stopped")
    for event in stopped:
        if isinstance(event, TrainStep) and event.iteration == when:
            os.kill(os.getpid(), signal.SIGTERM)
    assert not stopped.finished or when == 3
    tiny.run_all(raw, tmp_path / "stopped", resume=True)
    tiny.run_all(raw, tmp_path / "calm")
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "calm")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_an_existing_run_is_not_written_over(tmp_path: Path, raw: dict[str, Any]) -> None:
    output = tmp_path / "run"
    tiny.run_all(raw | {"training": raw["training"] | {"iterations": 1}}, output)
    before = (output / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="already holds a run; add --resume"):
        Run(parse_recipe(raw), output)
    assert (output / "metrics.jsonl").read_bytes() == before


def test_a_run_encodes_each_prompt_once_and_keeps_it_for_the_next(tmp_path: Path, raw: dict[str, Any]) -> None:
    raw["generator"]["text_cache"] = str(tmp_path / "text")
    first = tiny.run_all(raw, tmp_path / "first").session.generator.text
    second = tiny.run_all(raw, tmp_path / "second").session.generator.text
    assert isinstance(first, TextCache) and isinstance(second, TextCache)
    assert 0 < first.counts.encoded <= len(tiny.PROMPTS) and second.counts.encoded == 0 < second.counts.loaded


def test_a_file_in_the_way_is_named(tmp_path: Path, raw: dict[str, Any]) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match="is a file, not a folder"):
        Run(parse_recipe(raw), tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


def test_resuming_with_another_recipe_is_refused_and_more_iterations_are_not(
    tmp_path: Path, raw: dict[str, Any]
) -> None:
    raw["training"]["iterations"] = 2
    tiny.run_all(raw, tmp_path / "run")
    with pytest.raises(UserError, match=r"cannot resume .*: seed 0 -> 1, which can never change"):
        Run(parse_recipe(raw | {"seed": 1, "optimizer": {"learning_rate": 1.0}}), tmp_path / "run", resume=True)
    longer = raw | {"training": raw["training"] | {"iterations": 4}}
    assert tiny.run_all(longer, tmp_path / "run", resume=True).iteration == 4
    tiny.run_all(longer, tmp_path / "calm")
    ours, calm = outcome(tmp_path / "run"), outcome(tmp_path / "calm")
    assert {name for name in calm if ours[name] != calm[name]} <= {"recipe.yaml"}


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path, raw: dict[str, Any]) -> None:
    raw["training"]["iterations"] = 1
    tiny.run_all(raw, tmp_path / "run")
    before = outcome(tmp_path / "run")
    tiny.run_all(raw, tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run") == before


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path: Path, raw: dict[str, Any]) -> None:
    tiny.run_all(raw, tmp_path / "run")
    whole = outcome(tmp_path / "run")
    for name in ("metrics.jsonl", "evaluations.jsonl", "timing.jsonl"):
        with (tmp_path / "run" / name).open("a") as file:
            file.write('{"iteration": 4, "rew')
    assert RunDirectory(tmp_path / "run").past().evaluated == {0, 2, 4}
    tiny.run_all(raw, tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run") == whole


def test_a_score_that_is_missing_is_null_in_the_log(tmp_path: Path, raw: dict[str, Any]) -> None:
    (tmp_path / "holes.py").write_text(
        "def reward(media, prompts):\n    values = media.mean((1, 2, 3, 4))\n    values[0] = float('nan')\n"
        "    return values\n"
    )
    raw |= {"rewards": {f"{tmp_path / 'holes.py'}:reward": 1.0}}
    raw["training"] |= {"iterations": 1}
    tiny.run_all(raw, tmp_path / "run")
    line = tiny.lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "left out" in line["events"][0]
    (values,) = tiny.lines(tmp_path / "run" / "evaluations.jsonl")[0]["values"].values()
    assert values[0] is None and values[1] is not None


def test_too_many_missing_scores_stop_the_run(tmp_path: Path, raw: dict[str, Any]) -> None:
    (tmp_path / "holes.py").write_text(
        "def reward(media, prompts):\n    values = media.mean((1, 2, 3, 4))\n    values[1:] = float('nan')\n"
        "    return values\n"
    )
    raw |= {"rewards": {f"{tmp_path / 'holes.py'}:reward": 1.0}}
    with pytest.raises(UserError, match=r"left 83% of the samples unscored.*max_failed_share=0\.5"):
        tiny.run_all(raw, tmp_path / "run")


def test_a_loaded_run_has_the_averaged_weights_and_exports_them(tmp_path: Path, raw: dict[str, Any]) -> None:
    raw["training"]["iterations"] = 2
    tiny.run_all(raw, tmp_path / "run")
    _, model = open_run(tmp_path / "run")
    average = load_file(list_checkpoints(tmp_path / "run" / "checkpoints")[-1] / "ema.safetensors")
    assert all(torch.equal(value.cpu(), average[name]) for name, value in model.policy.state().items())
    model.policy.export(model.generator, tmp_path / "again")
    name = "pytorch_lora_weights.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "run" / "export" / name).read_bytes()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, raw: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="is not a run directory"):
        open_run(tmp_path)
    (tmp_path / "recipe.yaml").write_text(parse_recipe(raw).to_yaml())
    with pytest.raises(UserError, match="no complete checkpoint yet"):
        open_run(tmp_path)


def test_train_yields_its_steps_with_their_evaluations_and_writes_the_report(
    tmp_path: Path, raw: dict[str, Any]
) -> None:
    raw["training"]["iterations"], root, seen = 3, tmp_path / "run", []
    for step in train(parse_recipe(raw), root):
        assert (
            isinstance(step, TrainStep) and len(tiny.lines(root / "metrics.jsonl")) == step.iteration + 1
        )  # not ahead
        seen.append(step.evaluations)
    assert [[found.iteration for found in of_step] for of_step in seen] == [[0], [2], [3]]
    last = read_run(root).evaluations[-1]
    (name,) = raw["rewards"]
    assert last.values[name].tolist() == seen[-1][0].scores[name].tolist()
    assert "</html>" in (root / "report.html").read_text()
    assert [step.evaluations for step in train(parse_recipe(raw))] == [(), (), ()]


def test_one_process_trains_in_one_precision_after_the_other(raw: dict[str, Any]) -> None:
    """Each as if it were alone, also a run that goes on after another one has begun."""
    raw["rewards"] = {"redness": 1.0}

    def recipe(precision: str) -> Recipe:
        return parse_recipe({**raw, "training": {"iterations": 2, "precision": precision}})

    def metrics(precision: str) -> list[dict[str, float]]:
        return [dict(step.metrics) for step in train(recipe(precision))]

    exact = metrics("no")
    assert metrics("bf16") != exact and metrics("no") == exact
    going_on = train(recipe("no"))
    begun = next(going_on)
    metrics("bf16")
    assert [dict(begun.metrics), dict(next(going_on).metrics)] == exact


def test_a_failed_export_leaves_nothing_half_written(
    tmp_path: Path, raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw["training"]["iterations"] = 1

    def full(folder: Path, **_: object) -> None:
        (Path(folder) / "pytorch_lora_weights.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FluxPipeline, "save_lora_weights", full)
    with pytest.raises(OSError, match="No space left"):
        tiny.run_all(raw, tmp_path / "run")
    assert not (tmp_path / "run" / "export").exists() and not leftovers(tmp_path / "run")


@pytest.mark.slow
def test_two_processes_keep_one_run_directory_like_that_of_one(tmp_path: Path, raw: dict[str, Any]) -> None:
    raw["training"] |= {"keep_best": next(iter(raw["rewards"])), "checkpoint_every": 4, "keep_checkpoints": 1}
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", raw)
    both, alone = tmp_path / "both", tmp_path / "alone"
    command = ("train", recipe, "--allow-code", "--no-report", "--output", both)
    first, second = gloo.vipo(*command)
    assert first.code == second.code == 0, first.stderr[-3000:] + second.stderr[-3000:]
    assert first.stdout.count("4/4 reward") == first.stdout.count("2 processes.") == 1 and not second.stdout
    assert json.loads((both / "environment.json").read_text())["processes"] == 2
    for again in gloo.vipo(*command):
        assert again.code == 2 and "Traceback" not in again.stderr
        assert "already holds a run" in again.stderr
    tiny.run_all(raw, alone)
    for key, tolerance in (("reward", 1e-3), ("ratio_deviation", 1e-6)):
        ours, theirs = ([line[key] for line in tiny.lines(folder / "metrics.jsonl")] for folder in (both, alone))
        assert ours == pytest.approx(theirs, abs=tolerance)
    assert [e["iteration"] for e in tiny.lines(both / "evaluations.jsonl")] == [0, 2, 4]
    saved = [[path.name for path in list_checkpoints(folder / "checkpoints")] for folder in (both, alone)]
    assert saved[0] == saved[1]  # the best too
    assert not leftovers(both)


def evaluated(session: Session, model: Model) -> dict[str, list[float]]:
    prompts, sampler = session.evaluation_prompts, Sampler(model.generator, model.solver, 1)
    scores = scored(sampler, session.evaluation_scorer, prompts).scores
    return {name: values.tolist() for name, values in scores.items()}


def test_the_logged_evaluation_is_of_the_averaged_weights(tmp_path: Path, raw: dict[str, Any]) -> None:
    run = tiny.run_all(raw, tmp_path / "run")  # keeps a moving average
    logged = tiny.lines(tmp_path / "run" / "evaluations.jsonl")[-1]["values"]
    here, there = (evaluated(run.session, model) for model in (open_run(tmp_path / "run")[1], run.session.model))
    assert all(
        values == pytest.approx(here[name], abs=1e-6) for name, values in logged.items()
    )  # the average's weights
    assert all(values != pytest.approx(there[name], abs=1e-6) for name, values in logged.items())


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan.save_pipeline(tmp_path_factory.mktemp("tiny") / "wan")


@pytest.fixture
def video(tmp_path: Path, wan_folder: Path) -> dict[str, Any]:
    """Clips of 5 frames, two rewards as two advantages, maps over two latent frames."""
    (tmp_path / "calm.py").write_text(
        "def calm(media, prompts):\n    return -media.diff(dim=2).abs().mean((1, 2, 3, 4))\n"
    )
    rewards = {"redness": 1.0, f"{tmp_path / 'calm.py'}:calm": 0.5}
    height, width = tiny_wan.SIZES["2.1"]
    raw = tiny.recipe(wan_folder, tmp_path / "prompts.txt", rewards=rewards, credit="advantage_map")
    raw["generator"] |= {"name": "wan", "height": height, "width": width, "frames": tiny_wan.FRAMES, "fps": 4}
    raw["objective"] |= {"combine": "advantage"}
    raw["training"] |= {"iterations": 2, "maps_every": 1, "checkpoint_every": 1}
    raw["evaluation"] |= {"every": 1, "samples_per_prompt": 2}
    return raw


def frames_of(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(opened)])


def test_a_video_run_leaves_clips_to_look_at_and_every_frame_that_was_scored(
    tmp_path: Path, video: dict[str, Any]
) -> None:
    root = tmp_path / "run"
    run, seen = Run(parse_recipe(video), root), []
    redness = run.session.evaluation_scorer.rewards["redness"]

    def look(media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        seen.append(media)
        return redness(media, prompts)

    run.session.evaluation_scorer.rewards["redness"] = look  # type: ignore[index]
    events = list(run)
    scored = to_uint8(seen[0])
    strips, info = load_sheet(root / "samples" / "step-000000.png")
    assert (info["frames"], info["tile"]) == (5, [32, 48]) and len(strips) == 4
    read = [[np.asarray(frame) for frame in cut(strip, 5)] for strip in strips]
    assert np.array_equal(np.array(read), scored) and not np.array_equal(scored[:, 0], scored[:, 4])

    names = ["00000-0-a-cat", "00000-1-a-cat", "00001-0-a-red-car", "00001-1-a-red-car"]
    clips = root / "samples" / "step-000000"
    assert sorted(path.name for path in clips.glob("*.webp")) == [f"{name}.webp" for name in names]
    for name, frames in zip(names, scored, strict=True):
        assert np.array_equal(frames_of(clips / f"{name}.webp"), frames)
    with Image.open(root / "samples" / "step-000001.gif") as opened:
        assert (opened.n_frames, opened.info["duration"]) == (5, 250)

    metrics = tiny.lines(root / "metrics.jsonl")
    assert all(line["map/flicker"] > 0 for line in metrics) and len(metrics) == 2
    steps = [event for event in events if isinstance(event, TrainStep)]
    assert steps[0].maps is not None and steps[0].maps.shape == (6, 2, 4, 6)
    with Image.open(root / "maps" / "step-000001.png") as sheet:
        assert sheet.height > 2 * 3 * 128  # two clips, three rows of 192 x 128 tiles each
    page = write_report(root).read_text()
    assert page.count('<figure class="pair clip">') >= 4 and "data:image/webp" in page and len(page) < 6_000_000
    assert not leftovers(root)


def test_a_resumed_video_run_ends_like_an_undisturbed_one_and_rewinds_its_files(
    tmp_path: Path, video: dict[str, Any]
) -> None:
    video["training"]["iterations"] = 1
    tiny.run_all(video, tmp_path / "run")
    kept = ("rollouts/step-000001.png", "rollouts/step-000001.safetensors")
    for stale in ("samples/step-000002.gif", "samples/step-000002.png", "maps/step-000001.png", *kept):
        (tmp_path / "run" / stale).write_bytes(b"of a part that was lost")
    (tmp_path / "run" / "samples" / "step-000002").mkdir()
    longer = video | {
        "training": video["training"] | {"iterations": 2},
        "generator": video["generator"] | {"fps": 16},  # of the files only
    }
    run = Run(parse_recipe(longer), tmp_path / "run", resume=True)
    assert {path.stem for path in (tmp_path / "run" / "samples").iterdir()} == {"step-000000", "step-000001"}
    assert [path.name for path in (tmp_path / "run" / "maps").iterdir()] == ["step-000000.png"]
    assert {path.stem for path in (tmp_path / "run" / "rollouts").iterdir()} == {"step-000000"}
    for _ in run:
        pass
    tiny.run_all(longer, tmp_path / "calm")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "calm")
    for name in ("samples/step-000002.png", "samples/step-000002.gif", "maps/step-000001.png", *kept):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "calm" / name).read_bytes()


def test_a_picture_run_has_no_clips_and_no_flicker(tmp_path: Path, raw: dict[str, Any]) -> None:
    raw |= {"credit": "advantage_map"}
    raw["training"] |= {"iterations": 1}
    tiny.run_all(raw, tmp_path / "run")
    assert {path.suffix for path in (tmp_path / "run" / "samples").iterdir()} == {".png", ".json"}
    assert "map/flicker" not in tiny.lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert load_sheet(tmp_path / "run" / "samples" / "step-000000.png")[1]["frames"] == 1


def test_prompts_that_are_cut_are_told_at_the_start_and_in_the_first_event(
    tmp_path: Path, raw: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the prompts that the run will deal, not of the whole file; and of the evaluation's."""
    texts = [*tiny.PROMPTS, "a cat and a dog " * 9]
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    (tmp_path / "evaluation.txt").write_text("a cat\n" + "a red car " * 9)
    raw["evaluation"] |= {"prompts": str(tmp_path / "evaluation.txt"), "every": None}
    raw["training"] |= {"iterations": 3}  # six prompts: each of the five
    run = Run(parse_recipe(raw), tmp_path / "run")
    follow(run, Console(width=400))
    said = capsys.readouterr().out
    training, evaluation = run.notices
    assert training.startswith("1 of 5 training prompts longer than the 16 tokens that T5 reads, the rest is cut")
    assert "the first is 'a cat and a dog a cat" in training and training.endswith(" tokens")
    assert evaluation.startswith("1 of 2 evaluation prompts longer")
    assert said.count(training) == said.count(evaluation) == 1
    metrics = tiny.lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["events"] for line in metrics] == [[training, evaluation], [], []]

    raw["training"] |= {"iterations": 1}
    dealt = {prompt.text for prompt in run.session.trainer.prompts.groups(0)}
    told = [notice.split(" prompts")[0] for notice in Run(parse_recipe(raw), tmp_path / "short").notices]
    assert told == (["1 of 2 training"] if texts[-1].strip() in dealt else []) + ["1 of 2 evaluation"]


def test_a_run_resumed_before_its_first_checkpoint_tells_of_cut_prompts_again(
    tmp_path: Path, raw: dict[str, Any]
) -> None:
    with (tmp_path / "prompts.txt").open("a") as file:
        file.write("a cat and a dog " * 9)
    raw["training"] |= {"iterations": 3, "checkpoint_every": 2}
    stopped = Run(parse_recipe(raw), tmp_path / "stopped")
    next(event for event in stopped if isinstance(event, TrainStep))
    assert not list_checkpoints(tmp_path / "stopped" / "checkpoints")
    tiny.run_all(raw, tmp_path / "stopped", resume=True)
    tiny.run_all(raw, tmp_path / "calm")
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "calm")
    assert len(tiny.lines(tmp_path / "calm" / "metrics.jsonl")[0]["events"]) == 1


def test_without_a_run_directory_cut_prompts_are_the_first_event_too(tmp_path: Path, raw: dict[str, Any]) -> None:
    (tmp_path / "prompts.txt").write_text("a cat and a dog " * 9)
    raw["training"] |= {"iterations": 2}
    first, second = train(parse_recipe(raw))
    assert len(first.events) == 2 and second.events == ()


RATED = """
class Rated:
    def __init__(self, *, media_fps=16.0, share=1.0):
        self.rate = media_fps
    def __call__(self, media, prompts):
        return media.mean((1, 2, 3, 4)) + self.rate
"""


@pytest.fixture
def rated(tmp_path: Path, video: dict[str, Any]) -> dict[str, Any]:
    """A reward that adds the rate of the clips, as it was told."""
    (tmp_path / "rated.py").write_text(RATED)
    video["rewards"] = {"pace": {"reward": f"{tmp_path / 'rated.py'}:Rated"}}
    video["training"] |= {"iterations": 1}
    return video


@pytest.mark.parametrize(
    ("options", "rate"), [({}, 4), ({"share": 0.5}, 4), ({"media_fps": 4.0}, 4), ({"media_fps": 16}, 16)]
)
def test_a_reward_gets_the_rate_of_the_clips_and_a_difference_is_told(
    tmp_path: Path, rated: dict[str, Any], options: dict[str, float], rate: float
) -> None:
    rated["rewards"]["pace"]["options"] = options
    tiny.run_all(rated, tmp_path / "run")
    (line,) = tiny.lines(tmp_path / "run" / "metrics.jsonl")
    assert rate < line["reward"] < rate + 1
    told = "reward 'pace' has media_fps=16, but the clips have 4 frames per second; left out, it is theirs"
    assert line["events"] == [told] * (rate == 16)


def test_the_rate_of_the_clips_may_not_change_where_a_score_depends_on_it(
    tmp_path: Path, rated: dict[str, Any]
) -> None:
    tiny.run_all(rated, tmp_path / "run")
    rated["generator"] |= {"fps": 8}
    with pytest.raises(UserError, match=r"generator\.fps 4.0 -> 8.0"):
        Run(parse_recipe(rated), tmp_path / "run", resume=True)


def test_files_of_a_run_are_as_the_umask_says(tmp_path: Path, raw: dict[str, Any]) -> None:
    raw["training"] |= {"iterations": 1}
    before = os.umask(0o022)
    try:
        tiny.run_all(raw, tmp_path / "run")
    finally:
        os.umask(before)
    found = list((tmp_path / "run").rglob("*"))
    assert sum(path.suffix == ".safetensors" for path in found) == 5
    wrong = [path for path in found if path.stat().st_mode & 0o777 != (0o755 if path.is_dir() else 0o644)]
    assert not wrong
