"""The loop does not wait for the accelerator, but where it says so; and its guards are as strict as if it did."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

import tiny
from vipo.engine import Engine
from vipo.structuring import PerceptualStructuring
from vipo.structuring.sources import Consensus, Deviation, Perceptual, TextRelevance
from vipo.training.trainer import Trainer
from waits import counted

# What waits in one iteration: whether the latents stayed finite, what the one reward gave and how much of it is
# missing, one transfer for each optimiser step, and what goes into metrics.jsonl, of the scores and of the maps.
ALLOWED = {
    "rollout.py:_check_finite": 1,
    "scoring.py:score": 1,
    "scoring.py:_check_share": 1,
    "learner.py:_accumulate": 1,
    "metrics.py:as_floats": 2,
}
CASES: dict[str, dict[str, Any]] = {
    "sample": {"credit": "sample"},
    "map": {"credit": "advantage_map", "map_source": Deviation()},
    "reward_map": {"credit": "reward_map", "map_source": Consensus()},
    "guard": {"credit": "advantage_map", "map_source": Consensus(), "loss": "guard", "step_weight": "gradient"},
    "detached": {"credit": "advantage_map", "map_source": Deviation(), "ratio": "detached", "kl_weight": 0.1},
    "matching": {"credit": "sample", "loss": "matching", "kind": "ode", "same_noise": False},
    "batches": {"credit": "sample", "rollout_batch_size": 3, "replay_batch_size": 3, "train_fraction": 0.7},
}


def waits_of(trainer: Trainer) -> Counter[str]:
    """Of the second iteration; in the first one it is looked at whether a weight moves."""
    trainer.generator.keep_text(tiny.PROMPTS)
    trainer.step()
    with counted(trainer.generator) as found:
        trainer.step()
    return found


@pytest.mark.parametrize("name", CASES)
def test_an_iteration_waits_for_the_accelerator_only_where_it_says(model_folder: Path, name: str) -> None:
    trainer = tiny.trainer(model_folder, **CASES[name])
    expected = {**ALLOWED, "metrics.py:as_floats": 1 if CASES[name]["credit"] == "sample" else 2}
    assert waits_of(trainer) == expected


def test_best_of_n_and_more_updates_wait_once_each(model_folder: Path) -> None:
    trainer = tiny.trainer(model_folder, credit="sample", keep_per_group=2, per_iteration=2)
    expected = {"learner.py:_accumulate": 2, "metrics.py:as_floats": 1, "trainer.py:_kept": 1}
    assert waits_of(trainer) == {**ALLOWED, **expected}


@pytest.mark.parametrize("orientation", ["background", "border", "border_distance", "skewness", "energy"])
def test_a_perceptual_map_waits_for_its_components_alone(model_folder: Path, orientation: Any) -> None:
    source = Perceptual(PerceptualStructuring(tiny.Patches(), orientation=orientation))
    found = waits_of(tiny.trainer(model_folder, credit="advantage_map", map_source=source))
    own = {place: count for place, count in found.items() if not place.startswith(("components.py", "krylov.py"))}
    assert own == ALLOWED


def test_a_text_map_waits_for_nothing(model_folder: Path) -> None:
    trainer = tiny.trainer(model_folder, credit="advantage_map")
    trainer.map_source = TextRelevance(trainer.generator)
    assert waits_of(trainer) == ALLOWED


@pytest.mark.parametrize("bad", [-1.0, torch.nan, torch.inf])
def test_a_bad_map_is_refused_before_any_weight_moves(model_folder: Path, bad: float) -> None:
    trainer = tiny.trainer(model_folder, credit="advantage_map")
    trainer.map_source = lambda *_: torch.full((8, *tiny.GRID), 1.0).index_fill(1, torch.tensor([0]), bad)
    before = trainer.policy.fingerprint()
    with pytest.raises(ValueError, match="maps must be finite and non-negative"):
        trainer.step()
    assert trainer.policy.fingerprint() == before


@pytest.mark.needs_gpu
def test_cuda_itself_counts_no_other_wait(model_folder: Path) -> None:
    assert torch.cuda.is_available(), "asked for with --run-needs-gpu, but torch finds no GPU"
    trainer = tiny.trainer(
        model_folder,
        device="cuda",
        credit="advantage_map",
        map_source=Deviation(),
        engine=Engine(accelerator=Accelerator(mixed_precision="bf16")),
        scorer=tiny.scorer(_on_the_device),
    )
    trainer.step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    said = [warning for warning in said if "vipo" in Path(warning.filename).parts]  # diffusers encodes as it likes
    waits = [warning for warning in said if "synchronizing CUDA operation" in str(warning.message)]
    places = Counter(f"{Path(warning.filename).name}:{warning.lineno}" for warning in waits)
    assert sum(places.values()) <= sum(ALLOWED.values()), places


def _on_the_device(media: Tensor, prompts: Any) -> Tensor:
    return tiny.redness(media, prompts)
