"""What the training scripts of the embedded generator share: paths, schedules, averaging, safe checkpoints."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scenes import Scene, SceneComposer
from vipo.files import written_whole

DEFAULT_ART = Path("~/.cache/vipo/art")
DEFAULT_WORK = Path("~/.cache/vipo/emoji-flux")
WAN_WORK = Path("~/.cache/vipo/emoji-wan")
SHIPPED = Path(__file__).resolve().parents[2] / "src" / "vipo" / "embedded" / "emoji-flux"


def to_pixels(scenes: Iterable[Scene]) -> Tensor:
    """Stack scene pictures into the pipelines' pixel range: float32 (b, 3, H, W) in [-1, 1]."""
    stacked = np.stack([scene.image for scene in scenes])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def draw_scenes(composer: SceneComposer, rng: np.random.Generator, count: int, hard_share: float = 0.0) -> list[Scene]:
    """Draw a list of scenes, a share of them hard."""
    return [composer.sample(rng, hard=bool(rng.random() < hard_share)) for _ in range(count)]


def trapezoid(step: float, total: float, warmup: float, decay_share: float, floor: float = 0.02) -> float:
    """Learning-rate factor: linear warmup, plateau, then a cosine fall over the last ``decay_share`` of training."""
    if step < warmup:
        return (step + 1) / warmup
    start = total * (1 - decay_share)
    if step <= start:
        return 1.0
    done = min(1.0, (step - start) / max(1e-9, total - start))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


class Average:
    """Exponential moving average of a module's parameters, with a decay that warms up with the step count."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone().float() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move the average towards the module's parameters."""
        decay = min(self.decay, (1 + step) / (10 + step))
        live = dict(module.named_parameters())
        torch._foreach_lerp_(list(self.values.values()), [live[n].detach() for n in self.values], 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the averaged values into a module of the same shape."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.values[name])


def optimizer_tensors(optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Flatten optimizer states to named tensors: ``optimizer<k>.<parameter index>.<state key>``."""
    flat: dict[str, Tensor] = {}
    for k, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            flat |= {f"optimizer{k}.{index}.{key}": torch.as_tensor(value).clone() for key, value in state.items()}
    return flat


def restore_optimizers(optimizers: Iterable[torch.optim.Optimizer], flat: Mapping[str, Tensor]) -> None:
    """Load what ``optimizer_tensors`` flattened."""
    for k, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in flat.items():
            if name.startswith(f"optimizer{k}."):
                _, index, key = name.split(".", 2)
                state.setdefault(int(index), {})[key] = value
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def save_checkpoint(file: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, float]) -> None:
    """Write tensors and a few numbers to one safetensors file, atomically."""
    packed = {name: value.detach().contiguous() for name, value in tensors.items()}
    with written_whole(file) as aside:
        save_file(packed, aside, metadata={"notes": json.dumps(dict(notes))})


def load_checkpoint(file: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Read a file of ``save_checkpoint``: the tensors and the numbers."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as handle:
        notes = json.loads((handle.metadata() or {}).get("notes", "{}"))
    return load_file(file), notes


class Log:
    """Append lines to a log file and the terminal, each with the seconds since the start."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.start = file, time.time()

    def __call__(self, text: str) -> None:
        line = f"[{time.time() - self.start:7.1f}s] {text}"
        print(line, flush=True)
        with self.file.open("a", encoding="utf-8") as handle:
            handle.write(line + "\n")
