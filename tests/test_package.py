"""The package as somebody meets it who types ``import vipo``."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from importlib.resources import files
from pathlib import Path

import pytest

import tiny
import vipo
from terminal import imported
from vipo.backbones import BACKBONES
from vipo.generators import GENERATORS
from vipo.recipe import parse_recipe

ADAPTERS = {f"vipo.generators.{name}" for name in GENERATORS} | {f"vipo.backbones.{name}" for name in BACKBONES}
HEAVY = {"peft", "diffusers", "transformers", "tensorboard", "torch.distributed.fsdp"}
POLICY = """
from torch import nn
from vipo.policy import Policy
network = nn.Sequential(nn.Linear(2, 2))
policy = Policy.full(network) if sys.argv[1] == "full" else Policy.lora(network, rank=1, alpha=1, targets="0", seed=0)
policy.begin().state()
"""


def test_dir_lists_what_vipo_offers_and_all_of_it_is_there() -> None:
    offered = {name for name in dir(vipo) if not name.startswith("_")}
    of_modules = {"objective", "sde", "structuring"}
    assert offered == {"PerceptualStructuring", "build", "load_recipe", "metrics_frame", "train"} | of_modules
    assert all(getattr(vipo, name) is not None for name in dir(vipo))
    assert set(vipo.__all__) <= set(dir(vipo))


def test_type_checkers_are_told_that_it_is_typed() -> None:
    assert (files("vipo") / "py.typed").is_file()


def test_no_module_has_the_name_of_something_that_vipo_offers() -> None:
    """Importing a submodule puts it into the package under its name, over whatever was there."""
    modules = {module.name for module in pkgutil.iter_modules(vipo.__path__)}
    assert {"assemble", "runs", "training"} <= modules and not modules & set(vipo.__all__)


def test_building_works_any_number_of_times_also_after_training(model_folder: Path, tmp_path: Path) -> None:
    recipe = parse_recipe(tiny.recipe(model_folder, tmp_path / "prompts.txt", training__iterations=1))
    sessions = [vipo.build(recipe)]
    steps = list(vipo.train(recipe))
    sessions += [vipo.build(recipe), vipo.build(recipe)]
    homes = import_module("vipo.assemble"), import_module("vipo.runs.run")
    assert vipo.build is homes[0].build and vipo.train is homes[1].train
    assert len(steps) == 1 and all(session.recipe == recipe for session in [*sessions, vipo.build(recipe)])


def test_importing_the_package_and_reading_a_recipe_cost_no_torch() -> None:
    assert not imported("import vipo; vipo.load_recipe") & {"torch", *HEAVY}


def test_assembling_imports_no_part_before_it_is_named() -> None:
    loaded = imported("import vipo.assemble")
    assert "vipo.training.trainer" in loaded and "vipo.backbones" in loaded
    assert not loaded & (HEAVY | ADAPTERS | {f"vipo.rewards.{name}" for name in ("rules", "embedded", "clip_family")})


@pytest.mark.parametrize(("kind", "needs"), [("full", False), ("lora", True)])
def test_only_a_lora_needs_peft(kind: str, needs: bool) -> None:
    assert ("peft" in imported(POLICY, kind)) == needs
