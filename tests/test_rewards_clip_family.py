"""CLIP scorers: published layouts read exactly, prepared pictures, formulas; each against an independent forward."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
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

from vipo.embedded import path as embedded_path
from vipo.errors import UserError
from vipo.rewards.aesthetic import SHIPPED_HEAD, Aesthetic
from vipo.rewards.clip_family import ClipScore, HpsV21, PickScore
from vipo.rewards.scoring import score
from vipo.types import Prompt, Reward
from vipo.vision.preprocess import CLIP_MEAN, CLIP_STD, centre_crop, letterbox

TOKENIZER = embedded_path("emoji-flux") / "tokenizer"  # CLIP's kind, 655 tokens
WORDS, LENGTH, SIDE, PATCH, EMBEDDING = 655, 12, 28, 14, 20
HEADS = (4, 2)
PROMPTS = [Prompt(text) for text in ("a red cat", "a panda", "a heart above a star", "a red cat")]


@pytest.fixture(scope="module")
def media() -> Tensor:
    """Four samples of one frame, not square, each brighter and redder than the one before."""
    noise = torch.rand(4, 3, 1, 40, 58, generator=torch.Generator().manual_seed(1))
    noise[:, 0] += torch.arange(4.0).view(4, 1, 1, 1)
    return (noise / 4).clamp(0, 1)


# --- HPSv2.1: a CLIP in open_clip's layout, written down here a second time -----------------------------------------


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        layers = [("c_fc", nn.Linear(width, 3 * width)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(3 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        seen = self.ln_1(x)
        x = x + self.attn(seen, seen, seen, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class _Tower(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class _Visual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((SIDE // PATCH) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = _Tower(width, HEADS[0], layers=3)
        self.proj = nn.Parameter(torch.randn(width, EMBEDDING))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(images), 1, -1), patches], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class _OpenClip(nn.Module):
    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.visual = _Visual(32)
        self.transformer = _Tower(width, HEADS[1], layers=2)
        self.token_embedding = nn.Embedding(WORDS, width)
        self.positional_embedding = nn.Parameter(torch.randn(LENGTH, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, EMBEDDING))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def text(self, ids: Tensor) -> Tensor:
        future = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)
        x = self.ln_final(self.transformer(self.token_embedding(ids) + self.positional_embedding, future))
        return x[torch.arange(len(ids)), ids.argmax(1)] @ self.text_projection


def _shaken(model: nn.Module) -> nn.Module:
    """Weights large enough that any two pictures, and any two mistakes, differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def open_clip() -> _OpenClip:
    torch.manual_seed(3)
    return _shaken(_OpenClip())  # type: ignore[return-value]


@pytest.fixture(scope="module")
def hps_file(open_clip: _OpenClip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As published: a pickle with the tensors under ``state_dict``, beside how far training had come."""
    file = tmp_path_factory.mktemp("hps") / "HPS_v2.1_compressed.pt"
    torch.save({"epoch": 3, "name": "hps", "state_dict": open_clip.state_dict()}, file)
    return file


def _hps(file: Path, **options: Any) -> HpsV21:
    return HpsV21(pretrained=file, tokenizer=TOKENIZER, heads=HEADS, **options)


def _ids(texts: list[str]) -> Tensor:
    """Start, words, end and padding, cut so that the end stays: by hand."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(TOKENIZER)
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"][: LENGTH - 2] for text in texts]
    return torch.tensor([[653, *row, 654] + [654] * (LENGTH - 2 - len(row)) for row in rows])


def _normalised(images: Tensor) -> Tensor:
    return (images - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def _cosines(clip: _OpenClip, images: Tensor, prompts: list[Prompt]) -> Tensor:
    with torch.no_grad():
        texts = clip.text(_ids([prompt.text for prompt in prompts]))
        return F.cosine_similarity(clip.visual(_normalised(images)), texts)


def test_hps_is_the_cosine_of_the_published_network(open_clip: _OpenClip, hps_file: Path, media: Tensor) -> None:
    scores = score({"hps": _hps(hps_file)}, {"hps": 1.0}, media, PROMPTS).by_name["hps"]
    assert scores.shape == (4,) and scores.dtype == torch.float32
    assert scores.std() > 0.02 and scores.abs().max() <= 1
    torch.testing.assert_close(scores, _cosines(open_clip, letterbox(media[:, :, 0], SIDE), PROMPTS))


@pytest.mark.parametrize("place", ["folder", "safetensors"])
def test_hps_loads_from_a_folder_and_from_plain_safetensors(
    place: str, open_clip: _OpenClip, hps_file: Path, tmp_path: Path, media: Tensor
) -> None:
    from safetensors.torch import save_file

    source = hps_file.parent
    if place == "safetensors":
        source = tmp_path / "renamed.safetensors"
        save_file(open_clip.state_dict(), source)
    torch.testing.assert_close(_hps(source)(media, PROMPTS), _hps(hps_file)(media, PROMPTS), rtol=0, atol=0)


@pytest.mark.parametrize("frames", ["mean", "first"])
def test_a_video_scores_as_its_frames_do(frames: Any, hps_file: Path) -> None:
    video = torch.rand(2, 3, 3, 30, 30, generator=torch.Generator().manual_seed(4)) * torch.rand(2, 3, 3, 1, 1)
    single = torch.stack([_hps(hps_file)(video[:, :, f : f + 1], PROMPTS[:2]) for f in range(3)])
    expected = single.mean(0) if frames == "mean" else single[0]
    torch.testing.assert_close(_hps(hps_file, frames=frames)(video, PROMPTS[:2]), expected)


def test_the_network_alone_decides_the_key_difference(open_clip: _OpenClip, tmp_path: Path) -> None:
    tensors = dict(open_clip.state_dict())
    del tensors["visual.ln_post.bias"], tensors["logit_scale"]
    tensors["visual.extra"] = torch.ones(2)
    tensors["ln_final.weight"] = torch.ones(3)
    torch.save({"state_dict": tensors}, tmp_path / "wrong.pt")
    with pytest.raises(UserError) as caught:
        _hps(tmp_path / "wrong.pt")
    message = str(caught.value)
    assert "wrong.pt does not fit CLIPModel" in message
    assert "2 lacking (logit_scale, vision_model.post_layernorm.bias)" in message
    assert "1 unknown (visual.extra)" in message
    assert "text_model.final_layer_norm.weight is (3,) and should be (24,)" in message


def test_a_checkpoint_in_another_layout_is_refused(tmp_path: Path, hps_file: Path) -> None:
    torch.save({"fc.weight": torch.ones(2, 2)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"has no tensor 'visual\.conv1\.weight' among its 1"):
        _hps(tmp_path / "other.pt")
    with pytest.raises(UserError, match="5 attention heads cannot share a width of 32; correct heads="):
        HpsV21(pretrained=hps_file, tokenizer=TOKENIZER, heads=(5, 2))


# --- CLIPs in transformers' format ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with its tokenizer. Its config has the old end-of-text id 2, as the published ones do."""
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": WORDS, "max_position_embeddings": LENGTH, "bos_token_id": 0, "eos_token_id": 2}
    config = transformers.CLIPConfig(
        text_config={**tower, **text},
        vision_config={**tower, "image_size": SIDE, "patch_size": PATCH},
        projection_dim=EMBEDDING,
        logit_scale_init_value=4.6052,
    )
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(24)  # of these weights, cosines of both signs come out
    _shaken(transformers.CLIPModel(config)).save_pretrained(folder)  # type: ignore[operator]
    transformers.CLIPTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return folder


def _pictures(count: int, height: int = SIDE, width: int = SIDE) -> tuple[list[Image.Image], Tensor]:
    """Pictures of 8 bits, as Pillow and as media have them."""
    rng = np.random.default_rng(6)
    coarse = rng.integers(0, 256, (count, height // 7, width // 7, 3), dtype=np.uint8)
    pixels = coarse.repeat(7, 1).repeat(7, 2) // 2 + rng.integers(0, 128, (count, height, width, 3), dtype=np.uint8)
    media = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255).unsqueeze(2)
    return [Image.fromarray(picture) for picture in pixels], media


def _published(folder: Path, pictures: list[Image.Image], texts: list[str]) -> Any:
    """What transformers' own processor and forward pass make of files."""
    network = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE)
    tokens = transformers.CLIPTokenizer.from_pretrained(folder)(
        texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
    )
    with torch.no_grad():
        return network(pixel_values=processor(pictures, return_tensors="pt")["pixel_values"], **tokens)


def test_pickscore_is_the_logit_of_the_published_pipeline(clip_folder: Path) -> None:
    pictures, media = _pictures(4)
    scores = PickScore(pretrained=clip_folder, tokenizer=clip_folder)(media, PROMPTS)
    expected = _published(clip_folder, pictures, [prompt.text for prompt in PROMPTS]).logits_per_image.diag()
    assert expected.std() > 1
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_pickscore_of_a_file_that_must_be_resized_is_near(clip_folder: Path) -> None:
    pictures, media = _pictures(4, height=63, width=98)
    scores = PickScore(pretrained=clip_folder, tokenizer=clip_folder)(media, PROMPTS)
    expected = _published(clip_folder, pictures, [prompt.text for prompt in PROMPTS]).logits_per_image.diag()
    assert (scores - expected).abs().max() < 0.1 * expected.std()


@pytest.mark.parametrize(
    "scale, formula, low, high",
    [
        ("cosine", lambda cosine: cosine, -1.0, 1.0),
        ("hessel", lambda cosine: 2.5 * cosine.clamp(min=0), 0.0, 2.5),
        ("percent", lambda cosine: 100 * cosine.clamp(min=0), 0.0, 100.0),
    ],
)
def test_clip_score_in_three_scales(
    scale: Any, formula: Callable[[Tensor], Tensor], low: float, high: float, clip_folder: Path
) -> None:
    pictures, media = _pictures(4)
    seen = _published(clip_folder, pictures, [prompt.text for prompt in PROMPTS])
    cosine = (seen.image_embeds * seen.text_embeds).sum(1)
    assert cosine.min() < 0 < cosine.max(), "choose another seed: the scales differ where the cosine is negative"
    scores = ClipScore(pretrained=clip_folder, scale=scale)(media, PROMPTS)
    torch.testing.assert_close(scores, formula(cosine), rtol=1e-4, atol=1e-4)
    assert low <= float(scores.min()) and float(scores.max()) <= high


def test_hessel_floors_each_frame_before_the_mean(clip_folder: Path) -> None:
    _, media = _pictures(4)
    video = media.transpose(0, 2)  # one sample of four frames
    cosines = ClipScore(pretrained=clip_folder).matcher.cosines(video, PROMPTS[:1])
    assert cosines.min() < 0 < cosines.max()
    expected = (2.5 * cosines.clamp(min=0)).mean(1)
    torch.testing.assert_close(ClipScore(pretrained=clip_folder, scale="hessel")(video, PROMPTS[:1]), expected)


@pytest.mark.usefixtures("unchecked")
def test_unknown_options_are_refused(clip_folder: Path) -> None:
    with pytest.raises(UserError, match=r"no scale 'best'; choose from cosine, hessel, percent"):
        ClipScore(pretrained=clip_folder, scale="best")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"no frames='last'; choose from mean, first"):
        ClipScore(pretrained=clip_folder, frames="last")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"no dtype 'int8'; choose from float32"):
        PickScore(pretrained=clip_folder, tokenizer=clip_folder, dtype="int8")


# --- aesthetic ------------------------------------------------------------------------------------------------------


def _published_head(width: int) -> nn.Sequential:
    """Five linear layers, dropout between them, no activation."""
    wide = [nn.Linear(width, 32), nn.Dropout(0.2), nn.Linear(32, 16), nn.Dropout(0.2), nn.Linear(16, 8)]
    return nn.Sequential(*wide, nn.Dropout(0.1), nn.Linear(8, 4), nn.Linear(4, 1)).eval()


def test_aesthetic_is_the_published_head_on_the_unit_embedding(clip_folder: Path, tmp_path: Path) -> None:
    head = _published_head(EMBEDDING)
    torch.save({f"layers.{key}": value for key, value in head.state_dict().items()}, tmp_path / "head.pth")
    pictures, media = _pictures(4)
    reward = Aesthetic(pretrained=clip_folder, head=tmp_path / "head.pth")
    unit = _published(clip_folder, pictures, ["a"]).image_embeds
    with torch.no_grad():
        torch.testing.assert_close(reward(media, PROMPTS), head(unit)[:, 0], rtol=1e-4, atol=1e-5)
    assert not hasattr(reward.network, "text_model")


def test_the_shipped_head_is_the_published_one(clip_folder: Path) -> None:
    """|w| and b of LAION's file, measured on the original; its kind of score is around 5."""
    shipped = load_file(SHIPPED_HEAD)
    assert shipped["weight"].shape == (1, 768)
    assert float(shipped["weight"].norm()) == pytest.approx(17.9956, abs=1e-3)
    assert float(shipped["bias"]) == pytest.approx(5.2366, abs=1e-3)
    with pytest.raises(UserError, match=r"head in .*laion_aesthetic_v2.* reads 768 numbers and the encoder gives 20"):
        Aesthetic(pretrained=clip_folder)


@pytest.mark.parametrize(
    "tensors",
    [
        {"layers.0.weight": torch.ones(3, EMBEDDING), "layers.0.bias": torch.ones(3)},  # ends in three numbers
        {"layers.0.weight": torch.ones(1, EMBEDDING)},
        {"layers.0.weight": torch.ones(1, EMBEDDING), "layers.0.bias": torch.ones(1), "norm.weight": torch.ones(1)},
        {
            "layers.0.weight": torch.ones(4, EMBEDDING),
            "layers.0.bias": torch.ones(4),
            "layers.1.weight": torch.ones(1, 3),
            "layers.1.bias": torch.ones(1),
        },
    ],
)
def test_a_head_that_is_no_stack_of_linear_layers_is_refused(
    tensors: dict[str, Tensor], clip_folder: Path, tmp_path: Path
) -> None:
    torch.save(tensors, tmp_path / "head.pth")
    with pytest.raises(UserError, match=r"no stack of linear layers that ends in one number.*layers\.0\.weight"):
        Aesthetic(pretrained=clip_folder, head=tmp_path / "head.pth")


# --- all of them ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def build(hps_file: Path, clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Reward]:
    torch.manual_seed(7)
    head = tmp_path_factory.mktemp("head") / "linear.pth"
    torch.save(nn.Linear(EMBEDDING, 1).state_dict(), head)  # the single-layer format
    factories: dict[str, Callable[..., Reward]] = {
        "hps": lambda **o: _hps(hps_file, **o),
        "pickscore": lambda **o: PickScore(pretrained=clip_folder, tokenizer=clip_folder, **o),
        "clip_score": lambda **o: ClipScore(pretrained=clip_folder, **o),
        "aesthetic": lambda **o: Aesthetic(pretrained=clip_folder, head=head, **o),
    }
    return lambda name, **options: factories[name](**options)


NAMES = ("hps", "pickscore", "clip_score", "aesthetic")


@pytest.mark.parametrize("name", NAMES)
def test_a_score_does_not_depend_on_its_companions(name: str, build: Callable[..., Reward], media: Tensor) -> None:
    together = build(name)(media, PROMPTS)
    reward = build(name, batch_size=1)
    alone = torch.cat([reward(media[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(reward(media, PROMPTS), together, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_media_and_nothing_else(name: str, build: Callable[..., Reward], media: Tensor) -> None:
    reward, leaf = build(name), media.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(reward(leaf, PROMPTS).sum(), leaf)
    assert gradient.isfinite().all() and (gradient.flatten(1).norm(dim=1) > 1e-5).all()
    network = reward.matcher.network if hasattr(reward, "matcher") else reward.network  # type: ignore[attr-defined]
    assert not network.training and not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_keeps_the_ranking(name: str, build: Callable[..., Reward]) -> None:
    _, media = _pictures(12, height=42, width=56)
    prompts = PROMPTS * 3
    fine, coarse = (build(name, dtype=dtype)(media, prompts) for dtype in ("float32", "bfloat16"))
    assert coarse.dtype == torch.float32
    ranks = torch.stack([values.argsort().argsort().float() for values in (fine, coarse)])
    assert torch.corrcoef(ranks)[0, 1] > 0.95
    assert (coarse - fine).abs().max() < 0.1 * (fine.max() - fine.min())


def test_the_logit_scale_is_not_rounded_with_the_network(build: Callable[..., Any]) -> None:
    assert build("pickscore", dtype="bfloat16").scale == build("pickscore").scale == pytest.approx(100.0, rel=0.5)
    assert build("pickscore", dtype="bfloat16").matcher.network.dtype == torch.bfloat16


def test_nan_media_have_no_score(build: Callable[..., Reward], media: Tensor) -> None:
    broken = media.clone()
    broken[1] = torch.nan
    for name in NAMES:
        assert build(name)(broken, PROMPTS).isnan().tolist() == [False, True, False, False]


@pytest.mark.needs_weights
@pytest.mark.parametrize("reward, low, high", [(HpsV21, 0.1, 0.45), (PickScore, 14, 28), (ClipScore, 0.05, 0.4)])
def test_real_weights_know_a_cat_from_a_rocket(reward: Callable[[], Reward], low: float, high: float) -> None:
    cat = torch.from_numpy(photos.chelsea()).permute(2, 0, 1).float().div(255)[None, :, None]
    right, wrong = reward()(cat.expand(2, -1, -1, -1, -1), [Prompt("a photo of a cat"), Prompt("a rocket")]).tolist()
    assert low < wrong < right < high


@pytest.mark.needs_weights
def test_real_weights_like_a_photo_more_than_noise() -> None:
    cat = torch.from_numpy(photos.chelsea()).permute(2, 0, 1).float().div(255)[None, :, None]
    nice, ugly = Aesthetic()(torch.cat([cat, torch.rand_like(cat)]), [Prompt("")] * 2).tolist()
    assert 4 < nice < 8 and ugly < nice


# --- text -----------------------------------------------------------------------------------------------------------


def test_a_long_prompt_is_cut_with_its_end_kept(clip_folder: Path) -> None:
    matcher = ClipScore(pretrained=clip_folder).matcher
    tokens = matcher.tokens(["a red cat " * 20, "a panda"])
    torch.testing.assert_close(tokens, _ids(["a red cat " * 20, "a panda"]))
    assert tokens.shape == (2, LENGTH) and tokens[0, -1] == 654 and 654 not in tokens[0, :-1]


def test_a_shared_prompt_is_embedded_once(clip_folder: Path, media: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = ClipScore(pretrained=clip_folder)
    rows: list[int] = []
    original = reward.matcher.network.get_text_features

    def counted(ids: Tensor) -> Any:
        rows.append(len(ids))
        return original(ids)

    monkeypatch.setattr(reward.matcher.network, "get_text_features", counted)
    scores = reward(media[[0, 0, 0, 0]], [PROMPTS[i] for i in (0, 1, 0, 1)])
    assert rows == [2]
    assert scores[0] == scores[2] and scores[1] == scores[3] and scores[0] != scores[1]


def test_a_tokenizer_of_other_weights_is_refused(hps_file: Path, tmp_path: Path) -> None:
    tokenizer = transformers.CLIPTokenizer.from_pretrained(TOKENIZER)
    tokenizer.add_tokens(["<new>"])
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"ends a text with token 656, its network with 654 of 655; give the tokenizer"):
        HpsV21(pretrained=hps_file, tokenizer=tmp_path, heads=HEADS)


# --- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(90, 120), (301, 170), (64, 64), (20, 33)])
def test_centre_crop_is_what_pillow_makes_of_the_file(height: int, width: int) -> None:
    rng = np.random.default_rng(8)
    picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    short = min(height, width)
    size = int(32 * width / short), int(32 * height / short)
    left, top = (size[0] - 32) // 2, (size[1] - 32) // 2
    cropped = picture.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 32))
    expected = torch.from_numpy(np.asarray(cropped).copy()).permute(2, 0, 1).float() / 255
    seen = centre_crop(torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float()[None] / 255, 32)[0]
    difference = (seen - expected).abs()
    assert difference.max() < (0.03 if short > 32 else 0.05) and difference.mean() < 0.003


def _bicubic(size_in: int, size_out: int) -> np.ndarray:
    """Rows of weights of an antialiased resize: Keys' kernel with a = -1/2, widened by the scale (Pillow's rule)."""
    scale = size_in / size_out
    wide = max(scale, 1.0)
    weights = np.zeros((size_out, size_in))
    for out in range(size_out):
        centre = (out + 0.5) * scale
        low, high = max(0, int(centre - 2 * wide + 0.5)), min(size_in, int(centre + 2 * wide + 0.5))
        x = np.abs((np.arange(low, high) + 0.5 - centre) / wide)
        near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        row = np.where(x < 1, near, np.where(x < 2, far, 0.0))
        weights[out, low:high] = row / row.sum()
    return weights


@pytest.mark.parametrize(
    "height, width, size, corner",
    [(40, 100, (13, 32), (9, 0)), (100, 61, (32, 20), (0, 6)), (16, 10, (32, 20), (0, 6)), (32, 9, (32, 9), (0, 11))],
)
def test_letterbox_keeps_the_whole_picture_between_black_borders(
    height: int, width: int, size: tuple[int, int], corner: tuple[int, int]
) -> None:
    picture = (np.random.default_rng(9).random((3, height, width)) > 0.5).astype(float)  # hard edges overshoot
    small = np.einsum("iy,cyx,jx->cij", _bicubic(height, size[0]), picture, _bicubic(width, size[1]))
    expected = np.zeros((3, 32, 32))
    expected[:, corner[0] : corner[0] + size[0], corner[1] : corner[1] + size[1]] = small
    seen = letterbox(torch.from_numpy(picture).float()[None], 32)[0]
    np.testing.assert_allclose(seen.numpy(), expected, atol=2e-5)


def test_letterbox_and_crop_agree_on_squares_up_to_overshoot() -> None:
    images = torch.rand(2, 3, 50, 50, generator=torch.Generator().manual_seed(10))
    torch.testing.assert_close(letterbox(images, 32).clamp(0, 1), centre_crop(images, 32))
