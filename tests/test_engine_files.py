"""The files of recipes/engines: what they start, with processes of this machine in the place of GPUs."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

import tiny
from gloo import spare_deepspeed_its_compiler, together
from toy_recipes import at_toy_size, toy_model
from vipo.assemble import build
from vipo.recipe import load_recipe, parse_recipe

FOLDER = Path(__file__).parents[1] / "recipes" / "engines"
CONFIGS = sorted(FOLDER.glob("*.yaml"))

STOPS = """
import os, signal
from pathlib import Path
CALLS = 0
def reward(media, prompts):
    global CALLS
    CALLS += 1  # the first is the evaluation's
    marker = os.environ.get("STOP_MARKER")
    if marker and CALLS == 2 and os.environ["RANK"] == "1" and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGTERM)
    return media[:, 0].mean((1, 2, 3))
"""
# In the place of a cluster's: a process per task, and what Slurm tells each.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
export SLURM_NTASKS=2
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!
SLURM_PROCID=0 SLURM_LOCALID=0 "$@"; first=$?
wait $second; other=$?
exit $(( first > other ? first : other ))
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$@" >> "$ASKED"; fi
"""


@pytest.fixture
def recipe(tmp_path: Path, model_folder: Path) -> str:
    (tmp_path / "stops.py").write_text(STOPS)
    rewards = {f"{tmp_path / 'stops.py'}:reward": 1.0}
    raw: dict[str, Any] = tiny.recipe(model_folder, tmp_path / "prompts.txt", rewards=rewards)
    raw["prompts"] |= {"per_iteration": 2}
    raw["training"] |= {"iterations": 2, "checkpoint_every": 1}
    return str(tiny.write_recipe(tmp_path / "recipe.yaml", raw))


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    usual = {**tiny.on_cpu(), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env={**usual, **environment}, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_file_is_one_of_accelerates_and_says_so_many_processes(config: Path) -> None:
    found = load_config_from_file(str(config))
    machines = 2 if "2x8" in config.stem else 1
    assert (found.num_machines, found.num_processes) == (machines, 8 * machines)
    kinds = {"fsdp2": "FSDP", "zero3": "DEEPSPEED", "ddp": "MULTI_GPU"}
    assert str(found.distributed_type.value) == kinds[config.stem.split("-")[0]]
    if "fsdp2" in config.stem:
        assert found.fsdp_config["fsdp_version"] == 2 and not found.fsdp_config["fsdp_cpu_ram_efficient_loading"]
    twin = config.with_name(config.name.replace("-2x8gpu", "-8gpu"))
    where = {"num_machines", "num_processes", "main_process_ip", "main_process_port"}
    ours, theirs = (yaml.safe_load(path.read_text()) for path in (config, twin))
    if "zero3" in config.stem:
        assert ours["deepspeed_config"].pop("deepspeed_multinode_launcher", "standard") == "standard"  # no pdsh
        assert found.deepspeed_config["zero_stage"] == 3
    assert {key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)} <= where


@pytest.mark.long
def test_accelerates_launcher_starts_processes_that_train_together(tmp_path: Path, recipe: str) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / "ddp-8gpu.yaml")]
    vipo = ["-m", "vipo", "train", recipe, "--allow-code", "--no-report", "--output", str(tmp_path / "run")]
    ended = run([*launch, "--num_processes", "2", *vipo])
    assert ended.returncode == 0 and "2 processes." in ended.stdout, ended.stderr
    assert [line["iteration"] for line in tiny.lines(tmp_path / "run" / "metrics.jsonl")] == [0, 1]


@pytest.mark.slow
def test_the_slurm_script_stops_goes_back_into_the_queue_and_goes_on(tmp_path: Path, recipe: str) -> None:
    tools, asked = tmp_path / "bin", tmp_path / "asked"
    tools.mkdir()
    python = f'#!/usr/bin/env bash\nexec {sys.executable} "$@"\n'
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": python}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(stat.S_IRWXU)
    command = ["bash", str(FOLDER / "slurm.sh"), str(tmp_path / "run"), recipe, "--allow-code", "--no-report"]
    slurm = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "here",
        "MASTER_PORT": str(20000 + os.getpid() % 20000),
        "ASKED": str(asked),
    }
    stopped = run(command, STOP_MARKER=str(tmp_path / "marker"), **slurm)
    assert stopped.returncode == 130 and asked.read_text() == "requeue 7\n", stopped.stderr
    assert [line["iteration"] for line in tiny.lines(tmp_path / "run" / "metrics.jsonl")] == [0]
    ended = run(command, **slurm)
    assert ended.returncode == 0 and "Going on after iteration 1." in ended.stdout, ended.stderr
    assert [line["iteration"] for line in tiny.lines(tmp_path / "run" / "metrics.jsonl")] == [0, 1]
    assert asked.read_text() == "requeue 7\n"
    assert run(["bash", str(FOLDER / "slurm.sh")], **slurm).returncode == 2


LAUNCH = re.compile(r"(?:torchrun|accelerate launch)\b(?P<launcher>.*?) -m vipo train (?P<words>[^\n]*)", re.DOTALL)
OUTPUT = re.compile(r" --output \S+")


def launches() -> dict[str, tuple[str, list[str], str]]:
    """The launch lines in the comments of recipes and engine files: recipe, overrides, what cuts its weights."""
    found = {}
    for path in (*FOLDER.parent.glob("*.yaml"), *CONFIGS):
        comments = "\n".join(line[1:].strip() for line in path.read_text("utf-8").splitlines() if line.startswith("#"))
        for match in LAUNCH.finditer(comments.replace("\\\n", "")):
            name, *words = OUTPUT.sub("", match["words"]).split()
            overrides = [word for word in words if "=" in word]
            recipe = load_recipe(name, overrides)
            sharding = "fsdp2" if "fsdp2" in match["launcher"] else recipe.training.sharding
            assert "zero3" not in match["launcher"] or sharding == "zero3"
            found[f"{path.stem}: {match[0]}"] = (name, overrides, sharding)
    return found


def two_steps(cases: list[tuple[dict[str, Any], str]]) -> list[list[dict[str, float]]]:
    """The metrics of two iterations of each recipe, as this process has them."""
    found = []
    if any(sharding == "zero3" for _, sharding in cases):
        spare_deepspeed_its_compiler()
    for raw, sharding in cases:
        session = build(parse_recipe({**raw, "training": {**raw["training"], "sharding": sharding}}))
        assert session.engine.ranks == 2 and session.engine.in_step == (sharding != "none")
        found.append([dict(session.trainer.step().metrics) for _ in range(2)])
    return found


@pytest.mark.slow
def test_every_launch_line_in_a_header_trains_in_two_processes_at_toy_size(tmp_path: Path, model_folder: Path) -> None:
    lines = launches()
    assert len(lines) >= 6 and {cut for _, _, cut in lines.values()} == {"none", "fsdp2", "zero3"}
    cases, seen = [], set()
    for name, overrides, cut in lines.values():
        recipe = load_recipe(name, overrides)
        alike = (recipe.generator.name, recipe.policy.kind, cut)  # at toy size 14B is 1.3B, and two machines are one
        if alike not in seen and (cut != "zero3" or find_spec("deepspeed")):
            seen.add(alike)
            toy = toy_model(str(recipe.generator.name), tmp_path / str(len(seen)), model_folder)
            raw = at_toy_size(recipe, toy, tmp_path / "prompts.txt").model_dump(mode="json")
            raw["prompts"]["per_iteration"] = 2
            cases.append((raw, cut))
    first, second = together(two_steps, 2, cases)
    assert first == second and all(step["grad_norm"] > 0 and step["skipped"] == 0 for run in first for step in run)
