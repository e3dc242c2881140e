"""What is measured: shipped recipes, with the changes that make them an iteration of seconds on one GPU.

``full`` are networks of published size, ``toy`` the same code on the networks that ship, for a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vipo.recipe import load_recipe
from vipo.schema import Recipe

CREDITS = ("sample", "advantage_map")  # scalar, ViPO
BACKBONE = "dinov2-large"  # a part of published size; the plan knows it by the last part of a path

# A cheap reward on tensors, prompts that ship (nobody reads them), one group.
COMMON = (
    "prompts.file=embedded:prompts_train",
    "prompts.per_iteration=1",
    "evaluation.prompts=embedded:prompts_eval",
    "rewards={redness: 1.0}",
    "judges={}",
)


@dataclass(frozen=True)
class Case:
    """A recipe and what is changed in it.

    Args:
        backbone: the map's backbone is DINOv2-large; else the recipe's own.
    """

    title: str
    recipe: str
    changes: tuple[str, ...]
    backbone: bool

    def load(self, credit: str, backbones: Path, changes: Sequence[str] = ()) -> Recipe:
        """The recipe with ``credit``; its backbone is in the folder ``backbones``."""
        seen = (
            f"structuring.backbone_options={{pretrained: '{backbones / BACKBONE}', resolution: null, dtype: bfloat16}}"
        )
        own = [*COMMON, *self.changes, *([seen] if self.backbone else []), *changes]
        return load_recipe(self.recipe, [f"credit={credit}", *own])


CASES: dict[str, dict[str, Case]] = {
    "full": {
        "flux": Case(
            "FLUX.1-dev, LoRA 32 on attention, 512 px, 8 steps, G = 12, 4 of 7 trained, batches of 4, checkpointing",
            "flux1-dev-lora-24gb",
            ("generator.quantization=none", "training.rollout_batch_size=4", "training.replay_batch_size=4"),
            True,
        ),
        "wan": Case(
            "Wan2.1-14B, LoRA 32 on attention, 240 x 416 x 53, 4 steps, G = 2, guidance in two passes, checkpointing",
            "wan2.1-14b-vipo-videoalign",
            (
                "policy={kind: lora, rank: 32, targets: attention}",
                "optimizer.learning_rate=3e-4",
                "generator.options.guidance_in_one_pass=false",
                "prompts.group_size=2",
                "solver.steps=4",
                "training.sharding=none",
                "training.rollout_batch_size=1",
                "training.replay_batch_size=1",
            ),
            True,
        ),
    },
    "toy": {
        "flux": Case(
            "emoji-flux, LoRA 8, 64 px, 3 steps, G = 4",
            "quickstart",
            (
                "prompts.group_size=4",
                "solver={steps: 3, eta: 0.7}",
                "structuring.sources=[perceptual]",
                "policy={targets: attention}",
                "training.rollout_batch_size=2",
                "training.replay_batch_size=2",
                "training.gradient_checkpointing=true",
            ),
            False,
        ),
        "wan": Case(
            "emoji-wan, LoRA 8, 64 x 64 x 17, 3 steps, G = 2, guidance in two passes",
            "quickstart-video",
            (
                "generator.options={guidance_scale: 2.0, max_sequence_length: 16}",
                "prompts.group_size=2",
                "solver={steps: 3, eta: 0.7}",
                "policy={targets: attention}",
                "training.precision=bf16",
                "training.rollout_batch_size=1",
                "training.replay_batch_size=1",
            ),
            False,
        ),
    },
}
COMPILED = "flux"  # the case that is run once more with training.compile, where the recipe knows that key
