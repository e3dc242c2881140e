"""Load a reward's frozen network: from transformers' format, or from the one file that its authors published.

A published file is a torch pickle (read with ``weights_only``, so nothing in it runs) or, converted once with
:mod:`vipo.rewards.convert`, safetensors with the same tensor names. Either must fill the network exactly: a tensor too
few, too many or of another shape is an error that names it.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vipo.errors import UserError
from vipo.files import is_path
from vipo.files import sha256 as file_sha256
from vipo.offline import hub_is_silent
from vipo.pretrained import cause, dtype_named, not_found, quiet
from vipo.vision.frozen import freeze, load_frozen

VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")
NAMED = 3
"""How many tensors a message names of each kind of difference."""


def load_model(
    reward: str,
    pretrained: str | Path,
    classes: Mapping[str, str],
    *,
    dtype: str = "float32",
    sha256: str | None = None,
) -> Any:
    """The network in a hub id or a folder in transformers' format, frozen.

    Args:
        reward: the name the user knows, for messages.
        pretrained: hub id or local folder with config.json and safetensors weights.
        classes: model_type in config.json -> name of the transformers class that reads it.
        dtype: "float32", "bfloat16" or "float16".
        sha256: of model.safetensors, in hexadecimal; None does not check.

    Raises:
        UserError: nothing there, another kind of model, weights that do not fill it, or another file than the pinned.
    """
    if sha256 is not None:
        check_sha256(reward, checkpoint_file(reward, pretrained, ("model.safetensors",)), sha256)
    return load_frozen(f"reward {reward!r}", pretrained, classes, dtype=dtype)


def checkpoint_file(reward: str, pretrained: str | Path, names: Sequence[str]) -> Path:
    """The weights file meant by ``pretrained``: the file itself, or the first of ``names`` in a folder or on the hub.

    Raises:
        UserError: there is none.
    """
    if Path(pretrained).expanduser().is_file():
        return Path(pretrained).expanduser()
    try:
        return _find(pretrained, names)
    except OSError as error:
        accepted = f"a file {' or '.join(names)} or the folder that holds it"
        raise UserError(
            not_found(f"reward {reward!r}", pretrained, names[-1], error, accepted, "pretrained=FILE")
        ) from error


def _find(pretrained: str | Path, names: Sequence[str]) -> Path:
    """The first of ``names`` in a folder or on the hub; OSError where there is none."""
    from transformers.utils import cached_file

    place, error = Path(pretrained).expanduser(), OSError("it does not exist")
    if place.is_dir():
        for name in names:
            if (place / name).is_file():
                return place / name
        error = OSError(f"the folder holds {_listed([p.name for p in place.iterdir()]) or 'nothing'}")
    elif not is_path(pretrained):
        hub_is_silent()  # if so, it is not asked for each
        for name in names:
            try:
                return Path(str(cached_file(str(pretrained), name)))
            except OSError as failure:
                error = failure
    raise error


def read_tensors(reward: str, file: Path, *, sha256: str | None = None) -> dict[str, Tensor]:
    """All tensors of a checkpoint on the CPU; those of ``state_dict`` where the file has such an entry.

    Args:
        reward: the name the user knows, for messages.
        file: ``.safetensors``, or a torch pickle of tensors.
        sha256: of the file, in hexadecimal; None does not check.

    Raises:
        UserError: another file than the pinned one, not readable, or more than tensors in it.
    """
    if sha256 is not None:
        check_sha256(reward, file, sha256)
    content = _read(reward, file)
    content = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(
            f"reward {reward!r}: {file} holds no plain table of named tensors; give the checkpoint its authors"
            " published, or its state_dict alone"
        )
    return dict(content)


def _read(reward: str, file: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"reward {reward!r} cannot read {file} as safetensors or as a torch file of tensors alone (pickled code is"
            f" never run); download it again, or save its state_dict alone. Cause: {cause(error)}"
        ) from error


def check_sha256(reward: str, file: Path, expected: str) -> None:
    """Refuse a file whose bytes are not the pinned ones."""
    found = file_sha256(file)
    if found != expected.lower():
        raise UserError(
            f"reward {reward!r}: {file} has sha256 {found}, not the pinned {expected};"
            " download it again, or correct sha256= if you meant this file"
        )


def check_tensors(
    reward: str, source: Path | str, network: nn.Module, tensors: Mapping[str, Tensor], part: str = ""
) -> None:
    """Refuse tensors that do not fill ``network`` exactly.

    Args:
        reward: the name the user knows, for messages.
        source: where the tensors came from, for messages.
        network: on any device, "meta" too: only names and shapes are looked at.
        tensors: by the network's own names.
        part: what to call the network, by default its class.

    Raises:
        UserError: tensors are lacking, unknown or of another shape; it names the first few of each.
    """
    wanted = network.state_dict()
    shared = wanted.keys() & tensors.keys()
    odd = [
        f"{key} is {tuple(tensors[key].shape)} and should be {tuple(wanted[key].shape)}"
        for key in sorted(shared)
        if tensors[key].shape != wanted[key].shape
    ]
    differences = {
        "lacking": sorted(wanted.keys() - tensors.keys()),
        "unknown": sorted(tensors.keys() - wanted.keys()),
        "of another shape": odd,
    }
    if any(differences.values()):
        told = "; ".join(f"{len(found)} {kind} ({_listed(found)})" for kind, found in differences.items() if found)
        raise UserError(
            f"reward {reward!r}: {source} does not fit {part or type(network).__name__}, which has {len(wanted)}"
            f" tensors: {told}. Is it the checkpoint of another model? Download it again or point pretrained= elsewhere"
        )


def assemble(
    reward: str,
    source: Path | str,
    model_class: Any,
    config: Any,
    tensors: Mapping[str, Tensor],
    *,
    dtype: str = "float32",
    **arguments: Any,
) -> Any:
    """A transformers network of ``config`` filled with ``tensors`` (by its own names) and frozen.

    ``arguments`` go to the class as they are.

    Raises:
        UserError: the tensors do not fill it exactly, or there is no such dtype.
    """
    check_fit(reward, source, model_class, config, tensors, **arguments)
    kind = dtype_named(f"reward {reward!r}", dtype)
    with quiet():
        network = model_class.from_pretrained(None, config=config, state_dict=dict(tensors), dtype=kind, **arguments)
    return freeze(network)


def check_fit(
    reward: str, source: Path | str, model_class: Any, config: Any, tensors: Mapping[str, Tensor], **arguments: Any
) -> None:
    """:func:`check_tensors` against a network that is never given memory."""
    with torch.device("meta"), quiet():
        network = model_class(config, **arguments)
    check_tensors(reward, source, network, tensors)


def shape_of(reward: str, source: Path | str, tensors: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    """The shape of a tensor that tells a size of the network.

    Raises:
        UserError: there is no such tensor, so the checkpoint is another model's or in another layout.
    """
    if key not in tensors:
        raise UserError(
            f"reward {reward!r}: {source} has no tensor {key!r} among its {len(tensors)}; it is another model's, or not"
            " in the layout its authors published. Download it again or point pretrained= elsewhere"
        )
    return tuple(tensors[key].shape)


def check_heads(reward: str, width: int, heads: int) -> None:
    """Refuse a number of attention heads that cannot share a layer's width."""
    if heads < 1 or width % heads:
        raise UserError(f"reward {reward!r}: {heads} attention heads cannot share a width of {width}; correct heads=")


def load_tokenizer(reward: str, class_name: str, tokenizer: str | Path) -> Any:
    """The tokenizer in a hub id or a folder.

    Raises:
        UserError: nothing there, or no vocabulary among it.
    """
    import transformers

    try:
        _find(tokenizer, VOCABULARY_FILES)  # without one, transformers makes an empty tokenizer and says nothing
        with quiet():
            return getattr(transformers, class_name).from_pretrained(str(Path(tokenizer).expanduser()))
    except (OSError, ValueError) as error:
        accepted = f"a folder with one of {', '.join(VOCABULARY_FILES)}"
        raise UserError(
            not_found(f"reward {reward!r}", tokenizer, "tokenizer", error, accepted, "tokenizer=FOLDER")
        ) from error


@contextmanager
def placed(network: nn.Module, device: torch.device, *, offload: bool) -> Iterator[None]:
    """Have ``network`` on ``device`` inside; with ``offload`` it goes back to the CPU's memory afterwards.

    While gradients are recorded it stays: the backward pass needs the weights where the forward pass used them.
    """
    network.to(device)
    try:
        yield
    finally:
        if offload and not torch.is_grad_enabled():
            network.to("cpu")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(sorted(names)[:NAMED]) + (", ..." if len(names) > NAMED else "")
