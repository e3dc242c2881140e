"""A policy that begins with a LoRA: its layers, ranks and scales, its reference, and what comes out of training it."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from vipo.assemble import build, build_policy, open_model
from vipo.errors import UserError
from vipo.evaluation.records import BASE, POLICY
from vipo.generators import quantization
from vipo.generators.flux import LORA_TARGETS, FluxGenerator
from vipo.generators.lora import attach_lora
from vipo.generators.lora_start import read_start
from vipo.options import Solver
from vipo.policy import Policy
from vipo.recipe import parse_recipe
from vipo.runs.target import Target, open_target
from vipo.schema import JudgeSection

FILE = "pytorch_lora_weights.safetensors"
TARGETS = r".*\.(attn\.to_q|ff\.net\.2|proj_mlp)"
SOME = r"(transformer_blocks\.0\.attn\.to_q|single_transformer_blocks\.0\.proj_mlp)"


@pytest.fixture
def model(model_folder: Path) -> FluxGenerator:
    return tiny.generator(model_folder)


@pytest.mark.parametrize("kind", ["nf4", "int8", "float8", "float8_storage"])
def test_it_goes_on_from_a_lora_on_a_quantised_base(model_folder: Path, tmp_path: Path, kind: str) -> None:
    library = quantization.LIBRARIES.get(kind)  # type: ignore[call-overload]
    if library is not None and importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    fewer = {"quantization": kind, "dtype": "bfloat16"}
    raw = tiny.recipe(
        model_folder, tmp_path / "prompts.txt", policy={"init": str(ours(model_folder, tmp_path / "lora"))}
    )
    raw["training"] |= {"precision": "bf16"}
    raw["objective"] |= {"kl_weight": 0.1}
    whole = open_model(parse_recipe(raw), device="cpu").policy.state()
    raw["generator"] |= fewer
    session = build(parse_recipe(raw))
    begun = session.policy.state()
    assert all(torch.equal(begun[name], value) and value.dtype == torch.float32 for name, value in whole.items())
    first, second = (session.trainer.step().metrics for _ in range(2))
    assert first["ratio_deviation"] == 0 and first["grad_norm"] > 0
    assert first["kl_reference"] == 0 < second["kl_reference"]  # the reference is the LoRA as it came, not the base


def ours(folder: Path, output: Path, **options: Any) -> Path:
    """A LoRA of ours, as a run exports it."""
    other = tiny.generator(folder)
    tiny.nudged(tiny.lora(other, **options)).export(other, output)
    return output


def of_peft(folder: Path, output: Path, **options: Any) -> Path:
    """One that PEFT saved, single blocks with a rank and an alpha of their own."""
    config = LoraConfig(
        r=4, lora_alpha=12, target_modules=TARGETS, rank_pattern={"proj_mlp": 2}, alpha_pattern={"proj_mlp": 3},
        init_lora_weights=False, **options,
    )  # fmt: skip
    torch.manual_seed(5)
    get_peft_model(tiny.generator(folder).network, config).save_pretrained(output)
    return output


def begin(model: FluxGenerator, path: Path, **options: Any) -> Policy:
    layers = read_start(model, str(path), rank=options.pop("rank", None), targets=options.pop("targets", None))
    return Policy.lora_from(model.network, layers, **options).begin()


def attached(folder: Path, path: Path) -> Tensor:
    """What diffusers' own way of loading gives."""
    other = tiny.generator(folder)
    attach_lora(other.pipeline, path)
    return tiny.velocity(other)


@pytest.mark.parametrize("write", [ours, of_peft])
def test_it_begins_as_the_file_and_every_layer_keeps_rank_and_scale(
    model: FluxGenerator, model_folder: Path, tmp_path: Path, write: Any
) -> None:
    base, path = tiny.velocity(model), write(model_folder, tmp_path / "lora")
    policy = begin(model, path)
    assert torch.allclose(tiny.velocity(model), attached(model_folder, path), atol=1e-5)
    assert not torch.allclose(tiny.velocity(model), base, atol=1e-3)
    assert all(weight.dtype == torch.float32 for weight in policy.parameters.values())
    scales = {m.scaling["default"] for m in model.network.modules() if hasattr(m, "lora_A") and m.lora_A}
    ranks = {len(weight) for name, weight in policy.parameters.items() if "lora_A" in name}
    assert (ranks, scales) == (({4}, {1.0}) if write is ours else ({4, 2}, {3.0, 1.5}))


@pytest.mark.parametrize("rslora", [False, True])
def test_pefts_weights_arrive_bit_for_bit(
    model: FluxGenerator, model_folder: Path, tmp_path: Path, rslora: bool
) -> None:
    path = of_peft(model_folder, tmp_path, use_rslora=rslora)
    held = load_file(path / "adapter_model.safetensors")
    found = {
        f"base_model.model.{name.replace('.default', '')}": weight
        for name, weight in begin(model, path).state().items()
    }
    assert found.keys() == held.keys() and all(torch.equal(found[name], held[name]) for name in held)


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model.", ""])
def test_alpha_beside_the_layers_is_a_scale(
    model: FluxGenerator, model_folder: Path, tmp_path: Path, prefix: str
) -> None:
    state = {
        re.sub(r"^transformer\.", prefix, name): tensor
        for name, tensor in load_file(ours(model_folder, tmp_path / "ours") / FILE).items()
    }
    layers = {name.rsplit(".lora_", 1)[0] for name in state}
    save_file(state | {f"{name}.alpha": torch.tensor(6.0) for name in layers}, tmp_path / "x.safetensors")
    policy = begin(model, tmp_path / "x.safetensors")
    assert torch.allclose(tiny.velocity(model), attached(model_folder, tmp_path / "x.safetensors"), atol=1e-5)
    scales = {m.scaling["default"] for m in model.network.modules() if hasattr(m, "lora_A") and m.lora_A}
    assert scales == {1.5} and policy.is_lora


def test_another_alpha_changes_the_pace_and_not_the_start(
    model: FluxGenerator, model_folder: Path, tmp_path: Path
) -> None:
    path = of_peft(model_folder, tmp_path)
    policy = begin(model, path, alpha=8.0)
    assert torch.allclose(tiny.velocity(model), attached(model_folder, path), atol=1e-5)
    scales = {m.scaling["default"] for m in model.network.modules() if hasattr(m, "lora_A") and m.lora_A}
    assert scales == {8.0 / 4, 8.0 / 2} and policy.parameters


def test_the_reference_is_the_policy_at_its_start(model: FluxGenerator, model_folder: Path, tmp_path: Path) -> None:
    """Not the network without the LoRA; without a copy it cannot be asked for."""
    base, path = tiny.velocity(model), ours(model_folder, tmp_path)
    policy = begin(model, path, ema_decay=0.9)
    start = tiny.velocity(model)
    trained = tiny.velocity(model) if tiny.nudged(policy, seed=8) else None
    with policy.reference():
        assert torch.equal(tiny.velocity(model), start)
    assert trained is not None and torch.equal(tiny.velocity(model), trained)
    assert not torch.allclose(start, base, atol=1e-4) and not torch.allclose(start, trained, atol=1e-4)
    bare = begin(tiny.generator(model_folder), path, keep_reference=False)
    with pytest.raises(ValueError, match="keep_reference=True"), bare.reference():
        pass


@pytest.mark.parametrize("write", [ours, of_peft])
def test_the_export_is_one_whole_lora_for_diffusers_and_for_us(
    model: FluxGenerator, model_folder: Path, tmp_path: Path, write: Any
) -> None:
    """Beginning and training in the same matrices, also where ranks differ."""
    policy = tiny.nudged(begin(model, write(model_folder, tmp_path / "first")), seed=8)
    trained = tiny.velocity(model)
    policy.export(model, tmp_path / "second")
    plain = FluxPipeline.from_pretrained(model_folder)
    plain.load_lora_weights(tmp_path / "second")
    other = FluxGenerator(plain, height=tiny.HEIGHT, width=tiny.WIDTH)
    assert torch.allclose(tiny.velocity(other), trained, atol=1e-5)
    again = tiny.generator(model_folder)
    begin(again, tmp_path / "second")
    assert torch.allclose(tiny.velocity(again), trained, atol=1e-5)


def test_a_layer_whose_name_others_end_with_is_trained_alone(
    model: FluxGenerator, model_folder: Path, tmp_path: Path
) -> None:
    """PEFT takes a name in a list for the end of another: FLUX has proj_out, and one in each single block."""
    state = {
        "transformer.proj_out.lora_A.weight": torch.randn(2, 32),
        "transformer.proj_out.lora_B.weight": torch.randn(model.network.proj_out.out_features, 2),
    }
    save_file(state, tmp_path / FILE)
    policy = begin(model, tmp_path)
    assert sorted(policy.parameters) == ["proj_out.lora_A.default.weight", "proj_out.lora_B.default.weight"]
    policy.export(model, tmp_path / "ours")
    again = begin(tiny.generator(model_folder), tmp_path / "ours")
    assert sorted(again.parameters) == sorted(policy.parameters)


def test_what_the_recipe_asks_for_must_be_what_the_file_has(
    model: FluxGenerator, model_folder: Path, tmp_path: Path
) -> None:
    path = ours(model_folder, tmp_path / "ours", targets=SOME)
    assert read_start(model, str(path), rank=4, targets=SOME).keys() == {
        "transformer_blocks.0.attn.to_q",
        "single_transformer_blocks.0.proj_mlp",
    }
    with pytest.raises(UserError, match=r"policy\.rank=8, but .* has rank 4; leave it out"):
        read_start(model, str(path), rank=8, targets=None)
    with pytest.raises(UserError, match=r"lacks \d+ layers \(.* of them; leave it out .* to train the 2 layers"):
        read_start(model, str(path), rank=None, targets=LORA_TARGETS["blocks"])
    with pytest.raises(UserError, match=r"has 1 layer \(single_transformer_blocks\.0\.proj_mlp\) beside them"):
        read_start(model, str(path), rank=None, targets=r"transformer_blocks\.0\.attn\.to_q")
    mixed = of_peft(model_folder, tmp_path / "peft")
    with pytest.raises(UserError, match=r"policy\.rank=4, but .* has rank 2 and 4"):
        read_start(model, str(mixed), rank=4, targets=None)


def test_what_is_no_lora_of_this_model_is_refused(model: FluxGenerator, model_folder: Path, tmp_path: Path) -> None:
    def said(path: Path) -> str:
        with pytest.raises(UserError) as raised:
            read_start(model, str(path), rank=None, targets=None)
        return str(raised.value)

    assert "does not exist; give a LoRA's .safetensors file" in said(tmp_path / "nowhere")
    whole = said(model_folder)
    assert "is a whole pipeline, no LoRA" in whole and f"give {str(model_folder)!r} as generator.path" in whole
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("name: x\n")
    assert f"write one with `vipo export {tmp_path / 'run'}`" in said(tmp_path / "run")
    state = load_file(ours(model_folder, tmp_path / "run" / "export") / FILE)
    assert read_start(model, str(tmp_path / "run"), rank=None, targets=None)
    name = next(iter(state))
    save_file({**state, name + "x": state[name].clone()}, tmp_path / "odd.safetensors")
    assert "no part of a LoRA" in said(tmp_path / "odd.safetensors")
    save_file({n.replace("to_q", "to_qq"): t for n, t in state.items()}, tmp_path / "renamed.safetensors")
    assert "that this model has not" in said(tmp_path / "renamed.safetensors")


def test_what_is_left_out_is_usual_or_the_files(model_folder: Path, tmp_path: Path) -> None:
    raw = tiny.recipe(model_folder, tmp_path / "prompts.txt", policy={})
    usual = parse_recipe(raw).policy
    assert (usual.rank, usual.targets, usual.init) == (8, "blocks", None)
    path = of_peft(model_folder, tmp_path / "peft")
    raw["policy"] = {"init": str(path)}
    recipe = parse_recipe(raw)
    assert (recipe.policy.rank, recipe.policy.targets) == (None, None)
    assert parse_recipe(json.loads(recipe.model_dump_json())) == recipe
    policy = build_policy(recipe, tiny.generator(model_folder), keep_reference=True).begin()
    assert policy.base and len(policy.parameters) == len(load_file(path / "adapter_model.safetensors"))
    raw["policy"] = {"init": str(path), "targets": "blocks"}
    with pytest.raises(UserError, match=r"policy\.targets='.*' to train the|policy\.targets=.*lacks"):
        open_model(parse_recipe(raw), device="cpu")
    raw["policy"] = {"init": str(path), "kind": "full"}
    with pytest.raises(UserError, match=r"goes with kind=lora; .* give the exported folder as generator\.path"):
        parse_recipe(raw)


def test_kl_is_zero_at_the_start_and_pulls_back_to_it(model_folder: Path, tmp_path: Path) -> None:
    path = ours(model_folder, tmp_path)
    trainer = tiny.trainer(
        model_folder,
        kl_weight=1.0,
        policy=lambda model: Policy.lora_from(model.network, read_start(model, str(path), rank=None, targets=None)),
    )
    assert trainer.step().metrics["kl_reference"] == 0
    assert trainer.step().metrics["kl_reference"] > 0


def test_it_can_be_planned(model_folder: Path, tmp_path: Path) -> None:
    """A plan reads the file's shapes, and a reference that is a copy has its bytes."""
    from vipo.plan.blueprint import draw

    path = of_peft(model_folder, tmp_path / "peft")
    raw = tiny.recipe(model_folder, tmp_path / "prompts.txt", policy={"init": str(path)}, objective__kl_weight=0.1)
    drawn = draw(parse_recipe(raw))
    held = sum(tensor.numel() for tensor in load_file(path / "adapter_model.safetensors").values())
    assert sum(p.numel() for p in drawn.policy.parameters.values()) == held
    assert sum(p.numel() for p in drawn.policy.base.values()) == held


# --- a whole run --------------------------------------------------------------------------------------------------


def values(folder: Path) -> list[list[float]]:
    return [next(iter(record["values"].values())) for record in tiny.lines(folder / "evaluations.jsonl")]


@pytest.fixture
def raw(tmp_path: Path, model_folder: Path) -> dict[str, Any]:
    training = {"iterations": 2, "precision": "no", "checkpoint_every": 1, "keep_checkpoints": 9}
    first = ours(model_folder, tmp_path / "first")
    return tiny.recipe(
        model_folder, tmp_path / "prompts.txt", training=training, evaluation__every=None, policy={"init": str(first)},
        objective__kl_weight=0.1,
    )  # fmt: skip


def test_a_run_begins_with_it_measures_from_it_and_needs_it_no_more(
    tmp_path: Path, raw: dict[str, Any], model_folder: Path
) -> None:
    """Gains are over the LoRA that it began with; once begun, the run has its own copy of it."""
    tiny.run_all(raw, tmp_path / "straight")
    first = tmp_path / "first"
    plain = open_target(str(model_folder), height=tiny.HEIGHT, width=tiny.WIDTH, lora=first)
    with_lora, without = (
        Target(plain.generator, Solver(steps=3, shift=3.0), {}, 8.0, reference) for reference in (None, plain.reference)
    )
    redness = {"redness": JudgeSection()}
    prompts = open_target(str(tmp_path / "straight")).evaluation_prompts()

    def scored(target: Target, model: str) -> list[float]:
        done = target.with_rewards(redness).evaluate(
            prompts, ["redness"], samples_per_prompt=len(values(tmp_path / "straight")[0]) // len(prompts), steps=None
        )
        return done.scores[model]["redness"].tolist()

    untrained, trained = values(tmp_path / "straight")
    assert untrained == pytest.approx(scored(with_lora, BASE), abs=1e-5)
    assert untrained != pytest.approx(scored(without, BASE), abs=1e-4) and trained != untrained

    tiny.run_all(raw, tmp_path / "again")
    shutil.rmtree(first)
    tiny.run_all(raw, tmp_path / "again", resume=True, checkpoint="step-000001")
    for file in ("metrics.jsonl", "checkpoints/step-000002/policy.safetensors", f"export/{FILE}"):
        assert (tmp_path / "straight" / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file
    evaluated = open_target(str(tmp_path / "again"))
    assert scored(evaluated, BASE) == pytest.approx(untrained, abs=1e-6)
    assert scored(evaluated, POLICY) == pytest.approx(trained, abs=1e-6)


def test_a_run_goes_on_from_another_run(tmp_path: Path, raw: dict[str, Any]) -> None:
    tiny.run_all(raw, tmp_path / "first-run")
    raw["policy"] = {"init": str(tmp_path / "first-run"), "alpha": 8.0}
    tiny.run_all(raw, tmp_path / "second-run")
    assert values(tmp_path / "second-run")[0] == pytest.approx(values(tmp_path / "first-run")[-1], abs=1e-5)
    assert [file.name for file in (tmp_path / "second-run" / "init").iterdir()] == [FILE]


def test_what_is_refused_leaves_no_folder(tmp_path: Path, raw: dict[str, Any]) -> None:
    raw["policy"] = {"init": str(tmp_path / "first"), "rank": 7}
    with pytest.raises(UserError, match=r"policy\.rank=7, but .* has rank 4"):
        tiny.run_all(raw, tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.yaml").exists() and not (tmp_path / "run" / "init").exists()
