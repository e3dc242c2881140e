"""ImageReward: the published layout read exactly, against the same network written down here a second time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file
from skimage import data as photos
from torch import Tensor, nn

from vipo.errors import UserError
from vipo.rewards.convert import convert_reward
from vipo.rewards.image_reward import ImageReward
from vipo.rewards.scoring import score
from vipo.types import Prompt

SIDE, PATCH, HEADS = 32, 16, (4, 3)
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "dog", "##s", "above", "star"]
WORDS = len(VOCABULARY) + 2  # the published network has two tokens more than the tokenizer
PROMPTS = [Prompt(text) for text in ("a red cat", "dogs above a star", "A Cat", "a red cat")]


# --- the network in its authors' layout ------------------------------------------------------------------------------


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """softmax(q k / sqrt(d)) v, by hand; ``mask`` is 1 where a key may be seen."""
    query, key, value = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    logits = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    if mask is not None:
        logits = logits.masked_fill(mask[:, None, None] == 0, -torch.inf)
    return (logits.softmax(-1) @ value).transpose(1, 2).flatten(2)


class _Named(nn.Module):
    """A bag of modules by name, dots and all."""

    def __init__(self, /, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class _VisionBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = _Named(qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width))
        self.mlp = _Named(fc1=nn.Linear(width, 2 * width), fc2=nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.attn.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + self.attn.proj(_attend(query, key, value, HEADS[0]))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class _Vision(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, (SIDE // PATCH) ** 2 + 1, width))
        self.patch_embed = _Named(proj=nn.Conv2d(3, width, PATCH, PATCH))
        self.blocks = nn.ModuleList(_VisionBlock(width) for _ in range(3))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def _attention(width: int, seen: int) -> _Named:
    parts = {"query": nn.Linear(width, width), "key": nn.Linear(seen, width), "value": nn.Linear(seen, width)}
    out = _Named(dense=nn.Linear(width, width), LayerNorm=nn.LayerNorm(width, eps=1e-12))
    return _Named(**{"self": _Named(**parts), "output": out})


class _TextLayer(nn.Module):
    def __init__(self, width: int, seen: int) -> None:
        super().__init__()
        self.attention, self.crossattention = _attention(width, width), _attention(width, seen)
        self.intermediate = _Named(dense=nn.Linear(width, 2 * width))
        self.output = _Named(dense=nn.Linear(2 * width, width), LayerNorm=nn.LayerNorm(width, eps=1e-12))

    def forward(self, x: Tensor, mask: Tensor, seen: Tensor) -> Tensor:
        x = self._step(self.attention, x, x, mask)
        x = self._step(self.crossattention, x, seen, None)
        return self.output.LayerNorm(x + self.output.dense(F.gelu(self.intermediate.dense(x))))

    def _step(self, part: Any, x: Tensor, other: Tensor, mask: Tensor | None) -> Tensor:
        inner = part.get_submodule("self")
        mixed = _attend(inner.query(x), inner.key(other), inner.value(other), HEADS[1], mask)
        return part.output.LayerNorm(x + part.output.dense(mixed))


class _Text(nn.Module):
    def __init__(self, width: int, seen: int) -> None:
        super().__init__()
        self.embeddings = _Named(
            word_embeddings=nn.Embedding(WORDS, width),
            position_embeddings=nn.Embedding(40, width),
            LayerNorm=nn.LayerNorm(width, eps=1e-12),
        )
        self.embeddings.register_buffer("position_ids", torch.arange(40)[None])
        self.encoder = _Named(layer=nn.ModuleList(_TextLayer(width, seen) for _ in range(2)))

    def forward(self, ids: Tensor, mask: Tensor, seen: Tensor) -> Tensor:
        e = self.embeddings
        x = e.LayerNorm(e.word_embeddings(ids) + e.position_embeddings.weight[: ids.shape[1]])
        for layer in self.encoder.layer:
            x = layer(x, mask, seen)
        return x


class _Published(nn.Module):
    """Both encoders, the two projections that scoring does not use, and the head."""

    def __init__(self, vision: int = 32, text: int = 24) -> None:
        super().__init__()
        self.blip = _Named(
            visual_encoder=_Vision(vision),
            text_encoder=_Text(text, vision),
            vision_proj=nn.Linear(vision, 8),
            text_proj=nn.Linear(text, 8),
        )
        wide = [nn.Linear(text, 16), nn.Dropout(0.2), nn.Linear(16, 12), nn.Dropout(0.2), nn.Linear(12, 8)]
        self.mlp = _Named(layers=nn.Sequential(*wide, nn.Dropout(0.1), nn.Linear(8, 4), nn.Linear(4, 1)))

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.blip.text_encoder(ids, mask, self.blip.visual_encoder(images))[:, 0]
        return (self.mlp.layers(hidden)[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def published() -> _Published:
    torch.manual_seed(3)
    model = _Published()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # any two inputs, and any two mistakes, must differ
    return model.eval()


@pytest.fixture(scope="module")
def folder(published: _Published, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As published: a flat state dict; beside it a tokenizer in BERT's oldest format."""
    folder = tmp_path_factory.mktemp("image_reward")
    torch.save(published.state_dict(), folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return folder


def _reward(folder: Path, **options: Any) -> ImageReward:
    return ImageReward(**{"pretrained": folder, "tokenizer": folder, "heads": HEADS, **options})


def _pictures(count: int, height: int = SIDE, width: int = SIDE) -> tuple[list[Image.Image], Tensor]:
    rng = np.random.default_rng(6)
    pixels = rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    media = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255).unsqueeze(2)
    return [Image.fromarray(picture) for picture in pixels], media


def _expected(model: _Published, pictures: list[Image.Image], prompts: list[Prompt]) -> Tensor:
    """transformers' picture processor, ids by hand: class token, words, separator, padding."""
    ids = torch.zeros(len(prompts), 35, dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        words = prompt.text.lower().replace("dogs", "dog ##s").split()[:33]
        row[: len(words) + 2] = torch.tensor([2, *(VOCABULARY.index(word) for word in words), 3])
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE)
    with torch.no_grad():
        return model(processor(pictures, return_tensors="pt")["pixel_values"], ids, (ids > 0).long())


# --- tests -----------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_published_network(published: _Published, folder: Path) -> None:
    pictures, media = _pictures(4)
    scores = score({"ir": _reward(folder)}, {"ir": 1.0}, media, PROMPTS).by_name["ir"]
    expected = _expected(published, pictures, PROMPTS)
    assert expected.std() > 0.02 and scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_pictures_and_prompts_both_count(folder: Path) -> None:
    _, media = _pictures(2)
    scores = _reward(folder)(media[[0, 0, 1, 1]], [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[1]])
    assert len({round(float(value), 4) for value in scores}) == 4


def test_a_file_that_must_be_cropped_is_near(published: _Published, folder: Path) -> None:
    pictures, media = _pictures(4, height=75, width=120)
    expected = _expected(published, pictures, PROMPTS)
    assert (_reward(folder)(media, PROMPTS) - expected).abs().max() < 0.1 * expected.std()


def test_a_prompt_is_read_up_to_35_tokens(published: _Published, folder: Path) -> None:
    pictures, media = _pictures(1)
    long = Prompt("a red cat above a star " * 10)
    scores = _reward(folder)(media, [long])
    torch.testing.assert_close(scores, _expected(published, pictures, [long]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(_reward(folder)(media, [Prompt(long.text + "dog dog")]), scores, rtol=0, atol=0)


@pytest.mark.parametrize("frames", ["mean", "first"])
def test_a_video_scores_as_its_frames_do_whatever_the_batch(frames: Any, folder: Path) -> None:
    video = torch.rand(2, 3, 3, 40, 36, generator=torch.Generator().manual_seed(4))
    reward = _reward(folder)
    single = torch.stack([reward(video[:, :, f : f + 1], PROMPTS[:2]) for f in range(3)])
    expected = single.mean(0) if frames == "mean" else single[0]
    for batch_size in (1, 2, 16):
        scores = _reward(folder, frames=frames, batch_size=batch_size)(video, PROMPTS[:2])
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_media_and_nothing_else(folder: Path) -> None:
    _, media = _pictures(4)
    reward, leaf = _reward(folder), media.requires_grad_(True)
    (gradient,) = torch.autograd.grad(reward(leaf, PROMPTS).sum(), leaf)
    assert (gradient.flatten(1).norm(dim=1) > 1e-5).all()
    assert not reward.network.training and not any(p.requires_grad for p in reward.network.parameters())


def test_bfloat16_keeps_the_ranking(folder: Path) -> None:
    _, media = _pictures(12)
    media = media * torch.linspace(0.1, 1, 12).view(-1, 1, 1, 1, 1)
    fine, coarse = (_reward(folder, dtype=dtype)(media, PROMPTS * 3) for dtype in ("float32", "bfloat16"))
    ranks = torch.stack([values.argsort().argsort().float() for values in (fine, coarse)])
    assert coarse.dtype == torch.float32 and torch.corrcoef(ranks)[0, 1] > 0.95


def test_a_converted_checkpoint_is_used_first_and_scores_the_same(folder: Path, tmp_path: Path) -> None:
    _, media = _pictures(4)
    written = convert_reward("imagereward", folder / "ImageReward.pt", tmp_path / "ImageReward.safetensors")
    assert load_file(written).keys() == torch.load(folder / "ImageReward.pt").keys()
    (tmp_path / "ImageReward.pt").write_bytes(b"never opened")
    scores = _reward(tmp_path, tokenizer=folder)(media, PROMPTS)
    torch.testing.assert_close(scores, _reward(folder)(media, PROMPTS), rtol=0, atol=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"blip.visual_encoder.norm.bias": None}, r"does not fit BlipVisionModel.*1 lacking \(post_layernorm\.bias\)"),
        ({"blip.visual_encoder.head.bias": (3,)}, r"does not fit BlipVisionModel.*1 unknown \(head\.bias\)"),
        ({"blip.text_encoder.pooler.dense.bias": (3,)}, r"BlipTextModel.*1 unknown \(pooler\.dense\.bias\)"),
        ({"blip.text_encoder.embeddings.LayerNorm.bias": (3,)}, r"LayerNorm\.bias is \(3,\) and should be \(24,\)"),
        ({"blip.visual_encoder.pos_embed": None}, r"has no tensor 'pos_embed' among its"),
        ({"mlp.layers.7.weight": (2, 4), "mlp.layers.7.bias": (2,)}, "no stack of linear layers"),
        ({"mlp.layers.0.weight": (16, 9)}, r"head .* reads 9 numbers and the encoder gives 24"),
        ({"clip.weight": (2,)}, r"holds a tensor 'clip\.weight', which is no part of ImageReward"),
    ],
)
@pytest.mark.parametrize("action", ["load", "convert"])
def test_a_checkpoint_that_does_not_fit_is_refused(
    action: str,
    change: dict[str, tuple[int, ...] | None],
    message: str,
    published: _Published,
    folder: Path,
    tmp_path: Path,
) -> None:
    tensors = dict(published.state_dict())
    for key, shape in change.items():
        tensors.pop(key, None)
        if shape is not None:
            tensors[key] = torch.ones(shape)
    torch.save(tensors, tmp_path / "ImageReward.pt")
    with pytest.raises(UserError, match=message):
        if action == "load":
            _reward(tmp_path, tokenizer=folder)
        else:
            convert_reward("imagereward", tmp_path / "ImageReward.pt", tmp_path / "new.safetensors")
    assert not (tmp_path / "new.safetensors").exists()


def test_a_tokenizer_of_other_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join([*VOCABULARY, "b", "c", "d"]) + "\n")
    with pytest.raises(UserError, match=r"has 15 tokens, its network reads 14; give the tokenizer"):
        _reward(folder, tokenizer=tmp_path)
    with pytest.raises(UserError, match=r"5 attention heads cannot share a width of 24"):
        _reward(folder, heads=(4, 5))


@pytest.mark.needs_weights
def test_real_weights_know_a_cat_from_a_rocket() -> None:
    cat = torch.from_numpy(photos.chelsea()).permute(2, 0, 1).float().div(255)[None, :, None]
    prompts = [Prompt("a photo of a cat"), Prompt("a rocket")]
    right, wrong = ImageReward()(cat.expand(2, -1, -1, -1, -1), prompts).tolist()
    assert -3 < wrong < right < 2.5
