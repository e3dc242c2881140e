"""Rewards that are a Qwen2-VL with a head: VideoAlign's VideoReward (2501.13918) and HPSv3 (2508.03789).

    VideoAlign  one number each for visual quality, motion quality and text alignment, read off at three special tokens
    HpsV3       mean and spread of human preference for a picture, read off at one; the score is the mean

Raw scores have no unit: both models only learnt which of two is better. ``normalised`` shifts and scales VideoAlign's
by its authors' own statistics, which matters for tables and for "Overall", not within a group.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from vipo.errors import UserError
from vipo.rewards.frames import Frames, check_frames, scored_frames
from vipo.rewards.pretrained import checkpoint_file, read_tensors
from vipo.rewards.qwen_vl_model import Lora
from vipo.rewards.qwen_vl_rater import Kind, load_rater
from vipo.rewards.qwen_vl_text import Instruction
from vipo.rewards.qwen_vl_vision import PAIR, sampled_frames
from vipo.types import Prompt

Dimension = Literal["VQ", "MQ", "TA", "Overall"]
PARTS = ("VQ", "MQ", "TA")  # what the model answers, in the order of its instruction; Overall is their sum

VIDEO_FILES = tuple(f"{folder}model.{kind}" for folder in ("checkpoint-11352/", "") for kind in ("safetensors", "pth"))
VIDEO_KIND = Kind(
    instruction=Instruction(
        reward="videoalign",
        file="prompt_template.py",
        source="https://github.com/KwaiVGI/VideoAlign (MIT)",
        constants=("DETAILED_PROMPT_WITH_SPECIAL_TOKEN",),
        markers=tuple(f"<|{part}_reward|>" for part in PARTS),
    ),
    placeholder="<|video_pad|>",
    outputs=(1, len(PARTS)),
    least=128 * 28 * 28,
)
HPS_PIXELS = 256 * 28 * 28  # px per picture, as nearly as its shape allows
HPS_KIND = Kind(
    instruction=Instruction(
        reward="hpsv3",
        file="data_collator_qwen.py",
        source="https://github.com/MizzenAI/HPSv3, hpsv3/dataset (MIT)",
        constants=("INSTRUCTION", "prompt_with_special_token"),
        markers=("<|Reward|>",),
    ),
    placeholder="<|image_pad|>",
    outputs=(2,),
    least=HPS_PIXELS,
)


class VideoAlign:
    """VideoReward's score of a video in one of its dimensions; unbounded, raw about -3 to 6.

    Several of these rewards on one model share it and its forward pass: what the model said about the last batch is
    kept until it is asked about another.

    Args:
        pretrained: hub id, or a folder as it was published: model_config.json and checkpoint-11352/model.pth.
        dimension: "VQ" (visual quality), "MQ" (motion quality), "TA" (text alignment), or "Overall", their sum.
        normalised: subtract the authors' mean and divide by their standard deviation, per dimension.
        media_fps: how many frames of the generated videos make a second. The score depends on it.
        fps: how many frames the model looks at in a second; None for what it was trained with.
        template: the authors' prompt_template.py, or a text file of the same words; by default in the model's folder.
        base: hub id or folder of Qwen2-VL-2B-Instruct; its config.json is read, not its weights.
        tokenizer: hub id or folder; None for the one in the model's folder, or else the base's.
        batch_size: videos per forward pass.
        dtype: of the network; the head and the scores are float32.
        offload: keep the weights in the CPU's memory between uses.
        sha256: of the weights file; None does not check.

    Raises:
        UserError: a file is missing or does not fit, or an option is not known.
    """

    def __init__(
        self,
        *,
        pretrained: str | Path = "KwaiVGI/VideoReward",
        dimension: str = "VQ",
        normalised: bool = False,
        media_fps: float = 16.0,
        fps: float | None = None,
        template: str | Path | None = None,
        base: str | Path = "Qwen/Qwen2-VL-2B-Instruct",
        tokenizer: str | Path | None = None,
        batch_size: int = 2,
        dtype: str = "bfloat16",
        offload: bool = False,
        sha256: str | None = None,
    ) -> None:
        if dimension not in get_args(Dimension):
            raise UserError(f"videoalign has no dimension={dimension!r}; choose from {', '.join(get_args(Dimension))}")
        self.wanted = PARTS if dimension == "Overall" else (dimension,)
        self.model = shared_model(
            ModelOptions(pretrained, media_fps, fps, template, base, tokenizer, batch_size, dtype, offload, sha256)
        )
        self.statistics = self.model.settings.statistics if normalised else dict.fromkeys(PARTS, (0.0, 1.0))
        if not self.statistics:
            raise UserError(
                f"model_config.json of {pretrained} has no statistics (inference_config), so there is nothing to"
                " normalise by; download it again, or leave out normalised"
            )

    def __call__(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Float[Tensor, " N"]:
        answers = dict(zip(PARTS, self.model(media, tuple(prompt.text for prompt in prompts)).T, strict=True))
        scores = [(answers[part] - self.statistics[part][0]) / self.statistics[part][1] for part in self.wanted]
        return torch.stack(scores).sum(0)


class HpsV3:
    """HPSv3's expected human preference for a picture; unbounded, about -2 to 13. Videos are scored frame by frame.

    Args:
        pretrained: hub id, the file HPSv3.safetensors, or its folder.
        template: the authors' data_collator_qwen.py, or a text file of the same words; by default beside the weights.
        base: hub id or folder of Qwen2-VL-7B-Instruct; its config.json is read, not its weights.
        tokenizer: hub id or folder; None for the base's.
        frames: of a video, "mean" over all or the "first" alone.
        batch_size: pictures per forward pass.
        dtype: of the network; the head and the scores are float32.
        offload: keep the weights in the CPU's memory between uses.
        sha256: of the weights file; None does not check.

    Raises:
        UserError: a file is missing or does not fit, or an option is not known.
    """

    def __init__(
        self,
        *,
        pretrained: str | Path = "MizzenAI/HPSv3",
        template: str | Path | None = None,
        base: str | Path = "Qwen/Qwen2-VL-7B-Instruct",
        tokenizer: str | Path | None = None,
        frames: Frames = "mean",
        batch_size: int = 4,
        dtype: str = "bfloat16",
        offload: bool = False,
        sha256: str | None = None,
    ) -> None:
        check_frames("hpsv3", frames)
        file = checkpoint_file("hpsv3", pretrained, ("HPSv3.safetensors",))
        self.frames = frames
        self.rater = load_rater(
            HPS_KIND,
            file,
            read_tensors("hpsv3", file, sha256=sha256),
            folder=file.parent,
            template=template,
            base=base,
            tokenizer=tokenizer or base,
            most=HPS_PIXELS,
            batch_size=batch_size,
            dtype=dtype,
            offload=offload,
        )

    def __call__(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Float[Tensor, " N"]:
        texts = [prompt.text for prompt in prompts]
        shown = scored_frames(media, self.frames).transpose(1, 2)
        # A picture is a video of one frame shown twice: the network's patches are two frames deep.
        outputs = [self.rater(frame.expand(-1, -1, PAIR, -1, -1), texts) for frame in shown.split(1, dim=2)]
        return torch.stack(outputs).mean(0)[:, 0, 0]


@dataclass(frozen=True)
class ModelOptions:
    """All that tells one VideoReward from another; see :class:`VideoAlign`."""

    pretrained: str | Path
    media_fps: float
    fps: float | None
    template: str | Path | None
    base: str | Path
    tokenizer: str | Path | None
    batch_size: int
    dtype: str
    offload: bool
    sha256: str | None


@dataclass(frozen=True)
class Settings:
    """What model_config.json says about how VideoReward was trained."""

    fps: float
    most: int  # px per frame
    lora: Lora | None
    statistics: Mapping[str, tuple[float, float]]  # dimension -> mean and standard deviation; empty if not there


class VideoReward:
    """One loaded VideoReward. It answers in all dimensions at once, and a batch asked about again from memory."""

    def __init__(self, options: ModelOptions) -> None:
        name = VIDEO_KIND.instruction.reward
        if Path(options.pretrained).expanduser().is_file():
            raise UserError(
                f"{options.pretrained} is a file; reward {name!r} needs the folder around it, with model_config.json"
            )
        config = checkpoint_file(name, options.pretrained, ("model_config.json",))
        file = checkpoint_file(name, options.pretrained, VIDEO_FILES)
        own = (file.parent / "tokenizer", config.parent / "tokenizer")
        self.options, self.settings = options, read_settings(config)
        self.rater = load_rater(
            VIDEO_KIND,
            file,
            read_tensors(name, file, sha256=options.sha256),
            folder=config.parent,
            template=options.template,
            base=options.base,
            tokenizer=options.tokenizer or next((place for place in own if place.is_dir()), options.base),
            most=self.settings.most,
            batch_size=options.batch_size,
            dtype=options.dtype,
            offload=options.offload,
            lora=self.settings.lora,
        )
        self.lock = threading.Lock()
        self.last: tuple[weakref.ref[Tensor], int, tuple[str, ...], Tensor] | None = None

    def __call__(self, media: Float[Tensor, "N 3 F Y X"], texts: tuple[str, ...]) -> Float[Tensor, "N 3"]:
        """Raw scores in the order of PARTS."""
        if torch.is_grad_enabled() or media.is_inference():  # a graph belongs to one call; the other has no version
            return self._answers(media, texts)
        with self.lock:
            if self.last is None or not _same(self.last, media, texts):
                self.last = weakref.ref(media), media._version, texts, self._answers(media, texts)
            return self.last[-1]

    def _answers(self, media: Float[Tensor, "N 3 F Y X"], texts: tuple[str, ...]) -> Float[Tensor, "N 3"]:
        fps = self.settings.fps if self.options.fps is None else self.options.fps
        looked_at = sampled_frames(media.shape[2], media_fps=self.options.media_fps, fps=fps).to(media.device)
        outputs = self.rater(media[:, :, looked_at], texts)
        # Trained with one output, each token has its number; with three, the k-th token has the k-th.
        return outputs[..., 0] if outputs.shape[2] == 1 else outputs.diagonal(dim1=1, dim2=2)


_loaded: weakref.WeakValueDictionary[ModelOptions, VideoReward] = weakref.WeakValueDictionary()
_loading = threading.Lock()


def shared_model(options: ModelOptions) -> VideoReward:
    """The model of these options; it is loaded once and stays as long as some reward uses it."""
    with _loading:
        model = _loaded.get(options) or VideoReward(options)
        _loaded[options] = model
        return model


def _same(
    last: tuple[weakref.ref[Tensor], int, tuple[str, ...], Tensor], media: Tensor, texts: tuple[str, ...]
) -> bool:
    """Whether the last batch was this very tensor, unchanged since, with these texts."""
    return last[0]() is media and last[1:3] == (media._version, texts)


def read_settings(file: Path) -> Settings:
    """What is needed of model_config.json.

    Raises:
        UserError: it is not VideoReward's.
    """
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        data, peft, statistics = table["data_config"], table["peft_lora_config"], table.get("inference_config")
        lora = Lora(int(peft["lora_r"]), float(peft["lora_alpha"]), bool(peft.get("use_rslora", False)))
        return Settings(
            fps=float(data["fps"]),
            most=int(data["max_frame_pixels"]),
            lora=lora if peft["lora_enable"] else None,
            statistics={
                part: (float(statistics[f"{part}_mean"]), float(statistics[f"{part}_std"]))
                for part in PARTS
                if statistics
            },
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is not the model_config.json of VideoReward ({type(error).__name__}: {error}); it has data_config"
            " (fps, max_frame_pixels) and peft_lora_config (lora_enable, lora_r, lora_alpha). Download it again"
        ) from error
