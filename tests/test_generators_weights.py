"""Pipelines whose weights are not wholly those of their networks are refused; what is legitimately not saved is not."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, WanPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel

import tiny_sd3
import tiny_wan
from vipo.embedded import path as embedded_path
from vipo.errors import UserError
from vipo.generators.flux import FluxGenerator
from vipo.generators.weights import load_pipeline

FLOAT32 = {"default": torch.float32}
State = dict[str, Tensor]


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny FLUX that the test may spoil."""
    return shutil.copytree(model_folder, tmp_path / "flux")


def rewrite(part: Path, change: Callable[[State], State]) -> None:
    (file,) = part.glob("*.safetensors")
    save_file(change(load_file(file)), file, {"format": "pt"})


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def renamed(name: str) -> Callable[[State], State]:
    return lambda state: {f"{key}x" if key == name else key: tensor for key, tensor in state.items()}


def without(name: str) -> Callable[[State], State]:
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


def deeper(state: State) -> State:
    more = {key.replace(".0.", ".1.", 1): tensor.clone() for key, tensor in state.items() if ".0." in key}
    return state | more


def wider(name: str) -> Callable[[State], State]:
    return lambda state: {key: torch.cat([t, t]) if key == name else t for key, t in state.items()}


CLIP, T5 = "embeddings.token_embedding.weight", "encoder.block.0.layer.0.SelfAttention.k.weight"
SPOILED: list[tuple[str, Callable[[State], State], str]] = [
    ("transformer", renamed("proj_out.weight"), r"lacks 1 tensor \(proj_out\.weight\), and has .*\.weightx\)"),
    ("transformer", without("proj_out.bias"), r"not those of FluxTransformer2DModel.*1 tensor \(proj_out\.bias\)"),
    ("transformer", deeper, r"has beside them \d+ tensors \(.*blocks\.1\..*, \.\.\.\)"),
    ("transformer", wider("proj_out.weight"), r"proj_out\.weight expected shape"),
    ("vae", renamed("decoder.conv_in.weight"), r"vae'.*lacks 1 tensor \(decoder\.conv_in\.weight\), and"),
    ("text_encoder", renamed(CLIP), r"text_encoder'.*lacks 1 tensor \(.*token_embedding\.weight\), and"),
    ("text_encoder", deeper, r"text_encoder'.*has beside them \d+ tensors \(.*layers\.1\."),
    ("text_encoder", wider(CLIP), r"in another size 1 tensor \(.*\.weight \(1310, 16\) for \(655, 16\)\)"),
    ("text_encoder_2", renamed(T5), r"lacks 1 tensor \(encoder\.block\.0.*k\.weight\)"),
    ("text_encoder_2", without("shared.weight"), r"lacks \d tensors? \((encoder\.embed_tokens|shared)\.weight"),
]


@pytest.mark.parametrize(("part", "spoil", "words"), SPOILED)
def test_weights_that_do_not_fit_are_refused_by_name(
    folder: Path, part: str, spoil: Callable[[State], State], words: str
) -> None:
    rewrite(folder / part, spoil)
    with pytest.raises(UserError, match=words) as raised:
        load_pipeline(FluxPipeline, str(folder), FLOAT32)
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value)


def test_what_is_legitimately_beside_or_not_saved_is_taken(folder: Path) -> None:
    """Position ids of old CLIPs, T5's embedding under either name or both, heads that the class has not."""
    before = load_pipeline(FluxPipeline, str(folder), FLOAT32)
    rewrite(
        folder / "text_encoder", lambda state: {**state, "text_model.embeddings.position_ids": torch.arange(16)[None]}
    )
    rewrite(folder / "text_encoder", lambda state: {**state, "text_projection.weight": torch.ones(16, 16)})
    both = {"encoder.embed_tokens.weight", "shared.weight"}
    embedding = before.text_encoder_2.shared.weight.detach()
    for names in (both, {"encoder.embed_tokens.weight"}, {"shared.weight"}):
        saved = {name: embedding.clone() for name in names}
        rewrite(
            folder / "text_encoder_2",
            lambda state, saved=saved: (
                {k: t for k, t in state.items() if k not in both} | saved | {"lm_head.weight": torch.ones(2, 2)}
            ),
        )
        after = load_pipeline(FluxPipeline, str(folder), FLOAT32)
        for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
            ours, theirs = getattr(after, part).state_dict(), getattr(before, part).state_dict()
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("spoil", [lambda s, name: s.pop(name), lambda s, _: s.update(extra=torch.ones(1))])
def test_shards_that_are_not_as_their_index_says(folder: Path, spoil: Callable[[State, str], Any]) -> None:
    """diffusers takes the index's word for it, and leaves what the shard lacks without a value."""
    part = folder / "transformer"
    network = FluxTransformer2DModel.from_pretrained(part)
    shutil.rmtree(part)
    network.save_pretrained(part, max_shard_size="20KB")
    assert len(list(part.glob("*.safetensors"))) > 2
    load_pipeline(FluxPipeline, str(folder), FLOAT32)
    shard = sorted(part.glob("*.safetensors"))[1]
    state = load_file(shard)
    spoil(state, next(iter(state)))
    save_file(state, shard, {"format": "pt"})
    with pytest.raises(UserError, match=r"index\.json: the folder (lacks|has beside them) 1 tensor \("):
        load_pipeline(FluxPipeline, str(folder), FLOAT32)
    shard.unlink()
    with pytest.raises(UserError, match=rf"no FluxPipeline could be loaded from .*{shard.name}"):
        load_pipeline(FluxPipeline, str(folder), FLOAT32)


def test_every_network_is_loaded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    for network in (FluxTransformer2DModel, CLIPTextModel):
        load = network.from_pretrained
        monkeypatch.setattr(
            network,
            "from_pretrained",
            lambda *a, load=load, name=network.__name__, **k: (calls.update([name]), load(*a, **k))[1],
        )
    load_pipeline(FluxPipeline, str(folder), FLOAT32)
    assert calls == {"FluxTransformer2DModel": 1, "CLIPTextModel": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pipeline_is_the_one_that_diffusers_loads(folder: Path, dtype: torch.dtype) -> None:
    ours = load_pipeline(FluxPipeline, str(folder), {"default": dtype, "vae": torch.float32})
    theirs = FluxPipeline.from_pretrained(str(folder), dtype={"default": dtype, "vae": torch.float32})
    assert ours.config == theirs.config and ours.components.keys() == theirs.components.keys()
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        mine, other = getattr(ours, part).state_dict(), getattr(theirs, part).state_dict()
        assert mine.keys() == other.keys()
        assert all(mine[n].dtype == other[n].dtype and torch.equal(mine[n], other[n]) for n in mine), part


def test_the_other_families_and_the_embedded_models_load(model_folder: Path, tmp_path: Path) -> None:
    for name, family in (("emoji-flux", FluxPipeline), ("emoji-wan", WanPipeline)):
        load_pipeline(family, str(embedded_path(name)), FLOAT32)
    tiny_wan.generator(tiny_wan.save_pipeline(tmp_path / "wan"))
    tiny_sd3.generator(tiny_sd3.save_pipeline(tmp_path / "sd3", model_folder))


BITS = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}


@pytest.mark.parametrize("part", ["transformer", "text_encoder_2", "vae"])
def test_quantised_weights_are_refused_before_they_are_read(folder: Path, part: str) -> None:
    edit(folder / part / "config.json", **BITS)
    for file in folder.rglob("*.safetensors"):
        file.write_bytes(b"")
    with pytest.raises(
        UserError, match=rf"the {part} of .* is quantised .*: bitsandbytes\); .*generator\.dtype=bfloat16"
    ):
        load_pipeline(FluxPipeline, str(folder), FLOAT32)


def test_a_folder_that_is_not_whole_is_one_sentence(folder: Path) -> None:
    def refused(words: str) -> None:
        with pytest.raises(UserError, match=words) as raised:
            load_pipeline(FluxPipeline, str(folder), FLOAT32)
        assert "\n" not in str(raised.value)

    (file,) = (folder / "vae").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:2000])
    refused("no FluxPipeline could be loaded from")
    file.unlink()
    refused("no FluxPipeline could be loaded from .*no file named")
    edit(folder / "transformer" / "config.json", num_layers="one")
    refused("no FluxPipeline could be loaded from")
    edit(folder / "model_index.json", text_encoder_2=["transformers", "T9EncoderModel"])
    refused("wants T9EncoderModel for its text_encoder_2, which the installed transformers does not have")
    edit(folder / "model_index.json", text_encoder_2=["transformers", "T5EncoderModel"])
    shutil.rmtree(folder / "tokenizer")
    refused("has no folder tokenizer, which its model_index.json names")
    edit(folder / "model_index.json", _class_name="WanPipeline")
    refused("is a WanPipeline, not a FluxPipeline")
    (folder / "model_index.json").write_text("{}")
    refused("names no pipeline class")
    (folder / "model_index.json").write_text('{"a":')
    refused("is not a diffusers pipeline; give a folder or hub id.* valid JSON")


def test_an_adapter_of_another_family_says_so(tmp_path: Path) -> None:
    wan = tiny_wan.save_pipeline(tmp_path / "wan")
    with pytest.raises(UserError, match="is a WanPipeline, not a FluxPipeline"):
        FluxGenerator.from_pretrained(wan, device="cpu", dtype=torch.float32, height=32, width=32)
    with pytest.raises(UserError, match="is not a diffusers pipeline: there is no such folder"):
        FluxGenerator.from_pretrained("/no/such/folder", device="cpu", dtype=torch.float32, height=32, width=32)
