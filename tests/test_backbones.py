"""Backbones: right cells, right order, right size, frozen; each against an independent forward of its own network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from skimage import data as photos
from torch import Tensor

from vipo import backbones
from vipo.errors import UserError
from vipo.types import Backbone
from vipo.vision.efficientnet_lite import FoldedTrunk, load_unfolded, to_input
from vipo.vision.preprocess import IMAGENET_MEAN, IMAGENET_STD, fitted_size, resize, tokens_to_grid

Y, X = 208, 304  # not square, and a multiple of neither 14 nor 32


@pytest.fixture(autouse=True)
def _quick() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 3, Y, X, generator=torch.Generator().manual_seed(1))


def _save(model: transformers.PreTrainedModel, folder: Path) -> Path:
    """Random weights large enough to matter: SAM's own initialisation is nearly zero and would hide any mistake."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def _dinov2(folder: Path) -> Path:
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=56
    )
    return _save(transformers.Dinov2Model(config), folder)


def _dinov2_registers(folder: Path) -> Path:
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=56, num_register_tokens=3
    )
    return _save(transformers.Dinov2WithRegistersModel(config), folder)


def _resnet(folder: Path) -> Path:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1])
    return _save(transformers.ResNetModel(config), folder)


def _sam(folder: Path) -> Path:
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 128,
        "global_attn_indexes": [1],
        "window_size": 4,
        "output_channels": 16,
        "mlp_dim": 32,
    }
    return _save(transformers.SamModel(transformers.SamConfig(vision_config=vision)), folder)


TINY: dict[str, Callable[[Path], Path]] = {"dinov2": _dinov2, "resnet": _resnet, "sam": _sam}


def _normalised(images: Tensor) -> Tensor:
    return (images - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]


@pytest.mark.parametrize("name", TINY)
def test_every_pretrained_backbone_is_frozen_float32_and_independent_of_the_batch(
    name: str, tmp_path: Path, images: Tensor
) -> None:
    backbone = backbones.build(name, pretrained=TINY[name](tmp_path))
    assert isinstance(backbone, Backbone)
    network = backbone.network  # type: ignore[attr-defined]
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    seen = backbone(images.requires_grad_(True))
    assert not seen.features.requires_grad and seen.features.dtype == torch.float32
    backbone.batch_size = 1  # type: ignore[attr-defined]
    torch.testing.assert_close(backbone(images).features, seen.features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make, dropped", [(_dinov2, 1), (_dinov2_registers, 4)])
def test_dinov2_gives_patch_tokens_in_reading_order(
    make: Callable[[Path], Path], dropped: int, tmp_path: Path, images: Tensor
) -> None:
    seen = backbones.build("dinov2", pretrained=make(tmp_path), resolution=None)(images)
    assert seen.features.shape == (2, 32, 15, 22) and seen.stride == 14
    network = transformers.AutoModel.from_pretrained(tmp_path).eval()
    resized = F.interpolate(images, size=(15 * 14, 22 * 14), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        tokens = network(_normalised(resized)).last_hidden_state[:, dropped:]
    row, column = 3, 17
    torch.testing.assert_close(seen.features[:, :, row, column], tokens[:, row * 22 + column], rtol=1e-4, atol=1e-5)


def test_dinov2_layer_is_a_raw_hidden_state(tmp_path: Path, images: Tensor) -> None:
    _dinov2(tmp_path)
    first = backbones.build("dinov2", pretrained=tmp_path, layer=1, resolution=None)(images).features
    last = backbones.build("dinov2", pretrained=tmp_path, resolution=None)(images).features
    assert first.shape == last.shape and not torch.allclose(first, last)
    with pytest.raises(UserError, match="hidden states 0 to 2"):
        backbones.build("dinov2", pretrained=tmp_path, layer=7)


@pytest.mark.parametrize("layer, shape, stride", [(3, (2, 32, 12, 20), 16), (4, (2, 64, 6, 10), 32)])
def test_resnet_stage_equals_the_network_itself(
    layer: int, shape: tuple[int, ...], stride: int, tmp_path: Path, images: Tensor
) -> None:
    seen = backbones.build("resnet", pretrained=_resnet(tmp_path), resolution=None, layer=layer)(images)
    assert seen.features.shape == shape and seen.stride == stride
    network = transformers.ResNetModel.from_pretrained(tmp_path).eval()
    resized = F.interpolate(images, size=(192, 320), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        expected = network(_normalised(resized), output_hidden_states=True).hidden_states[layer]
    torch.testing.assert_close(seen.features, expected, rtol=1e-4, atol=1e-5)


def test_sam_pads_after_normalising_and_crops_the_padding_away(tmp_path: Path, images: Tensor) -> None:
    seen = backbones.build("sam", pretrained=_sam(tmp_path))(images)
    assert seen.features.shape == (2, 16, 6, 8) and seen.stride == 16  # 128 px wide, 88 high: 5.5 rows of cells
    network = transformers.SamVisionModel.from_pretrained(tmp_path).eval()
    square = torch.zeros(2, 3, 128, 128)
    small = F.interpolate(images, size=(88, 128), mode="bicubic", antialias=True).clamp(0, 1)
    square[:, :, :88] = _normalised(small)
    with torch.no_grad():
        expected = network(square).last_hidden_state[:, :, :6]
    torch.testing.assert_close(seen.features, expected, rtol=1e-4, atol=1e-5)
    assert backbones.build("sam", pretrained=tmp_path, layer=1)(images).features.shape == (2, 32, 6, 8)
    with pytest.raises(UserError, match="takes 128 px only"):
        backbones.build("sam", pretrained=tmp_path, resolution=512)


def test_folding_the_batch_norms_changes_nothing() -> None:
    photo = torch.from_numpy(photos.coffee()).permute(2, 0, 1)[None].float() / 255
    photo = to_input(resize(photo, (224, 224)))  # the size for which the authors' fixed padding is right
    unfolded = load_unfolded()
    with torch.no_grad():
        x = unfolded._swish(unfolded._bn0(unfolded._conv_stem(photo)))
        for block in unfolded._blocks:
            x = block(x)
        folded = FoldedTrunk(unfolded, 32).eval()(photo)
    torch.testing.assert_close(folded, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride, width", [(2, 16), (4, 24), (8, 40), (16, 112), (32, 320)])
def test_efficientnet_lite_gives_every_stride(stride: int, width: int) -> None:
    seen = backbones.build("efficientnet_lite", stride=stride, resolution=96)(torch.rand(1, 3, 64, 48))
    assert seen.features.shape == (1, width, 96 // stride, 64 // stride) and seen.stride == stride


def test_efficientnet_lite_knows_a_mirrored_cat_from_a_cup_of_coffee() -> None:
    cat = torch.from_numpy(photos.chelsea()).permute(2, 0, 1)[None].float() / 255
    coffee = torch.from_numpy(photos.coffee()).permute(2, 0, 1)[None].float() / 255
    seen = backbones.build("efficientnet_lite", stride=32, resolution=224)(cat)
    assert seen.features.shape == (1, 320, 5, 7)
    mirrored = backbones.build("efficientnet_lite", stride=32, resolution=224)(cat.flip(3)).features.flip(3)
    other = backbones.build("efficientnet_lite", stride=32, resolution=224)(coffee).features
    cat_code, mirrored_code, other_code = (f.mean((2, 3)) for f in (seen.features, mirrored, other))
    assert F.cosine_similarity(cat_code, mirrored_code) > F.cosine_similarity(cat_code, other_code) + 0.2
    assert isinstance(backbones.build("efficientnet_lite"), Backbone)


def test_efficientnet_lite_in_bfloat16_is_near_and_float32() -> None:
    picture = torch.rand(1, 3, 64, 64)
    exact, near = (backbones.build("efficientnet_lite", dtype=d)(picture).features for d in ("float32", "bfloat16"))
    assert near.dtype == torch.float32
    assert (near - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize(
    "size, resolution, expected",
    [
        ((64, 64), 128, (128, 128)),
        ((208, 304), None, (208, 304)),
        ((10, 300), 160, (16, 160)),
        ((90, 64), 64, (64, 48)),
    ],
)
def test_fitted_size(size: tuple[int, int], resolution: int | None, expected: tuple[int, int]) -> None:
    assert fitted_size(torch.zeros(1, 3, *size), resolution, 16) == expected


def test_tokens_that_are_no_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="register tokens"):
        tokens_to_grid(torch.zeros(1, 10, 4), (3, 3), 2)


def test_unknown_names_and_options_are_user_errors() -> None:
    with pytest.raises(UserError, match="Did you mean 'dinov2'"):
        backbones.build("dinov-2")
    with pytest.raises(UserError, match="choose from 2, 4, 8, 16, 32"):
        backbones.build("efficientnet_lite", stride=7)
    with pytest.raises(UserError, match=r"takes no option 'depth'; it takes stride, resolution, batch_size, dtype."):
        backbones.build("efficientnet_lite", depth=3)
    with pytest.raises(UserError, match=r"refused its options {'resolution': 8}: .*less than one cell"):
        backbones.build("efficientnet_lite", resolution=8)


def test_missing_and_foreign_weights_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)no such folder.*Accepted: a hub id.*pretrained=FOLDER"):
        backbones.build("dinov2", pretrained=tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"found no config\.json"):
        backbones.build("dinov2", pretrained=tmp_path)
    with pytest.raises(UserError, match="type 'resnet'; backbone 'dinov2' accepts"):
        backbones.build("dinov2", pretrained=_resnet(tmp_path / "resnet"))


def test_weights_that_do_not_fill_the_network_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _dinov2(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["layernorm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 tensors"):
        backbones.build("dinov2", pretrained=tmp_path)
