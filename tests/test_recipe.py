"""Recipes: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
from vipo.errors import UserError
from vipo.recipe import load_recipe, parse_recipe, read_judges, shipped_recipes
from vipo.runs.run import train
from vipo.schema import DTYPES_OF, PolicySection

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


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_trains_in_no_dtype_is_refused_and_the_rest_trains(
    tmp_path: Path, model_folder: Path, kind: str, precision: str, dtype: str
) -> None:
    raw = tiny.recipe(model_folder, tmp_path / "prompts.txt", training__iterations=1, training__precision=precision)
    raw["policy"], raw["generator"]["dtype"] = {"kind": kind}, dtype
    if dtype in DTYPES_OF[kind, precision]:
        (step,) = train(parse_recipe(raw))
        assert step.metrics["grad_norm"] > 0 and step.metrics["skipped"] == 0
        return
    with pytest.raises(UserError, match=rf"generator\.dtype={dtype} does not go with policy\.kind={kind} and"):
        parse_recipe(raw)


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


@pytest.mark.parametrize("text", ["rewards={a: ", "name=2024-13-45", "seed=" + "9" * 5000, "name=" + "[" * 5000])
def test_an_override_that_is_no_yaml_is_refused_and_shortened(file: Path, text: str) -> None:
    message = refused(file, text)
    assert "not a YAML value" in message and len(message) < 220


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "a\\b", ".", "..", ".hidden", "", "  ", "a\nb", "x" * 201])
def test_a_name_that_is_no_folder_of_its_own_is_refused(raw: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError, match="name: it names the run's folder") as raised:
        parse_recipe(raw | {"name": name})
    assert f"(given: {name[:59]!r}"[:-1] in str(raised.value) and len(str(raised.value)) < 300


@pytest.mark.parametrize("name", ["nan", "[bold]", "ünï 2", "a=b", "v1.2"])
def test_other_names_are_names(file: Path, name: str) -> None:
    assert load_recipe(file, [f"name='{name}'"]).name == name


def test_the_bare_word_nan_is_a_word_and_a_number_without_a_dot_a_number(file: Path) -> None:
    assert load_recipe(file, ["name=nan"]).name == "nan"
    assert (
        load_recipe(file, ["optimizer.learning_rate=-1e-4", "optimizer.learning_rate=.5e-4"]).optimizer.learning_rate
        == 5e-5
    )


def test_a_long_wrong_value_is_shortened(file: Path) -> None:
    message = refused(file, f"solver.same_noise={list(range(1000))}")
    assert "(given: [0, 1, 2, " in message and message.endswith(" ...)") and len(message) < 220


def test_numbers_that_are_none_are_refused_in_sections_built_by_hand() -> None:
    with pytest.raises(ValueError, match="finite"):
        PolicySection(alpha=float("inf"))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("solver.kind=ode", "no likelihood to train on"),
        ("solver.eta=0", "no likelihood to train on"),
        ("solver.eta=-1", "solver.eta"),
        ("solver={steps: 3, kind: cps, eta: 2.5}", r"eta=2\.5 is more than .* kind=cps .* 1 or less"),
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
        ("rewards={redness: .nan}", r"rewards\.redness: nan is not a finite number"),
        ("rewards={redness: {weight: -.inf}}", r"rewards\.redness\.weight: -inf is not a finite number"),
        ("rewards={redness: true}", r"rewards\.redness: a reward's value is its weight.* \(given: True\)"),
        ("rewards={redness: [1]}", r"rewards\.redness: a reward's value is its weight.* \(given: \[1\]\)"),
        ("optimizer.betas=[1.0, 1.0]", r"optimizer\.betas\.0: .*less than 1 \(given: 1\.0\)"),
        ("optimizer.betas=[0.9, -0.1]", r"optimizer\.betas\.1: .*greater than or equal to 0 \(given: -0\.1\)"),
        ("judges=[[a]]", r"judges: a list of judges is names.* \(given: \[\['a'\]\]\)"),
        ("judges=[a, a]", "judges: a list of judges is names, each once"),
        ("judges=redness", r"judges: .* \(given: 'redness'\)"),
        ("generator.options={decode_batch_size: 0}", r"decode_batch_size=0 must be a whole number .* 1 or more"),
        ("generator.options={decode_batch_size: 2.5}", r"decode_batch_size=2\.5 must be a whole number"),
        ("generator.options={guidance_scale: .nan}", r"generator\.options\.guidance_scale: nan is not a finite number"),
        ("generator.height=99999999999", r"generator\.height: .*16384"),
        ("seed=-1", r"seed: .*greater than or equal to 0 \(given: -1\)"),
        ("seed=18446744073709551616", "seed: .*less than 18446744073709551616"),
        ("solver.shift=1e9", r"solver\.shift: Input should be less than or equal to 100"),
        ("solver.shift=.nan", r"solver\.shift: nan is not a finite number"),
        ("solver.eta=.inf", r"solver\.eta: inf is not a finite number"),
        ("solver.steps=10000000000", r"solver\.steps: .*1000"),
        ("optimizer.learning_rate=.inf", r"optimizer\.learning_rate: inf is not a finite number"),
        ("optimizer.learning_rate=inf", r"optimizer\.learning_rate: .*finite number \(given: 'inf'\)"),
        ("training.reward_pause_seconds=1e300", r"training\.reward_pause_seconds: .*86400"),
        ("prompts.file={a: b}", r"prompts\.file: .*string \(given: \{'a': 'b'\}\)"),
        ('prompts.file="\\ud800.txt"', r"prompts\.file: '\\ud800\.txt' holds half of a character"),
        ('rewards={"\\ud800": 1}', r"'\\ud800' holds half of a character"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_recipe_that_cannot_train_is_refused_before_anything_is_built(file: Path, override: str, says: str) -> None:
    assert re.search(says, refused(file, override))


@pytest.mark.parametrize(
    ("loss", "solver", "says"),
    [
        ("own.py:Loss", "kind: ode, same_noise: false", "adds none"),
        ("own.py:Loss", "eta: 0, same_noise: false", "adds none"),
        ("matching", "kind: dance", "noise levels that it draws"),
    ],
)
def test_steps_are_weighed_by_noise_that_they_have(file: Path, loss: str, solver: str, says: str) -> None:
    weighs = f"objective={{clip_range: 0.2, loss: '{loss}', step_weight: noise_level}}"
    with pytest.raises(UserError, match=rf"step_weight=noise_level .* {says}.*; take objective\.step_weight=equal"):
        load_recipe(file, [f"solver={{steps: 3, {solver}}}", weighs])


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


@pytest.mark.parametrize("named", ["gone.yaml", "quickstar", ["quickstart"], 3, None])
def test_extending_a_missing_recipe_says_where_it_was_looked_for(tmp_path: Path, named: Any) -> None:
    message = refused(child(tmp_path, "lost.yaml", extends=named))
    assert f"extends {named!r}, but there is no such file in {str(tmp_path)!r} and no shipped recipe" in message
    assert "quickstart-grpo" in message


def test_a_recipe_may_extend_a_shipped_one_by_name_unless_a_file_beside_it_has_that_name(tmp_path: Path) -> None:
    mine = child(tmp_path, "quickstart.yaml", extends="quickstart", name="mine", seed=7)
    assert load_recipe(mine) == load_recipe("quickstart", ["name=mine", "seed=7"])
    (tmp_path / "quickstart").mkdir()  # a folder is no recipe
    assert load_recipe(mine).name == "mine"
    (tmp_path / "quickstart").rmdir()
    child(tmp_path, "quickstart", **yaml.safe_load(load_recipe("redness").to_yaml()))
    assert load_recipe(mine).rewards == load_recipe("redness").rewards != load_recipe("quickstart").rewards


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


def test_taking_every_difference_for_the_steps_doing_needs_samples_that_start_from_one_noise() -> None:
    with pytest.raises(UserError, match="names deviation, which compares the samples of a group"):
        load_recipe("quickstart", ["solver.same_noise=false"])
    assert load_recipe("quickstart", ["solver.same_noise=false", "structuring.sources=[consensus]"])
    assert load_recipe("quickstart", ["solver.same_noise=false", "credit=signed_consensus"])
    assert load_recipe("quickstart", ["solver.same_noise=false", "structuring.sources=[perceptual]"])
    assert load_recipe("quickstart", ["solver.same_noise=false", "credit=sample"])


def test_judges_are_a_list_or_have_options_and_a_reward_may_be_named_twice(tmp_path: Path) -> None:
    plain, named = load_recipe("quickstart"), "{best: {reward: jpeg_compressibility, options: {quality: 90}}}"
    assert list(plain.judges) == [f"emoji_{name}" for name in ("judge", "layout", "count", "quality", "flaws")]
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
