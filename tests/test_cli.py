"""The command line: what it prints, how it refuses, what it leaves behind."""

from __future__ import annotations

import json
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data as photos
from typer.testing import CliRunner

import tiny
import tiny_wan
from test_lock import held_elsewhere
from vipo.cli import app, main
from vipo.recipe import parse_recipe
from vipo.run import Run
from vipo.vbench import DIMENSIONS

COMMANDS = ["train", "sample", "maps", "evaluate", "vbench", "report", "compare", "export", "list"]


class Said(NamedTuple):
    code: int
    out: str
    err: str


Vipo = Callable[..., Said]


@pytest.fixture
def vipo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Vipo:
    """``vipo ARGUMENTS`` in this process."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("VIPO_DEBUG", raising=False)

    def call(*arguments: str | Path) -> Said:
        monkeypatch.setattr(sys, "argv", ["vipo", *map(str, arguments)])
        capsys.readouterr()
        with warnings.catch_warnings(), pytest.raises(SystemExit) as stopped:
            main()
        return Said(int(stopped.value.code or 0), *capsys.readouterr())

    return call


def assert_refused(said: Said, *words: str) -> None:
    """Exit code 2, one sentence on the error stream, no trace."""
    assert said.code == 2, said
    sentence = said.err.strip()
    assert sentence.startswith("vipo: ") and "\n" not in sentence and "Traceback" not in said.out + said.err, said
    for word in words:
        assert word in sentence


@pytest.fixture
def raw(tmp_path: Path, model_folder: Path) -> dict[str, Any]:
    return tiny.recipe(model_folder, tmp_path / "prompts.txt", training__iterations=1)


@pytest.fixture
def recipe(tmp_path: Path, raw: dict[str, Any]) -> Path:
    return tiny.write_recipe(tmp_path / "recipe.yaml", raw)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("finished")
    changes = {"training__iterations": 2, "judges": ["brightness"]}
    list(Run(parse_recipe(tiny.recipe(model_folder, folder / "prompts.txt", **changes)), folder / "run"))
    return folder / "run"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0 and f"vipo {command} " in shown.output and "Example:" in shown.output


def test_the_map_of_the_commands_is_complete() -> None:
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    assert all(command in shown for command in COMMANDS)


@pytest.mark.parametrize(("kind", "entry"), [
    ("generators", "flux"), ("backbones", "dinov2"), ("rewards", "redness"), ("recipes", "quickstart")
])  # fmt: skip
def test_list_shows_what_can_be_named_as_a_table_and_as_json(vipo: Vipo, kind: str, entry: str) -> None:
    table, document = vipo("list", kind), vipo("list", kind, "--json")
    assert table.code == document.code == 0 and entry in table.out
    rows = json.loads(document.out)
    assert entry in {next(iter(row.values())) for row in rows}


def test_listing_something_else_is_refused(vipo: Vipo) -> None:
    assert_refused(vipo("list", "planets"), "'planets' cannot be listed", "generators")


def test_train_writes_a_run_and_says_how_it_goes(vipo: Vipo, recipe: Path, tmp_path: Path) -> None:
    said = vipo("train", recipe, "--no-report", "--output", tmp_path / "run")
    assert said.code == 0 and "1/1 reward" in said.out and "ratio 1 ok" in said.out and not said.err
    assert "after 0 iterations" in said.out and "gain over untrained" in said.out
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


def test_a_list_keeps_what_stands_in_brackets(vipo: Vipo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vipo.rewards.find_spec", lambda _package: None)
    shown = " ".join(vipo("list", "rewards").out.replace("│", " ").split())
    state = json.loads(vipo("list", "rewards", "--json").out)
    assert "missing: pip install 'vipo[ocr]'" in [row["state"] for row in state]
    assert "'vipo[ocr]'" in shown and "'vipo[geneval]'" in shown


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


def test_a_lora_that_fits_in_part_is_refused(vipo: Vipo, finished: Path, model_folder: Path, tmp_path: Path) -> None:
    name = "pytorch_lora_weights.safetensors"
    state = load_file(finished / "export" / name)
    one = "transformer.single_transformer_blocks.0.proj_out"
    save_file({key.replace(one, f"{one}x"): tensor for key, tensor in state.items()}, tmp_path / name)
    plain = ["evaluate", model_folder, "--size", 32, "--steps", 1, "--rewards", "redness", "--prompts", "a cat"]
    said = vipo(*plain, "--lora", tmp_path, "--output", tmp_path / "scores")
    assert_refused(said, "has 1 layer (single_transformer_blocks.0.proj_outx) that this model has not")
    assert not (tmp_path / "scores").exists()
    shutil.copy(finished / "export" / name, tmp_path / name)
    assert vipo(*plain, "--lora", tmp_path).code == 0


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


def test_maps_of_a_photograph(vipo: Vipo, tmp_path: Path) -> None:
    Image.fromarray(photos.astronaut()[:256, :192]).save(tmp_path / "photo.png")
    said = vipo("maps", tmp_path / "photo.png", "--output", tmp_path / "maps", "--resolution", "96")
    assert said.code == 0, said
    sheet = Image.open(tmp_path / "maps" / "photo-map.png")
    assert str(tmp_path / "maps" / "photo-map.png") in said.out and sheet.width > sheet.height > 50


def _clip(path: Path, frames: int, *sides: int) -> None:
    """Grey frames, of the sides in turn."""
    made = [Image.new("L", (side, side), k) for k, side in zip(range(frames), cycle(sides), strict=False)]
    made[0].save(path, save_all=True, append_images=made[1:])


BAD_FILES: dict[str, Callable[[Path], object]] = {
    "note.txt": lambda path: path.write_text("not a picture"),
    "text.png": lambda path: path.write_text("not a picture"),
    "cut.png": lambda path: path.write_bytes(Path("photo.png").read_bytes()[:3000]),
    "bomb.png": lambda path: Image.new("1", (9000, 9000)).save(path),
    "dot.png": lambda path: Image.new("L", (1, 1)).save(path),
    "sizes.tiff": lambda path: _clip(path, 2, 30, 20),
    "long.gif": lambda path: _clip(path, 18, 2000),
}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["lost.png"], ["'lost.png' does not exist"]),
        (["note.txt"], ["note.txt", "cannot be read as a picture"]),
        (["photo.png", "note.txt"], ["note.txt", "cannot be read as a picture"]),
        (["photo.png", "text.png"], ["text.png", "cannot be read as a picture", "give a whole PNG"]),
        (["cut.png"], ["cut.png", "cannot be read as a picture", "truncated"]),
        (["bomb.png"], ["bomb.png", "9000 x 9000 pixels", "67108864"]),
        (["dot.png"], ["dot.png", "1 x 1 pixels", "at least 8 a side"]),
        (["sizes.tiff"], ["sizes.tiff", "2 pictures differ in size or depth", "give each as a file"]),
        (["long.gif"], ["long.gif", "2000 x 2000 pixels in each of its first 17 frames", "67108864"]),
        (["photo.png", "--backbone", "resnett"], ["no backbone 'resnett'", "resnet"]),
        (["photo.png", "--aggregation", "sum"], ["aggregation", "variance"]),
        (["photo.png", "--orientation", "upwards"], ["orientation", "border"]),
    ],
)
def test_maps_that_cannot_be_made_are_refused_and_leave_nothing(
    vipo: Vipo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photos.astronaut()[:64, :64]).save("photo.png")
    if options[-1] in BAD_FILES:
        BAD_FILES[options[-1]](Path(options[-1]))
    assert_refused(vipo("maps", *options, "--output", "maps"), *words)
    assert not Path("maps").exists()


def test_pictures_are_sampled_from_a_run_and_from_a_plain_model(
    vipo: Vipo, finished: Path, model_folder: Path, tmp_path: Path
) -> None:
    ours = vipo("sample", finished, "--prompts", "a cat", "--count", 2, "--output", tmp_path / "ours")
    assert ours.code == 0 and len(list((tmp_path / "ours").glob("*.png"))) == 2, ours
    plain = ["sample", model_folder, "--prompts", "a cat", "--steps", 2, "--size", 32, "--output", tmp_path / "plain"]
    assert vipo(*plain).code == 0 and len(list((tmp_path / "plain").glob("*.png"))) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample", "EMPTY", "--prompts", "a cat"], ["neither a run directory nor"]),
        (["sample", "RUN", "--prompts", "lost.txt"], ["'lost.txt' does not exist"]),
        (["sample", "MODEL", "--prompts", "a cat", "--size", "-8"], ["size"]),
        (["evaluate", "MODEL"], ["--rewards"]),
        (["evaluate", "RUN", "--rewards", "rednes"], ["there is no reward 'rednes'"]),
        (["evaluate", "MODEL", "--rewards", "redness", "--size", "32"], ["--prompts"]),
        (["evaluate", "RUN", "--lora", "EMPTY"], ["policy of its own"]),
        (["evaluate", "RUN", "--resume"], ["--output"]),
        (["evaluate", "RUN", "--pictures"], ["--output"]),
        (["evaluate", "RUN", "--prompts", "set:hpd"], ["no prompt set 'hpd'", "set:geneval"]),
        (["sample", "RUN", "--prompts", "this/that", "--names", "prompt"], ["'this/that' cannot be a file name"]),
        (["vbench", "lost.json"], ["'lost.json'", "VBench result"]),
        (["export", "EMPTY"], ["is not a run directory"]),
        (["export", "RUN", "--output", "EMPTY"], ["exists already"]),
    ],
)
def test_targets_that_cannot_be_used_are_refused(
    vipo: Vipo, finished: Path, model_folder: Path, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    places = {"EMPTY": tmp_path, "RUN": finished, "MODEL": model_folder}
    assert_refused(vipo(*[places.get(argument, argument) for argument in arguments]), *words)


def test_evaluate_sets_a_policy_beside_its_base_model(vipo: Vipo, finished: Path) -> None:
    said = vipo("evaluate", finished, "--count", 1, "--json")
    rows = json.loads(said.out)
    assert [(row["reward"], row["model"]) for row in rows] == [
        (reward, model) for reward in ("brightness", "redness") for model in ("base", "policy")
    ]
    logged = [line["values"] for line in tiny.lines(finished / "evaluations.jsonl")]
    base, policy = (sum(logged[k]["redness"]) / 2 for k in (0, -1))
    assert rows[2]["mean"] == pytest.approx(base, abs=1e-5) and rows[3]["mean"] == pytest.approx(policy, abs=1e-5)
    assert rows[3]["gain"]["mean"] == pytest.approx(policy - base, abs=1e-5) and rows[2]["gain"] is None
    table = vipo("evaluate", finished, "--rewards", "brightness", "--prompts", "a cat", "--count", 1)
    assert table.code == 0 and "gain over base" in table.out


def test_evaluate_keeps_a_folder_that_can_be_gone_on_with(
    vipo: Vipo, finished: Path, model_folder: Path, tmp_path: Path
) -> None:
    plain = ["evaluate", model_folder, "--size", 32, "--steps", 2, "--rewards", "redness", "--count", 1]
    ours = [*plain, "--lora", finished / "export", "--prompts", "a cat", "--prompts", "a red car"]
    folder = tmp_path / "evaluation"
    said = vipo(*ours, "--output", folder, "--pictures", "--json")
    rows = json.loads(said.out)
    assert [(row["model"], row["scored"], row["samples"]) for row in rows] == [("base", 2, 2), ("policy", 2, 2)]
    assert json.loads((folder / "evaluation.json").read_text())["summary"] == rows
    assert len((folder / "scores.csv").read_text().splitlines()) == 5
    assert len(list((folder / "pictures").glob("*/*.png"))) == 4 and (folder / "before-after.png").is_file()
    assert_refused(vipo(*ours, "--output", folder), "already holds an evaluation", "--resume")
    shutil.rmtree(folder / "parts")
    before = (folder / "evaluation.json").read_bytes()
    assert vipo(*ours, "--output", folder, "--resume").code == 0
    assert (folder / "evaluation.json").read_bytes() == before
    other = [*plain, "--prompts", "a dog", "--output", folder, "--resume"]
    assert_refused(vipo(*other), "cannot resume", "weights", "prompts", "--output")


def test_what_was_not_scored_is_counted_and_explained(vipo: Vipo, model_folder: Path, tmp_path: Path) -> None:
    reward = tmp_path / "cats.py"
    reward.write_text(
        "import torch\ndef cats(media, prompts):\n"
        "    return torch.tensor([1.0 if 'cat' in p.text else float('nan') for p in prompts])\n"
    )
    plain = ["evaluate", model_folder, "--size", 32, "--steps", 1, "--rewards", f"{reward}:cats", "--count", 1]
    said = vipo(*plain, "--prompts", "a cat", "--prompts", "a dog", "--batch", 1)
    assert said.code == 0 and "1 of 2" in said.out and "no score for 1 of 1 samples from prompt 1 on" in said.err
    none = vipo(*plain, "--prompts", "a dog")
    assert none.code == 0 and "0 of 1" in none.out


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


def test_vbench_prints_the_three_totals_and_names_what_is_missing(vipo: Vipo, tmp_path: Path) -> None:
    results = {name: [dimension.high, []] for name, dimension in DIMENSIONS.items()}
    (tmp_path / "a.json").write_text(json.dumps(results))
    said = vipo("vbench", tmp_path / "a.json")
    assert said.code == 0 and re.search(r"Total\D+100\.00", said.out) and "subject_consistency" in said.out
    del results["scene"]
    (tmp_path / "a.json").write_text(json.dumps(results))
    assert_refused(vipo("vbench", tmp_path / "a.json"), "lack scene", "--partial")
    partial = json.loads(vipo("vbench", tmp_path / "a.json", "--partial", "--json").out)
    assert partial["quality"] == pytest.approx(1.0) and partial["total"] is None and partial["missing"] == ["scene"]


def test_export_writes_what_training_wrote(vipo: Vipo, finished: Path, tmp_path: Path) -> None:
    assert vipo("export", finished, "--output", tmp_path / "out").code == 0
    name = "pytorch_lora_weights.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (finished / "export" / name).read_bytes()


@pytest.mark.slow
def test_a_process_of_its_own_refuses_in_the_same_words() -> None:
    process = tiny.command_line("train", "nowhere.yaml")
    out, err = process.communicate(timeout=60)
    assert_refused(Said(process.returncode, out, err), "'nowhere.yaml' does not exist")
