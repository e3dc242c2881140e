"""What only a GPU can show: that attention's backward is right there. ``pytest --run-needs-gpu tests/test_gpu.py``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny

pytestmark = pytest.mark.needs_gpu
SMALL = ("training.iterations=3", "evaluation.limit=4", "prompts.per_iteration=2", "prompts.group_size=4")


@pytest.mark.parametrize("attention", ["auto", "_native_flash", "_native_efficient", "_native_math"])
def test_the_quickstart_learns_with_each_attention(tmp_path: Path, attention: str) -> None:
    # On an H100 cuDNN's attention gave NaN gradients in bfloat16: every update was skipped.
    assert torch.cuda.is_available(), "asked for with --run-needs-gpu, but torch finds no GPU"
    run = tmp_path / "run"
    command = [sys.executable, "-m", "vipo", "train", "quickstart", *SMALL, f"generator.attention={attention}"]
    done = subprocess.run([*command, "--no-report", "--output", run], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    metrics = tiny.lines(run / "metrics.jsonl")
    assert len(metrics) == 3 and all(line["grad_norm"] > 0 and line["skipped"] == 0 for line in metrics)
    weights = load_file(next((run / "export").glob("*.safetensors")))
    assert any(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)
