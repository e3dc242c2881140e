"""LAION's aesthetic predictor, version 2 ("sac+logos+ava1"): how much people like a picture, whatever its prompt.

    score = w . e / |e| + b        e the image embedding of CLIP ViT-L/14

The published head is five linear layers with nothing but dropout between them, so it is one affine map. Its 769 numbers
ship with the package (``data/README.md``); the CLIP does not. Gradients with respect to media flow.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from vipo.rewards.clip_family import CLASSES, CLIP_VIT_L, embed_frames
from vipo.rewards.frames import Frames, check_frames
from vipo.rewards.linear_head import affine_head
from vipo.rewards.pretrained import checkpoint_file, load_model, placed, read_tensors
from vipo.types import Prompt
from vipo.vision.preprocess import centre_crop

SHIPPED_HEAD = Path(__file__).parent / "data" / "laion_aesthetic_v2.safetensors"


class Aesthetic:
    """LAION's aesthetic predictor, version 2: an affine map of CLIP ViT-L/14's unit embedding, usually 5 to 6.5.

    Args:
        pretrained: hub id or local folder of the CLIP that the head was fitted on.
        head: file of another head, the published ``.pth`` of five linear layers or one of a single layer; None takes
            the one that ships.
        batch_size: pictures per forward pass.
        frames: "mean" over a video's frames, or "first" for the first frame alone.
        dtype: of the network; the head stays float32.
        sha256: of the CLIP's model.safetensors, in hexadecimal; None does not check.
        offload: keep the network on the CPU between calls.
    """

    def __init__(
        self,
        *,
        pretrained: str | Path = CLIP_VIT_L,
        head: str | Path | None = None,
        batch_size: int = 16,
        frames: Frames = "mean",
        dtype: str = "float32",
        sha256: str | None = None,
        offload: bool = False,
    ) -> None:
        check_frames("aesthetic", frames)
        file = checkpoint_file("aesthetic", SHIPPED_HEAD if head is None else head, (SHIPPED_HEAD.name,))
        self.network = load_model("aesthetic", pretrained, CLASSES, dtype=dtype, sha256=sha256)
        del self.network.text_model, self.network.text_projection  # no prompt is read: a third of the memory
        self.weight, self.bias = affine_head(
            "aesthetic", file, read_tensors("aesthetic", file), width=self.network.config.projection_dim
        )
        self.batch_size, self.frames, self.offload = batch_size, frames, offload

    def __call__(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Float[Tensor, " N"]:
        with placed(self.network, media.device, offload=self.offload):
            images = embed_frames(self.network, centre_crop, media, self.frames, self.batch_size)
        return (images @ self.weight.to(media.device) + self.bias).mean(1)
