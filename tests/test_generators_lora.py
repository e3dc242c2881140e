"""LoRA files of every layout, right to the value or refused by name; on a tiny FLUX and a tiny Wan."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tiny
import tiny_wan
from vipo.errors import UserError
from vipo.generators.common import DiffusersGenerator
from vipo.generators.lora import attach_lora
from vipo.policy import Policy

RANK, ALPHA = 4, 12.0
TARGETS = r".*\.(attn\.to_q|ff\.net\.2|proj_mlp)"  # in both kinds of blocks
FILE = "pytorch_lora_weights.safetensors"
State = dict[str, Tensor]


@pytest.fixture
def model(model_folder: Path) -> DiffusersGenerator:
    return tiny.generator(model_folder)


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan.save_pipeline(tmp_path_factory.mktemp("wan") / "wan")


def weights(network: nn.Module) -> State:
    """Every linear layer's weight by name, with what an adapter adds to it."""
    merged = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and ".lora_" not in f".{name}":
            base = module.weight.detach().clone()
            layer = name.removesuffix(".base_layer")
            wrapper = network.get_submodule(layer)
            merged[layer] = base if wrapper is module else base + wrapper.get_delta_weight("default").detach()
    return merged


def layers(network: nn.Module, targets: str = TARGETS, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Random A and B for the layers that ``targets`` names."""
    rng = torch.Generator().manual_seed(seed)
    found = {
        name: (
            torch.randn(RANK, module.in_features, generator=rng),
            torch.randn(module.out_features, RANK, generator=rng),
        )
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(targets, name)
    }
    assert found
    return found


def named(prefix: str, given: dict[str, tuple[Tensor, Tensor]], down: str = "lora_A", up: str = "lora_B") -> State:
    return {
        f"{prefix}{name}.{half}.weight": tensor
        for name, pair in given.items()
        for half, tensor in zip((down, up), pair, strict=True)
    }


def check(model: DiffusersGenerator, given: dict[str, tuple[Tensor, Tensor]], path: Path, scale: float) -> None:
    """Attached, the network is the base plus scale * B A, merged by hand, in these layers and no other."""
    expected = weights(model.network)
    for name, (down, up) in given.items():
        expected[name] += scale * up @ down
    attach_lora(model.pipeline, path)
    found = weights(model.network)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, atol=1e-5), name
    assert sum(".lora_A." in name for name, _ in model.network.named_parameters()) == len(given)


@pytest.mark.parametrize("spelling", [("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up")])
@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model.", ""])
@pytest.mark.parametrize("alpha", [None, ALPHA])
def test_layouts_with_the_models_own_names(
    model: DiffusersGenerator, tmp_path: Path, prefix: str, spelling: tuple[str, str], alpha: float | None
) -> None:
    given = layers(model.network)
    state = named(prefix, given, *spelling)
    if alpha is not None:
        state |= {f"{prefix}{name}.alpha": torch.tensor(alpha) for name in given}
    save_file(state, tmp_path / "any.safetensors")
    check(model, given, tmp_path / "any.safetensors", 1.0 if alpha is None else alpha / RANK)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_folder_that_peft_saved(model: DiffusersGenerator, model_folder: Path, tmp_path: Path, rslora: bool) -> None:
    """The scale is in adapter_config.json, also where single layers have a rank and an alpha of their own."""
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, use_rslora=rslora, rank_pattern={"proj_mlp": 2},
        alpha_pattern={"proj_mlp": 3.0}, init_lora_weights=False,
    )  # fmt: skip
    wrapped = get_peft_model(tiny.generator(model_folder).network, config)
    wrapped.save_pretrained(tmp_path)
    attach_lora(model.pipeline, tmp_path)
    expected, found = weights(wrapped.get_base_model()), weights(model.network)
    base = weights(tiny.generator(model_folder).network)
    assert all(torch.allclose(found[name], weight, atol=1e-5) for name, weight in expected.items())
    assert any(not torch.allclose(found[name], weight, atol=1e-2) for name, weight in base.items())
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"in PEFT's layout, but no adapter_config\.json lies beside it"):
        attach_lora(tiny.generator(model_folder).pipeline, tmp_path)


def test_settings_in_the_header_as_diffusers_writes_them(model: DiffusersGenerator, tmp_path: Path) -> None:
    given = layers(model.network)
    model.pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=named("", given),
        transformer_lora_adapter_metadata={
            "r": RANK,
            "lora_alpha": ALPHA,
            "target_modules": ["to_q", "proj_mlp", "ff.net.2"],
        },
    )
    check(model, given, tmp_path, ALPHA / RANK)


def wan_names(name: str) -> str:
    for ours, theirs in {
        "attn1": "self_attn",
        "attn2": "cross_attn",
        "to_out.0": "o",
        "to_": "",
        "ffn.net.0.proj": "ffn.0",
        "ffn.net.2": "ffn.2",
    }.items():
        name = name.replace(ours, theirs)
    return name


@pytest.mark.parametrize("kohya", [False, True])
@pytest.mark.parametrize("alpha", [None, ALPHA])
def test_names_of_a_models_authors_go_through_diffusers_conversion(
    wan_folder: Path, tmp_path: Path, kohya: bool, alpha: float | None
) -> None:
    model = tiny_wan.generator(wan_folder)
    given = layers(model.network, model.lora_targets["blocks"])
    theirs = {wan_names(name): pair for name, pair in given.items()}
    if kohya:
        theirs = {name.replace(".", "_"): pair for name, pair in theirs.items()}
    prefix, spelling = ("lora_unet_", ("lora_down", "lora_up")) if kohya else ("diffusion_model.", ("lora_A", "lora_B"))
    state = named(prefix, theirs, *spelling)
    if alpha is not None:
        state |= {f"{prefix}{name}.alpha": torch.tensor(alpha) for name in theirs}
    save_file(state, tmp_path / "theirs.safetensors")
    check(model, given, tmp_path / "theirs.safetensors", 1.0 if alpha is None else alpha / RANK)


def authors_of_wan(model: DiffusersGenerator) -> dict[str, tuple[Tensor, Tensor]]:
    return {wan_names(name): pair for name, pair in layers(model.network, model.lora_targets["blocks"]).items()}


def test_authors_names_that_do_not_fit_are_refused(wan_folder: Path, tmp_path: Path) -> None:
    model = tiny_wan.generator(wan_folder)
    theirs = authors_of_wan(model)
    theirs["time_projection.1"] = theirs.pop("blocks.1.self_attn.q")
    save_file(named("diffusion_model.", theirs), tmp_path / FILE)
    with pytest.raises(UserError, match=r"is for a weight of size \(24, 24\) in condition_embedder\.time_proj"):
        attach_lora(model.pipeline, tmp_path)
    theirs["blocks.0.mystery"] = theirs.pop("time_projection.1")
    save_file(named("diffusion_model.", theirs), tmp_path / FILE)
    with pytest.raises(UserError, match=r"does not convert for WanPipeline .*blocks\.0\.mystery"):
        attach_lora(model.pipeline, tmp_path)


def test_a_layer_that_the_conversion_leaves_out_is_named(
    wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_wan.generator(wan_folder)
    convert = WanPipeline.lora_state_dict

    def forgetful(state: State) -> State:
        return {name: tensor for name, tensor in convert(state).items() if "blocks.1.attn1.to_k" not in name}

    monkeypatch.setattr(WanPipeline, "lora_state_dict", forgetful)
    save_file(named("diffusion_model.", authors_of_wan(model)), tmp_path / FILE)
    with pytest.raises(
        UserError, match=r"has 1 layer \(blocks\.1\.self_attn\.k\) that diffusers' conversion .* leaves out"
    ):
        attach_lora(model.pipeline, tmp_path)


@pytest.mark.parametrize("spoil", ["value", "layer", "scale"])
def test_what_did_not_arrive_in_the_network_is_named(
    model: DiffusersGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: str
) -> None:
    """As diffusers leaves adapters at random values when it finds no tensor for them."""
    load, layer = model.network.load_lora_adapter, "single_transformer_blocks.0.proj_mlp"

    def badly(state: State, **options: Any) -> None:
        load({name: t for name, t in state.items() if spoil != "layer" or layer not in name}, **options)
        if spoil == "value":
            model.network.get_submodule(layer).lora_A["default"].weight.data[0, 0] += 1
        if spoil == "scale":
            model.network.get_submodule(layer).scaling["default"] = 2.0

    monkeypatch.setattr(model.network, "load_lora_adapter", badly)
    save_file(named("transformer.", layers(model.network)), tmp_path / FILE)
    with pytest.raises(UserError, match=r"did not arrive in the network .*proj_mlp\.lora_"):
        attach_lora(model.pipeline, tmp_path)


def rename(part: str, new: str) -> Callable[[State], State]:
    return lambda state: {name.replace(part, new): tensor for name, tensor in state.items()}


def deeper(state: State) -> State:
    more = {name.replace("blocks.0", "blocks.1"): tensor.clone() for name, tensor in state.items()}
    return state | more


def plus(name: str, *shape: int) -> Callable[[State], State]:
    return lambda state: {**state, name: torch.ones(shape)}


def only(*names: str) -> Callable[[State], State]:
    return lambda _: {name: torch.ones(4, 4) for name in names}


def wider(state: State) -> State:
    return {name: torch.cat([tensor, tensor], 1 if "lora_A" in name else 0) for name, tensor in state.items()}


def of_the_first(change: Callable[[Tensor], list[Tensor]]) -> Callable[[State], State]:
    """Other tensors for the first one, perhaps none."""
    return lambda state: {
        name: new for i, (name, tensor) in enumerate(state.items()) for new in ([tensor] if i else change(tensor))
    }


def authors(state: State) -> State:
    return rename("transformer.", "diffusion_model.double_")(rename("transformer_blocks", "blocks")(state))


HALVES = ("lora_unet_down_blocks_0.lora_down.weight", "lora_unet_down_blocks_0.lora_up.weight")
Case = tuple[Callable[[State], State], str]
SPOILED: dict[str, Case] = {
    "one layer renamed": (
        rename("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_qq"),
        r"has 2 layers \(single_transformer_blocks\.0\.attn\.to_qq, .*\) that this model has not",
    ),
    "a prefix renamed": (
        rename("transformer.transformer_blocks", "other.transformer_blocks"),
        r"has 4 tensors \(other\.transformer_blocks.* beside its layout, in which names begin with 'transformer\.'",
    ),
    "every prefix renamed": (rename("transformer.", "other."), "has names in no layout that is known, such as other"),
    "a deeper model's": (deeper, r"has 4 layers \(.*blocks\.1\.attn.*that this model has not"),
    "a wider model's": (wider, r"is for a weight of size \(64, 64\) in .*, where this model has \(32, 32\)"),
    "half a layer": (of_the_first(lambda _: []), r"A without B.* for 1 layer \("),
    "another rank": (of_the_first(lambda tensor: [tensor[:2]]), "has no common rank in"),
    "a bias": (plus("transformer.proj_out.lora_B.bias", 16), "LoRA with biases: 1 tensor"),
    "something else": (plus("transformer.proj_out.mystery", 16), "1 tensor .* no part of a LoRA"),
    "alpha without a layer": (plus("transformer.x.alpha"), r"alpha without both for 1 layer \(x\)"),
    "text encoders too": (plus("text_encoder.layers.0.lora_A.weight", 4, 4), "for a text encoder"),
    "kohya's text encoders": (plus("lora_te1_x.lora_down.weight", 4, 4), "for a text encoder"),
    "LoKr": (only("transformer.proj_out.lokr_w1"), "has LoKr: 1 tensor"),
    "DoRA": (plus("transformer.proj_out.dora_scale", 4), "has DoRA: 1 tensor"),
    "the authors' names, which FLUX.1 has no conversion for": (authors, "diffusers does not convert for FluxPipeline"),
    "kohya's, of another model": (only(*HALVES), "FluxPipeline"),
    "nothing": (only(), "holds no tensor"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_file_that_is_not_wholly_this_models_is_refused_by_name(
    model: DiffusersGenerator, tmp_path: Path, how: str
) -> None:
    spoil, words = SPOILED[how]
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    save_file(spoil(named("transformer.", layers(model.network))), tmp_path / FILE)
    with pytest.raises(UserError, match=words) as raised:
        attach_lora(model.pipeline, tmp_path)
    assert "\n" not in str(raised.value) and str(raised.value).startswith(f"LoRA {str(tmp_path)!r} ")
    assert model.network.state_dict().keys() == before.keys()


def test_a_shallower_models_lora_is_refused_unless_its_settings_say_so(wan_folder: Path, tmp_path: Path) -> None:
    """Blocks from the first on, but not to the last: another model's, or the choice of who trained it."""
    model = tiny_wan.generator(wan_folder)
    given = layers(model.network, r"blocks\.0\.attn1\.to_q")
    save_file(named("transformer.", given), tmp_path / FILE)
    with pytest.raises(UserError, match=r"ends with block 0 of blocks, of which this model has 2"):
        attach_lora(model.pipeline, tmp_path)
    policy = Policy.lora(model.network, rank=RANK, alpha=ALPHA, targets=r"blocks\.0\.attn1\.to_q", seed=0)
    tiny.nudged(policy).export(model, tmp_path / "ours")
    other = tiny_wan.generator(wan_folder)
    attach_lora(other.pipeline, tmp_path / "ours")
    assert torch.allclose(
        weights(other.network)["blocks.0.attn1.to_q"], weights(model.network)["blocks.0.attn1.to_q"], atol=1e-5
    )


def test_layers_that_the_settings_name_and_the_file_lacks(model: DiffusersGenerator, tmp_path: Path) -> None:
    tiny.nudged(tiny.lora(tiny.generator(Path(model.pipeline.config._name_or_path)))).export(model, tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / FILE, framework="pt") as opened:
        header = opened.metadata()
    state = {n: t for n, t in load_file(tmp_path / FILE).items() if "single_transformer_blocks.0.proj_mlp" not in n}
    save_file(state, tmp_path / FILE, header)
    with pytest.raises(
        UserError, match=r"lacks 1 layer \(single_transformer_blocks\.0\.proj_mlp\) that its settings name"
    ):
        attach_lora(model.pipeline, tmp_path)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"use_dora": True}, "trained with use_dora=True"),
        ({"bias": "all"}, "trained with bias='all'"),
        ({"modules_to_save": ["proj_out"]}, "trained with modules_to_save="),
        ({"init_lora_weights": "pissa"}, "trained with init_lora_weights='pissa'"),
        ({"peft_type": "LOHA"}, "trained with peft_type='LOHA'"),
        ({"r": 8}, "has rank 4 in .*, but its settings say 8"),
        ({"lora_alpha": "much"}, "settings that cannot be read"),
    ],
)
def test_settings_that_are_more_than_a_lora_are_refused(
    model: DiffusersGenerator, tmp_path: Path, setting: dict[str, Any], words: str
) -> None:
    save_file(named("base_model.model.", layers(model.network)), tmp_path / "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS}
    (tmp_path / "adapter_config.json").write_text(json.dumps(plain | setting))
    with pytest.raises(UserError, match=words):
        attach_lora(model.pipeline, tmp_path)


def test_which_file_of_a_folder(model: DiffusersGenerator, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must hold one \.safetensors file.*it holds none"):
        attach_lora(model.pipeline, tmp_path)
    given = layers(model.network)
    for name in ("a.safetensors", "b.safetensors"):
        save_file(named("transformer.", given), tmp_path / name)
    with pytest.raises(UserError, match=r"it holds 2 files \(a\.safetensors, b\.safetensors\)"):
        attach_lora(model.pipeline, tmp_path)
    save_file(named("transformer.", given), tmp_path / FILE)
    check(model, given, tmp_path, 1.0)


def test_a_bfloat16_file_keeps_its_scale(model: DiffusersGenerator, tmp_path: Path) -> None:
    given = {name: (down.bfloat16(), up.bfloat16()) for name, (down, up) in layers(model.network).items()}
    state = named("transformer.", given) | {f"transformer.{name}.alpha": torch.tensor(2.0) for name in given}
    save_file(state, tmp_path / FILE)
    check(model, {name: (down.float(), up.float()) for name, (down, up) in given.items()}, tmp_path, 0.5)
