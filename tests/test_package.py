"""The package as somebody meets it who types ``import vipo``."""

from __future__ import annotations

import pkgutil
import shutil
import subprocess
import tomllib
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

ROOT = Path(__file__).resolve().parents[1]
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


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not there")
def test_the_quickstart_moves_an_earlier_run_aside_and_says_so(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "constraints.txt", "Makefile"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / ".installed").touch()
    (tmp_path / ".venv" / "bin" / "vipo").symlink_to(
        shutil.which("true") or ""
    )  # what it trains is not the matter here
    run = tmp_path / "runs" / "quickstart"
    told = []
    for number in range(3):
        told.append(
            subprocess.run(["make", "quickstart"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        )
        run.mkdir(parents=True)
        (run / "mine.txt").write_text(str(number))
    kept = {path.parent.name: path.read_text() for path in run.parent.glob("*/mine.txt")}
    assert kept == {"quickstart-1": "0", "quickstart-2": "1", "quickstart": "2"}
    assert "earlier" not in told[0] and "Your earlier runs/quickstart is runs/quickstart-2 now" in told[2]


def test_the_package_names_the_licence_of_each_file_that_ships_with_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    notices = [path for pattern in project["license-files"] for path in ROOT.glob(pattern)]
    assert {ROOT / "LICENSE", *(ROOT / "src").rglob("README.md")} == set(notices)
    sets = (ROOT / "src" / "vipo" / "prompts" / "sets" / "README.md").read_text()
    of_sets = {line.split("|")[-2].strip() for line in sets.splitlines() if line.startswith("| `set:")}
    assert of_sets | {"Apache-2.0"} == set(project["license"].split(" AND "))
