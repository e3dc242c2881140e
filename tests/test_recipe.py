"""Recipes: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
from vipo.recipe import load_recipe, parse_recipe, read_judges, shipped_recipes
from vipo.types import UserError

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    return tiny.recipe(tmp_path / "model", tmp_path / "prompts.txt")


@pytest.fixture
def file(tmp_path: Path, raw: dict[str, Any]) -> Path:
    return tiny.write_recipe(tmp_path / "recipe.yaml", raw)


def refused(file: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as raised:
        load_recipe(file, overrides)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(path: Path) -> None:
    assert load_recipe(path).name == path.stem
    assert shipped_recipes()[path.stem] == path and load_recipe(path.stem) == load_recipe(path)


def test_the_scalar_twin_differs_in_credit_alone() -> None:
    ours, twin = (load_recipe(name).model_dump() for name in ("quickstart", "quickstart-grpo"))
    assert {key for key in ours if ours[key] != twin[key]} == {"name", "credit"}


def test_what_is_written_loads_as_the_same_recipe(tmp_path: Path, file: Path) -> None:
    recipe = load_recipe(file, ["solver.window={size: 1, starts: 1}", "rewards={redness: {weight: 2.0}}"])
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml())
    assert load_recipe(again) == recipe


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("creditt=sample", "'creditt'; the nearest known one is 'credit'"),
        ("solver.step=3", "'solver.step'; the nearest known one is 'steps'"),
        ("solver.window.sise=2", "'solver.window.sise'; the nearest known one is 'size'"),
        ("optimiser.learning_rate=1", "'optimiser'; the nearest known one is 'optimizer'"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(file: Path, override: str, nearest: str) -> None:
    assert f"unknown key {nearest}" in refused(file, override)


def test_overrides_reach_nested_keys_and_read_numbers(file: Path) -> None:
    recipe = load_recipe(
        file,
        [
            "optimizer.learning_rate=1e-4",
            "optimizer.betas=[0.8, 0.9]",
            "solver.window.size=1",
            "solver.same_noise=false",
            "policy.ema_decay=null",
            "name=a=b",
        ],
    )
    assert recipe.optimizer.learning_rate == 1e-4 and recipe.optimizer.betas == (0.8, 0.9)
    assert recipe.solver.window is not None and recipe.solver.window.size == 1
    assert recipe.solver.same_noise is False and recipe.policy.ema_decay is None and recipe.name == "a=b"


@pytest.mark.parametrize("override", ["credit", "=sample", "optimizer.learning_rate"])
def test_an_override_without_key_or_value_is_refused(file: Path, override: str) -> None:
    assert "not of the form key=value" in refused(file, override)


def test_an_override_that_is_no_yaml_is_refused(file: Path) -> None:
    assert "not a YAML value" in refused(file, "rewards={a: ")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("solver.kind=ode", "no likelihood to train on"),
        ("solver.eta=0", "no likelihood to train on"),
        ("solver.eta=-1", "solver.eta"),
        ("solver.window={size: 3}", "reaches step 3 of steps=3"),
        ("solver.steps=1", "no step to train on"),
        ("solver.train_fraction=0.4", "no step to train on"),
        ("optimizer.per_iteration=7", "optimizer.per_iteration=7 .* 6 samples"),
        ("prompts.group_size=1", "prompts.group_size"),
        ("training.keep_per_group=1", "half best and half worst"),
        ("training.keep_per_group=4", "at most prompts.group_size=3"),
        ("optimizer.learning_rate=fast", r"optimizer.learning_rate: .*number.* \(given: 'fast'\)"),
        ("credit=vipo", "credit: .*'advantage_map'"),
        ("rewards={}", "rewards is empty"),
        ("objective={}", "objective.clip_range is required"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_recipe_that_cannot_train_is_refused_before_anything_is_built(file: Path, override: str, says: str) -> None:
    assert re.search(says, refused(file, override))


@pytest.mark.parametrize(
    ("content", "says"), [("- a\n- b\n", "must be a mapping"), ("a: [1\n", "cannot be read"), ("", "must be a mapping")]
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    assert says in refused(path)


def test_a_missing_recipe_lists_the_shipped_ones() -> None:
    message = refused(Path("nowhere.yaml"))
    assert "does not exist" in message and "quickstart" in message


def child(folder: Path, file_name: str, **keys: Any) -> Path:
    return tiny.write_recipe(folder / file_name, keys)


def test_a_recipe_may_change_some_keys_of_another(tmp_path: Path, file: Path) -> None:
    first = child(tmp_path, "first.yaml", extends=file.name, solver={"eta": 0.2}, rewards={"brightness": 1.0})
    second = load_recipe(child(tmp_path, "second.yaml", extends=first.name, name="second"))
    assert second.solver.eta == 0.2 and second.solver.steps == load_recipe(file).solver.steps
    assert set(second.rewards) == {"brightness"}  # rewards are replaced whole
    assert second.name == "second"


def test_extending_a_missing_recipe_names_it(tmp_path: Path) -> None:
    assert "which does not exist" in refused(child(tmp_path, "lost.yaml", extends="gone.yaml"))


def test_recipes_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    child(tmp_path, "a.yaml", extends="b.yaml")
    assert "extends itself" in refused(child(tmp_path, "b.yaml", extends="a.yaml"))


def test_a_wrong_option_of_a_reward_is_named(raw: dict[str, Any]) -> None:
    raw["rewards"] = {"redness": {"wieght": 2.0}}
    with pytest.raises(UserError, match=r"unknown key 'rewards\.redness.*wieght'"):
        parse_recipe(raw)


def test_a_recipe_is_frozen(file: Path) -> None:
    recipe = load_recipe(file)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]
    assert yaml.safe_load(recipe.to_yaml())["seed"] == 0


def test_precision_no_is_a_name_not_false() -> None:
    assert load_recipe("quickstart", ["training.precision=no"]).training.precision == "no"


def test_comparing_samples_needs_them_to_start_from_one_noise() -> None:
    with pytest.raises(UserError, match="names deviation, which compares the samples of a group"):
        load_recipe("quickstart", ["solver.same_noise=false"])
    assert load_recipe("quickstart", ["solver.same_noise=false", "structuring.sources=[perceptual]"])
    assert load_recipe("quickstart", ["solver.same_noise=false", "credit=sample"])


def test_judges_are_a_list_or_have_options_and_a_reward_may_be_named_twice(tmp_path: Path) -> None:
    plain, named = load_recipe("quickstart"), "{best: {reward: jpeg_compressibility, options: {quality: 90}}}"
    assert list(plain.judges) == ["emoji_judge", "emoji_layout"]
    changed = load_recipe("quickstart", [f"judges={named}"])
    assert changed.judges["best"].reward == "jpeg_compressibility" and list(changed.judges) == ["best"]
    file = tmp_path / "judges.yaml"
    file.write_text("[redness, brightness]")
    assert list(read_judges(file)) == ["redness", "brightness"]
    file.write_text("a: {reward: redness, weight: 2}")
    with pytest.raises(UserError, match=r"unknown key 'judges\.a\.weight'"):
        read_judges(file)
    with pytest.raises(UserError, match="does not exist; give a YAML file"):
        read_judges(tmp_path / "none.yaml")
