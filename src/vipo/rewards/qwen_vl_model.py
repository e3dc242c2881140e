"""Qwen2-VL with a head instead of a vocabulary, from the file its authors published.

    out_k = head(h at marker k),  h the last hidden state, after the final norm

Two such files are known: VideoReward's (with LoRA beside the weights, one linear head) and HPSv3's (a head of three
linear layers). Both were written with Qwen2-VL's older tensor names. A LoRA is merged when it is read:

    W <- W + s B A,  s = alpha / r  (alpha / sqrt(r) for rank-stabilised LoRA), in float32
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vipo.errors import UserError
from vipo.pretrained import dtype_named, folder_or_id, not_found, quiet
from vipo.rewards.pretrained import check_fit, check_tensors
from vipo.rewards.qwen_vl_text import Tokens
from vipo.rewards.qwen_vl_vision import Patches

HEAD = "rm_head."
UNUSED = "lm_head."
RENAMED = {"visual.": "visual.", "model.": "language_model."}
"""Tensor names' beginnings: of the published files -> of ``Qwen2VLModel``."""


@dataclass(frozen=True)
class Lora:
    """How a LoRA was trained: W + s B A with A of ``rank`` rows."""

    rank: int
    alpha: float
    rank_stabilised: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


class RewardModel(nn.Module):
    """The network and its head, as one module to place and move."""

    def __init__(self, network: Any, head: nn.Module) -> None:
        super().__init__()
        self.network, self.head = network, head
        self.outputs: int = [layer for layer in head.modules() if isinstance(layer, nn.Linear)][-1].out_features

    def forward(self, tokens: Tokens, seen: Patches) -> Float[Tensor, "N K O"]:
        """The head's outputs at each marker, float32. Row n of ``tokens`` speaks of sample n of ``seen``."""
        device, (rows, length) = seen.values.device, tokens.ids.shape
        # Both models were trained with plain positions 0, 1, 2, ... on all three axes of the rotary embedding, not with
        # the grid positions that Qwen2-VL uses when it writes. Left out, transformers would compute the latter.
        positions = torch.arange(length, device=device).view(1, 1, -1).expand(3, rows, -1)
        ids = tokens.ids.to(device)
        hidden = self.network(
            input_ids=ids,
            attention_mask=tokens.mask.to(device),
            position_ids=positions,
            use_cache=False,
            **self._pictures(ids, seen),
        ).last_hidden_state
        outputs: Tensor = self.head(
            hidden[torch.arange(rows, device=device)[:, None], tokens.places.to(device)].float()
        )
        return outputs

    def _pictures(self, ids: Tensor, seen: Patches) -> dict[str, Tensor]:
        """The patches under the name that belongs to the placeholder in the text."""
        grid = torch.tensor([seen.grid], device=ids.device).expand(ids.shape[0], -1)
        values = seen.values.to(self.network.dtype)
        if (ids == self.network.config.video_token_id).any():
            return {"pixel_values_videos": values, "video_grid_thw": grid}
        return {"pixel_values": values, "image_grid_thw": grid}


def load_reward_model(
    reward: str,
    source: Path,
    tensors: Mapping[str, Tensor],
    base: str | Path,
    *,
    dtype: str,
    lora: Lora | None = None,
) -> RewardModel:
    """The model of a published file, frozen.

    Args:
        reward: the name the user knows, for messages.
        source: the file, for messages.
        tensors: what was in it, under its own names.
        base: hub id or folder of the Qwen2-VL that was trained further; only its config.json is read.
        dtype: of the network; the head is float32.
        lora: how the LoRA in it was trained; None where there is none.

    Raises:
        UserError: no config, or tensors that do not fill the network and the head exactly.
    """
    tensors = merge_lora(reward, source, {key.removeprefix("base_model.model."): t for key, t in tensors.items()}, lora)
    body = {_renamed(key): value for key, value in tensors.items() if not key.startswith((HEAD, UNUSED))}
    network = _network(reward, source, _config(reward, base, body), body, dtype)
    head = _head(reward, source, {k.removeprefix(HEAD): t.float() for k, t in tensors.items() if k.startswith(HEAD)})
    return RewardModel(network, head).eval().requires_grad_(False)


def merge_lora(
    reward: str, source: Path, tensors: Mapping[str, Tensor], lora: Lora | None
) -> dict[str, Float[Tensor, "..."]]:
    """Adapted layers under their own names, with what they learnt added; other tensors as they are.

    Raises:
        UserError: half an adapter, an adapter without a description, or one of another rank than described.
    """
    adapters = {key: value for key, value in tensors.items() if ".lora_" in key}
    merged, halves = {}, []
    for key in tensors.keys() - adapters.keys():
        stem, weight = key.removesuffix("base_layer.weight"), tensors[key]
        if stem != key:
            down, up = (adapters.pop(f"{stem}lora_{which}.default.weight", None) for which in "AB")
            if down is None or up is None:
                halves.append(key)
                continue
            weight = weight.float() + _scale(reward, source, lora, down) * (up.float() @ down.float())
        merged[key.replace(".base_layer.", ".")] = weight
    if halves or adapters:
        raise UserError(
            f"reward {reward!r}: {source} has LoRA tensors without their layer or their other half, the first is"
            f" {min([*halves, *adapters])!r}; download it again"
        )
    return merged


def _scale(reward: str, source: Path, lora: Lora | None, down: Tensor) -> float:
    if lora is None or lora.rank != down.shape[0]:
        said = "does not describe" if lora is None else f"describes as of rank {lora.rank}"
        raise UserError(
            f"reward {reward!r}: {source} holds a LoRA of rank {down.shape[0]} that model_config.json {said};"
            " the two files must be of one model, download them again"
        )
    return lora.scale


def _renamed(key: str) -> str:
    """The name in ``Qwen2VLModel``; an unknown one is kept, to be named in the error."""
    old = next((old for old in RENAMED if key.startswith(old)), "")
    return RENAMED.get(old, "") + key.removeprefix(old)


def _config(reward: str, base: str | Path, body: Mapping[str, Tensor]) -> Any:
    """The base model's config with as many words as the file has: special tokens were added in training."""
    from transformers import PretrainedConfig, Qwen2VLConfig

    user, place = f"reward {reward!r}", folder_or_id(f"reward {reward!r}", base)
    try:
        table, _ = PretrainedConfig.get_config_dict(place)
    except (OSError, ValueError) as error:
        raise UserError(not_found(user, base, "config.json", error, "a folder with it", "base=FOLDER")) from error
    if table.get("model_type") != "qwen2_vl":
        raise UserError(
            f"{base} holds a model of type {table.get('model_type')!r}; {user} needs a base of type qwen2_vl"
        )
    with quiet():
        config = Qwen2VLConfig.from_dict(table)
    words = body.get("language_model.embed_tokens.weight")
    config.text_config.vocab_size = config.text_config.vocab_size if words is None else words.shape[0]
    return config


def _network(reward: str, source: Path, config: Any, body: Mapping[str, Tensor], dtype: str) -> Any:
    from transformers import Qwen2VLModel

    check_fit(reward, source, Qwen2VLModel, config, body)
    kind = dtype_named(f"reward {reward!r}", dtype)
    with quiet():
        return Qwen2VLModel.from_pretrained(None, config=config, state_dict=dict(body), dtype=kind)


def _head(reward: str, source: Path, tensors: Mapping[str, Tensor]) -> nn.Module:
    """One linear layer without bias, or three with a rectifier between them, as wide as the tensors say."""
    head: nn.Module
    if set(tensors) == {"weight"}:
        head = _linear(tensors["weight"], bias=False)
    else:
        first, second, third = (_linear(tensors.get(f"{i}.weight", torch.empty(1, 1)), bias=True) for i in (0, 3, 5))
        head = nn.Sequential(first, nn.ReLU(), nn.Dropout(0.05), second, nn.ReLU(), third)
    check_tensors(reward, source, head, tensors, part="the reward head")
    head.load_state_dict(tensors)
    return head


def _linear(weight: Tensor, *, bias: bool) -> nn.Linear:
    return nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
