"""Which orientation rule finds the subject? Allocation maps against exact masks, and a sheet of them to look at.

    python experiments/orientation/measure.py --art ART --out OUT

writes OUT/orientation.json (area under the ROC curve of each rule's map against the mask on 16 x 16 cells, and the
share of pictures where it is below one half: "inverted") and OUT/orientation.png. ART is what
experiments/embedded/fetch_art.py filled. The photographs come with scikit-image and matplotlib.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from photos import Labelled, photographs, portraits
from vipo.backbones.efficientnet_lite import EfficientNetLite
from vipo.options import Orientation
from vipo.structuring import allocation_map, oriented, principal_components

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "embedded"))
from scenes import SceneComposer

RULES = get_args(Orientation)
CELLS = (16, 16)
SETTINGS = [("hard", 224, 8), ("hard", 224, 16), ("hard", 224, 32), ("hard", 128, 16), ("photo-ground", 224, 16)]
SETTINGS += [
    ("small", 96, 8),
    ("small", 128, 8),
    ("small", 128, 16),
    ("small", 160, 16),
    ("portraits", 224, 8),
    ("portraits", 224, 16),
]
SETTINGS += [("portraits", 128, 16), ("photographs", 224, 16)]
"""(pictures, pixels at the network's input, stride). ``small`` are pictures of 64 px, magnified."""
ABLATIONS: list[dict[str, Any]] = [{"components": k} for k in (1, 2, 3, 5)]
ABLATIONS += [{"aggregation": "average"}, {"smoothing_sigma": 0.0}, {"smoothing_sigma": 0.5}]


def grounds() -> list[np.ndarray]:
    """Busy photographs without a subject."""
    from skimage import data

    found = [data.brick(), data.grass(), data.gravel(), data.hubble_deep_field(), data.immunohistochemistry()]
    return [picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=2) for picture in found]


def scenes(art: Path, rng: np.random.Generator, count: int, size: int, busy: list[np.ndarray]) -> Iterator[Labelled]:
    """Hard scenes whose objects cover 4-60 % of the picture, on the composer's grounds or on ``busy`` ones."""
    composer, made = SceneComposer(art, size=size), 0
    while made < count:
        scene = composer.sample(rng, hard=True)
        mask = scene.masks.sum(0).clip(0, 1)
        if not 0.04 <= mask.mean() <= 0.6:
            continue
        made += 1
        image = scene.image
        if busy:
            ground = _cut(rng, busy[rng.integers(len(busy))], size)
            image = (image * mask[..., None] + ground * (1 - mask[..., None])).astype(np.uint8)
        yield Labelled(image, mask)


def _cut(rng: np.random.Generator, picture: np.ndarray, size: int) -> np.ndarray:
    side = int(rng.uniform(0.5, 1.0) * min(picture.shape[:2]))
    y, x = (int(rng.integers(0, extent - side + 1)) for extent in picture.shape[:2])
    return np.asarray(Image.fromarray(picture[y : y + side, x : x + side]).resize((size, size)), dtype=np.float32)


def resized(picture: np.ndarray, size: int) -> Tensor:
    pixels = torch.tensor(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].float() / 255
    return F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)


def cells_of(mask: np.ndarray) -> Tensor:
    """Which of the 16 x 16 cells are mostly subject."""
    return F.adaptive_avg_pool2d(torch.tensor(np.ascontiguousarray(mask))[None, None], CELLS)[0, 0] > 0.5


def area_under_curve(score: Tensor, subject: Tensor) -> float:
    """The share of (subject, ground) pairs of cells that the map ranks rightly."""
    inside, outside = score[subject][:, None], score[~subject]
    return float((inside > outside).double().mean() + 0.5 * (inside == outside).double().mean())


def judged(features: Tensor, subjects: list[Tensor], **options: Any) -> dict[str, float]:
    maps = allocation_map(features, CELLS, **options)
    pairs = [(m, s) for m, s in zip(maps, subjects, strict=True) if 0 < s.sum() < s.numel()]
    areas = np.array([area_under_curve(*pair) for pair in pairs])
    shares = [float(m[s].sum() / m.sum() / s.double().mean()) for m, s in pairs]
    return {
        "auc": float(areas.mean()),
        "inverted_percent": 100 * float((areas < 0.5).mean()),
        "worst": float(areas.min()),
        "density_on_subject": float(np.mean(shares)),
        "pictures": len(pairs),
    }


def see(labelled: list[Labelled], size: int, stride: int) -> Tensor:
    backbone = EfficientNetLite(stride=stride, resolution=size)
    return torch.cat([backbone(resized(item.image, size)).features for item in labelled])


def measure(pictures: dict[str, list[Labelled]]) -> dict[str, Any]:
    by_setting: dict[str, Any] = {}
    for name, size, stride in SETTINGS:
        features, subjects = see(pictures[name], size, stride), [cells_of(item.mask) for item in pictures[name]]
        row = {rule: judged(features, subjects, orientation=rule) for rule in RULES}
        by_setting[f"{name}, {size} px, stride {stride}"] = row
        print(
            f"{name:>12} {size} /{stride:<3}",
            *(f"{r}={v['auc']:.3f} ({v['inverted_percent']:.1f})" for r, v in row.items()),
            flush=True,
        )
        if (size, stride) == (224, 16) and name == "hard":
            ablations = {json.dumps(option): judged(features, subjects, **option) for option in ABLATIONS}
    return {"rules": by_setting, "ablations of the default, hard, 224 px, stride 16": ablations}


def sheet(labelled: list[Labelled], size: int, stride: int) -> Image.Image:
    """A row per picture: the picture, its mask, its components as RGB, the map of each rule (minmax)."""
    features = see(labelled, size, stride)
    colours = oriented(principal_components(features, 3)).float()
    columns = [torch.cat([resized(item.image, 112) for item in labelled])]
    columns += [torch.stack([cells_of(item.mask).float().expand(3, *CELLS) for item in labelled]), colours]
    columns += [allocation_map(features, CELLS, orientation=r, normalization="minmax")[:, None] for r in RULES]
    tiles = [F.interpolate(c.expand(-1, 3, -1, -1), size=(112, 112)) for c in columns]
    pixels = torch.cat([torch.cat(list(column), dim=1) for column in tiles], dim=2)
    return Image.fromarray((pixels.permute(1, 2, 0) * 255).round().byte().numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--art", type=Path, default=Path("~/.cache/vipo/art"))
    parser.add_argument("--out", type=Path, default=Path("orientation"))
    parser.add_argument("--scenes", type=int, default=320, help="hard scenes; the other kinds are a third of it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng, third = np.random.default_rng(args.seed), max(1, args.scenes // 3)
    compose: Callable[..., list[Labelled]] = lambda *rest: list(scenes(args.art, rng, *rest))  # noqa: E731
    pictures = {"hard": compose(args.scenes, 224, []), "photo-ground": compose(third, 224, grounds())}
    pictures |= {"small": compose(third, 64, []), "portraits": portraits(rng, max(1, args.scenes // 16))}
    pictures["photographs"] = list(photographs().values())
    args.out.mkdir(parents=True, exist_ok=True)
    shown = pictures["hard"][:4] + pictures["photo-ground"][:2] + pictures["portraits"][:: args.scenes // 16]
    sheet([*shown, *pictures["photographs"]], 224, 16).save(args.out / "orientation.png")
    found = {"seed": args.seed, "columns": ["picture", "mask", "components", *RULES], **measure(pictures)}
    (args.out / "orientation.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
