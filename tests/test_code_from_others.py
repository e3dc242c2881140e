"""Recipes, runs and models from somebody else run no code of theirs unseen."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import vipo as package
from terminal import Vipo
from vipo.errors import UserError
from vipo.generators.flux import FluxGenerator
from vipo.recipe import load_recipe

CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
def mine(media, prompts):
    return media.mean((1, 2, 3, 4))
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(CODE)
    return f"{tmp_path}/mine.py:mine"


def written(folder: Path, model: Path, **changes: Any) -> Path:
    return tiny.write_recipe(folder / "recipe.yaml", tiny.recipe(model, folder / "prompts.txt", **changes))


@pytest.mark.parametrize("key", ["rewards", "judges", "alias", "extends"])
def test_a_recipe_that_names_code_needs_a_word_of_the_user(
    tmp_path: Path, model_folder: Path, own: str, vipo: Vipo, key: str
) -> None:
    given: dict[str, Any] = {
        "rewards": {"rewards": {own: 1.0}},
        "judges": {"judges": [own]},
        "alias": {"rewards": {"fine": {"reward": own}}},
        "extends": {"rewards": {own: 1.0}},
    }[key]
    recipe = written(tmp_path, model_folder, **given)
    if key == "extends":
        recipe = tiny.write_recipe(tmp_path / "child.yaml", {"extends": "recipe.yaml", "name": "child"})
    said = vipo("train", recipe, "training.iterations=1", "--output", tmp_path / "run")
    assert said.code == 2 and "--allow-code" in said.err and "mine.py:mine" in said.err, said
    assert not (tmp_path / "ran").exists() and not (tmp_path / "run").exists()
    assert load_recipe(recipe)  # in Python it is the caller's own code
    with pytest.raises(UserError, match="--allow-code"):
        load_recipe(recipe, allow_code=False)
    load_recipe(recipe, [f"rewards={{{own}: 1.0}}", f"judges=[{own}]"][key == "judges" :][:1], allow_code=False)
    assert load_recipe(recipe, [f"{'judges' if key == 'judges' else 'rewards'}={{redness2: {{reward: redness}}}}"])


def test_what_the_command_line_names_is_the_users_own_word(
    tmp_path: Path, model_folder: Path, own: str, vipo: Vipo
) -> None:
    recipe, run = written(tmp_path, model_folder, training__iterations=1), tmp_path / "run"
    said = vipo("train", recipe, f"rewards={{{own}: 1.0}}", "--no-report", "--output", run)
    assert said.code == 0 and (tmp_path / "ran").exists(), said
    (tmp_path / "ran").unlink()
    said = vipo("evaluate", run)  # the run may be somebody else's
    assert said.code == 2 and "--allow-code" in said.err and not (tmp_path / "ran").exists()
    assert vipo("evaluate", run, "--allow-code").code == 0
    assert vipo("evaluate", run, "--rewards", own).code == 0


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    folder = tiny.save_pipeline(tmp_path / "flux")
    weights = next((folder / "transformer").glob("*.safetensors"))
    weights.unlink()

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    with (folder / "transformer" / "diffusion_pytorch_model.bin").open("wb") as file:
        pickle.dump({"x": Bomb()}, file)
    with pytest.raises(UserError, match="safetensors"):
        FluxGenerator.from_pretrained(folder, device="cpu", dtype=torch.float32, height=24, width=40)
    torch.save({"x": torch.zeros(1)}, folder / "transformer" / "diffusion_pytorch_model.bin")  # not even harmless ones
    with pytest.raises(UserError, match="safetensors"):
        FluxGenerator.from_pretrained(folder, device="cpu", dtype=torch.float32, height=24, width=40)
    assert not (tmp_path / "ran").exists()


def test_no_line_of_vipo_trusts_code_or_unpickles_it() -> None:
    seen = 0
    for file in Path(package.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            assert not given.get("trust_remote_code"), file
            spelled = ast.unparse(node.func)
            if spelled == "torch.load":
                seen += 1
                assert given["weights_only"] is True, file
            assert spelled not in ("pickle.load", "pickle.loads", "yaml.load", "joblib.load"), file
            if spelled in ("np.load", "numpy.load"):
                assert given["allow_pickle"] is False, file
    assert seen >= 2
