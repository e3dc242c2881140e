"""VideoAlign and HPSv3 on tiny random weights in their published formats, against forwards written out here.

The reference adds the LoRA to each layer's output instead of merging it, cuts patches in plain loops, and gives the
positions, one sample at a time. What it shares with the code under test is transformers' Qwen2-VL alone.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vipo.errors import UserError
from vipo.rewards import qwen_vl
from vipo.rewards.qwen_vl import HpsV3, VideoAlign
from vipo.rewards.qwen_vl_model import Lora, merge_lora
from vipo.rewards.qwen_vl_text import Instruction, Reader
from vipo.rewards.qwen_vl_vision import budgeted_size, patches, sampled_frames
from vipo.types import Prompt

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
BYTES = 256
VIDEO_WORDS = "\nLook.\nVQ: <|VQ_reward|>\nMQ: <|MQ_reward|>\nPrompt - {text_prompt}\nTA: <|TA_reward|>\nEND\n"
PICTURE_WORDS = ("\nJudge {text_prompt}\n\n", "\nScore: <|Reward|>\n\nEND\n")
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 3, 6.0
STATISTICS = {"VQ": (3.6757, 2.2476), "MQ": (1.1646, 1.3811), "TA": (2.8105, 2.5121)}
PROMPTS = [Prompt("a cat"), Prompt("a much longer prompt about two dogs"), Prompt("rain")]


@dataclass(frozen=True)
class Parts:
    """A published model taken apart: what the reference computes with."""

    network: Any
    head: nn.Module
    adapters: Mapping[str, tuple[Tensor, Tensor]]  # layer -> A, B
    tokenizer: Any


# --- made here: models as their authors publish them -----------------------------------------------------------------


def _tokenizer(folder: Path) -> Any:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {letter: place for place, letter in enumerate(bytes_to_unicode().values())}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], additional_special_tokens=SPECIAL[1:])
    tokenizer.save_pretrained(folder)
    return tokenizer


def _base(folder: Path) -> Path:
    """The base model's folder: its tokenizer, and config.json in the flat form that the hub has."""
    tokenizer = _tokenizer(folder)
    placeholders = {
        f"{kind}_token_id": tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>") for kind in ("image", "video")
    }
    table = {
        "model_type": "qwen2_vl", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 999, "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "tie_word_embeddings": True, **placeholders,
        "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(table))
    return folder


def _network(base: Path, words: int) -> Any:
    config = Qwen2VLConfig.from_pretrained(base)
    config.text_config.vocab_size = words
    network = Qwen2VLModel(config)
    for name, weight in network.named_parameters():
        if weight.ndim > 1:  # far from zero, so that attention looks somewhere and positions matter
            nn.init.normal_(weight, std=0.02 if "patch_embed" in name else 0.25)
    return network.eval().requires_grad_(False)


def _old_name(name: str) -> str:
    return name if name.startswith("visual.") else name.replace("language_model.", "model.", 1)


def _video_tensors(network: Any, head: nn.Linear, adapters: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    tensors = {"lm_head.weight": network.get_input_embeddings().weight.clone(), "rm_head.weight": head.weight.clone()}
    for name, value in network.state_dict().items():
        layer, _, kind = name.rpartition(".")
        adapted = layer in adapters
        tensors[f"{_old_name(layer)}.base_layer.{kind}" if adapted else _old_name(name)] = value.clone()
    for layer, (down, up) in adapters.items():
        tensors[f"{_old_name(layer)}.lora_A.default.weight"] = down
        tensors[f"{_old_name(layer)}.lora_B.default.weight"] = up
    return {f"base_model.model.{name}": value.detach() for name, value in tensors.items()}


def _adapters(network: Any) -> dict[str, tuple[Tensor, Tensor]]:
    layers = {n: m for n, m in network.language_model.named_modules() if n.rpartition(".")[2] in ADAPTED}
    return {
        f"language_model.{name}": (0.3 * torch.randn(RANK, m.in_features), 0.3 * torch.randn(m.out_features, RANK))
        for name, m in layers.items()
    }


def _save_video_reward(folder: Path, base: Path, outputs: int = 3) -> Parts:
    checkpoint = folder / "checkpoint-11352"
    checkpoint.mkdir(parents=True)
    tokenizer = _tokenizer(checkpoint / "tokenizer")
    words = len(tokenizer) + 3
    network, head = _network(base, words), nn.Linear(32, outputs, bias=False).requires_grad_(False)
    adapters = _adapters(network)
    torch.save(_video_tensors(network, head, adapters), checkpoint / "model.pth")
    config: dict[str, Any] = {
        "data_config": {"fps": 2.0, "max_frame_pixels": 200704},
        "peft_lora_config": {"lora_enable": True, "lora_r": RANK, "lora_alpha": ALPHA},
        "inference_config": {
            f"{part}_{which}": value
            for part, pair in STATISTICS.items()
            for which, value in zip(("mean", "std"), pair, strict=True)
        },
    }
    (folder / "model_config.json").write_text(json.dumps(config))
    (folder / "prompt_template.py").write_text(f"DETAILED_PROMPT_WITH_SPECIAL_TOKEN = {VIDEO_WORDS!r}\n1 / 0\n")
    return Parts(network, head, adapters, tokenizer)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _base(tmp_path_factory.mktemp("qwen") / "base")


@pytest.fixture(scope="module")
def video(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Parts]:
    """A VideoReward as published, and its parts."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("qwen") / "video"
    return folder, _save_video_reward(folder, base)


@pytest.fixture(scope="module")
def hps(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Parts]:
    """An HPSv3 as published, and its parts."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("qwen") / "hps"
    folder.mkdir()
    tokenizer = _tokenizer(folder / "unused")
    network = _network(base, len(tokenizer) + 1)
    head = nn.Sequential(
        nn.Linear(32, 12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 2)
    ).eval()
    tensors = {_old_name(name): value for name, value in network.state_dict().items()}
    tensors |= {f"rm_head.{name}": value for name, value in head.state_dict().items()}
    tensors["lm_head.weight"] = torch.zeros(7, 32)
    save_file({name: value.clone() for name, value in tensors.items()}, folder / "HPSv3.safetensors")
    texts = dict(zip(("INSTRUCTION", "prompt_with_special_token"), PICTURE_WORDS, strict=True))
    lines = ["import no_such_module_anywhere", *(f"{name} = {text!r}" for name, text in texts.items())]
    (folder / "data_collator_qwen.py").write_text("\n".join(lines))
    return folder, Parts(network, head.requires_grad_(False), {}, tokenizer)


def _align(video: tuple[Path, Parts], base: Path, **options: Any) -> VideoAlign:
    return VideoAlign(pretrained=video[0], base=base, **{"dtype": "float32", **options})


def _media(samples: int, frames: int, height: int = 40, width: int = 60) -> Tensor:
    coarse = torch.rand(samples, 3, frames, 4, 6, generator=torch.Generator().manual_seed(5))
    return F.interpolate(coarse, size=(frames, height, width), mode="trilinear").contiguous()


# --- the reference ---------------------------------------------------------------------------------------------------


def _loop_patches(frames: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """(n, 3, y, x) in [0, 1] to rows of patches, by loops in the order that the merger of 2 x 2 patches wants."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    frames = (frames - mean) / std
    pairs, rows, columns = frames.shape[0] // 2, frames.shape[2] // 14, frames.shape[3] // 14
    out = []
    for t in range(pairs):
        for y in range(0, rows, 2):
            for x in range(0, columns, 2):
                for py, px in ((y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1)):
                    cube = frames[2 * t : 2 * t + 2, :, 14 * py : 14 * py + 14, 14 * px : 14 * px + 14]
                    out.append(cube.transpose(0, 1).reshape(-1))
    return torch.stack(out), (pairs, rows, columns)


def _reference(
    parts: Parts, frames: Tensor, instruction: str, markers: list[str], placeholder: str, mrope: bool = False
) -> Tensor:
    """The head's outputs (K, O) of one sample whose frames (n, 3, y, x) have their final size."""
    values, grid = _loop_patches(frames)
    tokens = [*SPECIAL, *markers]
    ids_of = {token: BYTES + place for place, token in enumerate(tokens)}
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + placeholder * (grid[0] * grid[1] * grid[2] // 4)
        + f"<|vision_end|>{instruction}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = torch.tensor([_byte_ids(text, ids_of)])
    handles = [_add(parts.network.get_submodule(layer), *pair) for layer, pair in parts.adapters.items()]
    kind = "pixel_values_videos" if "video" in placeholder else "pixel_values"
    position = {"mm_token_type_ids": (ids == ids_of[placeholder]).int() * (2 if "video" in placeholder else 1)}
    if not mrope:
        position = {"position_ids": torch.arange(ids.shape[1]).expand(3, 1, -1)}
    grids = {"video_grid_thw" if "video" in placeholder else "image_grid_thw": torch.tensor([grid])}
    hidden = parts.network(input_ids=ids, **position, **{kind: values}, **grids).last_hidden_state[0]
    for handle in handles:
        handle.remove()
    return parts.head(torch.stack([hidden[ids[0].tolist().index(ids_of[marker])] for marker in markers]))


def _byte_ids(text: str, ids_of: Mapping[str, int]) -> list[int]:
    """Special tokens by name, everything else byte by byte: what a tokenizer without merges does."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    order = {byte: place for place, byte in enumerate(bytes_to_unicode())}
    ids = []
    while text:
        special = next((token for token in ids_of if text.startswith(token)), None)
        ids += [ids_of[special]] if special else [order[byte] for byte in text[0].encode()]
        text = text[len(special or " ") :]
    return ids


def _add(layer: nn.Linear, down: Tensor, up: Tensor) -> Any:
    """What LoRA is: the layer's output plus alpha / r times B A x."""
    return layer.register_forward_hook(lambda _m, inputs, output: output + ALPHA / RANK * (inputs[0] @ down.T) @ up.T)


def _expected_video(parts: Parts, media: Tensor, chosen: list[int], mrope: bool = False) -> Tensor:
    """(N, 3) raw scores; 40 x 60 px becomes 280 x 392, the smallest multiple of 28 with 100352 px (see the sizes)."""
    markers = ["<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"]
    rows = []
    for clip, prompt in zip(media, PROMPTS, strict=False):
        frames = F.interpolate(clip[:, chosen].transpose(0, 1), (280, 392), mode="bicubic", antialias=True).clamp(0, 1)
        words = VIDEO_WORDS.replace("{text_prompt}", prompt.text)
        rows.append(_reference(parts, frames, words, markers, "<|video_pad|>", mrope))
    outputs = torch.stack(rows)
    return torch.stack([outputs[:, k, k if outputs.shape[2] == 3 else 0] for k in range(3)], dim=1)


# --- frames ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frames, media_fps, chosen",
    [
        (81, 16, [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]),  # 10.125 frames
        (16, 16, [0, 5, 10, 15]),  # 2, raised to 4
        (5, 16, [0, 1, 3, 4]),
        (3, 16, [0, 2]),  # an odd number there is: the even one below it
        (40, 8, [0, 4, 9, 13, 17, 22, 26, 30, 35, 39]),
    ],
)
def test_sampled_frames_by_hand(frames: int, media_fps: float, chosen: list[int]) -> None:
    assert sampled_frames(frames, media_fps=media_fps, fps=2.0).tolist() == chosen


def test_long_videos_are_capped() -> None:
    assert len(sampled_frames(9000, media_fps=10, fps=2.0)) == 768


@pytest.mark.parametrize(
    "size, least, fitted",
    [
        ((480, 832), 100352, (336, 588)),
        ((720, 1280), 100352, (336, 588)),
        ((1024, 1024), 200704, (448, 448)),
        ((64, 64), 100352, (336, 336)),
        ((40, 60), 100352, (280, 392)),
        ((364, 364), 100352, (364, 364)),  # inside the budget and a multiple of 28: untouched
    ],
)
def test_sizes_by_hand(size: tuple[int, int], least: int, fitted: tuple[int, int]) -> None:
    assert budgeted_size(*size, least=least, most=200704) == fitted


@given(st.integers(16, 2000), st.integers(16, 2000))
def test_sizes_keep_budget_and_shape(height: int, width: int) -> None:
    fitted = budgeted_size(height, width, least=100352, most=200704)
    assert all(side % 28 == 0 and side > 0 for side in fitted)
    assert fitted[0] * fitted[1] <= 200704 or min(fitted) == 28
    if max(height, width) < 4 * min(height, width):
        assert fitted[0] * fitted[1] >= 100352 / 2
        assert fitted[0] / fitted[1] == pytest.approx(height / width, rel=0.3)


def test_patches_are_those_of_the_published_processor() -> None:
    picture = torch.rand(3, 84, 56, generator=torch.Generator().manual_seed(0)).mul(255).round()
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 784, "longest_edge": 200704})
    theirs = processor(np.uint8(picture.permute(1, 2, 0).numpy()), return_tensors="pt")
    ours = patches((picture / 255)[None, :, None].expand(-1, -1, 2, -1, -1), least=784, most=200704)
    assert list(ours.grid) == theirs["image_grid_thw"][0].tolist() and ours.tokens == 6
    torch.testing.assert_close(ours.values, theirs["pixel_values"], atol=1e-5, rtol=0)


def test_patches_of_videos_sample_after_sample() -> None:
    media = torch.rand(2, 3, 4, 84, 56, generator=torch.Generator().manual_seed(0))
    ours = patches(media, least=784, most=200704)
    expected = [_loop_patches(clip.transpose(0, 1)) for clip in media]
    assert ours.grid == expected[0][1] == (2, 6, 4)
    torch.testing.assert_close(ours.values, torch.cat([rows for rows, _ in expected]))


def test_frames_that_are_no_video_are_refused() -> None:
    with pytest.raises(UserError, match=r"media with 1 frame\(s\) is no video"):
        sampled_frames(1, media_fps=16, fps=2)
    with pytest.raises(UserError, match="must be positive"):
        sampled_frames(9, media_fps=0, fps=2)
    with pytest.raises(UserError, match="4 x 900 px is too narrow"):
        budgeted_size(4, 900, least=1, most=200704)


# --- words -----------------------------------------------------------------------------------------------------------

INSTRUCTION = Instruction("mine", "words.py", "https://example.org", ("FIRST", "SECOND"), ("<|A|>", "<|B|>"))


def _reader(folder: Path) -> Reader:
    return Reader(
        "mine", _tokenizer(folder), "{text_prompt}? <|A|> <|B|>", ("<|A|>", "<|B|>"), placeholder="<|video_pad|>"
    )


def test_the_whole_conversation(tmp_path: Path) -> None:
    assert _reader(tmp_path).chat("a {dog}") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>a {dog}? <|A|> <|B|><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_rows_are_padded_on_the_right_and_markers_found(tmp_path: Path) -> None:
    reader = _reader(tmp_path)
    tokens = reader(["a", "abcdef"], 5)
    lengths = tokens.mask.sum(1)
    assert (lengths[1] - lengths[0]).item() == 5 and tokens.ids.shape[1] == lengths[1]
    assert tokens.mask[0, : lengths[0]].all() and not tokens.mask[0, lengths[0] :].any()
    assert ((tokens.ids == reader.placeholder_id).sum(1) == 5).all()
    for row, places in zip(tokens.ids, tokens.places, strict=True):
        assert row[places].tolist() == reader.marker_ids
        assert reader.tokenizer.decode(row[places[0] - 2 : places[1] + 1]) == "? <|A|> <|B|>"


def test_constants_are_read_from_python_and_nothing_runs(tmp_path: Path) -> None:
    code = (
        "import sys\nsys.exit('it ran')\nSECOND = '''<|A|> <|B|>'''\nFIRST = 'of {text_prompt} '\nOTHER = FIRST + 'x'\n"
    )
    (tmp_path / "words.py").write_text(code)
    assert INSTRUCTION.read(None, tmp_path) == "of {text_prompt} <|A|> <|B|>"
    (tmp_path / "words.txt").write_text("\n<|A|> {text_prompt} <|B|>\n")
    assert INSTRUCTION.read(tmp_path / "words.txt", tmp_path) == "\n<|A|> {text_prompt} <|B|>\n"


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "absent.py",
            None,
            "found no instruction text at .*absent.py.*Take words.py from https://example.org.*template=FILE",
        ),
        ("a.py", "FIRST = 'x'\n", "has no string SECOND"),
        ("a.py", "FIRST = (\n", "not a Python file that can be parsed"),
        ("a.txt", "{text_prompt} <|A|>", r"holds <\|B\|> 0 times"),
        ("a.txt", "{text_prompt} <|A|> <|A|> <|B|>", r"holds <\|A\|> 2 times"),
        ("a.txt", "<|A|> <|B|>", r"holds \{text_prompt\} 0 times"),
    ],
)
def test_files_that_are_no_instruction_say_so(name: str, content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        INSTRUCTION.read(tmp_path / name, tmp_path)


def test_a_prompt_with_a_special_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prompt 'a <\|A\|>' holds a special token"):
        _reader(tmp_path)(["b", "a <|A|>"], 4)


# --- VideoAlign ------------------------------------------------------------------------------------------------------


def test_video_align_is_the_published_model(video: tuple[Path, Parts], base: Path) -> None:
    media = _media(3, 16)
    expected = _expected_video(video[1], media, [0, 5, 10, 15])
    for part, column in zip(("VQ", "MQ", "TA"), expected.T, strict=True):
        scores = _align(video, base, dimension=part)(media, PROMPTS)
        assert scores.shape == (3,) and scores.dtype == torch.float32
        torch.testing.assert_close(scores, column, atol=2e-5, rtol=1e-4)
    assert expected.std(0).min() > 1e-3  # samples differ, or the comparison would say little
    torch.testing.assert_close(
        _align(video, base, dimension="Overall")(media, PROMPTS), expected.sum(1), atol=5e-5, rtol=1e-4
    )


def test_grid_positions_would_be_seen(video: tuple[Path, Parts]) -> None:
    media = _media(1, 16)
    plain, grid = (_expected_video(video[1], media, [0, 5, 10, 15], mrope) for mrope in (False, True))
    assert (plain - grid).abs().max() > 1e-2


def test_one_output_per_marker(base: Path, tmp_path: Path) -> None:
    parts = _save_video_reward(tmp_path / "one", base, outputs=1)
    media = _media(2, 16)
    expected = _expected_video(parts, media, [0, 5, 10, 15])
    scores = _align((tmp_path / "one", parts), base, dimension="TA")(media, PROMPTS[:2])
    torch.testing.assert_close(scores, expected[:, 2], atol=2e-5, rtol=1e-4)


def test_normalised_by_the_authors_statistics(video: tuple[Path, Parts], base: Path) -> None:
    media = _media(2, 4)
    raw = {part: _align(video, base, dimension=part)(media, PROMPTS[:2]) for part in STATISTICS}
    expected = {part: (raw[part] - mean) / std for part, (mean, std) in STATISTICS.items()}
    for part, values in expected.items():
        scores = _align(video, base, dimension=part, normalised=True)(media, PROMPTS[:2])
        torch.testing.assert_close(scores, values)
    overall = _align(video, base, dimension="Overall", normalised=True)(media, PROMPTS[:2])
    torch.testing.assert_close(overall, torch.stack(list(expected.values())).sum(0))


def test_only_text_alignment_reads_the_prompt(video: tuple[Path, Parts], base: Path) -> None:
    media = _media(1, 16).expand(2, -1, -1, -1, -1)
    scores = {part: _align(video, base, dimension=part)(media, PROMPTS[:2]) for part in STATISTICS}
    for part in ("VQ", "MQ"):  # the prompt comes after their markers
        torch.testing.assert_close(scores[part][0], scores[part][1], atol=1e-5, rtol=1e-5)
    assert (scores["TA"][0] - scores["TA"][1]).abs() > 1e-3


def test_a_padded_batch_scores_as_single_samples(video: tuple[Path, Parts], base: Path) -> None:
    media = _media(3, 16)
    together = _align(video, base, dimension="TA", batch_size=3)(media, PROMPTS)
    by_two = _align(video, base, dimension="TA", batch_size=2)(media, PROMPTS)
    single = _align(video, base, dimension="TA", batch_size=3)
    apart = torch.cat([single(media[i : i + 1], [PROMPTS[i]]) for i in range(3)])
    torch.testing.assert_close(together, apart, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(by_two, apart, atol=2e-5, rtol=1e-4)


def test_rates_choose_the_frames(video: tuple[Path, Parts], base: Path) -> None:
    media = _media(1, 16)
    expected = _expected_video(video[1], media, [0, 3, 6, 9, 12, 15])
    slow = _align(video, base, media_fps=8.0, fps=3.0)(media, PROMPTS[:1])
    torch.testing.assert_close(slow, expected[:, 0], atol=2e-5, rtol=1e-4)
    assert (slow - _align(video, base)(media, PROMPTS[:1])).abs() > 1e-4


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many samples each forward pass of the network had."""
    passes: list[int] = []
    forward = Qwen2VLModel.forward

    def counting(self: Any, *args: Any, **options: Any) -> Any:
        passes.append(options["input_ids"].shape[0])
        return forward(self, *args, **options)

    monkeypatch.setattr(Qwen2VLModel, "forward", counting)
    yield passes


def test_dimensions_share_a_model_and_its_pass(video: tuple[Path, Parts], base: Path, counted: list[int]) -> None:
    quality, motion = (_align(video, base, dimension=part, batch_size=4) for part in ("VQ", "MQ"))
    assert quality.model is motion.model
    media, texts = _media(2, 4, 28, 28), PROMPTS[:2]
    with torch.no_grad():
        first = quality(media, texts), motion(media, texts)
        assert counted == [2]
        media[1] = 0.25  # the same tensor with other content is another batch
        second = quality(media, texts), motion(media, texts)
        assert counted == [2, 2] and first[0][0] == second[0][0] and first[0][1] != second[0][1]
        quality(media, PROMPTS[1:])
        quality(media.clone(), PROMPTS[1:])
        assert counted == [2] * 4


def test_other_options_are_another_model_and_unused_ones_go(video: tuple[Path, Parts], base: Path) -> None:
    first, second = _align(video, base, batch_size=7), _align(video, base, batch_size=8)
    assert first.model is not second.model
    before = len(qwen_vl._loaded)
    del first
    gc.collect()
    assert len(qwen_vl._loaded) == before - 1


def test_gradients_reach_the_media(video: tuple[Path, Parts], base: Path) -> None:
    media = _media(1, 4, 28, 28).requires_grad_()
    reward = _align(video, base, dimension="MQ")
    for _ in range(2):  # each call its own graph
        (gradient,) = torch.autograd.grad(reward(media, PROMPTS[:1]).sum(), media)
        assert gradient.isfinite().all() and (gradient.abs().amax((0, 1, 3, 4)) > 0).all()


def test_half_precision_and_offloading(video: tuple[Path, Parts], base: Path) -> None:
    media = _media(2, 4, 28, 28)
    exact = _align(video, base)(media, PROMPTS[:2])
    half = VideoAlign(pretrained=video[0], base=base, offload=True)
    assert half.model.rater.model.network.dtype == torch.bfloat16
    assert half.model.rater.model.head.weight.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(half(media, PROMPTS[:2]), exact, atol=0.15, rtol=0)


# --- what does not fit -----------------------------------------------------------------------------------------------


def _copy(video: tuple[Path, Parts], folder: Path, **replaced: Any) -> Path:
    """The published folder by links, with the tensors or the configuration replaced."""
    checkpoint = folder / "checkpoint-11352"
    checkpoint.mkdir(parents=True)
    for name in ("prompt_template.py", "checkpoint-11352/tokenizer"):
        (folder / name).symlink_to(video[0] / name)
    config = json.loads((video[0] / "model_config.json").read_text())
    (folder / "model_config.json").write_text(json.dumps(replaced.get("config", lambda c: c)(config)))
    tensors = torch.load(video[0] / "checkpoint-11352/model.pth", weights_only=True)
    torch.save(replaced.get("tensors", lambda t: t)(tensors), checkpoint / "model.pth")
    return folder


def _without(key: str, table: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in table.items() if name != key}


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "key, message",
    [
        ("base_model.model.visual.merger.ln_q.weight", "1 lacking .visual.merger.ln_q.weight"),
        ("base_model.model.rm_head.weight", "does not fit the reward head"),
        (
            f"{LAYER}.lora_A.default.weight",
            "LoRA tensors without their layer or their other half.*layers.0.self_attn.q_proj",
        ),
        (f"{LAYER}.base_layer.weight", "LoRA tensors without their layer"),
    ],
)
def test_incomplete_weights_are_named(
    key: str, message: str, video: tuple[Path, Parts], base: Path, tmp_path: Path
) -> None:
    folder = _copy(video, tmp_path / "m", tensors=lambda table: _without(key, table))
    with pytest.raises(UserError, match=message):
        VideoAlign(pretrained=folder, base=base)


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("peft_lora_config", {"lora_r": 5}, "holds a LoRA of rank 3 that model_config.json describes as of rank 5"),
        ("peft_lora_config", {"lora_enable": False}, "holds a LoRA of rank 3 that model_config.json does not describe"),
        ("data_config", {"fps": "fast"}, r"is not the model_config.json of VideoReward \(ValueError"),
        ("data_config", None, r"is not the model_config.json of VideoReward \(KeyError: 'data_config'\)"),
    ],
)
def test_a_configuration_of_another_model_is_refused(
    part: str, change: dict[str, Any] | None, message: str, video: tuple[Path, Parts], base: Path, tmp_path: Path
) -> None:
    def changed(config: dict[str, Any]) -> dict[str, Any]:
        return _without(part, config) if change is None else {**config, part: {**config[part], **change}}

    with pytest.raises(UserError, match=message):
        VideoAlign(pretrained=_copy(video, tmp_path / "m", config=changed), base=base)


def test_options_that_do_not_fit_say_what_would(video: tuple[Path, Parts], base: Path, tmp_path: Path) -> None:
    plain = _copy(video, tmp_path / "plain", config=lambda c: _without("inference_config", c))
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    wide = _copy(
        video, tmp_path / "wide", tensors=lambda t: {**t, "base_model.model.rm_head.weight": torch.zeros(2, 32)}
    )
    for options, message in (
        ({"dimension": "IQ"}, "no dimension='IQ'; choose from VQ, MQ, TA, Overall"),
        ({"pretrained": plain, "normalised": True}, "has no statistics"),
        ({"pretrained": video[0] / "model_config.json"}, "is a file; .* needs the folder around it"),
        ({"pretrained": tmp_path / "nowhere"}, "found no model_config.json"),
        ({"pretrained": wide}, "gives 2 numbers per token, accepted: 1 or 3"),
        ({"base": tmp_path / "bert"}, "holds a model of type 'bert'; .* needs a base of type qwen2_vl"),
        ({"base": tmp_path / "nowhere"}, "found no such folder"),
        ({"dtype": "int8"}, "no dtype 'int8'"),
        ({"sha256": "00"}, "has sha256"),
        ({"template": tmp_path / "nowhere.txt"}, "found no instruction text"),
    ):
        with pytest.raises(UserError, match=message):
            VideoAlign(**{"pretrained": video[0], "base": base, **options})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"media with 1 frame\(s\) is no video"):
        _align(video, base)(_media(1, 1), PROMPTS[:1])


def test_a_tokenizer_of_another_model_is_refused(video: tuple[Path, Parts], base: Path, tmp_path: Path) -> None:
    Qwen2Tokenizer(vocab={"a": 0, "b": 1}, merges=[]).save_pretrained(tmp_path / "without")
    with pytest.raises(UserError, match=r"has no <\|video_pad\|>"):
        _align(video, base, tokenizer=tmp_path / "without")
    longer = _tokenizer(tmp_path / "longer")
    longer.add_tokens([f"<{i}>" for i in range(9)])
    longer.save_pretrained(tmp_path / "longer")
    with pytest.raises(UserError, match="counts otherwise than its weights"):
        _align(video, base, tokenizer=tmp_path / "longer")


def test_rank_stabilised_lora_by_hand() -> None:
    names = (
        "a.base_layer.weight",
        "a.lora_A.default.weight",
        "a.lora_B.default.weight",
        "a.base_layer.bias",
        "b.weight",
    )
    values = (torch.ones(2, 2), torch.ones(4, 2), torch.ones(2, 4), torch.zeros(2), torch.ones(3))
    merged = merge_lora("mine", Path("file"), dict(zip(names, values, strict=True)), Lora(4, 6.0, rank_stabilised=True))
    assert set(merged) == {"a.weight", "a.bias", "b.weight"}
    torch.testing.assert_close(merged["a.weight"], torch.full((2, 2), 1 + 6 / 2 * 4))


# --- HPSv3 -----------------------------------------------------------------------------------------------------------


def _expected_hps(parts: Parts, media: Tensor) -> Tensor:
    """Mean over frames of the first output; 56 x 56 px becomes 448 x 448."""
    rows = []
    for clip, prompt in zip(media, PROMPTS, strict=False):
        words = "".join(PICTURE_WORDS).replace("{text_prompt}", prompt.text)
        frames = F.interpolate(clip.transpose(0, 1), (448, 448), mode="bicubic", antialias=True).clamp(0, 1)
        doubled = [frame.expand(2, -1, -1, -1) for frame in frames]
        rows.append([float(_reference(parts, pair, words, ["<|Reward|>"], "<|image_pad|>")[0, 0]) for pair in doubled])
    return torch.tensor(rows).mean(1)


def test_hps_v3_is_the_published_model(hps: tuple[Path, Parts], base: Path) -> None:
    media = _media(2, 2, 56, 56)
    scores = HpsV3(pretrained=hps[0], base=base, dtype="float32")(media, PROMPTS[:2])
    expected = _expected_hps(hps[1], media)
    assert (expected[0] - expected[1]).abs() > 1e-4
    torch.testing.assert_close(scores, expected, atol=2e-5, rtol=1e-4)
    first = HpsV3(pretrained=hps[0] / "HPSv3.safetensors", base=base, dtype="float32", frames="first", batch_size=1)
    torch.testing.assert_close(first(media, PROMPTS[:2]), _expected_hps(hps[1], media[:, :, :1]), atol=2e-5, rtol=1e-4)


@pytest.mark.usefixtures("unchecked")
def test_hps_v3_refuses_other_heads_and_frames(hps: tuple[Path, Parts], base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    with pytest.raises(UserError, match="no frames='last'"):
        HpsV3(pretrained=hps[0], base=base, frames="last")  # type: ignore[arg-type]
    tensors = load_file(hps[0] / "HPSv3.safetensors")
    save_file(_without("rm_head.3.bias", tensors), tmp_path / "HPSv3.safetensors")
    with pytest.raises(UserError, match=r"does not fit the reward head.*3\.bias"):
        HpsV3(pretrained=tmp_path, base=base, template=hps[0] / "data_collator_qwen.py")
