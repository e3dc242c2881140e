"""DeepSpeed's ZeRO-2 and ZeRO-3 over two processes against one process; skipped where DeepSpeed is not installed."""

from __future__ import annotations

import importlib
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import gloo
from gloo import together
from test_sharded import (
    ITERATIONS,
    TOLERANCE,
    Case,
    assert_exported,
    assert_same,
    compiled,
    flux,
    furthest,
    run,
    trained,
    waited,
    wan,
)
from test_sharded import wan_folder as wan_folder
from vipo.assemble import build
from vipo.engine import Engine
from vipo.recipe import parse_recipe
from vipo.training.learner import Learner
from vipo.training.saved import list_checkpoints

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="the extra deepspeed is not installed"),
]


def zero_trained(cases: list[Case]) -> list[dict[str, Any]]:
    gloo.spare_deepspeed_its_compiler()
    return trained(cases)


def cases_of(model_folder: Path, wan_folder: Path, scratch: Path) -> dict[str, Case]:
    lora = {"kind": "lora", "rank": 2, "ema_decay": 0.5}
    updates = {"learning_rate": 1e-3, "per_iteration": 2, "max_grad_norm": 1e-3, "schedule": "linear", "warmup": 1}
    several = flux(model_folder, scratch, optimizer=updates, solver__train_fraction=0.5)
    adapted = flux(model_folder, scratch, policy=lora, training__gradient_checkpointing=True)
    return {
        "full, stage 2": (flux(model_folder, scratch), "zero2", ITERATIONS),
        "full, stage 3": (flux(model_folder, scratch), "zero3", ITERATIONS),
        "several updates, stage 2": (several, "zero2", 2),
        "several updates, stage 3": (several, "zero3", 2),
        "lora, stage 3": (adapted, "zero3", 2),
        "wan, stage 2": (wan(wan_folder, scratch, policy=lora), "zero2", 2),
        "wan, stage 3": (wan(wan_folder, scratch), "zero3", 2),
    }


def test_processes_train_as_one(model_folder: Path, wan_folder: Path, tmp_path: Path) -> None:
    cases = cases_of(model_folder, wan_folder, tmp_path)
    alone, both = trained(list(cases.values())), together(zero_trained, 2, list(cases.values()))
    for place, one in enumerate(alone):
        assert_same([rank[place] for rank in both], one, split=False)


def zero_compiled(cases: list[Case]) -> list[dict[str, Any]]:
    gloo.spare_deepspeed_its_compiler()
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # compiles a function while it is imported
    return compiled(cases)


def test_compiled_blocks_train_under_stage_2(model_folder: Path, tmp_path: Path) -> None:
    cases: list[Case] = [(flux(model_folder, tmp_path, training__compile=True), "zero2", 2)]
    (alone,), both = together(compiled, 1, cases), together(zero_compiled, 2, cases)
    assert_same([rank[0] for rank in both], alone[0], split=False)


def zero_run(raw: dict[str, Any], root: Path, *given: Any, **more: Any) -> dict[str, Any]:
    gloo.spare_deepspeed_its_compiler()
    return run(raw, root, *given, **more)


def resumed(raw: dict[str, Any], root: Path, sharding: str) -> dict[str, Any]:
    gloo.spare_deepspeed_its_compiler()
    raw["training"]["sharding"] = sharding
    return run(raw, root, resume=True)


@pytest.fixture
def raw(model_folder: Path, tmp_path: Path) -> dict[str, Any]:
    raw = flux(model_folder, tmp_path)
    raw["training"] |= {"iterations": 2}
    raw["evaluation"] |= {"limit": 3, "samples_per_prompt": 3, "every": None}
    return raw


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_is_saved_in_parts_and_goes_on_in_any_number_of_processes(
    tmp_path: Path, raw: dict[str, Any], stage: int
) -> None:
    one = run(raw, tmp_path / "alone")
    raw["training"]["sharding"] = f"zero{stage}"
    both = tmp_path / "both"
    half = together(zero_run, 2, raw, both, 1)
    (saved,) = list_checkpoints(both / "checkpoints")
    parts = [load_file(saved / f"optimizer-{rank:05d}-of-00002.safetensors") for rank in range(2)]
    cut = [name for name in parts[0] if name in parts[1]]
    assert half[0]["sharded"] and any(name.endswith("exp_avg") for name in cut)
    for processes, sharding in ((1, "none"), (2, f"zero{stage}"), (2, "fsdp2")):
        root = tmp_path / f"on{processes}{sharding}"
        shutil.copytree(both, root)
        ends = together(resumed, processes, raw, root, sharding)
        for end in ends:
            assert furthest(end["weights"], one["weights"]) < TOLERANCE
            assert furthest(end["averages"], one["averages"]) < TOLERANCE
        assert_exported(root, ends[0]["averages"])


def refused_first(raw: dict[str, Any]) -> dict[str, Any]:
    """Train with the first update refused; what the last came to, and what is said of a gradient that is not finite."""
    if raw["training"]["sharding"] != "none":
        gloo.spare_deepspeed_its_compiler()
    judged, asked = Learner._judged, []

    def refusing(self: Learner, report: Any, odd: str) -> tuple[bool, list[str]]:
        asked.append(report["grad_norm"])
        return (True, []) if len(asked) == 1 else judged(self, report, odd)

    session = build(parse_recipe(raw))
    Learner._judged = refusing  # type: ignore[method-assign]
    try:
        first = session.policy.state()
        session.trainer.step()
        assert furthest(first, session.policy.state()) == 0
        session.trainer.step()
    finally:
        Learner._judged = judged  # type: ignore[method-assign]
    weights = session.policy.state()
    engine = session.engine
    backward = engine.backward
    engine.backward = lambda loss, last: backward(loss * torch.nan, last=last)  # type: ignore[method-assign]
    events = session.trainer.step().events
    assert furthest(weights, session.policy.state()) == 0
    return {"weights": weights, "norms": asked, "events": events}


@pytest.mark.parametrize("stage", [2, 3])
def test_a_refused_gradient_leaves_nothing_behind(raw: dict[str, Any], stage: int) -> None:
    one = refused_first({**raw, "training": {**raw["training"], "sharding": "none"}})
    for rank in together(refused_first, 2, {**raw, "training": {**raw["training"], "sharding": f"zero{stage}"}}):
        assert rank["norms"] == pytest.approx(one["norms"], rel=1e-3)
        assert furthest(rank["weights"], one["weights"]) < TOLERANCE
        for (said,) in (rank["events"], one["events"]):  # DeepSpeed does not tell one of the two from the other
            assert re.match(r"gradient norm is (nan|inf), first in '.*' \(66 of 66 trained .*\): update skipped", said)


def left_waiting(stage: int) -> tuple[str, float]:
    """Where gradients are summed up."""
    gloo.spare_deepspeed_its_compiler()
    engine, network = Engine(sharding=f"zero{stage}", timeout=3), torch.nn.Linear(8, 8)
    network, _ = engine.prepare(network, torch.optim.AdamW(network.parameters()))
    engine.backward(network(torch.ones(2, 8)).sum(), last=True)
    engine.wait()
    return waited(engine, lambda: engine.clip([], 1.0))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_process_that_hangs_ends_the_others_within_its_time_out(stage: int) -> None:
    """DeepSpeed's own groups of processes would wait for half an hour."""
    said, seconds = together(left_waiting, 2, stage, grouped=False)[0]
    assert seconds < 7 and "did not answer for training.timeout=3 seconds" in said
