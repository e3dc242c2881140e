"""The pictures of docs/how-it-works.md, from the first iteration of the quickstart: python docs/site/pictures.py"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import vipo
from vipo.backbones import build as build_backbone
from vipo.media import pictures as paper
from vipo.media.map_sheets import heat, lit
from vipo.structuring import deviation_map, oriented, principal_components
from vipo.types import TrainStep

IMAGES = Path(__file__).parents[1] / "images"
SIDE = 128  # pixels of a tile
SHOWN = 3  # groups in the first picture; best and worst samples of one in the second
PRAISE, BLAME = (31, 95, 168), (190, 85, 10)


def first_iteration() -> tuple[vipo.recipe.Recipe, TrainStep]:
    recipe = vipo.load_recipe("quickstart", ["training.iterations=1"])
    (step,) = vipo.train(recipe)
    return recipe, step


def tile(picture: Tensor) -> Image.Image:
    """A picture (3, Y, X) in [0, 1]."""
    array = paper.to_uint8(picture[None, :, None])[0, 0]
    return Image.fromarray(array).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def plane(values: Tensor, top: float | Tensor | None = None) -> Image.Image:
    """A map (H, W), dark at 0 and light at ``top``, or at its own largest value."""
    shares = (values / (values.max() if top is None else top)).clamp(0, 1)
    return Image.fromarray(heat(shares.numpy())).resize((SIDE, SIDE), Image.Resampling.NEAREST)


def signed(values: Tensor, top: Tensor) -> Image.Image:
    """An advantage (H, W): white is 0, blue is made likelier, orange less likely."""
    shares = (values / top).clamp(-1, 1).numpy()[..., None]
    ends = np.where(shares > 0, PRAISE, BLAME)
    colours = 255 + np.abs(shares) * (ends - 255.0)
    return Image.fromarray(colours.round().astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.NEAREST)


def seen(recipe: vipo.recipe.Recipe) -> vipo.PerceptualStructuring:
    """The paper's map as the recipe has it."""
    how = recipe.structuring
    return vipo.PerceptualStructuring(build_backbone(how.backbone, **how.backbone_options), components=how.components)


def from_picture_to_map(recipe: vipo.recipe.Recipe, step: TrainStep) -> Image.Image:
    """One row for the first picture of each group: the picture, its components, the map, what the map lights."""
    source, media = seen(recipe), step.rollout.media[:: recipe.prompts.group_size][:SHOWN]
    found = principal_components(source.backbone(media[:, :, 0]).features, recipe.structuring.components)
    components, maps = oriented(found, source.orientation), source(media, step.rollout.latent_grid)[:, 0]
    rows = []
    for picture, parts, weights in zip(media[:, :, 0], components.float(), maps, strict=True):
        image = tile(picture)
        rows.append([image, *(plane(part, 1.0) for part in parts), plane(weights), lit(image, weights.numpy())])
    shares = [", ".join(f"{100 * share:.0f} %" for share in explained) for explained in found.explained]
    prompts = [prompt.text for prompt in step.rollout.prompts[:: recipe.prompts.group_size]][:SHOWN]
    labels = [f"{prompt}\nvariance: {share}" for prompt, share in zip(prompts, shares, strict=True)]
    parts = [f"component {number + 1}" for number in range(recipe.structuring.components)]
    return paper.labelled_grid(rows, labels, ["picture", *parts, "map M(p)", "what it lights"])


def from_score_to_advantage(recipe: vipo.recipe.Recipe, step: TrainStep) -> Image.Image:
    """The best and the worst of one group: picture, both maps, their product, and advantage times map."""
    size = recipe.prompts.group_size
    group = int(step.scores.total.unflatten(0, (-1, size)).std(1).argmax())
    inside = slice(group * size, (group + 1) * size)
    scores = step.scores.total[inside]
    advantage = vipo.objective.group_advantage(scores, size)
    order = advantage.argsort(descending=True)
    chosen = torch.cat([order[:SHOWN], order[-SHOWN:]])
    media, product = step.rollout.media[inside], step.maps[inside][:, 0]
    paper_map = seen(recipe)(media, step.rollout.latent_grid)[:, 0]
    differs = deviation_map(step.rollout.latents[inside], size)[:, 0]
    spatial = vipo.objective.spatial_advantage(advantage, step.maps[inside])[:, 0]
    rows = [
        [tile(media[k, :, 0]) for k in chosen],
        _planes(paper_map[chosen]),
        _planes(differs[chosen]),
        _planes(product[chosen]),
        [signed(spatial[k], spatial[chosen].abs().max()) for k in chosen],
    ]
    labels = [
        f"{step.rollout.prompts[inside.start].text}\nbest {SHOWN} and worst {SHOWN} of {size}",
        "perceptual\nwhat a backbone sees (the paper)",
        "deviation\nwhere a sample differs from its group",
        "M(p)\ntheir product, mean 1",
        "A M(p)\nblue: make likelier; orange: less likely",
    ]
    headings = [f"score {scores[k]:.2f}\nA = {advantage[k]:+.2f}" for k in chosen]
    return paper.labelled_grid(rows, labels, headings)


def _planes(maps: Tensor) -> list[Image.Image]:
    return [plane(weights, maps.max()) for weights in maps]


def main() -> None:
    recipe, step = first_iteration()
    made: Sequence[tuple[str, Image.Image]] = (
        ("how-map.png", from_picture_to_map(recipe, step)),
        ("how-advantage.png", from_score_to_advantage(recipe, step)),
    )
    for name, picture in made:
        paper.save_png(IMAGES / name, picture)
        print(IMAGES / name)


if __name__ == "__main__":
    main()
