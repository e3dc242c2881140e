"""Scenes with planted flaws whose place and strength are known: what the scorers of counts and of quality learn from.

A scene names one to three objects and shows each once, or several times, or not at all, perhaps beside objects that
nobody named. Objects may be cut, blurred, of a wrong colour, filled with another drawing, or dented out of shape; the
ground may be grainy. Three in four pictures then go through the generator's own autoencoder, clean ones too, so that
its softness is no flaw, and some of their latents get noise, which decodes to the grain of a generator gone astray.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from judge_data import NAME_INDEX, move, objects_of, recolour, uniform
from scenes import GROUND_KINDS, SceneComposer
from vipo.embedded import VOCABULARY

KINDS = ("duplicate", "stray", "cut", "blur", "colour", "texture", "broken", "grain")
"""What a pixel can be wrong by; maps of kinds hold the place in this list plus one, 0 for nothing wrong."""
CODE = {kind: number for number, kind in enumerate(KINDS, 1)}
SEVERITIES = ("grain", "blur", "colour", "cut", "broken")
"""What lowers a picture's quality; a texture counts as colour, a wrong number of objects is no matter of quality."""
MOST = 7
"""Objects in a scene, at most."""
WHOLE = 0.6
"""Share of an object that must show for it to count as one; with less it counts as that share of a whole."""
GRID = 16

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Flawed:
    """A batch of pictures and what is wrong with them.

    images: uint8 (b, 3, 64, 64). cover: uint8 (b, MOST, 16, 16), share of a cell that shows an object, in 255ths.
    spots: (b, MOST, 4): vocabulary index (-1 for none), x and y of its centre in cells, how much of one it counts.
    named: bool (b, K), what the caption names. kinds: uint8 (b, 32, 32), see ``KINDS``. severity: (b, 5) in [0, 1].
    """

    images: Tensor
    cover: Tensor
    spots: Tensor
    named: Tensor
    kinds: Tensor
    severity: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, index: Tensor | slice) -> Flawed:
        """Some of the pictures."""
        return Flawed(*(getattr(self, field.name)[index] for field in fields(self)))

    @staticmethod
    def join(parts: Sequence[Flawed]) -> Flawed:
        """One batch of several."""
        return Flawed(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Flawed)))


@dataclass
class Drawn:
    """One scene before it is moved and spoilt: image (64, 64, 3) 0-255, and per object mask, name and flaw."""

    image: Array
    masks: Array
    flawed: Array
    names: list[str]
    kinds: list[int]
    strengths: list[float]
    extents: list[float]
    wanted: tuple[str, ...]


class FlawSource:
    """Endless flawed and clean scenes of several vendors' art.

    Args:
        plant: kinds of flaws that are planted, all of ``KINDS`` if not given.
        clean: share of scenes without any flaw.
        encoded: share of pictures that go through the autoencoder.
        moved: how far pictures are turned, stretched and recoloured, 0 to 1.
        grain, blur: shares of the others that are grainy, or blurred, as a whole.
    """

    def __init__(
        self,
        art: Path,
        vendors: Sequence[str],
        autoencoder: AutoencoderKL,
        seed: int,
        *,
        plant: Sequence[str] = KINDS,
        clean: float = 0.3,
        encoded: float = 0.75,
        moved: float = 0.4,
        grain: float = 0.4,
        blur: float = 0.12,
    ) -> None:
        self.composers = [SceneComposer(art, vendor, objects_of(art, vendor)) for vendor in vendors]
        self.autoencoder, self.plant = (
            autoencoder.eval().to(torch.bfloat16, memory_format=torch.channels_last),
            set(plant),
        )
        self.clean, self.encoded, self.moved = clean, encoded, moved
        self.shares = {"grain": grain, "blur": blur}
        self.rng = np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self, count: int) -> Flawed:
        """Draw ``count`` scenes."""
        spotless = self.rng.random(count) < self.clean
        drawn = [self._draw(bool(clean)) for clean in spotless]
        images = torch.from_numpy(np.stack([d.image for d in drawn])).permute(0, 3, 1, 2).float().div(255).clamp(0, 1)
        masks = torch.from_numpy(np.stack([np.concatenate([d.masks, d.flawed]) for d in drawn]))
        if self.moved:
            images, masks = move(images, masks, self.moved, self.generator)
            images = recolour(images, self.moved, self.generator)
        masks, flawed = masks.split(MOST, 1)
        severity = torch.tensor([_severity(d) for d in drawn])
        kinds = _kind_map(flawed, torch.tensor([d.kinds for d in drawn]))
        ground = (1 - masks.sum(1, keepdim=True)).clamp(0, 1)
        grain, wide = self._strengths(spotless, "grain"), self._strengths(spotless, "blur")
        images = self._through(images, grain, ground)
        images = _blurred(images, wide)
        severity[:, 0] = torch.maximum(severity[:, 0], grain)
        severity[:, 1] = torch.maximum(severity[:, 1], wide)
        kinds = _add(kinds, (ground > 0.5) & (grain > 0.08)[:, None, None, None], CODE["grain"])
        kinds = _add(kinds, (ground < 0.5) & (wide > 0.1)[:, None, None, None], CODE["blur"])
        spots = torch.stack([_spots(m, d) for m, d in zip(masks, drawn, strict=True)])
        named = torch.zeros(count, len(NAME_INDEX), dtype=torch.bool)
        for row, d in enumerate(drawn):
            named[row, [NAME_INDEX[name] for name in d.wanted]] = True
        cover = F.adaptive_avg_pool2d(masks, GRID).mul(255).round().byte()
        return Flawed(images.mul(255).round().byte(), cover, spots, named, kinds, severity)

    def _draw(self, clean: bool) -> Drawn:
        rng = self.rng
        composer = self.composers[rng.integers(len(self.composers))]
        wanted, names, kinds = self._cast(composer.names, clean)
        boxes = _place(rng, composer, names)
        image = composer._ground(rng, GROUND_KINDS[rng.choice(3, p=(0.6, 0.3, 0.1))], _colour(rng), 1.0)
        masks, flawed = (np.zeros((MOST, composer.size, composer.size), dtype=np.float32) for _ in range(2))
        strengths, extents = [0.0] * MOST, [0.0] * MOST
        most = {name: max(_area(b) for n, b in zip(names, boxes, strict=True) if n == name) for name in names}
        for i, (name, box) in enumerate(zip(names, boxes, strict=True)):
            patch, wrong = composer._sized(name, int(max(box[2:] - box[:2]))), None
            extents[i] = float(patch[..., 3].sum())
            if kinds[i] > CODE["stray"]:
                strengths[i] = float(rng.uniform(0.25, 1.0))
                patch, wrong = self._spoil(composer, patch, name, KINDS[kinds[i] - 1], strengths[i])
            elif names.count(name) > 1 and _area(box) < most[name]:
                kinds[i] = CODE["duplicate"]
            alpha = _paste(image, patch, box)
            masks[:i] *= 1 - alpha
            flawed[:i] *= 1 - alpha
            masks[i] = alpha
            flawed[i] = alpha if wrong is None else _laid(wrong, box, composer.size)
        flawed *= (np.array(_padded(kinds, 0)) > 0)[:, None, None]
        return Drawn(image, masks, flawed, names, _padded(kinds, 0), strengths, extents, wanted)

    def _cast(self, known: Sequence[str], clean: bool) -> tuple[tuple[str, ...], list[str], list[int]]:
        """Whom the caption names, who appears, and each one's flaw (0: none; copies are found when sizes are known)."""
        rng = self.rng
        cast = [known[i] for i in rng.choice(len(known), size=5, replace=False)]
        wanted = cast[: rng.choice(3, p=(0.45, 0.4, 0.15)) + 1]
        copies = np.ones(len(wanted), dtype=int)
        if "duplicate" in self.plant and not clean and rng.random() < 0.55:
            copies = rng.choice(7, size=len(wanted), p=(0.05, 0.3, 0.3, 0.15, 0.1, 0.06, 0.04))
        names = [name for name, count in zip(wanted, copies, strict=True) for _ in range(count)]
        kinds = [0] * len(names)
        if "stray" in self.plant and not clean and rng.random() < 0.2:
            names += cast[3 : rng.integers(4, 6)]
            kinds += [CODE["stray"]] * (len(names) - len(kinds))
        order = rng.permutation(len(names))[:MOST]
        names, kinds = [names[i] for i in order], [kinds[i] for i in order]
        own = [kind for kind in KINDS[2:7] if kind in self.plant]
        if own and not clean and rng.random() < 0.55:
            kinds = [CODE[str(rng.choice(own))] if k == 0 and rng.random() < 0.6 else k for k in kinds]
        return tuple(wanted), names, kinds

    def _spoil(
        self, composer: SceneComposer, patch: Array, name: str, kind: str, strength: float
    ) -> tuple[Array, Array]:
        """A drawing (h, w, 4) with a flaw, and where that is (h, w)."""
        if kind == "cut":
            return _cut(self.rng, patch, strength)
        if kind == "blur":
            return _blur_patch(patch, strength), patch[..., 3]
        if kind == "colour":
            return _wrong_colour(self.rng, patch)
        if kind == "texture":
            others = [other for other in composer.names if other != name]
            return _texture(patch, composer._sized(str(self.rng.choice(others)), max(patch.shape[:2])))
        return _dent(patch, strength, self.generator)

    def _strengths(self, spotless: NDArray[np.bool_], kind: str) -> Tensor:
        """How grainy or blurred each picture is as a whole; most are not."""
        chosen = ~spotless & (self.rng.random(len(spotless)) < self.shares[kind]) & (kind in self.plant)
        strength = 0.06 + 0.94 * self.rng.random(len(spotless)) ** 1.5
        return torch.from_numpy(np.where(chosen, strength, 0.0)).float()

    @torch.no_grad()
    def _through(self, images: Tensor, grain: Tensor, ground: Tensor) -> Tensor:
        """Send most pictures through the autoencoder; the grain is noise on latents there, and on pixels elsewhere."""
        chosen = torch.rand(len(images), generator=self.generator) < self.encoded
        pixel = 0.1 * grain.view(-1, 1, 1, 1) * _rough(images.shape, self.generator)
        out = (images + pixel).clamp(0, 1)
        out[chosen] = self._encoded(images[chosen], grain[chosen], ground[chosen])
        return out

    def _encoded(self, images: Tensor, grain: Tensor, ground: Tensor) -> Tensor:
        """Pictures out of the autoencoder, with noise on their latents: everywhere, or on the ground alone."""
        pixels = (images * 2 - 1).bfloat16().contiguous(memory_format=torch.channels_last)
        latents = self.autoencoder.encode(pixels).latent_dist.mean.float()
        on = F.adaptive_avg_pool2d(ground, latents.shape[-1])
        on = torch.where(torch.rand(len(on), 1, 1, 1, generator=self.generator) < 0.5, on, torch.ones_like(on))
        free = FREE_GRAIN * torch.rand(len(on), 1, 1, 1, generator=self.generator)
        amount = (LATENT_GRAIN * grain.view(-1, 1, 1, 1) * on + free) / self.autoencoder.config.scaling_factor
        latents = latents + amount * _rough(latents.shape, self.generator)
        decoded = self.autoencoder.decode(latents.bfloat16().contiguous(memory_format=torch.channels_last)).sample
        return decoded.float().add(1).div(2).clamp(0, 1).contiguous()


FREE_GRAIN = 0.03
"""Standard deviation of the noise on latents that no picture is blamed for, at most."""
LATENT_GRAIN = 0.5
"""Standard deviation of the noise on latents (which have 1) at full strength."""


def _padded(values: Sequence[int], fill: int) -> list[int]:
    return [*values, *[fill] * (MOST - len(values))]


def _colour(rng: np.random.Generator) -> str:
    return VOCABULARY.ground_names[rng.integers(len(VOCABULARY.grounds))]


def _area(box: NDArray[np.int64]) -> int:
    return int(max(box[2:] - box[:2]))


def _place(rng: np.random.Generator, composer: SceneComposer, names: Sequence[str]) -> NDArray[np.int64]:
    """Boxes (n, 4) of objects that hardly overlap; the more there are, the smaller they are."""
    high = {0: 0.8, 1: 0.8, 2: 0.52, 3: 0.42, 4: 0.4, 5: 0.36, 6: 0.34, 7: 0.32}[len(names)]
    boxes = np.zeros((len(names), 4), dtype=np.int64)
    for i, name in enumerate(names):
        for attempt in range(60):
            side = max(9, round(composer.size * rng.uniform(0.24, high) * (1 - 0.008 * attempt)))
            height, width = composer._sized(name, side).shape[:2]
            x, y = (int(rng.integers(-1, max(0, composer.size - extent) + 2)) for extent in (width, height))
            boxes[i] = x, y, x + width, y + height
            if _free(boxes[: i + 1]):
                break
    return boxes


def _free(boxes: NDArray[np.int64]) -> bool:
    """Whether the last box covers little of the others."""
    *others, last = boxes
    for box in others:
        sides = np.minimum(box[2:], last[2:]) - np.maximum(box[:2], last[:2])
        if np.all(sides > 0) and np.prod(sides) > 0.12 * min(np.prod(b[2:] - b[:2]) for b in (box, last)):
            return False
    return True


def _inside(box: NDArray[np.int64], shape: Sequence[int], size: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where a patch of this shape lies in the picture, and which part of it shows."""
    (x, y), (height, width) = box[:2], shape[:2]
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + width, size), min(y + height, size)
    return (slice(top, bottom), slice(left, right)), (slice(top - y, bottom - y), slice(left - x, right - x))


def _laid(values: Array, box: NDArray[np.int64], size: int) -> Array:
    """(h, w) values in their place of an empty (size, size) picture."""
    picture = np.zeros((size, size), dtype=np.float32)
    where, part = _inside(box, values.shape, size)
    picture[where] = values[part]
    return picture


def _paste(canvas: Array, patch: Array, box: NDArray[np.int64]) -> Array:
    """Put a premultiplied drawing onto the canvas in place; returns its alpha (size, size)."""
    alpha = _laid(patch[..., 3], box, len(canvas))
    where, part = _inside(box, patch.shape, len(canvas))
    canvas[where] = canvas[where] * (1 - alpha[where][..., None]) + patch[part][..., :3]
    return alpha


def _cut(rng: np.random.Generator, patch: Array, strength: float) -> tuple[Array, Array]:
    """Nothing is left beyond a straight line; wrong is what lies near it, on both sides."""
    height, width = patch.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    inside = patch[..., 3] > 0.5
    line = np.quantile(along[inside], 1 - (0.15 + 0.5 * strength)) if inside.any() else 0.0
    kept = np.clip(line - along + 0.5, 0, 1)[..., None]
    near = (np.abs(along - line) < 5) & (patch[..., 3] > 0.3)
    return patch * kept, near.astype(np.float32)


def _as_tensor(patch: Array) -> Tensor:
    return torch.from_numpy(patch).permute(2, 0, 1)[None]


def _as_patch(tensor: Tensor) -> Array:
    return tensor[0].permute(1, 2, 0).numpy()


def _kernel(sigma: float) -> Tensor:
    reach = max(1, math.ceil(2.5 * sigma))
    weight = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma).square())
    return weight / weight.sum()


def _smooth(images: Tensor, sigma: float, mode: str) -> Tensor:
    """Gaussian blur of (b, c, H, W)."""
    kernel, channels = _kernel(sigma), images.shape[1]
    reach = len(kernel) // 2
    padded = F.pad(images, (reach,) * 4, mode=mode)
    rows = F.conv2d(padded, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return F.conv2d(rows, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)


def _blur_patch(patch: Array, strength: float) -> Array:
    return _as_patch(_smooth(_as_tensor(patch), 1.0 + 2.0 * strength, "constant"))


def _blurred(images: Tensor, strength: Tensor) -> Tensor:
    """Blur each picture of (b, 3, H, W) by its own strength, none at 0."""
    out = images.clone()
    for row in strength.nonzero().flatten().tolist():
        out[row] = _smooth(images[row : row + 1], 0.7 + 1.8 * float(strength[row]), "replicate")[0]
    return out


def _wrong_colour(rng: np.random.Generator, patch: Array) -> tuple[Array, Array]:
    """Colours trade channels, on the whole drawing or on an ellipse of it."""
    height, width = patch.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    on = np.ones((height, width), dtype=np.float32)
    if rng.random() < 0.5:
        cy, cx = rng.uniform(0.25, 0.75, 2) * (height, width)
        ry, rx = rng.uniform(0.2, 0.4, 2) * (height, width)
        on = ((((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2) < 1).astype(np.float32)
    alpha = patch[..., 3:]
    order = [(1, 2, 0), (2, 0, 1), (1, 0, 2), (2, 1, 0)][rng.integers(4)]
    other = patch[..., order] * 0.6 + 0.4 * alpha * rng.uniform(0, 255, 3).astype(np.float32)
    new = np.concatenate([other, alpha], axis=2)
    mixed = patch * (1 - on[..., None]) + new * on[..., None]
    differs = np.abs(mixed - patch)[..., :3].max(2) > 40
    return mixed.astype(np.float32), differs.astype(np.float32)


def _texture(patch: Array, other: Array) -> tuple[Array, Array]:
    """The outline of one drawing filled with the pattern of another's middle."""
    height, width = patch.shape[:2]
    h, w = other.shape[:2]
    middle = other[h // 6 : h - h // 6, w // 6 : w - w // 6]
    filled = F.interpolate(_as_tensor(np.ascontiguousarray(middle)), size=(height, width), mode="bilinear")
    colour = _as_patch(filled)
    mean = other[..., :3].sum((0, 1)) / max(1.0, float(other[..., 3].sum()))
    opaque = colour[..., :3] + (1 - colour[..., 3:]) * mean
    alpha = patch[..., 3:]
    return np.concatenate([opaque * alpha, alpha], axis=2).astype(np.float32), patch[..., 3]


def _dent(patch: Array, strength: float, generator: torch.Generator) -> tuple[Array, Array]:
    """The drawing torn by a rough displacement."""
    tensor = _as_tensor(patch)
    knots = torch.randn(1, 2, 7, 7, generator=generator) * (0.1 + 0.25 * strength)
    shift = F.interpolate(knots, size=patch.shape[:2], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    identity = torch.eye(2, 3)[None]
    grid = F.affine_grid(identity, list(tensor.shape), align_corners=False) + shift
    torn = _as_patch(F.grid_sample(tensor, grid, padding_mode="zeros", align_corners=False))
    return torn, np.maximum(torn[..., 3], 0)


def _rough(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Noise of standard deviation 1, for each row fine, coarse or in between."""
    fine = torch.randn(tuple(shape), generator=generator)
    coarse = F.interpolate(fine[..., ::2, ::2], size=shape[-2:], mode="bilinear", align_corners=False) * 1.5
    mix = torch.rand(shape[0], 1, 1, 1, generator=generator)
    return (fine * mix + coarse * (1 - mix)) / (mix.square() + (1 - mix).square()).sqrt()


def _severity(drawn: Drawn) -> list[float]:
    """How bad each of ``SEVERITIES`` is: the strength, less where a smaller part of all objects has the flaw."""
    worst, areas = dict.fromkeys(SEVERITIES, 0.0), drawn.masks.sum((1, 2))
    for kind, strength, area in zip(drawn.kinds, drawn.strengths, areas, strict=True):
        if kind > CODE["stray"]:
            name = KINDS[kind - 1].replace("texture", "colour")
            share = float(area / max(1.0, areas.sum()))
            graded = 0.8 if name == "colour" else strength
            worst[name] = min(1.0, max(worst[name], graded * (0.4 + 0.6 * share)))
    return [worst[name] for name in SEVERITIES]


def _kind_map(flawed: Tensor, kinds: Tensor) -> Tensor:
    """(b, MOST, 64, 64) where each object is wrong and (b, MOST) by what, to (b, 32, 32) codes."""
    small = F.avg_pool2d(flawed, 2)
    most, which = small.max(1)
    codes = kinds.gather(1, which.flatten(1)).view_as(which)
    return torch.where(most > 0.35, codes, 0).byte()


def _add(kinds: Tensor, where: Tensor, code: int) -> Tensor:
    """Mark cells of ``where`` (b, 1, 64, 64) that nothing has marked yet."""
    cells = F.avg_pool2d(where.float(), 2)[:, 0] > 0.5
    return torch.where(cells & (kinds == 0), torch.tensor(code, dtype=torch.uint8), kinds)


def _spots(masks: Tensor, drawn: Drawn) -> Tensor:
    """Index, centre in cells and weight of each object that shows. masks: (MOST, 64, 64)."""
    spots = torch.full((MOST, 4), -1.0)
    scale = masks.shape[-1] / GRID
    axis = (torch.arange(masks.shape[-1]) + 0.5) / scale
    for i, name in enumerate(drawn.names):
        area = float(masks[i].sum())
        share = min(1.0, area / max(1.0, drawn.extents[i]) / WHOLE)
        x, y = (masks[i].sum(0) * axis).sum() / max(area, 1e-6), (masks[i].sum(1) * axis).sum() / max(area, 1e-6)
        if area > 4:
            spots[i] = torch.tensor([NAME_INDEX[name], float(x), float(y), share])
    return spots


def quality(severity: Tensor) -> Tensor:
    """(b, 5) severities to what is left of a picture's quality (b,)."""
    return (1 - severity).prod(1)


def jitter(batch: Flawed, generator: torch.Generator) -> Flawed:
    """Mirror half of the pictures of a batch, so that a pool of them lasts longer."""
    flip = torch.rand(len(batch), generator=generator) < 0.5
    pick = flip.view(-1, 1, 1)

    def mirrored(values: Tensor) -> Tensor:
        return torch.where(pick.view(-1, *[1] * (values.ndim - 1)), values.flip(-1), values)

    spots = batch.spots.clone()
    spots[..., 1] = torch.where(flip[:, None], GRID - spots[..., 1], spots[..., 1])
    return Flawed(
        mirrored(batch.images), mirrored(batch.cover), spots, batch.named, mirrored(batch.kinds), batch.severity
    )


def brightened(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift brightness and contrast of (b, 3, H, W) a little."""
    shape = (len(images), 1, 1, 1)
    contrast, shift = uniform(shape, 0.85, 1.15, generator), uniform(shape, -0.06, 0.06, generator)
    return ((images - 0.5) * contrast + 0.5 + shift).clamp(0, 1)
