"""A FLUX of random weights and everything around it that a test of the loop needs, each part tiny."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from vipo.embedded import path as embedded_path
from vipo.engine import Engine
from vipo.generators.flux import LORA_TARGETS, FluxGenerator
from vipo.options import Objective, OptimizerOptions, Solver
from vipo.policy import Policy
from vipo.prompts.sampler import PromptSampler
from vipo.recipe import parse_recipe
from vipo.rewards.suite import RewardSuite
from vipo.runs.run import Run
from vipo.structuring import PerceptualStructuring
from vipo.structuring.sources import Perceptual
from vipo.training.credit import combined
from vipo.training.trainer import Trainer
from vipo.types import FeatureMap, Prompt, Rollout, Scores, TrainStep

HEIGHT, WIDTH = 24, 40  # not square; latents 6 x 10, FLUX tokens 3 x 5
GRID = (1, 6, 10)
PROMPTS = ("a cat", "a red car", "a heart above a star", "a panda on a white background")


def on_cpu() -> dict[str, str]:
    """The environment of processes that train together on a CPU, on a machine with a GPU too."""
    return {**os.environ, "ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": ""}


def save_pipeline(folder: Path, seed: int = 0) -> Path:
    """The classes of FLUX.1-dev with one double and one single block of width 32; random weights."""
    source = embedded_path("emoji-flux")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
            scaling_factor=0.5,
            shift_factor=0.1,
            mid_block_add_attention=False,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        with torch.no_grad():
            vae.decoder.conv_out.weight.mul_(20)  # random decoders are grey: spread the pictures over [0, 1]
        clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=655,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=16,
                projection_dim=16,
                bos_token_id=653,
                eos_token_id=654,
                pad_token_id=654,
            )
        )
        t5 = T5EncoderModel(T5Config(vocab_size=142, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=clip,
        tokenizer=AutoTokenizer.from_pretrained(source / "tokenizer"),
        text_encoder_2=t5,
        tokenizer_2=AutoTokenizer.from_pretrained(source / "tokenizer_2"),
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def generator(folder: Path, device: str = "cpu") -> FluxGenerator:
    return FluxGenerator.from_pretrained(folder, device=device, dtype=torch.float32, height=HEIGHT, width=WIDTH)


def lora(model: FluxGenerator, **options: Any) -> Policy:
    return Policy.lora(
        model.network, **{"rank": 4, "alpha": 4.0, "targets": LORA_TARGETS["blocks"], "seed": 0, **options}
    )


def nudged(policy: Policy, scale: float = 0.1, seed: int = 1) -> Policy:
    """The policy with some noise on its trained weights, as if it had been trained."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters.values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=rng))
    return policy


def redness(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:  # noqa: ARG001
    red, green, blue = media.mean((2, 3, 4)).unbind(1)
    return red - (green + blue) / 2


def brightness(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:  # noqa: ARG001
    return media.mean((1, 2, 3, 4))


def constant(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:  # noqa: ARG001
    return torch.full((len(media),), 0.3)


class Patches:
    """A backbone without weights: the colours of 4 x 4 patches."""

    def __call__(self, images: Tensor) -> FeatureMap:
        return FeatureMap(F.avg_pool2d(images, 4), 4)


MAPS = Perceptual(PerceptualStructuring(Patches()))


class Shuffled:
    """A map source whose maps have their positions in another order."""

    def __init__(self, source: Callable[..., Tensor]) -> None:
        self.source = source

    def __call__(self, rollout: Rollout, advantage: Tensor, scores: Scores) -> Tensor:
        maps = self.source(rollout, advantage, scores)
        order = torch.randperm(maps[0].numel(), generator=torch.Generator().manual_seed(5))
        return maps.flatten(1)[:, order].reshape(maps.shape)


def scorer(*functions: Callable[..., Tensor], weights: Mapping[str, float] | None = None) -> RewardSuite:
    named = {function.__name__: function for function in functions}
    return RewardSuite(named, weights or dict.fromkeys(named, 1.0))


def trainer(folder: Path, **changes: Any) -> Trainer:
    """A trainer on the tiny model; ``changes`` go to whichever part has that name."""
    objective = {"clip_range": 0.2}
    optimizer = {"learning_rate": 1e-2, "weight_decay": 0.0}
    solver = {"steps": 4, "shift": 3.0, "eta": 0.7}
    own = {"group_size": 4, "seed": 0, "scorer": scorer(redness), "map_source": MAPS, "credit": "uniform"}
    per_iteration, build_policy = changes.pop("prompts_per_iteration", 2), changes.pop("policy", lora)
    if "optimizer_kind" in changes:  # the solver has a kind too
        optimizer["kind"] = changes.pop("optimizer_kind")
    for name, value in changes.items():
        home = next((part for part, keys in _HOMES.items() if name in keys), "own")
        {"objective": objective, "optimizer": optimizer, "solver": solver, "own": own}[home][name] = value
    model = generator(folder, own.pop("device", "cpu"))
    engine = own.pop("engine", None) or Engine(
        accelerator=Accelerator(mixed_precision=own.pop("precision", "no"), cpu=True)
    )
    return Trainer(
        engine=engine,
        generator=model,
        policy=build_policy(model),
        prompts=PromptSampler([Prompt(text) for text in PROMPTS], per_iteration=per_iteration, seed=0),
        solver=Solver(**solver),
        objective=Objective(**objective),
        optimizer=OptimizerOptions(**optimizer),
        **own,
    )


def same_calls(trainer: Trainer) -> Trainer:
    """The trainer with every network called on one group at a time, in whichever process the group is."""
    trainer.rollout_batch_size = trainer.group_size
    trainer.generator.options = replace(trainer.generator.options, decode_batch_size=trainer.group_size)
    return trainer


def advantage_of(trainer: Trainer, step: TrainStep) -> Tensor:
    """The advantage (N,) that an iteration trained on, in this process."""
    return combined(trainer.objective, step.scores, trainer.group_size)


_HOMES = {
    "objective": set(Objective.__dataclass_fields__),
    "optimizer": set(OptimizerOptions.__dataclass_fields__) - {"kind"},
    "solver": set(Solver.__dataclass_fields__),
}


def recipe(folder: Path, prompts: Path, **changes: Any) -> dict[str, Any]:
    """A recipe that trains the tiny model; ``changes`` by dotted key with ``__`` for the dot."""
    prompts.write_text("\n".join(PROMPTS) + "\n")
    raw: dict[str, Any] = {
        "name": "tiny",
        "credit": "sample",
        "generator": {"path": str(folder), "height": HEIGHT, "width": WIDTH},
        "prompts": {"file": str(prompts), "per_iteration": 2, "group_size": 3},
        "solver": {"steps": 3, "eta": 0.7},
        "rewards": {"redness": 1.0},
        "objective": {"clip_range": 0.2},
        "optimizer": {"learning_rate": 1e-2},
        "policy": {"rank": 2},
        "training": {"iterations": 4, "precision": "no", "checkpoint_every": 2},
        "evaluation": {"prompts": str(prompts), "samples_per_prompt": 1, "limit": 2, "every": 2},
    }
    for key, value in changes.items():
        *parents, leaf = key.split("__")
        node = raw
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return raw


def write_recipe(path: Path, raw: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(raw), sort_keys=False))
    return path


def command_line(*arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    """Start ``vipo`` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "vipo", *map(str, arguments)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def run_all(raw: Mapping[str, Any], output: Path, **options: Any) -> Run:
    """The whole run of a recipe, gone on with if ``options`` say so."""
    run = Run(parse_recipe(raw), output, **options)
    for _ in run:
        pass
    return run


@torch.no_grad()
def velocity(model: FluxGenerator) -> Tensor:
    """What the tiny model says of two fixed latents."""
    rng = torch.Generator().manual_seed(3)
    latents = torch.randn(2, *model.latent_shape(), generator=rng)
    return model.velocity(latents, torch.tensor([0.9, 0.3]), model.encode(["a cat", "a dog"]))


def benchmark(name: str) -> Any:
    """A script of ``benchmarks/`` as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
