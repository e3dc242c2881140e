"""Does `vipo plan` predict the memory that training takes? Predicted and measured peaks, and their ratio, case by case.

    python benchmarks/plan_memory.py [--family flux wan]

Each case trains a model of random weights (20 to 60 MB) for two iterations on the CPU, in a process of its own.
Measured is the second iteration: the bytes of all live tensors before it, plus the most that the CPU allocator holds
beyond that (torch.profiler, every allocation and free). Predicted is the plan's worst phase, with autocast as on the
CPU.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vipo.assemble import build
from vipo.embedded import path as embedded_path
from vipo.engine import Engine
from vipo.plan import Ledger, Machine, plan
from vipo.recipe import parse_recipe
from vipo.schema import Recipe

FAMILIES = ("flux", "wan")


def flux(folder: Path) -> dict[str, Any]:
    """FLUX.1's classes at width 256."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    source = embedded_path("emoji-flux")
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL.from_config(AutoencoderKL.load_config(source / "vae")),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=655, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
            )
        ),
        tokenizer=AutoTokenizer.from_pretrained(source / "tokenizer"),
        text_encoder_2=T5EncoderModel(T5Config(vocab_size=142, d_model=64, d_kv=8, d_ff=32, num_layers=1, num_heads=2)),
        tokenizer_2=AutoTokenizer.from_pretrained(source / "tokenizer_2"),
        transformer=FluxTransformer2DModel(
            in_channels=4 * int(AutoencoderKL.load_config(source / "vae")["latent_channels"]),
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=64,
            num_attention_heads=4,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            guidance_embeds=True,
            axes_dims_rope=(8, 28, 28),
        ),
    ).save_pretrained(folder)
    return {"name": "flux", "height": 128, "width": 128, "options": {"max_sequence_length": 32}}


def wan(folder: Path) -> dict[str, Any]:
    """Wan2.1's classes at width 256."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

    WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(embedded_path("emoji-flux") / "tokenizer_2"),
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=142, d_model=64, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ),
        vae=AutoencoderKLWan(base_dim=8, z_dim=16),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=WanTransformer3DModel(
            num_attention_heads=4, attention_head_dim=64, text_dim=64, freq_dim=64, ffn_dim=1024, num_layers=6
        ),
    ).save_pretrained(folder)
    return {
        "name": "wan",
        "height": 128,
        "width": 128,
        "frames": 9,
        "options": {"max_sequence_length": 32, "guidance_scale": 3.0},
    }


def recipe_of(folder: Path, generator: dict[str, Any], **changes: Any) -> Recipe:
    """A recipe that trains the model in ``folder``; ``changes`` to ``policy`` and ``training``."""
    prompts = folder / "prompts.txt"
    prompts.write_text("a cat\na heart\n")
    raw: dict[str, Any] = {
        "name": "memory",
        "credit": "sample",
        "generator": {"path": str(folder), **generator},
        "prompts": {"file": str(prompts), "per_iteration": 1, "group_size": 4},
        "solver": {"steps": 3, "eta": 0.3},
        "rewards": {"redness": 1.0},
        "objective": {"clip_range": 0.1},
        "optimizer": {"learning_rate": 1e-5},
        "policy": changes.get("policy", {}),
        "training": {"iterations": 2, **changes.get("training", {})},
        "evaluation": {"prompts": str(prompts)},
    }
    return parse_recipe(raw)


def predicted(recipe: Recipe) -> int:
    return plan(recipe, Machine(), Ledger(like_cuda=False)).peak


def measured(recipe: Recipe) -> int:
    """Bytes at worst in the second iteration."""
    before = set(_alive())  # what is not this model's
    engine = Engine(accelerator=Accelerator(mixed_precision=recipe.training.precision, cpu=True))
    trainer = build(recipe, engine=engine).trainer
    trainer.step()
    alive = {place: size for place, size in _alive().items() if place not in before}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return sum(alive.values()) + max(held)


def _alive() -> dict[int, int]:
    """Every storage that some tensor holds: its address and its bytes."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    tensors = [tensor for tensor in tensors if not is_traceable_wrapper_subclass(tensor)]  # what they wrap is there too
    # A library's sparse ones and a plan's, which have only a shape, have no storage.
    tensors = [t for t in tensors if t.layout == torch.strided and not isinstance(t, FakeTensor)]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def compare(family: str, kind: str, checkpointing: bool, precision: str) -> str:
    with tempfile.TemporaryDirectory() as place:
        torch.manual_seed(0)
        generator = {"flux": flux, "wan": wan}[family](Path(place))
        training = {"gradient_checkpointing": checkpointing, "precision": precision}
        recipe = recipe_of(Path(place), generator, policy={"kind": kind}, training=training)
        guess, truth = predicted(recipe), measured(recipe)
    row = f"| {family} | {kind} | {'on' if checkpointing else 'off'} | {precision} |"
    return f"{row} {guess / 1e6:.1f} | {truth / 1e6:.1f} | {guess / truth:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--case", nargs=4, help="one case, in this process: family, policy, checkpointing, precision")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.case:
        family, kind, checkpointing, precision = args.case
        print(compare(family, kind, checkpointing == "on", precision))
        return
    print("| family | policy | checkpointing | precision | predicted MB | measured MB | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for case in itertools.product(args.family, ("lora", "full"), ("off", "on"), ("no", "bf16")):
        command = [sys.executable, "-W", "ignore", __file__, "--case", *case]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        print(result.stdout.strip() or f"{case} failed: {result.stderr.strip().splitlines()[-1:]}", flush=True)


if __name__ == "__main__":
    main()
