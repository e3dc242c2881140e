"""NumPy files inside the messages of a reward server, and what is wrong with a message. No pickle."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np


class WireError(ValueError):
    """A message that does not follow the protocol."""


class TooLargeError(WireError):
    """A message that would take more memory than it may."""


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def read_npy(data: bytes, check: Callable[[tuple[int, ...], np.dtype], None]) -> np.ndarray:
    """A file's array. ``check`` raises unless shape and type are right.

    The header is believed only once it agrees with the number of bytes: reading allocates what it says.
    """
    buffer = io.BytesIO(data)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(buffer)
    if version not in readers:
        raise ValueError(f"version {version} of the format, not 1.0 or 2.0")
    shape, _, dtype = readers[version](buffer)
    check(shape, dtype)
    if math.prod(shape) * dtype.itemsize != len(data) - buffer.tell():
        raise ValueError(f"{len(data) - buffer.tell()} bytes are not {dtype} {shape}")
    buffer.seek(0)
    return np.ascontiguousarray(np.load(buffer, allow_pickle=False))
