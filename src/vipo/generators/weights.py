"""Load a pipeline whose every weight comes from its files, and whose files hold nothing else.

diffusers and transformers only warn about keys that are missing, and leave those weights random. Here the networks are
loaded one by one, with the report of what was found, and handed to the pipeline, which loads the rest. Weights are
safetensors, never pickles, and no code that comes with a model is run; there is no option for either.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from vipo.errors import UserError
from vipo.generators import quantization
from vipo.generators.folder import one_line, pipeline_class, read_config, refuse_quantised
from vipo.options import Quantization, TextQuantization
from vipo.pretrained import quiet

INDEXES = ("diffusion_pytorch_model.safetensors.index.json", "model.safetensors.index.json")
HEADS = ("lm_head.", "text_projection.")  # of a checkpoint that was saved from the class with a head
TRAINED = "transformer"  # the part of a pipeline that a policy is put on
TEXT = "text_encoder"  # what the names of those that read prompts begin with
NAMED = 3  # tensors named in a message

# What diffusers and transformers raise about folders that are not as they should be.
BROKEN = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError, SafetensorError)


@dataclass(frozen=True)
class Fewer:
    """Bits for a pipeline's transformer and its text encoders, and where they will work.

    See :mod:`vipo.generators.quantization`.
    """

    kind: Quantization = "none"
    device: str = "cpu"
    text: TextQuantization = "none"


def load_pipeline(wanted: type[Any], path: str, dtypes: Mapping[str, torch.dtype], fewer: Fewer = Fewer()) -> Any:
    """The pipeline in a folder or of a hub id.

    Args:
        wanted: its diffusers class.
        dtypes: of the networks, by part; those not named get ``default``.
        fewer: how the transformer and the text encoders are quantised.

    Raises:
        UserError: a pipeline of another class or none, quantised weights, or weights that do not fill its networks or
            do not all fit into them.
    """
    found = pipeline_class(path)
    if found != wanted.__name__:
        raise UserError(f"{path!r} is a {found}, not a {wanted.__name__}; give a folder or hub id of the latter")
    parts = dict(_parts(wanted, path))
    if lost := [part for part in parts if Path(path).is_dir() and not Path(path, part).is_dir()]:
        raise UserError(f"{path!r} has no folder {lost[0]}, which its model_index.json names; download it again")
    networks = {part: found for part, found in parts.items() if issubclass(found, nn.Module)}
    for part in networks:
        refuse_quantised(path, part, read_config(path, part))
    try:
        folder = path if Path(path).is_dir() else wanted.download(path, use_safetensors=True)
        with quiet(), quiet("diffusers", logging.CRITICAL):
            loaded = {
                part: _load_network(
                    Path(folder, part),
                    network,
                    dtypes.get(part, dtypes["default"]),
                    _of_part(fewer, part),
                )
                for part, network in networks.items()
            }
            return wanted.from_pretrained(path, use_safetensors=True, trust_remote_code=False, **loaded)
    except UserError:
        raise  # it is a ValueError too, and says more
    except BROKEN as error:
        raise UserError(f"no {wanted.__name__} could be loaded from {path!r}: {one_line(error)}") from error


def _parts(wanted: type[Any], path: str) -> Iterator[tuple[str, type[Any]]]:
    """What the pipeline takes and model_index.json names, with its class."""
    taken = inspect.signature(wanted).parameters
    for part, entry in read_config(path).items():
        is_part = part in taken and isinstance(entry, Sequence) and len(entry) == 2
        if not is_part or entry[0] not in ("diffusers", "transformers"):
            continue
        found = getattr(import_module(entry[0]), entry[1], None)
        if not isinstance(found, type):
            raise UserError(
                f"model_index.json of {path!r} wants {entry[1]} for its {part}, which the installed {entry[0]} does"
                " not have; upgrade it, or give another model"
            )
        yield part, found


def _of_part(fewer: Fewer, part: str) -> Fewer:
    """What of it holds for a part."""
    is_text = part.startswith(TEXT)
    return replace(fewer, kind=fewer.kind if part == TRAINED else "none", text=fewer.text if is_text else "none")


def _load_network(place: Path, network: Any, dtype: torch.dtype, fewer: Fewer) -> nn.Module:
    _check_indexes(place)
    of_transformers = network.__module__.startswith("transformers.")
    options = {"ignore_mismatched_sizes": True} if of_transformers else {}  # it reports them, and diffusers names them
    strictly = {"use_safetensors": True, "output_loading_info": True}
    read = partial(network.from_pretrained, str(place), dtype=dtype, **strictly, **options)
    loaded: nn.Module
    how: dict[str, Any] = {"dtype": dtype, "device": fewer.device, "read": read}
    if fewer.kind != "none":
        loaded, report = quantization.load(network, place, fewer.kind, **how)
    elif fewer.text != "none":
        loaded, report = quantization.load_text(network, place, fewer.text, **how)
    else:
        loaded, report = read()
    wrong_size = [f"{name} {tuple(theirs)} for {tuple(ours)}" for name, theirs, ours in report["mismatched_keys"]]
    strange = [name for name in report["unexpected_keys"] if not name.startswith(HEADS)]
    problems = {"lacks": report["missing_keys"], "has beside them": strange, "has in another size": wrong_size}
    _refuse(place, {what: sorted(names) for what, names in problems.items()}, network.__name__)
    return loaded


def _check_indexes(place: Path) -> None:
    """The shards hold what their index says: diffusers believes it, and leaves what is not there without a value."""
    for index in (place / name for name in INDEXES):
        if not index.is_file():
            continue
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        held: dict[str, str] = {}
        for shard in sorted(set(listed.values())):
            with safe_open(place / shard, framework="pt") as tensors:
                held.update(dict.fromkeys(tensors.keys(), shard))
        problems = {
            "lacks": sorted(listed.keys() - held.keys()),
            "has beside them": sorted(held.keys() - listed.keys()),
        }
        _refuse(place, problems, index.name)


def _refuse(place: Path, problems: Mapping[str, Sequence[str]], of: str) -> None:
    """Raise UserError if there are any."""
    said = [f"{what} {some(names)}" for what, names in problems.items() if names]
    if said:
        raise UserError(
            f"the weights in {str(place)!r} are not those of {of}: the folder {', and '.join(said)}; they were renamed,"
            " damaged or made for another model: download them again, or correct config.json"
        )


def some(names: Sequence[str], what: str = "tensor") -> str:
    """How many there are, and the first of them."""
    more = ", ..." if len(names) > NAMED else ""
    return f"{len(names)} {what}{'' if len(names) == 1 else 's'} ({', '.join(names[:NAMED])}{more})"
