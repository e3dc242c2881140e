"""What a run may overwrite, adopt, delete or believe of the folder it is given."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from vipo.errors import UserError
from vipo.recipe import parse_recipe
from vipo.runs.inputs import fingerprints
from vipo.runs.run import Run
from vipo.runs.trained import open_run
from vipo.training.saved import choose, list_checkpoints, prune


@pytest.fixture
def raw(tmp_path: Path, model_folder: Path) -> dict[str, Any]:
    (tmp_path / "red.py").write_text("def reward(media, prompts):\n    return media[:, 0].mean((1, 2, 3))\n")
    rewards = {f"{tmp_path / 'red.py'}:reward": 1.0}
    raw = tiny.recipe(model_folder, tmp_path / "prompts.txt", rewards=rewards)
    raw["training"] |= {"iterations": 2, "checkpoint_every": 1, "keep_checkpoints": 5}
    return raw


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make_checkpoint(folder: Path, name: str) -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / "state.json").write_text("{}")
    return folder / name


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path, raw: dict[str, Any]) -> None:
    project = tmp_path / "project"
    make_checkpoint(project / "checkpoints", "step-best")
    (project / "export").mkdir()
    (project / "export" / "mine.txt").write_text("mine")
    before = contents(project)
    with pytest.raises(UserError, match=r"project' is not empty and holds no run \(it has 'checkpoints'\); choose"):
        Run(parse_recipe(raw), project)
    with pytest.raises(UserError, match=r"cannot resume .*project': it holds no run"):
        Run(parse_recipe(raw), project, resume=True)
    assert contents(project) == before


def test_an_empty_folder_is_taken(tmp_path: Path, raw: dict[str, Any]) -> None:
    (tmp_path / "run").mkdir()
    assert tiny.run_all(raw, tmp_path / "run").finished


def test_a_run_whose_log_was_emptied_is_still_one(tmp_path: Path, raw: dict[str, Any]) -> None:
    folder = tmp_path / "run"
    tiny.run_all(raw, folder)
    (folder / "metrics.jsonl").write_text("")
    before = contents(folder)
    with pytest.raises(UserError, match=r"already holds a run; add --resume"):
        Run(parse_recipe(raw | {"seed": 5}), folder)
    with pytest.raises(UserError, match="seed 0 -> 5, which can never change"):
        Run(parse_recipe(raw | {"seed": 5}), folder, resume=True)
    assert contents(folder) == before


def test_lost_lines_of_the_log_are_told(tmp_path: Path, raw: dict[str, Any]) -> None:
    folder = tmp_path / "run"
    tiny.run_all(raw, folder)
    whole = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(whole.removesuffix("\n"))  # the last line is not complete any more
    raw["training"]["iterations"] = 3
    tiny.run_all(raw, folder, resume=True)
    (event,) = tiny.lines(folder / "metrics.jsonl")[-1]["events"]
    assert event == "resumed at iteration 2 with a log of only 1 iterations: lines of metrics.jsonl were lost"


def test_another_digit_in_the_log_is_told(tmp_path: Path, raw: dict[str, Any]) -> None:
    folder = tmp_path / "run"
    tiny.run_all(raw, folder)
    log = folder / "metrics.jsonl"
    log.write_text(log.read_text().replace("0.", "1.", 1))
    raw["training"]["iterations"] = 3
    tiny.run_all(raw, folder, resume=True)
    (event,) = tiny.lines(log)[-1]["events"]
    assert event.startswith("resumed at iteration 2 with another metrics.jsonl than was saved with it")


def test_wall_times_that_were_damaged_stop_no_run_and_stay(tmp_path: Path, raw: dict[str, Any]) -> None:
    folder = tmp_path / "run"
    tiny.run_all(raw, folder)
    timing = folder / "timing.jsonl"
    timing.write_bytes(timing.read_bytes().replace(b"{", b"\xff", 1))
    raw["training"]["iterations"] = 3
    tiny.run_all(raw, folder, resume=True)
    assert len(timing.read_text(errors="replace").splitlines()) == 3


def test_a_checkpoint_without_its_index_is_passed_over_and_said(tmp_path: Path, raw: dict[str, Any]) -> None:
    folder = tmp_path / "run"
    tiny.run_all(raw, folder)
    (folder / "checkpoints" / "step-000002" / "state.json").unlink()
    with pytest.raises(UserError, match=r"step-000002' cannot be read: .*state\.json"):
        open_run(folder)
    run = tiny.run_all(raw, folder, resume=True)
    assert "A newer one is passed over: checkpoint" in run.notes[-1]
    (event,) = tiny.lines(folder / "metrics.jsonl")[-1]["events"]
    assert "passed over: " in event and "step-000002' cannot be read" in event


def test_a_recipe_that_is_not_the_checkpoints_is_said(
    tmp_path: Path, raw: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    tiny.run_all(raw, folder)
    open_run(folder)
    assert not caplog.records
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("eta: 0.7", "eta: 0.6"))
    open_run(folder)
    assert "is not what its checkpoint was trained with: solver.eta 0.7 -> 0.6" in caplog.text


def test_what_a_kill_left_is_cleared_away(tmp_path: Path, raw: dict[str, Any]) -> None:
    """Half a picture, a removal half done, and one checkpoint more than are kept."""
    folder, raw["training"]["keep_checkpoints"] = tmp_path / "run", 1
    tiny.run_all(raw, folder)
    whole = contents(folder)
    (folder / "samples" / ".step-000009.png.partial").write_bytes(b"half")
    (folder / "checkpoints" / ".step-000001.partial").mkdir()
    shutil.copytree(folder / "checkpoints" / "step-000002", folder / "checkpoints" / "step-000001")
    tiny.run_all(raw, folder, resume=True)
    there = {name for name in contents(folder) if not name.startswith("tensorboard")}
    assert there == {name for name in whole if not name.startswith("tensorboard")}
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000002"]


def test_a_lost_recipe_is_no_reason_to_begin_again(tmp_path: Path, raw: dict[str, Any]) -> None:
    folder = tmp_path / "run"
    tiny.run_all(raw, folder)
    (folder / "recipe.yaml").unlink()
    with pytest.raises(UserError, match=r"it has checkpoints but its recipe\.yaml is gone"):
        Run(parse_recipe(raw), folder, resume=True)
    with pytest.raises(UserError, match="already holds a run"):
        Run(parse_recipe(raw), folder)


BOMB = b"a: &a0 [x]\n" + b"".join(
    b"b%d: &a%d [%s]\n" % (k, k, b", ".join([b"*a%d" % (k - 1)] * 10)) for k in range(1, 10)
)
DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "a line of the log": ("metrics.jsonl", lambda whole: whole.replace(b"{", b"[", 1)),
    "bytes of the log": ("metrics.jsonl", lambda whole: b"\xff" + whole),
    "a log of other things": ("evaluations.jsonl", lambda _: b'{"a": 1}\n'),
    "a digit of an evaluation": ("evaluations.jsonl", lambda whole: whole.replace(b"[0.", b"[1.", 1)),
    "the recipe": ("recipe.yaml", lambda _: b"name: [\n"),
    "bytes of the recipe": ("recipe.yaml", lambda _: b"\xff\xfe\x00"),
    "aliases that stand for a billion words": ("recipe.yaml", lambda _: BOMB),
    "an emptied recipe": ("recipe.yaml", lambda _: b""),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_one_sentence_and_leaves_everything(tmp_path: Path, raw: dict[str, Any], what: str) -> None:
    folder, (name, spoil) = tmp_path / "run", DAMAGE[what]
    raw["training"]["iterations"] = 1
    tiny.run_all(raw, folder)
    (folder / name).write_bytes(spoil((folder / name).read_bytes()))
    before = contents(folder)
    with pytest.raises(UserError, match=f"{name}' (is damaged|cannot be read|holds no recipe)") as raised:
        Run(parse_recipe(raw), folder, resume=True)
    assert "\n" not in str(raised.value) and contents(folder) == before


def test_copies_of_checkpoints_are_neither_taken_nor_removed(tmp_path: Path, raw: dict[str, Any]) -> None:
    folder = tmp_path / "run"
    tiny.run_all(raw, folder)
    copies = ["step-best", "step-000003-old", "step-000002.bak", "step-3", "step-0000003"]
    for name in copies:
        shutil.copytree(folder / "checkpoints" / "step-000002", folder / "checkpoints" / name)
    (folder / "samples" / "step-best.png").write_bytes(b"mine")
    raw["training"] |= {"iterations": 3, "keep_checkpoints": 1}
    assert tiny.run_all(raw, folder, resume=True).iteration == 3
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {*copies, "step-000003"}
    assert (folder / "samples" / "step-best.png").read_bytes() == b"mine"


def test_checkpoints_are_ordered_by_number(tmp_path: Path) -> None:
    for name in ("step-1000000", "step-999999", "step-000002"):
        make_checkpoint(tmp_path, name)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000002", "step-999999", "step-1000000"]
    prune(tmp_path, 1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-1000000"]


def test_a_checkpoint_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint 'step-000009'; in .* there is none yet"):
        choose(tmp_path, "step-000009")
    make_checkpoint(tmp_path, "step-000002")
    with pytest.raises(UserError, match=r"there are step-000002"):
        choose(tmp_path, "step-000009")
    assert choose(tmp_path / "nowhere") is None


def test_an_input_that_changed_is_named_and_refused_unless_allowed(tmp_path: Path, raw: dict[str, Any]) -> None:
    folder, prompts, reward = tmp_path / "run", tmp_path / "prompts.txt", tmp_path / "red.py"
    tiny.run_all(raw, folder)
    prompts.write_text(prompts.read_text() + "one more\n")
    reward.write_text(reward.read_text().replace("[:, 0]", "[:, 1]"))
    raw["training"]["iterations"] = 3
    asked = (
        r"inputs\.prompts\.file \w{16} -> \w{16}, inputs\.rewards\..*red\.py:reward .*--allow-changes inputs\.prompts"
    )
    with pytest.raises(UserError, match=asked):
        Run(parse_recipe(raw), folder, resume=True)
    tiny.run_all(raw, folder, resume=True, allow_changes=["inputs.prompts.file", "inputs.rewards"])
    events = tiny.lines(folder / "metrics.jsonl")[-1]["events"]
    changed = {event.split(" ")[5].split("/")[0] for event in events}
    assert changed == {"inputs.prompts.file", "inputs.evaluation.prompts", "inputs.rewards."}
    # Scores of before cannot be compared with those of another reward.
    assert tiny.lines(folder / "evaluations.jsonl")[-1]["comparable_since"] == 2


def test_another_version_of_a_package_is_told(
    tmp_path: Path, raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.run_all(raw, tmp_path / "run")
    monkeypatch.setattr("torch.__version__", "9.9.9")
    raw["training"]["iterations"] = 3
    tiny.run_all(raw, tmp_path / "run", resume=True)
    (event,) = tiny.lines(tmp_path / "run" / "metrics.jsonl")[-1]["events"]
    assert event.startswith("resumed at iteration 2 with inputs.packages.torch ") and event.endswith(" -> 9.9.9")


def test_a_model_folder_is_known_by_its_files(tmp_path: Path, raw: dict[str, Any]) -> None:
    model = tmp_path / "model"
    shutil.copytree(raw["generator"]["path"], model)
    recipe = parse_recipe(raw | {"generator": raw["generator"] | {"path": str(model)}})
    before = fingerprints(recipe)
    assert set(before) > {"generator.path", "prompts.file", "packages.torch"} and "credit" not in before
    weights = next(model.glob("transformer/*.safetensors"))
    whole = bytearray(weights.read_bytes())
    whole[-1] ^= 1
    weights.write_bytes(whole)
    after = fingerprints(recipe)
    assert {key for key in before if before[key] != after[key]} == {"generator.path"}


def flip(file: Path) -> None:
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    file.write_bytes(whole)


def test_a_damaged_checkpoint_is_passed_over_for_the_newest_good_one(tmp_path: Path, raw: dict[str, Any]) -> None:
    raw["training"]["iterations"] = 3
    folder, newest = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-000003"
    tiny.run_all(raw, folder)
    whole = contents(folder)
    flip(newest / "optimizer.safetensors")
    (newest.with_name("step-000002") / "policy.safetensors").unlink()
    run = tiny.run_all(raw, folder, resume=True)
    assert "Going on after iteration 1. " in run.notes[-1] and "A newer one is passed over: checkpoint" in run.notes[-1]
    first, second = tiny.lines(folder / "metrics.jsonl")[1]["events"]
    assert "passed over: " in first and "'optimizer.safetensors' is damaged: its SHA-256" in first
    assert "passed over: " in second and "'policy.safetensors' cannot be read" in second
    ours = contents(folder)
    assert all(
        ours[name] == whole[name] for name in whole if name.startswith(("export/", "checkpoints/step-000003/po"))
    )


def test_without_a_good_checkpoint_nothing_begins_again(tmp_path: Path, raw: dict[str, Any]) -> None:
    folder = tmp_path / "run"
    tiny.run_all(raw, folder)
    for saved in list_checkpoints(folder / "checkpoints"):
        flip(saved / "policy.safetensors")
    before = contents(folder)
    for given in ({}, {"checkpoint": "step-000001"}):
        with pytest.raises(UserError, match=r"step-00000\d' cannot be read: its file 'policy\.safetensors' is damaged"):
            Run(parse_recipe(raw), folder, resume=True, **given)
    with pytest.raises(UserError, match=r"step-000002' cannot be read: its file 'policy\.safetensors' is damaged"):
        open_run(folder)
    assert contents(folder) == before


LIMITED = """
import resource, runpy, sys
limit, sys.argv = int(sys.argv[1]), ["vipo", *sys.argv[2:]]
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
runpy.run_module("vipo", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "what"), [pytest.param(100, "recipe.yaml", marks=pytest.mark.long), (12000, "checkpoints/step-000001")]
)
def test_a_full_disk_is_one_sentence_and_what_is_there_goes_on(
    tmp_path: Path, raw: dict[str, Any], limit: int, what: str
) -> None:
    recipe, folder = tiny.write_recipe(tmp_path / "recipe.yaml", raw), tmp_path / "run"
    arguments = ["train", recipe, "--allow-code", "--no-report", "--output", folder]
    full = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *map(str, arguments)], capture_output=True, text=True
    )
    assert full.returncode == 2 and "Traceback" not in full.stderr, full.stderr
    assert f"run/{what}' cannot be written: " in full.stderr and "File too large" in full.stderr, full.stderr
    going_on = ["--resume"] if (folder / "metrics.jsonl").exists() else []
    tiny.run_all(raw, folder, resume=bool(going_on))
    tiny.run_all(raw, tmp_path / "calm")
    kept = [name for name in contents(tmp_path / "calm") if name.endswith(("s.jsonl", ".safetensors", "yaml"))]
    ours, calm = contents(folder), contents(tmp_path / "calm")
    assert kept and all(ours[name] == calm[name] for name in kept)


def test_a_selection_of_a_file_has_that_files_fingerprint(tmp_path: Path, model_folder: Path) -> None:
    """Also where a question mark follows its name, or it is a folder that ``datasets`` reads."""
    (tmp_path / "list.csv").write_text("prompt,mood\na cat,1\n")
    raw = tiny.recipe(model_folder, tmp_path / "prompts.txt", prompts__file=f"{tmp_path / 'list.csv'}?where=mood<2")
    raw["evaluation"] = {**raw["evaluation"], "prompts": f"hub:{tmp_path}?split=train"}
    first = fingerprints(parse_recipe(raw))
    (tmp_path / "list.csv").write_text("prompt,mood\na dog,1\n")
    second = fingerprints(parse_recipe(raw))
    assert {key for key in first if first[key] != second[key]} == {"prompts.file", "evaluation.prompts"}
