"""A reward of the user's own: ``path/to/file.py:function``, a function with the signature of ``vipo.types.Reward``."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any, cast

from vipo.errors import UserError
from vipo.registry import parameters
from vipo.secrets import redacted, shown_options

if TYPE_CHECKING:
    from vipo.types import Reward

EXAMPLE = "def my_reward(media, prompts):  # (N, 3, F, Y, X) in [0, 1], N prompts -> (N,)"


def load_user_reward(name: str, offered: Mapping[str, Any] = MappingProxyType({}), /, **options: Any) -> Reward:
    """Import the file and take the function from it; with options, and a class in any case, it is called with them and
    must return a reward.

    Args:
        offered: options that are added if the function has them and is called.

    Raises:
        UserError: no function named, no such file, the file does not import, no such function, or it is not callable.
    """
    reward = user_function(name)
    called = bool(options) or isinstance(reward, type)  # a class is none yet
    added = {key: value for key, value in offered.items() if called and key in parameters(reward)}
    if called:
        reward = _configured(reward, name, {**added, **options})
    return cast("Reward", reward)


def user_function(name: str) -> Any:
    """What ``path/to/file.py:function`` names: a reward, or what makes one."""
    file_name, _, function = name.rpartition(":") if not name.endswith(".py") else (name, "", "")
    if not function:
        raise UserError(f"{name!r} names a file but no function; write {name}:FUNCTION, where the file has {EXAMPLE}")
    module = _import(Path(file_name).expanduser())
    if not hasattr(module, function):
        defined = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise UserError(f"{file_name} has no {function!r}; it defines {', '.join(defined) or 'nothing callable'}")
    reward = getattr(module, function)
    if not callable(reward):
        raise UserError(f"{function!r} in {file_name} is a {type(reward).__name__}, not a function: {EXAMPLE}")
    return reward


def _import(file: Path) -> ModuleType:
    if not file.is_file():
        raise UserError(f"there is no file {file} to take a reward from; give an existing path as file.py:function")
    spec = importlib.util.spec_from_file_location(f"vipo_user_reward_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"{file} is not a Python file; a reward of your own is {EXAMPLE}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script that ends with sys.exit would end the run as if all were well
        raise UserError(f"{file} could not be imported: {type(error).__name__}: {error}") from error
    return module


def _configured(factory: Any, name: str, options: dict[str, Any]) -> Any:
    """``factory(**options)``, for a class or a function that makes a reward."""
    try:
        reward = factory(**options)
    except SystemExit as error:
        raise UserError(f"{name} called sys.exit({error.code!r}) while it was made; raise an exception") from error
    except TypeError as error:
        raise UserError(f"{name} does not take the options {shown_options(options)}: {redacted(str(error))}") from error
    if not callable(reward):
        raise UserError(
            f"{name} called with {shown_options(options)} gave a {type(reward).__name__}, not a reward: {EXAMPLE}"
        )
    return reward
