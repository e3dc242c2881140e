"""A frozen base in fewer bits, and AdamW with its moments in 8: they train, resume, export, and are planned for."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import adapters
import tiny
import tiny_wan
from vipo.assemble import build, build_generator, check_sharding
from vipo.errors import UserError
from vipo.generators import compiled, in_parts, quantization
from vipo.generators.lora import attach_lora
from vipo.generators.wan import WanGenerator
from vipo.options import OptimizerOptions, Sharding
from vipo.plan import Ledger, Machine, advise, plan
from vipo.plan.advice import Change
from vipo.plan.blueprint import empty_network, empty_pipeline
from vipo.plan.published import table
from vipo.policy import Policy
from vipo.pretrained import fingerprint
from vipo.recipe import load_recipe, parse_recipe
from vipo.runs.run import Run
from vipo.runs.target import open_target
from vipo.runs.trained import open_run
from vipo.schema import GeneratorSection, Recipe
from vipo.training import checkpoint, optimizers
from vipo.training.saved import verified
from vipo.training.trainer import Trainer
from vipo.types import Prompt

KINDS = ["nf4", "int8", "float8", "float8_storage"]


def needs(library: str | None) -> None:
    if library is not None and importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed: pip install 'vipo[{library}]'")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    needs(quantization.LIBRARIES.get(request.param))
    return str(request.param)


@pytest.fixture
def eight_bit() -> None:
    needs("bitsandbytes")


def recipe_of(folder: Path, root: Path, **changes: Any) -> Recipe:
    return parse_recipe(tiny.recipe(folder, root / "prompts.txt", **changes))


def generator_of(folder: Path, kind: str, dtype: str = "float32") -> Any:
    section = GeneratorSection(path=str(folder), height=tiny.HEIGHT, width=tiny.WIDTH, quantization=kind, dtype=dtype)
    return build_generator(section, device="cpu")


TRAINED = {
    "training__iterations": 2,
    "objective": {"clip_range": 0.2, "kl_weight": 0.01},
    "evaluation__every": None,
}


@pytest.mark.parametrize(
    ("dtype", "precision", "checkpointing"),
    [("bfloat16", "bf16", True), ("float16", "no", False)],
)
def test_two_iterations_on_a_quantised_base(
    model_folder: Path, tmp_path: Path, kind: str, dtype: str, precision: str, checkpointing: bool
) -> None:
    recipe = recipe_of(
        model_folder,
        tmp_path,
        generator__quantization=kind,
        generator__dtype=dtype,
        training__precision=precision,
        training__gradient_checkpointing=checkpointing,
        **TRAINED,
    )
    list(Run(recipe, tmp_path / "run"))
    first, second = tiny.lines(tmp_path / "run" / "metrics.jsonl")
    for metrics in (first, second):
        assert metrics["ratio_deviation"] == 0  # replay asks the network what the rollout asked it
        assert metrics["grad_norm"] > 0 and metrics["skipped"] == 0
    assert first["kl_reference"] == 0 < second["kl_reference"]  # without its adapters the policy is the base
    where = tmp_path / "run" / "checkpoints" / "step-000002"
    kept = checkpoint.load_policy(where, verified(where))
    assert kept and all("lora_" in name and value.dtype == torch.float32 for name, value in kept.items())
    assert any(value.abs().max() > 0 for name, value in kept.items() if "lora_B" in name)


def test_a_run_opens_as_it_trained_and_its_export_loads_on_the_whole_base(
    model_folder: Path, tmp_path: Path, kind: str
) -> None:
    list(Run(recipe_of(model_folder, tmp_path, generator__quantization=kind, **TRAINED), tmp_path / "run"))
    recipe, model = open_run(tmp_path / "run")
    assert recipe.generator.quantization == kind
    layer = model.generator.network.get_submodule("transformer_blocks.0.ff.net.2")
    assert storage(getattr(layer, "base_layer", layer)) < 0.4 * 4 * 128 * 32
    target = open_target(str(tmp_path / "run"))
    assert any(kind in told for told in target.notices([Prompt("a cat")]))
    pipeline = FluxPipeline.from_pretrained(model_folder)
    pipeline.load_lora_weights(str(tmp_path / "run" / "export"))
    loaded = {name for name, p in pipeline.transformer.named_parameters() if "lora_B" in name and p.abs().max() > 0}
    assert loaded
    if kind != "float8_storage":  # the same file goes on the quantised network too, whose weights have other sizes
        attach_lora(generator_of(model_folder, kind).pipeline, tmp_path / "run" / "export")


def storage(module: nn.Module) -> int:
    """Bytes of a module's own weight and what belongs to it."""
    weight: Any = module.weight
    state = getattr(weight, "quant_state", None)
    parts = [weight, *([] if state is None else state.as_dict(packed=False).values())]
    if hasattr(weight, "__tensor_flatten__"):
        parts = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    return sum(part.untyped_storage().nbytes() for part in parts if isinstance(part, torch.Tensor))


def test_quantised_velocities_are_near_the_whole_ones_and_not_equal(model_folder: Path, kind: str) -> None:
    whole, fewer = generator_of(model_folder, "none"), generator_of(model_folder, kind)
    theirs, ours = (adapters.velocity(g, tiny.PROMPTS[:2]) for g in (whole, fewer))
    error = (ours - theirs).norm() / theirs.norm()
    assert 0 < error < 0.15
    assert (
        fingerprint(whole.network)
        != fingerprint(fewer.network)
        == fingerprint(generator_of(model_folder, kind).network)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wan_trains_quantised(tmp_path: Path, kind: str, dtype: str) -> None:
    folder = tiny_wan.save_pipeline(tmp_path / "wan")
    height, width = tiny_wan.SIZES["2.1"]
    generator = WanGenerator.from_pretrained(
        folder,
        device="cpu",
        dtype=getattr(torch, dtype),
        quantization=kind,
        height=height,
        width=width,
        frames=tiny_wan.FRAMES,
        guidance_scale=3.0,
    )
    if kind != "float8_storage":
        found = [n for n, m in generator.network.named_modules() if quantization.is_quantised(m)]
        assert len(found) == 2 * 10 and all(name.startswith("blocks.") for name in found)
    adapters.trains_two_steps(generator, tiny.PROMPTS[:2])


@pytest.mark.parametrize("model", list(table("models")))
def test_nearly_all_of_a_published_network_is_in_its_blocks(model: str) -> None:
    part = table("models")[model]["transformer"]
    with torch.device("meta"):
        network = empty_network(table("parts")[part] if isinstance(part, str) else part, torch.bfloat16)
    names = quantization.layers(network, "nf4", torch.bfloat16)
    inside = sum(network.get_submodule(name).weight.numel() for name in names)
    assert inside > 0.9 * sum(p.numel() for p in network.parameters())
    assert not {"proj_out", "x_embedder", "context_embedder", "norm_out.linear"} & set(names)


def test_a_library_that_is_missing_is_named_with_its_extra(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda _: None)
    monkeypatch.setattr(optimizers, "find_spec", lambda _: None)
    for kind, extra in {"nf4": "bitsandbytes", "int8": "torchao", "float8": "torchao"}.items():
        with pytest.raises(UserError, match=rf"quantization={kind} needs {extra}.*pip install 'vipo\[{extra}\]'"):
            generator_of(model_folder, kind)
    with pytest.raises(UserError, match=r"adamw8bit needs bitsandbytes.*pip install 'vipo\[bitsandbytes\]'"):
        optimizers.build(OptimizerOptions(learning_rate=1.0, kind="adamw8bit"), [])
    # A plan needs neither.
    small = recipe_of(model_folder, tmp_path, generator__quantization="nf4", optimizer__kind="adamw8bit")
    assert plan(small, Machine(), Ledger()).peak > 0


def test_weights_that_are_trained_are_not_quantised(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"quantization=nf4 is for weights that stay.*policy\.kind=lora"):
        recipe_of(model_folder, tmp_path, generator__quantization="nf4", policy__kind="full")


@pytest.mark.parametrize("kind", ["nf4", "int8", "float8"])
def test_a_compiled_block_is_given_plain_tensors_of_a_weight(
    model_folder: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(quantization.LIBRARIES[kind])  # type: ignore[index]
    monkeypatch.setattr(compiled, "install", lambda _network, _device, **_how: None)
    session = build(recipe_of(model_folder, tmp_path, generator__quantization=kind, training__compile=True))
    held = [p for p in session.model.generator.network.parameters() if is_traceable_wrapper_subclass(p)]
    assert held == []
    quantised = [m for m in session.model.generator.network.modules() if quantization.is_quantised(m)]
    assert quantised and all(("weight" in dict(m.named_parameters())) == (kind == "nf4") for m in quantised)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_blocks_of_quantised_weights_are_traced_for_both_ways(model_folder: Path, kind: str) -> None:
    needs(quantization.LIBRARIES[kind])  # type: ignore[index]
    torch._dynamo.reset()
    model = generator_of(model_folder, kind)
    Policy.lora(model.network, rank=2, alpha=2.0, targets=model.lora_targets["blocks"], seed=0)
    in_parts.take_apart(model.network, four_bit=False)
    for block in compiled.repeated_blocks(model.network):
        block.forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager")
    text, latents = model.encode(["a cat"] * 2), torch.ones(2, *model.latent_shape())
    model.velocity(latents, torch.full((2,), 0.7), text).sum().backward()
    trained = [p for p in model.network.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_blocks_that_cast_their_own_weights_are_not_compiled(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"quantization=float8_storage casts .* take training\.compile=false"):
        recipe_of(model_folder, tmp_path, generator__quantization="float8_storage", training__compile=True)


@pytest.mark.parametrize(
    "changes, sharding, refused",
    [
        ({"generator__quantization": "nf4"}, "fsdp2", ""),
        ({"generator__quantization": "nf4"}, "zero3", "cuts"),
        ({"generator__quantization": "float8_storage"}, "fsdp2", "cuts"),
        ({"generator__quantization": "float8_storage"}, "none", ""),
        ({"optimizer__kind": "adamw8bit"}, "fsdp2", "cuts"),
        ({"optimizer__kind": "adamw8bit"}, "none", ""),
        ({"training__compile": True}, "zero2", ""),
        ({"training__compile": True}, "zero3", r"sharding=zero3 gathers .* or training\.sharding=fsdp2$"),
        ({"training__compile": True, "generator__quantization": "int8"}, "fsdp2", ""),
        ({"training__compile": True, "generator__quantization": "nf4"}, "none", ""),
        ({"training__compile": True, "generator__quantization": "nf4"}, "fsdp2", r"or generator\.quantization=int8$"),
    ],
)
def test_what_cannot_be_cut_is_told_before_anything_is_loaded(
    model_folder: Path, tmp_path: Path, changes: dict[str, Any], sharding: Sharding, refused: str
) -> None:
    recipe = recipe_of(model_folder, tmp_path, **changes)
    if refused == "cuts":
        refused = rf"is for .* sharding={sharding} cuts them; take training\.sharding=n"
    with pytest.raises(UserError, match=refused) if refused else nullcontext():
        check_sharding(recipe, sharding)


def test_a_lora_on_float8_starts_as_finely_as_on_any_base(model_folder: Path) -> None:
    policy = tiny.lora(generator_of(model_folder, "float8_storage"))
    drawn = next(value for name, value in policy.state().items() if "lora_A" in name)
    assert drawn.unique().numel() > 0.9 * drawn.numel()
    assert not torch.equal(drawn, drawn.to(torch.float8_e4m3fn).float())


# Text encoders


@pytest.fixture(params=["nf4", "int8"])
def text_kind(request: pytest.FixtureRequest) -> str:
    needs(quantization.LIBRARIES[request.param])
    return str(request.param)


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan.save_pipeline(tmp_path_factory.mktemp("tiny") / "wan")


@pytest.mark.parametrize("family", ["flux", "wan"])
def test_two_iterations_with_prompts_read_in_fewer_bits(
    model_folder: Path, wan_folder: Path, tmp_path: Path, text_kind: str, family: str
) -> None:
    fewer = {"generator__text_quantization": text_kind, "generator__dtype": "bfloat16", "generator__offload_text": True}
    raw = tiny.recipe(model_folder, tmp_path / "prompts.txt", **fewer, training__precision="bf16", **TRAINED)
    if family == "wan":
        raw["generator"] |= {"name": "wan", "path": str(wan_folder), **wan_size()}
    list(Run(parse_recipe(raw), tmp_path / "run"))
    for metrics in tiny.lines(tmp_path / "run" / "metrics.jsonl"):
        assert metrics["ratio_deviation"] == 0 and metrics["grad_norm"] > 0 and metrics["skipped"] == 0
    generator: Any = open_run(tmp_path / "run")[1].generator  # as it trained
    found = [n for part in generator.text_encoders for n, m in part.named_modules() if quantization.is_quantised(m)]
    whole = 11 if family == "flux" else 6  # CLIP's and T5's; UMT5's alone, which has a gate
    assert len(found) == whole + (text_kind == "int8")
    assert any(name.endswith("wo") for name in found) == (text_kind == "int8")
    assert not any(quantization.is_quantised(module) for module in generator.network.modules())


def wan_size() -> dict[str, int]:
    height, width = tiny_wan.SIZES["2.1"]
    return {"height": height, "width": width, "frames": tiny_wan.FRAMES}


@pytest.mark.parametrize("family, dtype", [("flux", "float32"), ("wan", "bfloat16"), ("wan", "float16")])
def test_prompts_read_in_fewer_bits_are_near_the_whole_ones_and_planned_for(
    model_folder: Path, wan_folder: Path, text_kind: str, family: str, dtype: str
) -> None:
    sizes: dict[str, Any] = {"path": str(model_folder), "height": tiny.HEIGHT, "width": tiny.WIDTH}
    if family == "wan":
        sizes = {"path": str(wan_folder), **wan_size()}
    sections = [GeneratorSection(**sizes, dtype=dtype, text_quantization=kind) for kind in ("none", text_kind)]
    whole, fewer = (build_generator(section, device="cpu") for section in sections)
    theirs, ours = ([*vars(generator.encode(tiny.PROMPTS[:2])).values()] for generator in (whole, fewer))
    for one, other in zip(theirs, ours, strict=True):
        error = (one.float() - other.float()).norm() / one.float().norm()  # 16 wide, and of random weights
        assert 0 < error < {"nf4": 0.6, "int8": 0.03}[text_kind]
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        drawn = empty_pipeline(sections[1])
    names = [name for name in ("text_encoder", "text_encoder_2") if hasattr(drawn, name)]
    for planned, encoder in ((getattr(drawn, name), getattr(fewer.pipeline, name)) for name in names):
        linear = [m for m in encoder.modules() if isinstance(m, nn.Linear)]
        held = sum(map(storage, linear)) - sum(table_bytes(m) for m in linear)
        held += sum(p.numel() * p.element_size() for p in encoder.parameters())
        held -= sum(m.weight.numel() * m.weight.element_size() for m in linear)
        assert sum(p.numel() * p.element_size() for p in planned.parameters()) == held


def table_bytes(module: nn.Module) -> int:
    """Of the sixteen values that a 4-bit weight's codes stand for, which lie there once per layer."""
    state = getattr(module.weight, "quant_state", None)
    return 0 if state is None else state.code.untyped_storage().nbytes()


def test_text_encoders_stay_whole_where_a_pipeline_is_exported_or_a_library_is_missing(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"text_quantization=nf4 does not go with policy\.kind=full"):
        recipe_of(model_folder, tmp_path, generator__text_quantization="nf4", policy__kind="full")
    monkeypatch.setattr(quantization, "find_spec", lambda _: None)
    section = GeneratorSection(path=str(model_folder), height=24, width=40, text_quantization="nf4")
    with pytest.raises(
        UserError, match=r"text_quantization=nf4 needs bitsandbytes.*pip install 'vipo\[bitsandbytes\]'"
    ):
        build_generator(section, device="cpu")


# 8-bit AdamW


def trainer_of(folder: Path, **changes: Any) -> Trainer:
    """A trainer whose LoRA has weights of 4096 numbers, and smaller ones."""
    return tiny.trainer(
        folder, policy=lambda model: tiny.lora(model, rank=128, alpha=128.0), optimizer_kind="adamw8bit", **changes
    )


@pytest.mark.usefixtures("eight_bit")
def test_moments_of_large_weights_are_in_8_bits_and_a_resumed_run_is_the_same_bit_for_bit(
    model_folder: Path, tmp_path: Path
) -> None:
    straight = trainer_of(model_folder)
    for _ in range(4):
        straight.step()
    stopped = trainer_of(model_folder)
    stopped.step()
    stopped.step()
    slots = stopped.learner.optimizer_state()
    kinds = {key.rsplit("|", 1)[1]: value.dtype for key, value in slots.items() if value.numel() >= 4096}
    assert kinds == {"state1": torch.uint8, "state2": torch.uint8}
    saved = checkpoint.save(stopped.state(), tmp_path)
    again = trainer_of(model_folder)
    again.restore(checkpoint.load(saved, verified(saved), averages=False))
    assert {key: value.dtype for key, value in again.learner.optimizer_state().items()} == {
        key: value.dtype for key, value in slots.items()
    }
    for _ in range(2):
        again.step()
    for name, value in straight.policy.state().items():
        assert torch.equal(value, again.policy.state()[name]), name
    theirs = again.learner.optimizer_state()
    for key, value in straight.learner.optimizer_state().items():
        assert torch.equal(value, theirs[key]), key


@pytest.mark.usefixtures("eight_bit")
def test_8_bits_move_the_weights_nearly_as_32_do(model_folder: Path) -> None:
    eight, whole = (
        trainer_of(model_folder),
        tiny.trainer(model_folder, policy=lambda model: tiny.lora(model, rank=128, alpha=128.0)),
    )
    start = eight.policy.state()
    start = {name: value.clone() for name, value in start.items()}
    for _ in range(2):
        eight.step()
        whole.step()
    for name, value in whole.policy.state().items():
        moved, theirs = eight.policy.state()[name] - start[name], value - start[name]
        if theirs.norm() > 0:
            assert torch.cosine_similarity(moved.flatten(), theirs.flatten(), dim=0) > 0.8, name


def test_a_run_does_not_change_its_optimizer(model_folder: Path, tmp_path: Path) -> None:
    list(Run(recipe_of(model_folder, tmp_path, training__iterations=1, evaluation__every=None), tmp_path / "run"))
    other = recipe_of(model_folder, tmp_path, optimizer__kind="adamw8bit", evaluation__every=None)
    with pytest.raises(UserError, match=r"optimizer\.kind"):
        list(Run(other, tmp_path / "run", resume=True))


# What a plan says


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The benchmark's FLUX: wide enough that weights are more than tables and scales."""
    folder = tmp_path_factory.mktemp("medium")
    yield folder, tiny.benchmark("plan_memory").flux(folder)


def medium_recipe(medium: tuple[Path, dict[str, Any]], **generator: Any) -> Recipe:
    folder, section = medium
    training = {"gradient_checkpointing": True, "precision": "bf16"}
    recipe: Recipe = tiny.benchmark("plan_memory").recipe_of(
        folder, {**section, **generator}, policy={"rank": 16}, training=training
    )
    return recipe


def test_a_plan_knows_the_bytes_of_quantised_weights(medium: tuple[Path, dict[str, Any]], kind: str) -> None:
    recipe = medium_recipe(medium, quantization=kind, dtype="bfloat16")
    network: Any = build_generator(recipe.generator, device="cpu").network
    modules = [m for m in network.modules() if isinstance(m, nn.Linear)]
    others = sum(p.numel() * p.element_size() for p in network.parameters())
    others -= sum(m.weight.numel() * m.weight.element_size() for m in modules)
    real = sum(map(storage, modules)) + others
    said = plan(recipe, Machine(), Ledger()).resident["frozen weights"]
    assert said == pytest.approx(real, rel=0.01)
    whole = plan(medium_recipe(medium, dtype="bfloat16"), Machine(), Ledger()).resident["frozen weights"]
    assert said < {"nf4": 0.33, "int8": 0.55, "float8": 0.55, "float8_storage": 0.8}[kind] * whole


@pytest.mark.slow
def test_predicted_memory_is_what_training_quantised_takes(medium: tuple[Path, dict[str, Any]], kind: str) -> None:
    recipe, module = medium_recipe(medium, quantization=kind, dtype="bfloat16"), tiny.benchmark("plan_memory")
    assert module.predicted(recipe) == pytest.approx(module.measured(recipe), rel=0.15)


@pytest.mark.usefixtures("eight_bit")
def test_a_plan_knows_the_bytes_of_8_bit_moments(model_folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(model_folder)
    trainer.step()
    slots = trainer.learner.optimizer_state()
    real = sum(v.untyped_storage().nbytes() for k, v in slots.items() if "qmap" not in k and not k.endswith("|step"))
    recipe = recipe_of(model_folder, tmp_path, policy__rank=128, optimizer__kind="adamw8bit")
    found = plan(recipe, Machine(), Ledger()).resident
    assert found["AdamW state"] == real < 2 * found["trained weights"]


ONE_AT_A_TIME = ["training.rollout_batch_size=1", "training.replay_batch_size=1"]


@pytest.mark.long
@pytest.mark.parametrize("overrides", [ONE_AT_A_TIME, []], ids=["ones", "whole"])
def test_the_24_gb_recipe_fits_24_gb_with_room(overrides: list[str]) -> None:
    recipe = load_recipe("flux1-dev-lora-24gb", overrides)
    found = plan(recipe, Machine(memory=24 * 10**9), Ledger())
    assert recipe.generator.quantization == "nf4" and found.peak < 22e9
    assert found.worst == "read" and found.phases["read"]["text encoders"] > 9e9  # before they leave for good


SMALLEST = {
    "generator__dtype": "bfloat16",
    "generator__offload_text": True,
    "generator__options": {"decode_batch_size": 1},
    "training__gradient_checkpointing": True,
    "training__replay_batch_size": 1,
    "training__rollout_batch_size": 1,
}


def test_advice_quantises_before_it_gives_up(model_folder: Path, tmp_path: Path) -> None:
    ledger, fitted = Ledger(), recipe_of(model_folder, tmp_path, **SMALLEST)
    room = plan(fitted, Machine(), ledger).peak - 1
    found = advise(fitted, Machine(memory=room), ledger)
    assert any("generator.quantization=nf4" in str(change) for change in found.changes)


def test_advice_reads_prompts_in_8_bits_before_it_reads_them_in_4(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "wordy")
    config = tmp_path / "wordy" / "text_encoder_2" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "d_kv": 4096}))  # the most of all then
    wordy = recipe_of(tmp_path / "wordy", tmp_path, **SMALLEST, generator__quantization="nf4")
    ledger, key = Ledger(), ("generator", "text_quantization")
    eight = Change(key, "int8", ("read",), "prompts read in 8 bits")
    room = plan(eight.apply(wordy), Machine(), ledger).peak
    assert advise(wordy, Machine(memory=room), ledger).changes == (eight,)
    for less in (room - 1, 1):  # where nothing fits, too, it is said once
        (four,) = advise(wordy, Machine(memory=less), ledger).changes
        assert (four.path, four.value) == (key, "nf4")


@pytest.mark.needs_gpu
@pytest.mark.parametrize("quantised", KINDS)
def test_the_quickstart_learns_quantised_on_a_gpu(tmp_path: Path, quantised: str) -> None:
    assert torch.cuda.is_available(), "asked for with --run-needs-gpu, but torch finds no GPU"
    small = ("training.iterations=3", "evaluation.limit=4", "prompts.per_iteration=2", "prompts.group_size=4")
    library = importlib.util.find_spec("bitsandbytes") is not None
    if quantised == "nf4" and not library:
        pytest.skip("pip install 'vipo[bitsandbytes]'")
    kind = "adamw8bit" if library else "adamw"
    fewer = (f"generator.quantization={quantised}", "generator.dtype=bfloat16", f"optimizer.kind={kind}")
    command = [sys.executable, "-m", "vipo", "train", "quickstart", *small, *fewer, "--no-report"]
    done = subprocess.run([*command, "--output", str(tmp_path / "run")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    metrics = tiny.lines(tmp_path / "run" / "metrics.jsonl")
    assert len(metrics) == 3 and all(line["grad_norm"] > 0 and line["skipped"] == 0 for line in metrics)
    assert all(line["ratio_deviation"] == 0 for line in metrics)
    weights = load_file(next((tmp_path / "run" / "export").glob("*.safetensors")))
    assert any(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)
