"""Scorers for pictures of the embedded vocabulary: one to train on, two held out to judge with.

    EmojiMatch    mean over named objects of log sigmoid(presence logit) + stray * mean over the others of log(1 - p)
    EmojiJudge    mean over named objects of p(object is there)
    EmojiLayout   share of the caption's claims that hold: objects, relation, ground colour

EmojiMatch knows the drawings that the embedded generator was trained on, and says where it found what it scored; the
other two have never seen them, only other artists' drawings of the same things. A prompt outside the vocabulary's
grammar gets NaN, no score. Videos are scored frame by frame and averaged. Data, licence and accuracy:
``vipo/embedded/judges/README.md``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vipo import embedded
from vipo.embedded import VOCABULARY, parse_caption
from vipo.embedded.clips import parse_clip_caption
from vipo.errors import UserError
from vipo.rewards.embedded_networks import PICTURE_SIZE, JudgeNetwork, LayoutNetwork, MatchHead
from vipo.types import Prompt
from vipo.vision.efficientnet_lite import FoldedTrunk, load_unfolded, to_input
from vipo.vision.frozen import freeze
from vipo.vision.preprocess import in_batches, resize

MATCH_RESOLUTION = 128
"""Side in px at which EmojiMatch's trunk sees a picture: an 8 x 8 grid at stride 16."""

Network = TypeVar("Network", bound=nn.Module)
Claims = tuple[tuple[str, ...], str | None, str]  # objects, relation, ground: what parse_caption reads


class EmojiMatch:
    """The reward of the embedded recipes, in (-inf, 0].

    Args:
        stray: weight of the penalty for objects that the caption does not name; 0 turns it off.
        batch_size: pictures per forward pass.
    """

    def __init__(self, *, stray: float = 0.5, batch_size: int = 16) -> None:
        if stray < 0:
            raise ValueError(f"stray={stray}: must not be negative, or unnamed objects would be rewarded")
        self.stray, self.batch_size = stray, batch_size
        self.trunk = freeze(FoldedTrunk(load_unfolded(), 32))
        self.head = load_shipped(MatchHead(len(VOCABULARY.names)), "match")

    def __call__(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Float[Tensor, " N"]:
        return self.with_evidence(media, prompts)[0]

    def with_evidence(
        self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, "N F 8 8"]]:
        """Scores, and what the head saw in each cell before it pooled them:

            e(c) = max over named objects k of p_k(c)  -  min(stray, 1) max over the others of p_k(c)

        with p_k(c) the presence that it would give k in a picture of which every cell is this one; the picture's own
        is their smooth maximum.
        """
        named = named_objects(prompts).to(media.device)
        others = ~named & named.any(1, keepdim=True)
        cells = in_frames(self.cells, media)
        logits = self.head.presence(cells.flatten(0, 1)).unflatten(0, cells.shape[:2]).mean(1)
        there = _mean_where(F.logsigmoid(logits), named)
        scores = there + self.stray * _mean_where(F.logsigmoid(-logits), others)
        seen = self.head.presence.alone(cells).sigmoid()
        stray = _largest_where(seen, others).nan_to_num(0.0)  # where all objects are named
        return scores, _largest_where(seen, named) - min(self.stray, 1.0) * stray

    def presence(self, images: Float[Tensor, "B 3 Y X"]) -> Float[Tensor, "B K"]:
        """How sure the head is of each vocabulary object, in logits."""
        found: Tensor = self.head.presence(self.cells(images))
        return found

    def cells(self, images: Float[Tensor, "B 3 Y X"]) -> Float[Tensor, "B K 8 8"]:
        """The same of each cell, before they are pooled."""
        self.trunk.to(images.device)
        self.head.to(images.device)
        return in_batches(self._cells, resize(images, (MATCH_RESOLUTION,) * 2), self.batch_size)

    def _cells(self, images: Float[Tensor, "B 3 y x"]) -> Float[Tensor, "B K 8 8"]:
        *_, fine, coarse = self.trunk.stages(to_input(images))
        logits: Tensor = self.head(fine, coarse)
        return logits


class EmojiJudge:
    """The independent classifier, in [0, 1].

    Args:
        batch_size: pictures per forward pass.
    """

    def __init__(self, *, batch_size: int = 64) -> None:
        self.batch_size = batch_size
        self.network = load_shipped(JudgeNetwork(len(VOCABULARY.names)), "judge")

    def __call__(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Float[Tensor, " N"]:
        return _mean_where(_over_frames(self.probabilities, media), named_objects(prompts).to(media.device))

    def probabilities(self, images: Float[Tensor, "B 3 Y X"]) -> Float[Tensor, "B K"]:
        """P(object is there) for each vocabulary object."""
        network = self.network.to(images.device)
        small = resize(images, (PICTURE_SIZE, PICTURE_SIZE))
        return in_batches(lambda part: network.presence(network(part)).sigmoid(), small, self.batch_size)


class EmojiLayout:
    """The held-out checker of composition, in [0, 1]. Every claim of the caption counts the same.

    An object is there when some cell gives it more than ``threshold``; a relation holds when both are there and their
    centroids stand in it by at least ``margin``; the ground holds when the background's median colour is nearer, in
    CIELAB, to the named colour than to any other of the vocabulary, and not farther than ``colour_distance``.

    Args:
        threshold: cell probability from which an object counts as there.
        margin: distance of centroids, in shares of the picture's side.
        colour_distance: largest distance in CIELAB units of a ground from its name.
        batch_size: pictures per forward pass.
    """

    def __init__(
        self,
        *,
        threshold: float = 0.3,
        margin: float = 0.05,
        colour_distance: float = 30.0,
        batch_size: int = 64,
    ) -> None:
        self.threshold, self.margin, self.colour_distance = threshold, margin, colour_distance
        self.batch_size = batch_size
        self.network = load_shipped(LayoutNetwork(len(VOCABULARY.names)), "layout")

    def __call__(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Float[Tensor, " N"]:
        claims = [_claims(prompt) for prompt in prompts]
        frames = [self._frame(images, claims) for images in media.unbind(2)]
        return torch.stack(frames).mean(0).to(media.device)

    def heat(self, images: Float[Tensor, "B 3 Y X"]) -> Float[Tensor, "B K1 8 8"]:
        """Probability of each object, and last of background, per cell."""
        network = self.network.to(images.device)
        small = resize(images, (PICTURE_SIZE, PICTURE_SIZE))
        return in_batches(lambda part: network(part).exp(), small, self.batch_size)

    def _frame(self, images: Float[Tensor, "B 3 Y X"], claims: Sequence[Claims | None]) -> Float[Tensor, " B"]:
        heat = self.heat(images).cpu()
        grounds = nearest_ground(images.cpu(), heat[:, -1], self.colour_distance)
        rows = zip(heat, grounds, claims, strict=True)
        return torch.tensor([torch.nan if c is None else self._share(h, ground, c) for h, ground, c in rows])

    def _share(self, heat: Float[Tensor, "K1 h w"], ground: str | None, claims: Claims) -> float:
        names, relation, wanted = claims
        index = [VOCABULARY.names.index(name) for name in names]
        there = [bool(heat[i].max() > self.threshold) for i in index]
        held = [*there, ground == wanted]
        if relation is not None:
            held.append(all(there) and self._stands(heat[index[0]], heat[index[1]], relation))
        return sum(held) / len(held)

    def _stands(self, first: Float[Tensor, "h w"], second: Float[Tensor, "h w"], relation: str) -> bool:
        axis = 0 if relation == "left" else 1
        return bool(centroid(second)[axis] - centroid(first)[axis] > self.margin)


def centroid(heat: Float[Tensor, "h w"]) -> tuple[float, float]:
    """Centre (x, y) of a heat map in shares of the picture's side; squared, so that stray warmth hardly counts."""
    weight = heat.square() / heat.square().sum().clamp_min(1e-12)
    x = (torch.arange(heat.shape[1]) + 0.5) / heat.shape[1]
    y = (torch.arange(heat.shape[0]) + 0.5) / heat.shape[0]
    return float((weight.sum(0) * x).sum()), float((weight.sum(1) * y).sum())


def nearest_ground(
    images: Float[Tensor, "B 3 Y X"], background: Float[Tensor, "B h w"], limit: float
) -> list[str | None]:
    """Name of each picture's ground: median CIELAB colour where ``background`` > 0.8, or of the border if nowhere.

    None where the nearest name is farther than ``limit``.
    """
    names = VOCABULARY.ground_names
    palette = to_lab(torch.tensor([VOCABULARY.grounds[name] for name in names]).float() / 255)
    shown = F.interpolate(background[:, None], size=images.shape[-2:], mode="nearest")[:, 0] > 0.8
    border = torch.ones_like(shown[0])
    border[2:-2, 2:-2] = False
    found: list[str | None] = []
    for picture, mask in zip(images.float(), shown, strict=True):
        colours = to_lab(picture[:, mask if mask.any() else border].T)
        distance = (palette - colours.median(0).values).norm(dim=1)
        found.append(names[int(distance.argmin())] if float(distance.min()) <= limit else None)
    return found


def to_lab(rgb: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
    """sRGB in [0, 1] to CIELAB under D65: distances there are roughly what people see (CIE 15:2004)."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055).clamp_min(0) ** 2.4)
    to_xyz = rgb.new_tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / rgb.new_tensor([0.95047, 1.0, 1.08883])
    f = torch.where(xyz > (6 / 29) ** 3, xyz.clamp_min(1e-9) ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def _claims(prompt: Prompt) -> Claims | None:
    """What a picture's or a clip's caption claims of each frame; None, and so no score, for any other prompt."""
    with suppress(ValueError):
        return parse_caption(prompt.text)
    with suppress(ValueError):
        name, _, ground = parse_clip_caption(prompt.text)
        return (name,), None, ground
    return None


def named_objects(prompts: Sequence[Prompt]) -> Bool[Tensor, "N K"]:
    """Which vocabulary objects each prompt names; no object at all for a prompt outside the grammar."""
    named = torch.zeros(len(prompts), len(VOCABULARY.names), dtype=torch.bool)
    for row, claims in enumerate(map(_claims, prompts)):
        for name in claims[0] if claims else ():
            named[row, VOCABULARY.names.index(name)] = True
    return named


def _mean_where(values: Float[Tensor, "N K"], chosen: Bool[Tensor, "N K"]) -> Float[Tensor, " N"]:
    """Mean of the chosen values of each row; NaN where a row chooses none."""
    return (values * chosen).sum(1) / chosen.sum(1)


def _largest_where(values: Float[Tensor, "N F K h w"], chosen: Bool[Tensor, "N K"]) -> Float[Tensor, "N F h w"]:
    """The largest of the chosen values at each place; NaN where a sample chooses none."""
    largest = values.masked_fill(~chosen[:, None, :, None, None], -torch.inf).amax(2)
    return largest.masked_fill(largest.isinf(), torch.nan)


def _over_frames(function: Callable[[Tensor], Tensor], media: Float[Tensor, "N 3 F Y X"]) -> Float[Tensor, "N K"]:
    """Apply a picture's function to every frame at once and average over frames."""
    return in_frames(function, media).mean(1)


def in_frames(function: Callable[[Tensor], Tensor], media: Float[Tensor, "N 3 F Y X"]) -> Float[Tensor, "N F *rest"]:
    """Apply a picture's function to every frame at once."""
    values = function(media.transpose(1, 2).flatten(0, 1))
    return values.unflatten(0, (-1, media.shape[2]))


def load_shipped(network: Network, name: str) -> Network:
    """Fill a network from the shipped weights, frozen, float32; the vocabulary it was trained on must be today's."""
    from safetensors import safe_open

    file = Path(embedded.__file__).parent / "judges" / f"{name}.safetensors"
    if not file.is_file():
        raise UserError(f"no weights at {file}; reinstall vipo, or make them with the scripts in experiments/embedded")
    with safe_open(file, framework="pt") as handle:
        objects = (handle.metadata() or {}).get("objects", "")
        tensors = {key: handle.get_tensor(key).float() for key in handle.keys()}  # noqa: SIM118
    if objects != _vocabulary_stamp():
        raise UserError(f"{file} was trained on another vocabulary ({objects}); run the script that made it again")
    report = network.load_state_dict(tensors, strict=False)
    lacking = [key for key in report.missing_keys if not key.endswith("num_batches_tracked")]
    if lacking or report.unexpected_keys:
        raise UserError(f"{file} does not fit its network: lacking {lacking}, unknown {report.unexpected_keys}")
    return freeze(network)


def _vocabulary_stamp() -> str:
    return json.dumps(list(VOCABULARY.names))
