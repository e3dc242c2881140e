"""What is evaluated: a run, a plain pipeline, a pipeline with a LoRA; in parts as in one go."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from vipo.evaluate import evaluate, summary
from vipo.generators.flux import FluxGenerator
from vipo.recipe import parse_recipe, read_judges
from vipo.rollout import Solver
from vipo.run import Run
from vipo.target import PLAIN_STEPS, Model, fingerprint, open_target
from vipo.types import Prompt, UserError

SIDE, STEPS = 32, 2
PROMPTS = [Prompt(text, k) for k, text in enumerate(tiny.PROMPTS)]
LORA = "pytorch_lora_weights.safetensors"


def fresh(folder: Path) -> FluxGenerator:
    return FluxGenerator.from_pretrained(folder, device="cpu", dtype=torch.float32, height=SIDE, width=SIDE)


@pytest.fixture(scope="module")
def trained(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """An exported LoRA, and what its policy and its base score, by the policy that was exported."""
    model = fresh(model_folder)
    policy = tiny.nudged(tiny.lora(model))
    folder = tmp_path_factory.mktemp("lora")
    policy.export(model, folder)

    def redness() -> torch.Tensor:
        solver, scorer = Solver(steps=STEPS, shift=model.shift), tiny.scorer(tiny.redness)
        return evaluate(model, PROMPTS, scorer, solver, samples_per_prompt=2).scores["redness"]

    with policy.reference():
        base = redness()
    return folder, redness(), base


def test_a_lora_is_the_policy_and_the_base_is_without_it(
    model_folder: Path, trained: tuple[Path, torch.Tensor, torch.Tensor]
) -> None:
    folder, policy, base = trained
    for lora in (folder, folder / LORA):
        model = open_target(str(model_folder), size=SIDE, lora=lora)
        found = model.evaluate(PROMPTS, ["redness"], count=2, steps=STEPS).scores
        assert torch.allclose(found["policy"]["redness"], policy, atol=1e-5)
        assert torch.allclose(found["base"]["redness"], base, atol=1e-5)
        assert (policy - base).abs().max() > 1e-3  # or the two could be swapped unseen
    plain = open_target(str(model_folder), size=SIDE).evaluate(PROMPTS, ["redness"], count=2, steps=STEPS).scores
    assert list(plain) == ["base"] and torch.allclose(plain["base"]["redness"], base, atol=1e-5)


def test_parts_are_one_go(model_folder: Path) -> None:
    model = open_target(str(model_folder), size=SIDE)
    done: list[int] = []
    whole = model.evaluate(PROMPTS, ["redness"], count=2, steps=STEPS)
    parts = model.evaluate(PROMPTS, ["redness"], count=2, steps=STEPS, batch_size=3, progress=done.append)
    assert done == [1, 2, 3, 4]
    assert torch.allclose(parts.scores["base"]["redness"], whole.scores["base"]["redness"], atol=1e-5)
    sampled = [part.media for part in model.sample(PROMPTS, count=2, steps=STEPS, seed=5, batch_size=4)]
    (together,) = model.sample(PROMPTS, count=2, steps=STEPS, seed=5)
    assert len(sampled) == 2 and torch.allclose(torch.cat(sampled), together.media, atol=1e-4)


def test_settings_tell_models_prompts_and_rewards_apart(
    model_folder: Path, trained: tuple[Path, torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    reward = tmp_path / "mine.py"
    reward.write_text("def mine(media, prompts):\n    return media.mean((1, 2, 3, 4))\n")
    name, how = f"{reward}:mine", {"count": 2, "steps": None, "batch_size": 64}
    plain = open_target(str(model_folder), size=SIDE)
    settings = plain.settings(PROMPTS, [name], **how)
    assert settings["steps"] == PLAIN_STEPS and settings == plain.settings(PROMPTS, [name], **how)
    other = plain.settings([*PROMPTS[:3], replace(PROMPTS[3], metadata={"tag": 1})], ["redness"], **{**how, "count": 3})
    assert {key for key in settings if settings[key] != other[key]} == {"prompts", "rewards", "samples_per_prompt"}
    with_lora = open_target(str(model_folder), size=SIDE, lora=trained[0]).settings(PROMPTS, [name], **how)
    assert {key for key in settings if settings[key] != with_lora[key]} == {"weights", "lora"}
    reward.write_text("def mine(media, prompts):\n    return media.amax((1, 2, 3, 4))\n")
    assert plain.settings(PROMPTS, [name], **how)["rewards"] != settings["rewards"]


def test_one_reward_judges_twice_with_other_options(model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "judges.yaml"
    file.write_text(
        "coarse: {reward: jpeg_compressibility, options: {quality: 5}}\nfine: {reward: jpeg_compressibility}\n"
    )
    model = open_target(str(model_folder), size=SIDE).judged_by(read_judges(file))
    scores = model.evaluate(PROMPTS[:2], ["coarse", "fine"], count=1, steps=STEPS).scores["base"]
    assert (scores["coarse"] > scores["fine"]).all()  # fewer kilobytes
    told = model.settings(PROMPTS[:2], ["coarse", "fine"], count=1, steps=STEPS, batch_size=4)["rewards"]
    assert told["coarse"]["options"] == {"reward": "jpeg_compressibility", "quality": 5} != told["fine"]["options"]


def test_a_fingerprint_sees_the_smallest_training_step() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 3))
    before = fingerprint(network)
    assert fingerprint(network) == before
    with torch.no_grad():
        network[1].bias += 1e-6
    assert fingerprint(network) != before


def test_a_run_keeps_the_options_of_its_rewards(model_folder: Path, tmp_path: Path) -> None:
    reward = {"jpeg_compressibility": {"weight": 1.0, "options": {"quality": 10}}}
    changes = {"training__iterations": 1, "rewards": reward, "evaluation__every": None}
    list(Run(parse_recipe(tiny.recipe(model_folder, tmp_path / "prompts.txt", **changes)), tmp_path / "run"))
    model = open_target(str(tmp_path / "run"))
    assert model.rewards["jpeg_compressibility"].options == {"reward": "jpeg_compressibility", "quality": 10}
    logged = tiny.lines(tmp_path / "run" / "evaluations.jsonl")
    found = model.evaluate(model.evaluation_prompts, list(model.rewards), count=1, steps=None)
    for model_name, line in (("base", logged[0]), ("policy", logged[-1])):
        assert found.scores[model_name]["jpeg_compressibility"].tolist() == pytest.approx(
            line["values"]["jpeg_compressibility"], abs=0.02
        )
    assert len(summary(found)) == 2
    with pytest.raises(UserError, match="is a run and has a policy of its own"):
        open_target(str(tmp_path / "run"), lora=tmp_path)


def test_a_lora_that_does_not_fit_is_refused(model_folder: Path, trained: tuple[Path, object, object]) -> None:
    folder = trained[0].parent / "bad"
    folder.mkdir(exist_ok=True)
    with pytest.raises(UserError, match=r"'lost\.safetensors' does not exist"):
        open_target(str(model_folder), size=SIDE, lora=Path("lost.safetensors"))
    (folder / LORA).write_bytes(b"nothing")
    with pytest.raises(UserError, match="could not be loaded into this model"):
        open_target(str(model_folder), size=SIDE, lora=folder)
    good = load_file(trained[0] / LORA)
    save_file({name.replace("transformer.", "other."): tensor for name, tensor in good.items()}, folder / LORA)
    with pytest.raises(UserError, match=r"LoRA .* (changes no layer of|could not be loaded into) this model"):
        open_target(str(model_folder), size=SIDE, lora=folder)
    wide = {name: torch.cat([tensor, tensor], 1 if "lora_A" in name else 0) for name, tensor in good.items()}
    save_file(wide, folder / LORA)
    with pytest.raises(UserError, match="could not be loaded into this model") as raised:
        open_target(str(model_folder), size=SIDE, lora=folder)
    assert "\n" not in str(raised.value)


def test_a_generator_without_a_pipeline_takes_no_lora(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = fresh(model_folder)
    del bare.pipeline
    monkeypatch.setattr("vipo.target.build_generator", lambda *_arguments, **_options: bare)
    with pytest.raises(UserError, match="FluxGenerator takes no LoRA"):
        open_target(str(model_folder), size=SIDE, lora=model_folder)


def test_the_base_stays_off_only_inside(model_folder: Path, trained: tuple[Path, object, object]) -> None:
    model = open_target(str(model_folder), size=SIDE, lora=trained[0])
    assert model.reference is not None

    def picture(present: Model) -> torch.Tensor:
        return next(present.sample(PROMPTS[:1], count=1, steps=STEPS, seed=0)).media

    before = picture(model)
    with pytest.raises(RuntimeError), model.reference():
        assert not torch.equal(picture(model), before)
        raise RuntimeError
    assert torch.equal(picture(model), before) and model.models["policy"] is nullcontext
