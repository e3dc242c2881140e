"""The best checkpoint of a run: kept, found again after a kill, opened; and a run that its judge ends."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from terminal import Vipo, assert_refused
from vipo.errors import UserError
from vipo.recipe import parse_recipe
from vipo.report.page import write_report
from vipo.runs.directory import RunDirectory
from vipo.runs.run import Evaluated, Run
from vipo.runs.target import open_target
from vipo.runs.trained import open_run
from vipo.training.saved import list_checkpoints

JUDGE = "watched"
# Its score is told by how many evaluations are on record, so a test says how the run goes, and a resume goes the same.
TABLE = """
from pathlib import Path
class Judge:
    def __init__(self, table):
        self.log, self.table = Path({run!r}) / "evaluations.jsonl", table
    def __call__(self, media, prompts):
        done = len(self.log.read_text().splitlines()) if self.log.exists() else 0
        return media.new_full((len(media),), self.table[done])
"""
PROMPTS = [*tiny.PROMPTS, "a dog", "a tree"]


@pytest.fixture
def recipe_of(tmp_path: Path, model_folder: Path) -> Callable[..., dict[str, Any]]:
    """A recipe for ``tmp_path/run`` whose evaluations, one after each iteration, come to these scores."""
    (tmp_path / "judge.py").write_text(TABLE.format(run=str(tmp_path / "run")))

    def recipe(table: Sequence[float], **training: Any) -> dict[str, Any]:
        raw = tiny.recipe(model_folder, tmp_path / "prompts.txt", policy__ema_decay=0.5)
        (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
        options = {"table": list(table)}
        raw["judges"] = {JUDGE: {"reward": f"{tmp_path / 'judge.py'}:Judge", "options": options}}
        raw["evaluation"] |= {"every": 1, "limit": 6}
        usual = {"iterations": len(table) - 1, "checkpoint_every": 10, "keep_checkpoints": 1}
        raw["training"] |= usual | training
        raw["prompts"] |= {"per_iteration": 1, "group_size": 2}
        return raw

    return recipe


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, but for wall times and TensorBoard's own."""
    files = [path for path in folder.rglob("*") if path.is_file() and "tensorboard" not in path.parts]
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files
        if path.name not in ("timing.jsonl", "report.html")
    }


def kept(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder / "checkpoints")]


class Dies(Exception):  # noqa: N818 - what a kill is here
    """In the place of SIGKILL."""


def killed(raw: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, method: str) -> None:
    """The run, dead at the first call of a method."""

    def die(*_given: Any) -> None:
        raise Dies

    with monkeypatch.context() as patched, pytest.raises(Dies):
        patched.setattr(owner, method, die)
        tiny.run_all(raw, folder)


def test_the_best_is_kept_found_again_and_what_was_evaluated(
    tmp_path: Path, recipe_of: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, vipo: Vipo
) -> None:
    raw, folder = recipe_of([0.1, 0.3, 0.9, 0.9], keep_best=JUDGE), tmp_path / "run"
    best_by = [event.best_by for event in Run(parse_recipe(raw), folder) if isinstance(event, Evaluated)]
    assert best_by == [JUDGE, JUDGE, JUDGE, None]  # a tie is no better
    assert kept(folder) == ["step-000002", "step-000003"]
    undisturbed = contents(folder)

    average = load_file(folder / "checkpoints" / "step-000002" / "ema.safetensors")
    _, model = open_run(folder, checkpoint="best")
    assert all(torch.equal(value, average[name]) for name, value in model.policy.state().items())
    logged = tiny.lines(folder / "evaluations.jsonl")[2]["values"]["redness"]
    best = open_target(str(folder), checkpoint="best")
    scores = best.evaluate(best.evaluation_prompts(), ["redness"], samples_per_prompt=1, steps=None).scores
    assert scores["policy"]["redness"].tolist() == pytest.approx(logged, abs=1e-5)
    assert best.told == (f"Best by {JUDGE}: iteration 2 (0.9), kept as '{folder}/checkpoints/step-000002'.",)
    page = write_report(folder).read_text(encoding="utf-8")
    assert page.count('class="ring"') == 2 and "2 (best)" in page and "kept in checkpoints/step-000002" in page

    shutil.rmtree(folder)
    killed(raw, folder, monkeypatch, Run, "_save_if_missing")  # the evaluation is on record, its checkpoint is not
    assert kept(folder) == [] and len(tiny.lines(folder / "evaluations.jsonl")) == 2
    going_on = iter(Run(parse_recipe(raw), folder, resume=True))
    while next(going_on).iteration < 2:  # killed again, with the best alone to go on from
        pass
    del going_on
    assert kept(folder) == ["step-000002"]
    run = tiny.run_all(raw, folder, resume=True)
    assert contents(folder) == undisturbed and run.best is not None and "iteration 2 (0.9)" in run.best

    exported = vipo("export", folder, "--checkpoint", "best")
    assert exported.code == 0 and exported.out.strip() == f"{folder}/export-best" and "iteration 2" in exported.err
    names = [f"{place}/pytorch_lora_weights.safetensors" for place in ("export-best", "export")]
    assert (folder / names[0]).read_bytes() != (folder / names[1]).read_bytes()
    shutil.copytree(folder / "checkpoints" / "step-000002", tmp_path / "copy")
    given = (tmp_path / "copy", "--output", tmp_path / "again")  # with the recipe that is in it
    assert vipo("export", *given, "--dtype", "bfloat16").code == 0
    ours, theirs = (load_file(path) for path in (tmp_path / "again" / names[1][7:], folder / names[0]))
    assert all(torch.equal(ours[name], value.bfloat16()) for name, value in theirs.items())
    assert_refused(vipo("export", tmp_path / "copy"), "lies in no run", "--output FOLDER")
    assert_refused(vipo("export", folder, "--checkpoint", "step-000009"), "there are step-000002, step-000003")
    inside = folder / "checkpoints" / "step-000002"
    assert_refused(vipo("sample", inside, "--checkpoint", "best"), "is one checkpoint; leave out --checkpoint")


def test_where_nothing_is_better_than_the_untrained_model_that_is_said(
    tmp_path: Path, recipe_of: Callable[..., dict[str, Any]], vipo: Vipo
) -> None:
    raw, folder = recipe_of([0.9, 0.5], keep_best=JUDGE), tmp_path / "run"
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", raw)
    said = vipo("train", recipe, "--allow-code", "--output", folder)
    assert said.code == 0 and f"Best by {JUDGE}: the untrained model (0.9); no later evaluation was better" in said.out
    assert kept(folder) == ["step-000001"] and "nothing better was found" in (folder / "report.html").read_text()
    for command in ("export", "sample"):
        words = ("nothing better than the untrained model was found", "there are step-000001")
        assert_refused(vipo(command, folder, "--checkpoint", "best"), *words)
    plain = vipo("export", folder)
    assert plain.code == 0 and not plain.err


def test_a_run_ends_when_its_judge_has_fallen_and_says_how_to_go_on(
    tmp_path: Path, recipe_of: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, vipo: Vipo
) -> None:
    raw, folder = recipe_of([0.1, 0.9, 0.4, 0.3], stop_when=JUDGE), tmp_path / "run"
    assert parse_recipe(raw).training.keep_best == JUDGE  # the best is kept
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", raw)
    words = ("train", recipe, "--allow-code", "--no-report", "--output", folder)
    said, why = vipo(*words), f"stopped by training.stop_when: {JUDGE} fell by 0.5 [0.5, 0.5]"
    assert said.code == 0 and f"Ended after iteration 2 of 3, {why}" in said.out and not said.err
    assert kept(folder) == ["step-000001", "step-000002"] and (folder / "export").is_dir()
    last = tiny.lines(folder / "metrics.jsonl")[-1]
    assert last["iteration"] == 1 and last["events"][-1] == last["stopped"] and last["stopped"].startswith(why)
    assert f"Ended after 2 of 3 iterations, {why}" in write_report(folder).read_text(encoding="utf-8")
    undisturbed = contents(folder)

    shutil.rmtree(folder)
    killed(raw, folder, monkeypatch, RunDirectory, "log_stop")  # all is decided, and not yet told
    assert "stopped" not in tiny.lines(folder / "metrics.jsonl")[-1]
    again = vipo(*words, "--resume")
    assert again.code == 0 and why in again.out and contents(folder) == undisturbed
    faster = "optimizer.learning_rate=0.5"
    refused = vipo(*words, "--resume", faster)
    assert_refused(refused, "it would end at once, stopped by", "learning_rate 0.01 -> 0.5 would change nothing")
    assert "give training.stop_when=null, an earlier checkpoint" in refused.err and contents(folder) == undisturbed

    how = re.search(r"Go on with:\n  .* (train .*)\n", again.out)
    assert how is not None
    on = vipo(*how[1].split())
    assert on.code == 0 and "another metrics.jsonl" not in on.out and "Going on after iteration 2" in on.out
    lines = tiny.lines(folder / "metrics.jsonl")
    assert lines[2]["events"] == [f"resumed at iteration 2 with training.stop_when {JUDGE} -> null"]
    assert lines[1] == last and kept(folder) == ["step-000001", "step-000003"]


@pytest.mark.parametrize(("training", "evaluation", "words"), [
    ({"keep_best": "lost"}, {}, r"training\.keep_best='lost' is none of the rewards and.* give watched or redness"),
    ({"stop_when": "lost"}, {}, r"training\.stop_when='lost' is none of the rewards"),
    ({"stop_when": JUDGE}, {"every": None}, r"can stop nothing with evaluation\.every=null"),
    ({"stop_when": JUDGE}, {"limit": 5}, r"the evaluation's 5 are too few; give .* at least 6"),
    ({}, {"limit": 5}, r"guards\.over_optimization=stop goes by .*'s 5 are too few"),
])  # fmt: skip
def test_what_cannot_be_watched_is_refused(
    tmp_path: Path,
    recipe_of: Callable[..., dict[str, Any]],
    training: dict[str, Any],
    evaluation: dict[str, Any],
    words: str,
) -> None:
    raw = recipe_of([0.1, 0.2], **training)
    raw["evaluation"] |= evaluation
    raw["guards"] = {} if training else {"over_optimization": "stop"}
    with pytest.raises(UserError, match=words):
        Run(parse_recipe(raw), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_guidance_than_a_run_was_trained_with_is_said(vipo: Vipo, finished: Path, tmp_path: Path) -> None:
    sample = ("--prompts", "a cat", "--output")
    as_trained, other = (
        vipo("sample", finished, *sample, tmp_path / str(scale), "--guidance-scale", scale) for scale in (3.5, 1.5)
    )
    assert as_trained.code == other.code == 0 and not as_trained.err
    assert "guidance 1.5, but the run trained at 3.5" in other.err
    first, second = (next((tmp_path / str(scale)).glob("*.png")).read_bytes() for scale in (3.5, 1.5))
    assert first != second


def test_a_lora_is_sampled_on_its_base(vipo: Vipo, finished: Path, model_folder: Path, tmp_path: Path) -> None:
    exported = finished / "export" / "pytorch_lora_weights.safetensors"
    how = ("--size", 32, "--steps", 1, "--prompts", "a cat", "--guidance-scale", 2, "--output")
    said = vipo("sample", exported, "--base", model_folder, *how, tmp_path / "ours")
    assert said.code == 0 and "guidance 2, but the run trained at 3.5" in said.err
    assert vipo("sample", model_folder, "--lora", exported, *how, tmp_path / "theirs").code == 0
    ours, theirs = (next((tmp_path / name).glob("*.png")).read_bytes() for name in ("ours", "theirs"))
    assert ours == theirs
    assert_refused(vipo("sample", exported, "--prompts", "a cat"), "is a LoRA", "--base MODEL")
    assert_refused(vipo("sample", finished, "--base", model_folder), "--base is for a LoRA")
    assert_refused(vipo("sample", exported, "--base", model_folder, "--lora", exported), "names a second one")
    assert_refused(vipo("sample", model_folder, "--checkpoint", "best"), "is no run, so it has no checkpoints")
