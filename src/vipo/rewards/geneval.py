"""GenEval's object-focused checks (arXiv 2310.11513) with detectors that load through transformers.

    objects   Mask2Former, Swin-S, trained on COCO instances: class probability x mean probability inside the mask
    colours   CLIP ViT-L/14: the object on grey, cut out by its box, against ten colours in three phrases each

The benchmark itself uses the same architectures with mmdetection's weights, so scores resemble the published ones and
are not them; for the leaderboard, run the original. What is checked, from the prompt's metadata: ``geneval_checks``.
A prompt without claims gets NaN, no score. Videos are scored frame by frame and averaged.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vipo.errors import UserError
from vipo.registry import did_you_mean
from vipo.rewards.clip_family import CLASSES, CLIP_VIT_L, Matcher, embed_frames
from vipo.rewards.geneval_checks import COLOURS, Claims, Detection, Mode, read_claims, verdict
from vipo.rewards.pretrained import load_model, placed
from vipo.types import Prompt
from vipo.vision.preprocess import centre_crop, check_resolution, normalise, resize

NAME = "geneval_hf"
SURE, SURE_TO_COUNT = 0.3, 0.9  # scores above which a detection counts
MOST = 16  # detections per class
LONGEST = 1333 / 800  # where a picture is longer than that, its long side and not its short one gets the resolution
STRIDE = 32  # px
GREY = 0.6  # 0x99 of 0xff, behind an object whose colour is asked for
PHRASES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
COCO_NAMES = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}
"""GenEval's names of classes that COCO calls otherwise."""


class GenEvalHf:
    """How far a picture holds what its prompt's metadata claims, in [0, 1].

    Args:
        pretrained: hub id or local folder of the Mask2Former.
        clip: hub id or local folder of the CLIP, with its tokenizer.
        mode: "official" (the benchmark's rule), "strict" (exact counts), or "partial" (the share of claims that hold).
        resolution: short side in px at which the detector sees a picture; the benchmark has 800.
        batch_size: cut-out objects per forward pass of the CLIP.
        dtype: of both networks.
        offload: keep the networks on the CPU between calls.

    Raises:
        UserError: a model is missing or of another kind, or there is no such mode.
    """

    def __init__(
        self,
        *,
        pretrained: str | Path = "facebook/mask2former-swin-small-coco-instance",
        clip: str | Path = CLIP_VIT_L,
        mode: str = "official",
        resolution: int = 800,
        batch_size: int = 16,
        dtype: str = "float32",
        offload: bool = False,
    ) -> None:
        if mode not in get_args(Mode):
            raise UserError(f"{NAME} has no mode={mode!r}; choose from {', '.join(get_args(Mode))}")
        self.mode: Any = mode
        check_resolution(resolution, STRIDE)
        self.detector = Detector(pretrained, resolution=resolution, dtype=dtype, offload=offload)
        self.colours = Colours(clip, batch_size=batch_size, dtype=dtype, offload=offload)

    def __call__(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Float[Tensor, " N"]:
        claims = [read_claims(prompt.metadata) for prompt in prompts]
        self.detector.check(set().union(*(claim.names for claim in claims if claim)))
        rows = zip(media.unbind(0), claims, strict=True)
        scores = [torch.nan if claim is None else self._score(clip, claim) for clip, claim in rows]
        return torch.tensor(scores, device=media.device)

    def _score(self, clip: Float[Tensor, "3 F Y X"], claims: Claims) -> float:
        frames = [self._frame(picture, claims) for picture in clip.detach().unbind(1)]
        return sum(frames) / len(frames)

    def _frame(self, picture: Float[Tensor, "3 Y X"], claims: Claims) -> float:
        found = self.detector(picture, claims.names, sure=SURE_TO_COUNT if claims.counting else SURE)
        return verdict(claims, found, lambda name, objects: self.colours(picture, name, objects), self.mode)


class Detector:
    """A Mask2Former of instances. One picture at a time: they differ in size, and masks are large.

    Args:
        pretrained: hub id or local folder.
        resolution: short side of what it sees, in px.
        dtype: of the network.
        offload: keep it on the CPU between calls.
    """

    def __init__(self, pretrained: str | Path, *, resolution: int, dtype: str, offload: bool) -> None:
        _require_scipy()
        classes = {"mask2former": "Mask2FormerForUniversalSegmentation"}
        self.network = load_model(NAME, pretrained, classes, dtype=dtype)
        self.resolution, self.offload = resolution, offload
        self.labels: dict[str, int] = {name: index for index, name in self.network.config.id2label.items()}

    def check(self, names: Collection[str]) -> None:
        """Refuse classes that the network does not know."""
        for name in sorted(names):
            if COCO_NAMES.get(name, name) not in self.labels:
                raise UserError(
                    f"{NAME}: the detector knows {len(self.labels)} classes, and {name!r} is none of them; name"
                    f" COCO's classes in the prompts' metadata.{did_you_mean(name, self.labels)}"
                )

    @torch.no_grad()
    def __call__(
        self, picture: Float[Tensor, "3 Y X"], names: Collection[str], *, sure: float
    ) -> dict[str, list[Detection]]:
        """At most 16 detections of each class in ``names`` with a score above ``sure``, surest first."""
        height, width = picture.shape[-2:]
        with placed(self.network, picture.device, offload=self.offload):
            seen = normalise(resize(picture[None], _seen_size(height, width, self.resolution))).to(self.network.dtype)
            output = self.network(seen)
        chances = output.class_queries_logits[0].float().softmax(-1)[:, :-1]  # the last class is "nothing"
        masks = output.masks_queries_logits[0].float()
        return {name: self._of_class(name, chances, masks, picture.shape[-2:], sure) for name in names}

    def _of_class(
        self, name: str, chances: Float[Tensor, "Q c"], masks: Float[Tensor, "Q h w"], size: torch.Size, sure: float
    ) -> list[Detection]:
        chance = chances[:, self.labels[COCO_NAMES.get(name, name)]]
        likely = (chance > sure).nonzero().flatten().tolist()  # a mask can only lower the score
        found = [_detection(float(chance[query]), masks[query], size) for query in likely]
        kept = [detection for detection in found if detection is not None and detection.score > sure]
        return sorted(kept, key=lambda detection: -detection.score)[:MOST]


class Colours:
    """What colour an object has, by a CLIP.

    Args:
        clip: hub id or local folder, with its tokenizer.
        batch_size: objects per forward pass.
        dtype: of the network.
        offload: keep it on the CPU between calls.
    """

    def __init__(self, clip: str | Path, *, batch_size: int, dtype: str, offload: bool) -> None:
        network = load_model(NAME, clip, CLASSES, dtype=dtype)
        self.matcher = Matcher(NAME, network, clip, centre_crop, batch_size=batch_size, frames="mean", offload=offload)
        self.known: dict[str, Float[Tensor, "K D"]] = {}  # class name -> one unit vector per colour

    @torch.no_grad()
    def __call__(self, picture: Float[Tensor, "3 Y X"], name: str, objects: Sequence[Detection]) -> list[str]:
        """The colour of each object of class ``name``."""
        matcher, network = self.matcher, self.matcher.network
        side = network.config.vision_config.image_size
        cut = torch.cat([centre_crop(cut_out(picture, detection), side) for detection in objects])
        with placed(network, picture.device, offload=matcher.offload):
            seen = embed_frames(network, matcher.fit, cut[:, :, None], "mean", matcher.batch_size)[:, 0]
            if name not in self.known:
                self.known[name] = self._phrases(name)
        return [COLOURS[int(place)] for place in (seen @ self.known[name].to(seen.device).T).argmax(1)]

    def _phrases(self, name: str) -> Float[Tensor, "K D"]:
        """Each colour's mean over the phrases, of unit vectors and a unit vector again."""
        texts = [phrase.format(colour=colour, name=name) for colour in COLOURS for phrase in PHRASES]
        tokens = self.matcher.tokens(texts).to(self.matcher.network.device)
        vectors = F.normalize(self.matcher.network.get_text_features(tokens).pooler_output.float(), dim=-1)
        return F.normalize(vectors.unflatten(0, (len(COLOURS), -1)).mean(1), dim=-1)


def cut_out(picture: Float[Tensor, "3 Y X"], detection: Detection) -> Float[Tensor, "1 3 y x"]:
    """The object's box, with grey where the object is not."""
    left, top, right, bottom = (round(edge) for edge in detection.box)
    alone = torch.where(detection.mask, picture.float(), GREY)
    return alone[None, :, top:bottom, left:right]


def _detection(chance: float, small: Float[Tensor, "h w"], size: torch.Size) -> Detection | None:
    """From a mask in logits, on a coarser grid; None where no pixel is more likely the object's than not."""
    mask = F.interpolate(small[None, None], size=tuple(size), mode="bilinear", align_corners=False)[0, 0]
    inside = mask > 0
    if not inside.any():
        return None
    rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
    box = (float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1)
    return Detection(box, chance * float(mask[inside].sigmoid().mean()), inside)


def _seen_size(height: int, width: int, resolution: int) -> tuple[int, int]:
    """At which size in px the detector sees a picture: its shape, to the stride."""
    scale = resolution * min(1 / min(height, width), LONGEST / max(height, width))
    rows, columns = (max(STRIDE, round(side * scale / STRIDE) * STRIDE) for side in (height, width))
    return rows, columns


def _require_scipy() -> None:
    if importlib.util.find_spec("scipy") is None:  # transformers builds Mask2Former's loss with it, used or not
        raise UserError(f"{NAME} needs scipy: pip install 'vipo[geneval]'")
