"""Going on with a run: which checkpoint, which keys may have changed, and what is told of it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from vipo.cli.catalogue import CATALOGUES
from vipo.errors import UserError
from vipo.recipe import parse_recipe
from vipo.report.page import write_report
from vipo.report.run import read_run
from vipo.runs.rules import MEANINGS, OTHERWISE, RULES, Change, changes, rule_of
from vipo.runs.run import Evaluated, Run, train
from vipo.training import stored
from vipo.training.saved import described, list_checkpoints, read_head
from vipo.types import TrainStep

DOCS = Path(__file__).parents[1] / "docs" / "resume.md"


@pytest.fixture
def raw(tmp_path: Path, model_folder: Path) -> dict[str, Any]:
    training = {"iterations": 4, "precision": "no", "checkpoint_every": 1, "keep_checkpoints": 9}
    return tiny.recipe(model_folder, tmp_path / "prompts.txt", training=training, evaluation__every=None)


def changed(raw: dict[str, Any], **by_key: Any) -> dict[str, Any]:
    """A recipe with other values; ``__`` for the dot."""
    other = {key: dict(value) if isinstance(value, dict) else value for key, value in raw.items()}
    for key, value in by_key.items():
        *section, leaf = key.split("__")
        (other[section[0]] if section else other)[leaf] = value
    return other


def events(folder: Path) -> dict[int, list[str]]:
    told = {line["iteration"]: line["events"] for line in tiny.lines(folder / "metrics.jsonl")}
    return {iteration: said for iteration, said in told.items() if said}


def checkpoints(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder / "checkpoints")]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, but for wall times and TensorBoard's own."""
    files = [path for path in folder.rglob("*") if path.is_file() and "tensorboard" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name != "timing.jsonl"}


# --- the rules ---------------------------------------------------------------------------------------------------


def test_every_rule_is_of_a_key_that_there_is_and_every_key_has_one() -> None:
    keys = {row["key"]: row["on resume"] for row in CATALOGUES["keys"]()}
    sections = {key.rsplit(".", 1)[0] for key in keys}
    inputs = {key for key in RULES if key.startswith("inputs.")}
    assert {key.removeprefix("inputs.") for key in inputs} <= keys.keys() | sections | {"packages"}
    assert set(RULES) - inputs <= keys.keys() | sections
    assert set(keys.values()) == set(MEANINGS)
    assert keys["optimizer.learning_rate"] == keys["evaluation.prompts"] == "recorded"
    assert keys["generator.path"] == keys["policy.rank"] == keys["prompts.group_size"] == keys["seed"] == "never"
    assert keys["credit"] == keys["solver.eta"] == keys["structuring.sources"] == "on request"
    assert keys["training.iterations"] == keys["generator.text_cache"] == "free"


def test_the_docs_have_the_rules_as_the_code_has_them() -> None:
    rows = [
        f"| {rule} | {meaning} | {', '.join(f'`{key}`' for key in RULES if RULES[key] == rule) or 'every other key'} |"
        for rule, meaning in MEANINGS.items()
    ]
    page = DOCS.read_text(encoding="utf-8")
    assert OTHERWISE == "on request" and "\n".join(rows) in page


def test_changes_are_found_key_by_key() -> None:
    old = {"a": 1, "b": {"c": [1.0], "d": None}, "judges": {}}
    new = {"a": 1, "b": {"c": [2.0], "d": {"size": 2}}, "judges": {"x": {}}}
    found = list(changes(old, new))
    assert [str(change) for change in found] == [
        "b.c [1.0] -> [2.0]",
        "b.d null -> {'size': 2}",
        "judges {} -> {'x': {}}",
    ]
    assert not list(changes(old, old))


@pytest.mark.parametrize(("path", "old", "new", "moves"), [
    ("evaluation.limit", 2, 1, True), ("evaluation.every", 2, 1, False), ("judges", {}, {"brightness": {}}, False),
    ("judges.brightness", {}, None, False), ("judges.brightness.options.a", 1, 2, True), ("solver.steps", 3, 4, True),
    ("generator.fps", 8, 4, False), ("generator.height", 24, 32, True), ("optimizer.learning_rate", 1, 2, False),
])  # fmt: skip
def test_what_moves_scores_is_known(path: str, old: Any, new: Any, moves: bool) -> None:
    assert Change(tuple(path.split(".")), old, new, rule_of(path)).moves_scores == moves


def test_the_longest_entry_counts() -> None:
    assert rule_of("evaluation.steps") == "recorded" and rule_of("generator.fps") == "free"
    assert rule_of("generator.options.guidance_scale") == rule_of("generator") == OTHERWISE


# --- changes of a run --------------------------------------------------------------------------------------------


def test_a_changed_optimiser_is_applied_and_told_once(tmp_path: Path, raw: dict[str, Any]) -> None:
    short = changed(raw, training=raw["training"] | {"iterations": 2})
    tiny.run_all(short, tmp_path / "run")
    optimizer = {"learning_rate": 1e-20, "weight_decay": 0.5, "betas": [0.5, 0.6], "max_grad_norm": 0.25}
    training = raw["training"] | {"rollout_batch_size": 2, "maps_every": 3}
    other = changed(raw, optimizer=optimizer, training=training)
    run = Run(parse_recipe(other), tmp_path / "run", resume=True)
    (group,) = run.session.trainer.learner.optimizer.param_groups
    assert (group["lr"], group["weight_decay"], tuple(group["betas"])) == (1e-20, 0.5, (0.5, 0.6))
    before = {name: value.clone() for name, value in run.session.policy.state().items()}
    steps = [event for event in run if isinstance(event, TrainStep)]
    assert all(torch.equal(value, before[name]) for name, value in run.session.policy.state().items())
    told = [
        "resumed at iteration 2 with optimizer.learning_rate 0.01 -> 1e-20",
        "resumed at iteration 2 with optimizer.weight_decay 0.0001 -> 0.5",
        "resumed at iteration 2 with optimizer.betas [0.9, 0.999] -> [0.5, 0.6]",
        "resumed at iteration 2 with optimizer.max_grad_norm 1.0 -> 0.25",
        "resumed at iteration 2 with training.rollout_batch_size null -> 2",
    ]
    assert events(tmp_path / "run") == {2: told} and list(steps[0].events) == told and steps[1].events == ()
    assert told[0].replace(">", "&gt;") in write_report(tmp_path / "run").read_text()
    assert tiny.run_all(other, tmp_path / "run", resume=True).start.events == ()


def test_a_change_is_told_again_when_its_iterations_are_lost_and_only_then(tmp_path: Path, raw: dict[str, Any]) -> None:
    raw["training"] |= {"checkpoint_every": 2}
    tiny.run_all(changed(raw, training=raw["training"] | {"iterations": 2}), tmp_path / "run")
    slower = changed(raw, optimizer={"learning_rate": 1e-3})
    lost = iter(Run(parse_recipe(slower), tmp_path / "run", resume=True))
    assert next(lost).iteration == 2  # its line is on disk, its checkpoint is not
    assert 2 in events(tmp_path / "run")
    del lost
    run = Run(parse_recipe(slower), tmp_path / "run", resume=True)
    assert run.start.events and not events(tmp_path / "run")
    list(run)
    assert [len(said) for said in events(tmp_path / "run").values()] == [1]
    shutil.copytree(tmp_path / "run", tmp_path / "kept")
    tiny.run_all(raw, tmp_path / "run", resume=True, checkpoint="step-000002")
    assert not events(tmp_path / "run")  # back to what it began with


def test_what_is_trained_changes_only_on_request(tmp_path: Path, raw: dict[str, Any]) -> None:
    tiny.run_all(changed(raw, training=raw["training"] | {"iterations": 1}), tmp_path / "run")
    before = contents(tmp_path / "run")
    other = parse_recipe(changed(raw, credit="uniform", objective={"clip_range": 0.1}, solver={"steps": 3, "eta": 0.5}))
    with pytest.raises(UserError, match=r"credit sample -> uniform, .*0\.7 -> 0\.5.*0\.2 -> 0\.1") as raised:
        Run(other, tmp_path / "run", resume=True)
    with pytest.raises(UserError, match=r"cannot resume .*: credit"):
        Run(other, tmp_path / "run", resume=True, allow_changes=["solver", "objective.clip_range"])
    assert contents(tmp_path / "run") == before
    words = str(raised.value).split()
    flags = [words[at + 1] for at, word in enumerate(words) if word == "--allow-changes"]
    assert flags == ["credit", "solver.eta", "objective.clip_range"]
    list(train(other, tmp_path / "run", resume=True, allow_changes=flags))
    assert len(events(tmp_path / "run")[1]) == 3


def test_what_never_changes_is_refused_even_on_request(tmp_path: Path, raw: dict[str, Any]) -> None:
    tiny.run_all(changed(raw, training=raw["training"] | {"iterations": 1}), tmp_path / "run")
    other = parse_recipe(changed(raw, seed=1, policy={"rank": 3}, optimizer={"learning_rate": 1.0}))
    with pytest.raises(UserError, match=r"seed 0 -> 1, policy\.rank 2 -> 3, which can never change"):
        Run(other, tmp_path / "run", resume=True)
    for key, said in (
        ("policy.rank", "never change"),
        ("policy", "never change"),
        ("credits", "Did you mean 'credit'"),
    ):
        with pytest.raises(UserError, match=said):
            Run(other, tmp_path / "run", resume=True, allow_changes=[key])
    for option in ({"checkpoint": "step-000001"}, {"allow_changes": ["credit"]}):
        with pytest.raises(UserError, match="add --resume"):
            Run(other, tmp_path / "run", **option)


def test_evaluations_made_another_way_are_not_compared(tmp_path: Path, raw: dict[str, Any]) -> None:
    raw["evaluation"] |= {"every": 1}
    tiny.run_all(changed(raw, training=raw["training"] | {"iterations": 2}), tmp_path / "run")
    other = changed(raw, evaluation=raw["evaluation"] | {"limit": 1, "every": 3}, judges=["brightness"])
    run = Run(parse_recipe(other), tmp_path / "run", resume=True)
    assert [event.iteration for event in run if isinstance(event, Evaluated)] == [2, 3, 4]
    lines = tiny.lines(tmp_path / "run" / "evaluations.jsonl")
    since = [(line["iteration"], line.get("comparable_since")) for line in lines]
    assert since == [(0, None), (1, None), (2, 2), (3, 2), (4, 2)]
    assert [len(line["prompts"]) for line in lines] == [2, 2, 1, 1, 1]
    record = read_run(tmp_path / "run")
    assert [evaluation.iteration for evaluation in record.evaluations] == [2, 3, 4]
    page = write_report(tmp_path / "run").read_text()
    assert "Iteration 2 against iteration 4" in page and "left after iteration 2, right" in page
    again = changed(other, training=raw["training"] | {"iterations": 5})
    tiny.run_all(again, tmp_path / "run", resume=True)  # which changes nothing more
    assert tiny.lines(tmp_path / "run" / "evaluations.jsonl")[-1]["comparable_since"] == 2


def test_one_more_judge_leaves_the_other_scores_comparable(tmp_path: Path, raw: dict[str, Any]) -> None:
    tiny.run_all(changed(raw, training=raw["training"] | {"iterations": 1}), tmp_path / "run")
    tiny.run_all(changed(raw, judges=["brightness"]), tmp_path / "run", resume=True)
    lines = tiny.lines(tmp_path / "run" / "evaluations.jsonl")
    assert [(line["iteration"], sorted(line["values"])) for line in lines] == [
        (0, ["redness"]), (1, ["redness"]), (4, ["brightness", "redness"])
    ]  # fmt: skip
    assert "Iteration 0 (untrained) against iteration 4" in write_report(tmp_path / "run").read_text()


def test_what_only_more_training_could_show_is_refused_where_none_is_left(tmp_path: Path, raw: dict[str, Any]) -> None:
    """Else the recipe on record, the report and the card of the export name a rate that nothing was trained with."""
    short = changed(raw, training=raw["training"] | {"iterations": 1})
    tiny.run_all(short, tmp_path / "run")
    before = contents(tmp_path / "run")
    for other, said in (
        (
            changed(short, optimizer={"learning_rate": 0.5}),
            r"optimizer\.learning_rate 0\.01 -> 0\.5 would change nothing",
        ),
        (changed(short, credit="uniform"), "credit sample -> uniform would change nothing"),
        (changed(short, judges=["brightness"]), "judges.* would change nothing; give more training.iterations"),
    ):
        with pytest.raises(UserError, match=said):
            Run(parse_recipe(other), tmp_path / "run", resume=True, allow_changes=["credit"])
    assert contents(tmp_path / "run") == before
    going_on = iter(Run(parse_recipe(raw), tmp_path / "run", resume=True))
    assert (tmp_path / "run" / "export").is_dir() and [next(going_on).iteration for _ in range(2)] == [1, 2]
    assert checkpoints(tmp_path / "run")[-1] == "step-000002"
    assert not (tmp_path / "run" / "export").exists(), "which policy.init would take for the run's weights"
    del going_on
    with pytest.raises(UserError, match=r"2 iterations are done, more than training\.iterations=1.*--from"):
        Run(parse_recipe(short), tmp_path / "run", resume=True)


# --- which checkpoint --------------------------------------------------------------------------------------------


def test_from_an_earlier_checkpoint_ends_like_a_run_that_never_went_further(
    tmp_path: Path, raw: dict[str, Any]
) -> None:
    raw["evaluation"] |= {"every": 1}
    tiny.run_all(raw, tmp_path / "run")
    write_report(tmp_path / "run")
    for name in ("-best", "-comfyui", "-step-000002", "-step-000004-comfyui", "-of-mine"):
        (tmp_path / "run" / f"export{name}").mkdir()
    tiny.run_all(changed(raw, training=raw["training"] | {"iterations": 2}), tmp_path / "calm")
    run = Run(parse_recipe(raw), tmp_path / "run", resume=True, checkpoint="step-000002")
    assert checkpoints(tmp_path / "run") == ["step-000001", "step-000002"]
    assert run.notes[-1] == (
        "Going on after iteration 2. What was logged of 2 later iterations is dropped. Removed, because later:"
        " step-000004, step-000003."
    )
    left = sorted(path.name for path in (tmp_path / "run").glob("export*"))
    assert left == ["export-of-mine", "export-step-000002"] and not (tmp_path / "run" / "report.html").exists()
    ours, calm = contents(tmp_path / "run"), contents(tmp_path / "calm")
    logs = [name for name in calm if name.endswith("s.jsonl") or name.startswith("samples")]
    assert logs and all(ours[name] == calm[name] for name in logs)
    list(run)
    tiny.run_all(raw, tmp_path / "whole")
    ours, whole = contents(tmp_path / "run"), contents(tmp_path / "whole")
    assert ours == whole


def test_the_chosen_checkpoint_stays_until_a_newer_one_is_whole(
    tmp_path: Path, raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.run_all(raw, tmp_path / "run")
    single = changed(raw, training=raw["training"] | {"keep_checkpoints": 1})
    run = Run(parse_recipe(single), tmp_path / "run", resume=True, checkpoint="step-000001")
    assert checkpoints(tmp_path / "run") == ["step-000001"]
    write = stored.save_file

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stored, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        list(run)
    assert checkpoints(tmp_path / "run") == ["step-000001"]
    monkeypatch.setattr(stored, "save_file", write)
    tiny.run_all(single, tmp_path / "run", resume=True)
    assert checkpoints(tmp_path / "run") == ["step-000004"]


def test_a_checkpoint_that_was_kept_elsewhere_is_taken_by_its_path(tmp_path: Path, raw: dict[str, Any]) -> None:
    tiny.run_all(raw, tmp_path / "run")
    (tmp_path / "a b").mkdir()
    kept = (tmp_path / "run" / "checkpoints" / "step-000002").rename(tmp_path / "a b" / "kept")
    run = Run(parse_recipe(raw), tmp_path / "run", resume=True, checkpoint=str(kept))
    assert checkpoints(tmp_path / "run") == ["step-000001", "step-000002"] and run.iteration == 2 and kept.is_dir()
    list(run)
    tiny.run_all(raw, tmp_path / "whole")
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_a_checkpoint_that_is_not_there_or_not_of_this_run_is_refused(tmp_path: Path, raw: dict[str, Any]) -> None:
    tiny.run_all(raw, tmp_path / "run")
    short = changed(raw, training=raw["training"] | {"iterations": 1, "checkpoint_every": 5})
    tiny.run_all(short, tmp_path / "short")
    before = contents(tmp_path / "run"), contents(tmp_path / "short")
    recipe = parse_recipe(raw)
    with pytest.raises(UserError, match=r"no checkpoint 'step-000009'; .* there are step-000001, .*step-000004"):
        Run(recipe, tmp_path / "run", resume=True, checkpoint="step-000009")
    foreign = str(tmp_path / "run" / "checkpoints" / "step-000004")
    with pytest.raises(UserError, match=r"holds 4 iterations, .* a log of 1"):
        Run(recipe, tmp_path / "short", resume=True, checkpoint=foreign)
    shutil.rmtree(tmp_path / "short" / "checkpoints")
    with pytest.raises(UserError, match="there is none yet"):
        Run(recipe, tmp_path / "short", resume=True, checkpoint="step-000001")
    damaged = tmp_path / "run" / "checkpoints" / "step-000002" / "optimizer.safetensors"
    damaged.write_bytes(b"\x00" * 64)
    with pytest.raises(UserError, match="cannot be read"):
        Run(recipe, tmp_path / "run", resume=True, checkpoint="step-000002")
    ours = contents(tmp_path / "run")
    assert {name for name in ours if ours[name] != before[0].get(name)} == {str(damaged.relative_to(tmp_path / "run"))}


# --- where there is nothing yet ----------------------------------------------------------------------------------


def test_there_must_be_a_run_to_go_on_with(tmp_path: Path, raw: dict[str, Any]) -> None:
    recipe = parse_recipe(raw)
    with pytest.raises(UserError, match=r"cannot resume .*nowhere': there is no such folder; leave out --resume"):
        Run(recipe, tmp_path / "nowhere", resume=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"cannot resume .*empty': it holds no run"):
        Run(recipe, tmp_path / "empty", resume=True)
    assert not (tmp_path / "nowhere").exists() and not list((tmp_path / "empty").iterdir())


def test_a_run_without_a_checkpoint_yet_begins_again_and_says_so(tmp_path: Path, raw: dict[str, Any]) -> None:
    raw["training"] |= {"checkpoint_every": 9}
    stopped = iter(Run(parse_recipe(raw), tmp_path / "run"))
    assert [next(stopped).iteration for _ in range(3)] == [0, 0, 1]
    run = Run(parse_recipe(raw), tmp_path / "run", resume=True)
    assert run.notes[-1].endswith("has no checkpoint yet: it begins again at iteration 0.")
    list(run)
    tiny.run_all(raw, tmp_path / "whole")
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


# --- one writer --------------------------------------------------------------------------------------------------


def test_an_abandoned_run_neither_locks_out_nor_writes_on(tmp_path: Path, raw: dict[str, Any]) -> None:
    abandoned = train(parse_recipe(raw), tmp_path / "run")
    assert next(abandoned).iteration == 0  # kept alive, as a notebook would
    list(train(parse_recipe(raw), tmp_path / "run", resume=True))
    after = contents(tmp_path / "run")
    with pytest.raises(UserError, match="taken over by a later run"):
        next(abandoned)
    assert contents(tmp_path / "run") == after and ".lock" not in after


def test_changing_the_number_of_processes_is_told(tmp_path: Path, raw: dict[str, Any]) -> None:
    tiny.run_all(changed(raw, training=raw["training"] | {"iterations": 1}), tmp_path / "run")
    state = tmp_path / "run" / "checkpoints" / "step-000001" / "state.json"
    state.write_text(described(replace(read_head(state.parent), processes=2)))
    tiny.run_all(raw, tmp_path / "run", resume=True)
    assert events(tmp_path / "run") == {1: ["resumed at iteration 1 with processes 2 -> 1"]}
    assert load_file(state.parent / "policy.safetensors")
