"""A Qwen2-VL reward ready to be asked: model, words and pixel budget together, checked to be of one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from vipo.errors import UserError
from vipo.rewards.pretrained import load_tokenizer, placed
from vipo.rewards.qwen_vl_model import Lora, RewardModel, load_reward_model
from vipo.rewards.qwen_vl_text import Instruction, Reader
from vipo.rewards.qwen_vl_vision import patches


@dataclass(frozen=True)
class Kind:
    """What one family of published models has in common."""

    instruction: Instruction
    placeholder: str  # the token that stands for a picture token in the text
    outputs: tuple[int, ...]  # how many numbers its head may give per marker
    least: int  # px per frame


@dataclass(frozen=True)
class Rater:
    """Videos of an even number of frames and their prompts to the head's outputs at every marker."""

    model: RewardModel
    reader: Reader
    least: int  # px per frame
    most: int  # px per frame
    batch_size: int  # videos per forward pass
    offload: bool  # keep the weights in the CPU's memory between uses

    def __call__(self, frames: Float[Tensor, "N 3 n Y X"], prompts: Sequence[str]) -> Float[Tensor, "N K O"]:
        starts = range(0, len(prompts), self.batch_size)
        rows = [slice(start, start + self.batch_size) for start in starts]
        with placed(self.model, frames.device, offload=self.offload):
            return torch.cat([self._batch(frames[row], prompts[row]) for row in rows])

    def _batch(self, frames: Float[Tensor, "N 3 n Y X"], prompts: Sequence[str]) -> Float[Tensor, "N K O"]:
        seen = patches(frames, least=self.least, most=self.most)
        outputs: Tensor = self.model(self.reader(prompts, seen.tokens), seen)
        return outputs


def load_rater(
    kind: Kind,
    file: Path,
    tensors: Mapping[str, Tensor],
    *,
    folder: Path,
    template: str | Path | None,
    base: str | Path,
    tokenizer: str | Path,
    most: int,
    batch_size: int,
    dtype: str,
    offload: bool,
    lora: Lora | None = None,
) -> Rater:
    """A rater of the weights in ``file``.

    Args:
        kind: the family it is of.
        file: where the tensors came from, for messages.
        tensors: by their published names.
        folder: where its instruction text is if ``template`` is None.
        template: the file with the instruction text.
        base: hub id or folder of the Qwen2-VL that was trained further; only its config.json is read.
        tokenizer: hub id or folder.
        most: px per frame at which it looks, at most.
        batch_size: videos per forward pass.
        dtype: of the network.
        offload: keep the weights in the CPU's memory between uses.
        lora: how the LoRA among the tensors was trained.

    Raises:
        UserError: a file is missing, or they are not of one model.
    """
    reward = kind.instruction.reward
    text = kind.instruction.read(template, folder)
    words = load_tokenizer(reward, "AutoTokenizer", tokenizer)
    reader = Reader(reward, words, text, kind.instruction.markers, placeholder=kind.placeholder)
    model = load_reward_model(reward, file, tensors, base, dtype=dtype, lora=lora)
    _check_together(kind, model, reader)
    return Rater(model, reader, kind.least, most, batch_size, offload)


def _check_together(kind: Kind, model: RewardModel, reader: Reader) -> None:
    """Refuse a tokenizer, a base and weights that belong to different models."""
    config, words = model.network.config, model.network.get_input_embeddings().num_embeddings
    if reader.placeholder_id not in (config.video_token_id, config.image_token_id) or max(reader.marker_ids) >= words:
        raise UserError(
            f"the tokenizer of reward {reader.reward!r} counts otherwise than its weights ({reader.placeholder} is"
            f" {reader.placeholder_id}, markers are {reader.marker_ids} of {words} words); give tokenizer= and base= of"
            " the Qwen2-VL that it was trained from"
        )
    if model.outputs not in kind.outputs:
        raise UserError(
            f"the head of reward {reader.reward!r} gives {model.outputs} numbers per token, accepted:"
            f" {' or '.join(map(str, kind.outputs))}; is it the checkpoint of another model?"
        )
