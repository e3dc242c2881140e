"""What a run ran on: versions and hardware, for whoever wants to run it again."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("vipo", "torch", "diffusers", "transformers", "peft", "accelerate", "numpy")


def environment(processes: int = 1) -> dict[str, Any]:
    """Versions and hardware, for whoever wants to run it again."""
    versions: dict[str, str] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    versions["torch"] = torch.__version__  # with the local part, such as +cu130, which the package's metadata may lack
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": versions,
        "accelerators": devices,
        "processes": processes,
        "threads": torch.get_num_threads(),
    }
