"""Rewrite a published pickle checkpoint as safetensors, once: it then loads without pickle, faster, and can be pinned.

Tensors keep their names and types, so the converted file is read exactly as the published one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from vipo.errors import UserError
from vipo.files import written_whole
from vipo.rewards.pretrained import check_fit, read_tensors


def _check_hps(file: Path, tensors: Mapping[str, Tensor]) -> None:
    from vipo.rewards.clip_family import HPS, hps_parts

    check_fit(HPS, file, *hps_parts(file, tensors, (1, 1)))


def _check_image_reward(file: Path, tensors: Mapping[str, Tensor]) -> None:
    from vipo.rewards.image_reward import check_checkpoint

    check_checkpoint(file, tensors)


def _check_aesthetic(file: Path, tensors: Mapping[str, Tensor]) -> None:
    from vipo.rewards.linear_head import affine_head

    affine_head("aesthetic", file, tensors)


CONVERTIBLE: dict[str, Callable[[Path, Mapping[str, Tensor]], None]] = {
    "hpsv2.1": _check_hps,
    "imagereward": _check_image_reward,
    "aesthetic": _check_aesthetic,
}
"""Reward -> what refuses a checkpoint that is not its own, before anything is written."""


def convert_reward(name: str, source: str | Path, target: str | Path) -> Path:
    """Write the tensors of ``source`` to ``target`` and return its path.

    Args:
        name: a reward of ``CONVERTIBLE``.
        source: the published file, a torch pickle of tensors; code in it is never run.
        target: the file to write, ``.safetensors``; it is there whole or not at all.

    Raises:
        UserError: no such reward, no such file, a target of another kind, or a checkpoint that is not that reward's.
    """
    from safetensors.torch import save_file

    source, target = Path(source).expanduser(), Path(target).expanduser()
    if name not in CONVERTIBLE:
        raise UserError(f"reward {name!r} has no checkpoint to convert; choose from {', '.join(CONVERTIBLE)}")
    if not source.is_file():
        raise UserError(
            f"there is no file {source} to convert; give the checkpoint that the reward's authors published"
        )
    if target.suffix != ".safetensors":
        raise UserError(f"{target} must end in .safetensors, which is what will be written")
    tensors = read_tensors(name, source)
    CONVERTIBLE[name](source, tensors)
    with written_whole(target) as aside:
        # Cloned: safetensors refuses tensors that share memory, as tied or sliced ones do.
        save_file({key: value.clone().contiguous() for key, value in tensors.items()}, aside, {"format": "pt"})
    return target
