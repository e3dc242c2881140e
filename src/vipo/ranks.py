"""Several processes with one result: how all come to know what each has found, and fail together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import UInt8
from torch import Tensor

from vipo.errors import UserError

T = TypeVar("T")


@runtime_checkable
class Ranks(Protocol):
    """The processes that work together; :class:`vipo.engine.Engine` is that."""

    @property
    def team(self) -> int:
        """This process's, of those that samples are dealt to: one or, under context parallel, several processes."""

    @property
    def teams(self) -> int: ...

    @property
    def in_step(self) -> bool:
        """Whether every process has to make the same calls of the network."""

    @property
    def device(self) -> torch.device: ...

    def gather(self, values: Tensor) -> Tensor:
        """The rows of every team, which must be as many in each, in their order."""

    def any(self, flag: bool) -> bool:
        """Whether it holds in any process."""


class Alone:
    """One process."""

    team, teams, in_step, device = 0, 1, False, torch.device("cpu")

    def gather(self, values: Tensor) -> Tensor:
        return values

    def any(self, flag: bool) -> bool:
        return flag


ALONE = Alone()


def together(ranks: Ranks, work: Callable[[], T]) -> T:
    """What ``work`` returns; where it fails in one process it fails in all, which would else wait for that one.

    Raises:
        UserError: that of ``work``, or that there was one in another process.
    """
    failed: UserError | None = None
    try:
        done = work()
    except UserError as error:
        failed = error
    if not ranks.any(failed is not None):
        return done
    raise failed or UserError("a reward failed in another process, which says why; this one ends with it")


def everyones_rows(
    rows: UInt8[Tensor, "n ..."], ranks: Ranks, *, at_once: int | None, wanted: bool = True
) -> list[UInt8[Tensor, "_ ..."]]:
    """The rows of each team, in their order, on the CPU. Every process has to ask, with at least one row.

    Args:
        at_once: how many rows of all teams together are in the accelerator's memory at a time; None is all.
        wanted: without it nothing is kept here, and the list is empty: only to help the others.
    """
    if ranks.teams == 1:
        return [rows.cpu()]
    counts = ranks.gather(torch.tensor([len(rows)], device=ranks.device)).tolist()
    step = max(counts) if at_once is None else max(1, at_once // ranks.teams)
    pieces: list[list[Tensor]] = [[] for _ in counts]
    for start in range(0, max(counts), step):
        piece = rows.new_zeros(step, *rows.shape[1:])
        here = rows[start : start + step]
        piece[: len(here)] = here
        gathered = ranks.gather(piece.to(ranks.device)).split(step)
        for kept, of_rank, count in zip(pieces, gathered, counts, strict=True):
            if wanted and count > start:
                kept.append(of_rank[: count - start].cpu())
    return [torch.cat(kept) for kept in pieces] if wanted else []
