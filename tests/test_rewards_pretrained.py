"""Loading reward networks: the right file or a sentence, no code run from a pickle, pins, conversion, offloading."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vipo.embedded import path as embedded_path
from vipo.errors import UserError
from vipo.rewards.aesthetic import SHIPPED_HEAD
from vipo.rewards.convert import convert_reward
from vipo.rewards.pretrained import (
    assemble,
    check_tensors,
    checkpoint_file,
    load_model,
    load_tokenizer,
    placed,
    read_tensors,
)

TOKENIZER = embedded_path("emoji-flux") / "tokenizer"
CLASSES = {"clip_vision_model": "CLIPVisionModel"}


def _config() -> transformers.CLIPVisionConfig:
    return transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("network")
    transformers.CLIPVisionModel(_config()).save_pretrained(folder)
    return folder


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


# --- networks in transformers' format --------------------------------------------------------------------------------


def test_a_folder_loads_frozen_in_the_dtype_asked_for(folder: Path) -> None:
    network = load_model("mine", folder, CLASSES, dtype="bfloat16", sha256=_sha256(folder / "model.safetensors"))
    assert network.dtype == torch.bfloat16 and not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_another_file_than_the_pinned_one_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'mine': .*model\.safetensors has sha256 [0-9a-f]{64}, not the pinned 00ff"):
        load_model("mine", folder, CLASSES, sha256="00ff")
    file = tmp_path / "a.pt"
    torch.save({"a": torch.ones(2)}, file)
    assert read_tensors("mine", file, sha256=_sha256(file).upper()).keys() == {"a"}
    with pytest.raises(UserError, match=r"a\.pt has sha256 .* download it again, or correct sha256="):
        read_tensors("mine", file, sha256="0" * 64)


def test_what_is_not_the_network_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'clip_vision_model'; reward 'mine' accepts clip"):
        load_model("mine", folder, {"clip": "CLIPModel"})
    with pytest.raises(UserError, match=r"reward 'mine' found no such folder .*pretrained=FOLDER"):
        load_model("mine", tmp_path / "nowhere", CLASSES)
    with pytest.raises(UserError, match=r"(?s)reward 'mine' found no config\.json at 'some/model'"):
        load_model("mine", "some/model", CLASSES)
    with pytest.raises(UserError, match=r"found no model\.safetensors"):
        load_model("mine", tmp_path, CLASSES, sha256="00ff")


# --- the one file that authors publish -------------------------------------------------------------------------------


def test_a_file_its_folder_and_the_order_of_names(tmp_path: Path) -> None:
    names = ("w.safetensors", "w.pt")
    (tmp_path / "w.pt").touch()
    assert checkpoint_file("mine", tmp_path, names) == tmp_path / "w.pt"
    (tmp_path / "w.safetensors").touch()
    assert checkpoint_file("mine", str(tmp_path), names) == tmp_path / "w.safetensors"
    assert checkpoint_file("mine", tmp_path / "w.pt", names) == tmp_path / "w.pt"


def test_no_file_says_what_was_looked_for_and_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "other.bin").touch()
    with pytest.raises(UserError, match=r"found no w\.pt at .*a file w\.st or w\.pt.*the folder holds other\.bin"):
        checkpoint_file("mine", tmp_path, ("w.st", "w.pt"))
    with pytest.raises(UserError, match=r"Download it once .* pretrained=FILE.* it does not exist"):
        checkpoint_file("mine", tmp_path / "nothing.pt", ("w.pt",))
    with pytest.raises(UserError, match=r"found no w\.pt at 'owner/name'. Accepted: a hub id"):
        checkpoint_file("mine", "owner/name", ("w.pt",))


def test_tensors_come_out_of_every_container(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.float16)}
    torch.save(tensors, tmp_path / "flat.pt")
    torch.save({"step": 4, "state_dict": tensors}, tmp_path / "nested.pt")
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(tensors, tmp_path / "new.safetensors")
    for name in ("flat.pt", "nested.pt", "old.pt", "new.safetensors"):
        read = read_tensors("mine", tmp_path / name)
        assert read.keys() == tensors.keys()
        for key, value in tensors.items():
            torch.testing.assert_close(read[key], value, rtol=0, atol=0)


class _Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (os.environ["VIPO_TEST_MARK"],)


def test_code_in_a_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIPO_TEST_MARK", str(tmp_path / "ran"))
    torch.save({"state_dict": {"a": torch.ones(1)}, "extra": _Malicious()}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=r"cannot read .*bad\.pt .*\(pickled code is never run\)"):
        read_tensors("mine", tmp_path / "bad.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["cut.safetensors", "cut.pt"])
def test_a_cut_file_is_named(name: str, tmp_path: Path) -> None:
    save = save_file if name.endswith("safetensors") else torch.save
    save({"a": torch.ones(1000)}, tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:500])
    with pytest.raises(UserError, match=rf"cannot read .*{name}.*download it again"):
        read_tensors("mine", tmp_path / name)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=rf"cannot read .*{name}.*download it again"):
        read_tensors("mine", tmp_path / name)


@pytest.mark.parametrize("content", [[torch.ones(1)], {"a": {"b": torch.ones(1)}}, {"state_dict": {"a": 1}}])
def test_a_file_without_a_table_of_tensors_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(UserError, match="holds no plain table of named tensors"):
        read_tensors("mine", tmp_path / "odd.pt")


def test_a_network_is_filled_exactly_or_not_at_all() -> None:
    source = transformers.CLIPVisionModel(_config())
    tensors = {key: value.half() for key, value in source.state_dict().items()}
    network = assemble("mine", "here", transformers.CLIPVisionModel, _config(), tensors)
    assert network.dtype == torch.float32 and not network.training
    for key, value in network.state_dict().items():
        torch.testing.assert_close(value, tensors[key].float(), rtol=0, atol=0)
    del tensors["post_layernorm.bias"]
    with pytest.raises(UserError, match=r"here does not fit CLIPVisionModel.*1 lacking \(post_layernorm\.bias\)"):
        assemble("mine", "here", transformers.CLIPVisionModel, _config(), tensors)


def test_a_long_difference_names_the_first_few() -> None:
    network = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    with pytest.raises(UserError) as caught:
        check_tensors("mine", "f.pt", network, {"1.weight": torch.ones(2, 2)}, part="the head")
    assert "f.pt does not fit the head, which has 6 tensors: 5 lacking (0.bias, 0.weight, 1.bias, ...)." in str(
        caught.value
    )


# --- tokenizers ------------------------------------------------------------------------------------------------------


def test_a_tokenizer_loads_from_either_format(tmp_path: Path) -> None:
    new = load_tokenizer("mine", "CLIPTokenizer", TOKENIZER)
    (tmp_path / "vocab.json").write_text('{"<|startoftext|>": 0, "a</w>": 1, "<|endoftext|>": 2}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    old = load_tokenizer("mine", "CLIPTokenizer", str(tmp_path))
    assert len(new) == 655 and old("a")["input_ids"] == [0, 1, 2]


def test_no_tokenizer_is_never_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"no tokenizer at .*one of tokenizer\.json.*tokenizer=FOLDER.*holds tokenizer_c"
    ):
        load_tokenizer("mine", "CLIPTokenizer", tmp_path)
    with pytest.raises(UserError, match=r"found no tokenizer at 'owner/name'.*tokenizer=FOLDER"):
        load_tokenizer("mine", "CLIPTokenizer", "owner/name")


# --- conversion ------------------------------------------------------------------------------------------------------


def test_conversion_keeps_names_types_and_values(tmp_path: Path) -> None:
    both = torch.arange(8.0)
    tensors: dict[str, Tensor] = {"layers.0.weight": both[None], "layers.0.bias": both[3:4]}  # sharing memory
    torch.save(tensors, tmp_path / "head.pth")
    written = convert_reward("aesthetic", tmp_path / "head.pth", tmp_path / "sub" / "head.safetensors")
    read = read_tensors("aesthetic", written)
    assert read.keys() == tensors.keys()
    for key, value in tensors.items():
        torch.testing.assert_close(read[key], value, rtol=0, atol=0)


def test_conversion_refuses_before_it_writes(tmp_path: Path) -> None:
    torch.save({"other.weight": torch.ones(2)}, tmp_path / "a.pt")
    target = tmp_path / "new.safetensors"
    with pytest.raises(UserError, match=r"has no checkpoint to convert; choose from hpsv2\.1, imagereward, aesthetic"):
        convert_reward("redness", tmp_path / "a.pt", target)
    with pytest.raises(UserError, match=r"there is no file .*b\.pt"):
        convert_reward("hpsv2.1", tmp_path / "b.pt", target)
    with pytest.raises(UserError, match=r"must end in \.safetensors"):
        convert_reward("hpsv2.1", tmp_path / "a.pt", tmp_path / "new.pt")
    for name in ("hpsv2.1", "imagereward", "aesthetic"):
        with pytest.raises(UserError, match=f"reward '{name}': .*a.pt"):
            convert_reward(name, tmp_path / "a.pt", target)
    assert not target.exists()


def test_the_shipped_head_names_its_source_and_licence() -> None:
    with safe_open(SHIPPED_HEAD, framework="pt") as handle:
        notice = handle.metadata()
    assert notice["licence"] == "Apache-2.0" and "improved-aesthetic-predictor" in notice["source"]
    assert len(notice["sha256"]) == 64 and notice["changed"]


# --- devices ---------------------------------------------------------------------------------------------------------


class _Travelling(nn.Module):
    """Records where it was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[str] = []

    def to(self, device: object) -> _Travelling:  # type: ignore[override]
        self.sent.append(str(device))
        return self


@pytest.mark.parametrize(
    "offload, gradients, sent",
    [(False, False, ["cuda:1"]), (True, False, ["cuda:1", "cpu"]), (True, True, ["cuda:1"])],
)
def test_offloading_waits_for_the_backward_pass(offload: bool, gradients: bool, sent: list[str]) -> None:
    network = _Travelling()
    with torch.set_grad_enabled(gradients), placed(network, torch.device("cuda:1"), offload=offload):
        assert network.sent == ["cuda:1"]
    assert network.sent == sent


def test_a_failed_pass_gives_the_memory_back_too() -> None:
    network = _Travelling()
    with pytest.raises(RuntimeError), torch.no_grad(), placed(network, torch.device("cuda:0"), offload=True):
        raise RuntimeError("out of memory")
    assert network.sent == ["cuda:0", "cpu"]
