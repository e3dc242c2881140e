"""A part of the user's own: ``path/to/file.py:thing``, wherever a recipe takes a name of a generator, a reward, a map
source, a backbone, a credit or a loss. No torch here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

from vipo.errors import UserError
from vipo.registry import parameters
from vipo.secrets import redacted, shown_options

if TYPE_CHECKING:
    from collections.abc import Iterator

ENDING = ".py"
MODULE = "vipo_user_"  # what the name of a file's module begins with


@dataclass(frozen=True)
class Kind:
    """What a file is asked for: its name in a message, and how one begins."""

    what: str
    example: str


GENERATOR = Kind("generator", "class MyModel(vipo.generators.flux.FluxGenerator):  # or a function of (path)")
REWARD = Kind("reward", "def my_reward(media, prompts):  # (N, 3, F, Y, X) in [0, 1], N prompts -> (N,)")
SOURCE = Kind("map source", "def my_source(rollout, advantage, scores):  # -> (N, T, H, W), not negative")
BACKBONE = Kind("backbone", "def my_backbone(images):  # (B, 3, Y, X) in [0, 1] -> a vipo.types.FeatureMap")
CREDIT = Kind("credit", "def my_credit(advantage, maps, scores, rollout):  # -> (N,) or (N, T, H, W)")
LOSS = Kind("loss", "class MyLoss(vipo.training.losses.Clipped):  # made from (objective, solver)")


def is_user_file(name: str) -> bool:
    """Whether the name of a part is meant as ``file.py:thing``."""
    return f"{ENDING}:" in name or name.endswith(ENDING)


def file_of(name: str) -> Path:
    """The file that ``file.py:thing`` names."""
    return Path(_split(name)[0]).expanduser()


def checksum_of(part: type) -> str:
    """The SHA-256 of the file of the user's that a class is from; empty for any other class."""
    file = getattr(sys.modules.get(part.__module__), "__file__", None) if part.__module__.startswith(MODULE) else None
    return "" if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()


def load_part(kind: Kind, name: str, offered: Mapping[str, Any] = MappingProxyType({}), /, **options: Any) -> Any:
    """Import the file and take the part from it; with options, and a class in any case, it is called with them and must
    return a part, something to call.

    Args:
        offered: options that are added if the part has them and is called.

    Raises:
        UserError: nothing named in the file, no such file, it does not import, it has no such thing, or that is no such
            part.
    """
    part = named_in_file(kind, name)
    if not options and not isinstance(part, type):  # a class is no part yet
        return part
    added = {key: value for key, value in offered.items() if key in parameters(part)}
    made = make(name, part, **{**added, **options})
    if not callable(made):
        raise UserError(
            f"{name} called with {shown_options({**added, **options})} gave a {type(made).__name__}, not a {kind.what}:"
            f" {kind.example}"
        )
    return made


def named_in_file(kind: Kind, name: str) -> Any:
    """What ``path/to/file.py:thing`` names: a part, or what makes one."""
    file_name, thing = _split(name)
    if not thing:
        raise UserError(
            f"{name!r} names a file but no function; write {name}:FUNCTION, where the file has {kind.example}"
        )
    module = _import(kind, Path(file_name).expanduser())
    if not hasattr(module, thing):
        defined = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise UserError(f"{file_name} has no {thing!r}; it defines {', '.join(defined) or 'nothing callable'}")
    part = getattr(module, thing)
    if not callable(part):
        raise UserError(f"{thing!r} in {file_name} is a {type(part).__name__}, not a function: {kind.example}")
    return part


def _split(name: str) -> tuple[str, str]:
    file_name, _, thing = name.rpartition(":") if not name.endswith(ENDING) else (name, "", "")
    return file_name, thing


def _import(kind: Kind, file: Path) -> ModuleType:
    if not file.is_file():
        raise UserError(
            f"there is no file {file} to take a {kind.what} from; give an existing path as file.py:function"
        )
    place = hashlib.sha256(str(file.resolve()).encode(errors="surrogateescape")).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(f"{MODULE}{file.stem}_{place}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"{file} is not a Python file; a {kind.what} of your own is {kind.example}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass looks there for the module that it is of
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script that ends with sys.exit would end the run as if all were well
        raise UserError(f"{file} could not be imported: {type(error).__name__}: {error}") from error
    return module


def make(name: str, factory: Callable[..., Any], *given: Any, **options: Any) -> Any:
    """``factory(*given, **options)``, for a class or a function that makes a part.

    Raises:
        UserError: it ends the process, or does not take the options.
    """
    try:
        return factory(*given, **options)
    except SystemExit as error:
        raise UserError(f"{name} called sys.exit({error.code!r}) while it was made; raise an exception") from error
    except UserError:
        raise
    except TypeError as error:
        raise UserError(f"{name} does not take the options {shown_options(options)}: {redacted(str(error))}") from error
    except Exception as error:
        raise UserError(f"{name} could not be made with {shown_options(options)}: {said_by(error)}") from error


@contextmanager
def answering(kind: Kind, name: str) -> Iterator[None]:
    """While a part of the user's works: whatever it raises names its file.

    Raises:
        UserError: it raised.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{kind.what} {name!r} raised {said_by(error)}") from error


def said_by(error: BaseException) -> str:
    """An exception of the user's code, in one line."""
    return f"{type(error).__name__}: {' '.join(redacted(str(error)).split())}"
