"""``vipo train``: what it prints, how it refuses, what it leaves behind."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import tiny
import tiny_wan
from terminal import Vipo, assert_refused
from test_lock import held_elsewhere


@pytest.fixture
def raw(tmp_path: Path, model_folder: Path) -> dict[str, Any]:
    return tiny.recipe(model_folder, tmp_path / "prompts.txt", training__iterations=1)


@pytest.fixture
def recipe(tmp_path: Path, raw: dict[str, Any]) -> Path:
    return tiny.write_recipe(tmp_path / "recipe.yaml", raw)


def test_train_writes_a_run_and_says_how_it_goes(vipo: Vipo, recipe: Path, tmp_path: Path) -> None:
    said = vipo("train", recipe, "judges=[brightness]", "--no-report", "--output", tmp_path / "run")
    assert said.code == 0 and "1/1 reward" in said.out and "ratio 1 ok" in said.out and not said.err
    assert "after 0 iterations" in said.out and "gain over untrained" in said.out
    assert "redness " in said.out and "redness held out" not in said.out
    assert said.out.count("brightness held out") == 2
    assert (tmp_path / "run" / "export" / "pytorch_lora_weights.safetensors").is_file()


def test_names_that_look_like_markup_are_printed_as_they_are(vipo: Vipo, recipe: Path, tmp_path: Path) -> None:
    odd = ["[/x]", "[bold]", ":heart:"]
    rewards = f"rewards={{'{odd[0]}': {{reward: redness}}}}"
    judges = f"judges={{'{odd[1]}': {{reward: brightness}}, '{odd[2]}': {{reward: redness}}}}"
    output = tmp_path / "[red]"
    said = vipo("train", recipe, rewards, judges, "--output", output)
    assert said.code == 0 and all(name in said.out for name in odd) and f"Report: {output}" in said.out
    assert all(name in vipo("evaluate", output, "--count", 1).out for name in odd)
    compared, sampled = vipo("compare", output, output), vipo("sample", output, "--output", tmp_path / "[/x]")
    assert compared.code == 0 and all(name in compared.out for name in [*odd, str(output)])
    assert sampled.code == 0 and f"samples in {tmp_path / '[/x]'}" in sampled.out
    exported = vipo("export", output, "--output", tmp_path / "[bold]")
    assert exported.code == 0 and str(tmp_path / "[bold]") in exported.out
    for name in odd:
        assert_refused(vipo("train", name), repr(name))


def test_a_prompt_that_cannot_be_written_is_refused(
    vipo: Vipo, recipe: Path, model_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "half.jsonl"
    file.write_text('{"prompt": "a cat"}\n{"prompt": "a \\ud83d cat"}\n')
    said = vipo("train", recipe, f"prompts.file={file}", "--output", tmp_path / "run")
    assert_refused(said, f"entry 2 of '{file}' holds half of a character: 'a \\ud83d cat'")
    assert not (tmp_path / "run").exists()
    assert_refused(vipo("sample", model_folder, "--prompts", "a \udcff cat"), "'a \\udcff cat' is not UTF-8")


def raising(folder: Path) -> str:
    (folder / "mine.py").write_text("def reward(media, prompts):\n    raise RuntimeError('no such luck')\n")
    return f"rewards={{{folder / 'mine.py'}:reward: 1.0}}"


BAD_TRAINING: list[tuple[str, list[str]]] = [
    ("solver.stepps=3", ["solver.stepps", "'steps'"]),
    ("seed", ["key=value"]),
    ("prompts.file=nowhere.txt", ["'nowhere.txt' does not exist"]),
    ("rewards={rednes: 1.0}", ["there is no reward 'rednes'", "'redness'"]),
    ("judges=[rednes]", ["there is no reward 'rednes'"]),
    ("generator.name=fluxx", ["there is no generator 'fluxx'", "'flux'"]),
    ("generator.path=nowhere", ["'nowhere' is not a diffusers pipeline", "embedded:NAME"]),
    ("generator.path=/no/such/folder", ["'/no/such/folder' is not a diffusers pipeline", "no such folder"]),
    ("generator.path=''", ["'' is not a diffusers pipeline"]),
    ("generator.name=wan", ["generator.name=wan reads WanPipeline", "is a FluxPipeline", "set it to flux"]),
    ("generator.name=3", ["generator.name", "valid string"]),
    ("policy.targets='(to_q'", ["policy.targets", "not a regular expression", "unterminated subpattern"]),
    ("policy.targets='a{99999999999999999999}'", ["not a regular expression", "repetition number"]),
    (
        "generator.dtype=float16 training.precision=bf16",
        ["generator.dtype=float16 does not go with", "bf16 with float32, bfloat16"],
    ),
    (
        "generator.dtype=bfloat16 policy.kind=full training.precision=no",
        [
            "generator.dtype=bfloat16 does not go with policy.kind=full",
            "no with float32 or bf16 with float32, bfloat16",
        ],
    ),
    ("generator.path=embedded:nothing", ["nothing"]),
    ("generator.options={guidance: 2}", ["takes no option 'guidance'", "guidance_scale"]),
    ("generator.height=25", ["height=25", "multiples of 8"]),
    ("policy.targets=nothing", ["match none"]),
    ("solver.window={size: 9}", ["the window reaches step"]),
    ("optimizer.learning_rate=.inf", ["optimizer.learning_rate", "inf"]),
    ("name=../x", ["name", "'../x'", "--output"]),
]


@pytest.mark.parametrize(("override", "words"), BAD_TRAINING, ids=[override for override, _ in BAD_TRAINING])
def test_training_that_cannot_start_is_refused_and_leaves_nothing(
    vipo: Vipo, recipe: Path, tmp_path: Path, override: str, words: list[str]
) -> None:
    assert_refused(vipo("train", recipe, *re.split(r" (?=\w+\.\w+=)", override), "--output", tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()


def test_a_recipe_takes_the_adapter_that_reads_its_model(vipo: Vipo, recipe: Path, tmp_path: Path) -> None:
    """Also of another family than the file was written for; and what does not go together is told by a plan too."""
    wan = tiny_wan.save_pipeline(tmp_path / "wan")
    size = ["generator.height=32", "generator.width=48", f"generator.frames={tiny_wan.FRAMES}"]
    said = vipo("train", recipe, f"generator.path={wan}", *size, "--no-report", "--output", tmp_path / "run")
    assert said.code == 0 and "1/1 reward" in said.out, said
    assert vipo("plan", recipe, f"generator.path={wan}", *size).code == 0
    both = ("generator.name=flux reads FluxPipeline", f"{wan} is a WanPipeline", "set it to wan")
    for command in ("train", "plan"):
        assert_refused(vipo(command, recipe, f"generator.path={wan}", "generator.name=flux"), *both)


def test_quantised_weights_are_refused_in_one_sentence(
    vipo: Vipo, recipe: Path, model_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "flux")
    config = folder / "transformer" / "config.json"
    bits = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    config.write_text(json.dumps(json.loads(config.read_text()) | bits))
    words = ("the transformer of", "is quantised", "bitsandbytes", "generator.dtype=bfloat16")
    assert_refused(vipo("train", recipe, f"generator.path={folder}", "--output", tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()
    assert_refused(vipo("plan", recipe, f"generator.path={folder}"), *words)
    assert_refused(vipo("sample", folder, "--prompts", "a cat"), *words)


def test_an_unknown_backbone_is_refused(vipo: Vipo, recipe: Path, tmp_path: Path) -> None:
    overrides = ["credit=advantage_map", "structuring.backbone=dinov3000"]
    assert_refused(vipo("train", recipe, *overrides, "--output", tmp_path / "run"), "no backbone 'dinov3000'", "dinov2")
    assert not (tmp_path / "run").exists()


def test_a_missing_recipe_is_refused(vipo: Vipo) -> None:
    assert_refused(vipo("train", "nowhere.yaml"), "'nowhere.yaml' does not exist", "quickstart")


def test_a_reward_that_raises_is_named(vipo: Vipo, recipe: Path, tmp_path: Path) -> None:
    said = vipo("train", recipe, raising(tmp_path), "--output", tmp_path / "run")
    assert_refused(said, "mine.py:reward", "RuntimeError: no such luck")
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_a_policy_that_diverges_is_explained(vipo: Vipo, recipe: Path, tmp_path: Path) -> None:
    overrides = ["optimizer.learning_rate=1e30", "training.iterations=3", "evaluation.every=null"]
    said = vipo("train", recipe, *overrides, "--no-report", "--output", tmp_path / "run")
    assert_refused(said, "latents became NaN or infinite", "optimizer.learning_rate")
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_a_run_that_learns_nothing_fails_with_the_cause(vipo: Vipo, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def reward(media, prompts):\n    return media.new_full((len(media),), 0.3)\n")
    output = tmp_path / "run"
    overrides = [f"rewards={{{tmp_path / 'mine.py'}:reward: 1.0}}", "training.iterations=8"]
    said = vipo("train", recipe, *overrides, "--output", output)
    sentence = said.err.strip()
    assert said.code == 3 and "\n" not in sentence and "Traceback" not in said.out + said.err
    assert sentence.startswith("vipo: nothing was learned in 3 iterations: ") and "mine.py:reward" in sentence
    assert "iteration 2: " in said.out and "Complete" not in said.out and "Stopped and saved" not in said.out
    assert not (output / "export").exists() and (output / "checkpoints" / "step-000003" / "state.json").is_file()
    assert vipo("report", output).code == 0
    assert "Complete" not in (output / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("attention", "words"),
    [("fast", ["not known to diffusers", "_native_math"]), ("sage", ["no backward"]), ("flex", ["cannot be trained"])],
)
def test_attention_that_cannot_train_is_refused(
    vipo: Vipo, recipe: Path, tmp_path: Path, attention: str, words: list[str]
) -> None:
    said = vipo("train", recipe, f"generator.attention={attention}", "--output", tmp_path / "run")
    assert_refused(said, f"generator.attention={attention!r}", *words)


@pytest.mark.parametrize(
    "lower", [["optimizer.learning_rate=1e-3"], ["solver.eta=0.1", "--allow-changes", "solver.eta"]]
)
def test_the_advice_to_a_diverged_run_can_be_followed(
    vipo: Vipo, recipe: Path, tmp_path: Path, lower: list[str]
) -> None:
    always = ["--no-report", "--output", tmp_path / "run"]
    settings = ["training.checkpoint_every=1", "training.keep_checkpoints=9", "training.iterations=4"]
    assert vipo("train", recipe, *settings[:2], *always).code == 0
    diverged = vipo("train", recipe, *settings, "optimizer.learning_rate=1e30", *always, "--resume")
    assert_refused(diverged, "became NaN or infinite", "--resume --from step-NNNNNN", *[word for word in lower[1:]])
    asked = vipo("train", recipe, *settings, *lower, *always, "--resume", "--from", "step-NNNNNN")
    assert_refused(asked, "there are step-000001, step-000002")
    said = vipo("train", recipe, *settings, *lower, *always, "--resume", "--from", "step-000001")
    assert said.code == 0 and "Removed, because later: step-000002" in said.out, said
    lines = tiny.lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3]
    key, value = lower[0].split("=")
    (event,) = lines[1]["events"]
    assert event.startswith(f"resumed at iteration 1 with {key} ") and event.endswith(f"-> {float(value)}")


def test_a_second_run_in_a_folder_is_refused_and_changes_nothing(vipo: Vipo, recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with held_elsewhere(folder) as holder:
        for more in ([], ["--resume"]):
            (folder / "recipe.yaml").write_text(recipe.read_text())
            said = vipo("train", recipe, "--output", folder, *more)
            assert_refused(said, f"in use by process {holder.pid}", "--output")
        assert sorted(path.name for path in folder.iterdir()) == [".lock", "recipe.yaml"]


def test_resuming_nothing_is_refused_and_leaves_nothing(vipo: Vipo, recipe: Path, tmp_path: Path) -> None:
    assert_refused(vipo("train", recipe, "--output", tmp_path / "run", "--resume"), "there is no such folder")
    assert_refused(vipo("train", recipe, "--output", tmp_path / "run", "--from", "step-000001"), "add --resume")
    assert not (tmp_path / "run").exists()


def test_training_over_a_run_is_refused(vipo: Vipo, recipe: Path, finished: Path) -> None:
    assert_refused(vipo("train", recipe, "--output", finished), "already holds a run", "--resume")


def test_no_permission_is_one_sentence(vipo: Vipo, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_refused(vipo("train", recipe, "--output", tmp_path / "file" / "run"), "file")
