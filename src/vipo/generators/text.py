"""Prompts to conditioning: one protocol, and the parts of a pipeline that stand behind it.

A generator asks its :class:`Text`. That is the pipeline's own :class:`TextReader`, or what is put before it: a cache
(:mod:`vipo.generators.text_cache`), or blanks for a plan, which has no weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar, Protocol, cast, get_type_hints, runtime_checkable

import torch
from torch import Tensor, nn

from vipo.errors import UserError
from vipo.generators.conditioning import BlankConditioning
from vipo.generators.token_limits import TokenLimit
from vipo.types import Batched

USUAL_LENGTH = 512  # tokens of a prompt


@runtime_checkable
class Text(Protocol):
    """Prompts to conditioning, one row per prompt, all of one length; without gradient."""

    def __call__(self, prompts: Sequence[str]) -> Batched: ...


class TextReader(ABC):
    """The tokenizers and text encoders of a pipeline, as a :class:`Text`; one subclass per pipeline family.

    Args:
        pipeline: the encoders are its own; the rows are wanted where its ``transformer`` is.
        max_sequence_length: tokens of a prompt; None takes :meth:`usual_length`.
    """

    encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)  # parts of the pipeline

    def __init__(self, pipeline: Any, max_sequence_length: int | None = None) -> None:
        self.pipeline = pipeline
        self.max_sequence_length = max_sequence_length or self.usual_length()
        self.device: torch.device = pipeline.transformer.device
        self._offloaded = False

    @abstractmethod
    def read(self, prompts: Sequence[str]) -> Batched:
        """What the text encoders say; the annotation names the record, which a cache must know."""

    @abstractmethod
    def limits(self) -> Sequence[TokenLimit]:
        """How much of a prompt each encoder reads that hands on a sequence of tokens; pooled vectors do not count."""

    def blank(self, rows: int) -> Batched:  # noqa: ARG002 - of those that can
        """Zeros of the shape of encoded prompts as long as they can be, for planning without weights."""
        raise UserError(
            f"a {type(self.pipeline).__name__} cannot be planned: its adapter's {type(self).__name__} has no"
            " blank(rows), which says the shape of encoded prompts; add the method (CONTRIBUTING.md, a generator)"
        )

    def usual_length(self) -> int:
        """Tokens of a prompt unless told otherwise."""
        return USUAL_LENGTH

    @property
    def encoders(self) -> tuple[nn.Module, ...]:
        """The networks; some may be left out."""
        parts = (getattr(self.pipeline, name) for name in self.encoder_names)
        return tuple(part for part in parts if part is not None)

    @property
    def record(self) -> type[Batched]:
        """The class of the rows, from the annotation of :meth:`read`; one without has that of the class above.

        Raises:
            UserError: it names no record.
        """
        own = [vars(kind)["read"] for kind in type(self).__mro__ if "read" in vars(kind)]
        record = next(found["return"] for read in own if "return" in (found := get_type_hints(read)))
        if not isinstance(record, type) or not is_dataclass(record) or not fields(record):
            raise UserError(f"annotate {type(self).__name__}.read with the record it returns, not {record}")
        return cast("type[Batched]", record)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], *, batch_size: int | None = None) -> Batched:
        """One row per prompt, so many of them read at a time, all at once by default."""
        at_once = batch_size or len(prompts)
        with self._at_hand():
            parts = [self.read(prompts[start : start + at_once]) for start in range(0, len(prompts), at_once)]
        return parts[0] if len(parts) == 1 else type(parts[0]).cat(parts)

    @contextmanager
    def _at_hand(self) -> Iterator[None]:
        """Inside, encoders that were offloaded are back."""
        if not self._offloaded:
            yield
            return
        self._move(self.device)
        try:
            yield
        finally:
            self._move("cpu")

    def offload(self) -> None:
        """Move the encoders to the CPU, for good but for the moments in which they are asked."""
        self._move("cpu")
        self._offloaded = True

    def zeros(self, *shape: int) -> Tensor:
        """What a part of a blank row is made of."""
        encoder: Any = self.encoders[-1]
        return torch.zeros(shape, dtype=encoder.dtype, device=self.device)

    def full_rows(self, rows: int, width: int) -> BlankConditioning:
        """Blank rows of a sequence whose words are counted."""
        words = torch.full((rows,), self.max_sequence_length, device=self.device)
        return BlankConditioning(self.zeros(rows, self.max_sequence_length, width), words)

    def _move(self, device: torch.device | str) -> None:
        for encoder in self.encoders:
            encoder.to(device)


@dataclass(frozen=True)
class BlankText:
    """Says nothing, in as many words as a reader's prompts can have."""

    reader: TextReader

    def __call__(self, prompts: Sequence[str]) -> Batched:
        return self.reader.blank(len(prompts))
