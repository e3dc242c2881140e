"""Write the shipped prompt lists of pictures and of clips: train and eval captions that share no line.

The split serves the reinforcement learning that starts from emoji-flux. The generator itself was pre-trained on random
scenes over the whole vocabulary, so an eval prompt is new to a post-training run, not to the base model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from common import SHIPPED
from vipo.embedded import RELATIONS, VOCABULARY, clips, make_caption


def single_captions(rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """All object x ground captions, split to (train, eval): eval has every object once, and four twice."""
    grounds = VOCABULARY.ground_names
    twice = set(rng.choice(VOCABULARY.names, size=4, replace=False).tolist())
    train, held_out = [], []
    for name in VOCABULARY.names:
        order = [grounds[i] for i in rng.permutation(len(grounds))]
        cut = 2 if name in twice else 1
        held_out += [make_caption([name], None, g) for g in order[:cut]]
        train += [make_caption([name], None, g) for g in order[cut:]]
    return train, held_out


def random_captions(rng: np.random.Generator, objects: int, count: int) -> list[str]:
    """Distinct random captions of two or three objects."""
    found: dict[str, None] = {}
    while len(found) < count:
        names = rng.choice(VOCABULARY.names, size=objects, replace=False).tolist()
        relation = str(rng.choice(list(RELATIONS))) if objects == 2 else None
        found[make_caption(names, relation, str(rng.choice(VOCABULARY.ground_names)))] = None
    return list(found)


def clip_captions(rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Every caption of a clip; three of each thing, with three motions, are held out."""
    train, held_out = [], []
    for name in clips.OBJECTS:
        apart = set(zip(rng.choice(list(clips.MOTIONS), 3, replace=False), rng.choice(clips.GROUNDS, 3), strict=True))
        for motion in clips.MOTIONS:
            for ground in clips.GROUNDS:
                caption = clips.make_clip_caption(name, motion, ground)
                (held_out if (motion, ground) in apart else train).append(caption)
    return train, held_out


def main() -> None:
    """Command line; writes prompts_train.txt, prompts_eval.txt and their clips_ twins beside the vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=SHIPPED.parent)
    args = parser.parse_args()
    rng = np.random.default_rng(7)
    train, held_out = single_captions(rng)
    pairs = random_captions(rng, 2, 222)
    train += pairs[32:] + random_captions(rng, 3, 18)
    held_out += pairs[:32]
    if set(train) & set(held_out):
        raise RuntimeError("the two lists share a prompt")
    moving, moving_held_out = clip_captions(np.random.default_rng(8))
    lists = {"prompts_train": train, "prompts_eval": held_out, "clips_train": moving, "clips_eval": moving_held_out}
    for name, lines in lists.items():
        ordered = [lines[i] for i in rng.permutation(len(lines))]
        (args.out / f"{name}.txt").write_text("\n".join(ordered) + "\n", encoding="utf-8")
        print(f"{name}: {len(ordered)} prompts")


if __name__ == "__main__":
    main()
