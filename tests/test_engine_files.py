"""The files of recipes/engines: what they start, with processes of this machine in the place of GPUs."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

import tiny

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
    usual = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env={**usual, **environment}, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_file_is_one_of_accelerates_and_says_so_many_processes(config: Path) -> None:
    found = load_config_from_file(str(config))
    machines = 2 if "2x8" in config.stem else 1
    assert (found.num_machines, found.num_processes) == (machines, 8 * machines)
    assert str(found.distributed_type.value) == ("FSDP" if "fsdp2" in config.stem else "MULTI_GPU")
    if "fsdp2" in config.stem:
        assert found.fsdp_config["fsdp_version"] == 2 and not found.fsdp_config["fsdp_cpu_ram_efficient_loading"]
    twin = config.with_name(config.name.replace("-2x8gpu", "-8gpu"))
    where = {"num_machines", "num_processes", "main_process_ip", "main_process_port"}
    ours, theirs = (yaml.safe_load(path.read_text()) for path in (config, twin))
    assert {key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)} <= where


@pytest.mark.slow
def test_accelerates_launcher_starts_processes_that_train_together(tmp_path: Path, recipe: str) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / "ddp-8gpu.yaml")]
    vipo = ["-m", "vipo", "train", recipe, "--no-report", "--output", str(tmp_path / "run")]
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
    command = ["bash", str(FOLDER / "slurm.sh"), str(tmp_path / "run"), recipe, "--no-report"]
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
