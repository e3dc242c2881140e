"""``vipo evaluate`` and ``vipo vbench``; and what no command can be pointed at."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import tiny
from terminal import Vipo, assert_refused
from vipo.evaluation.vbench import DIMENSIONS


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
