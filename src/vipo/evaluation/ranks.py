"""An evaluation by several processes: who does which part, and how all come to know what each has found."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict

import torch

from vipo.evaluation.records import Part
from vipo.ranks import Ranks, everyones_rows


def share(starts: Sequence[int], ranks: Ranks) -> Sequence[int]:
    """This process's parts, by the prompts they begin with: consecutive ones, about as many for each.

    A process that none is left for does the last one again: with DDP the network's first pass waits for all processes.
    """
    each, more = divmod(len(starts), ranks.teams)  # so many for each team, and one more for the first ones
    begin = ranks.team * each + min(ranks.team, more)
    return starts[begin : begin + each + (ranks.team < more)] or starts[-1:]


def in_vain(starts: Sequence[int], ranks: Ranks) -> int:
    """How many more parts this process has to sample so that it does as many as the others, if they go in step."""
    most = math.ceil(len(starts) / ranks.teams)
    return most - len(share(starts, ranks)) if ranks.in_step else 0


def everyones_parts(parts: Sequence[Part], ranks: Ranks) -> list[Part]:
    """The parts of all processes, each once, in the order of their prompts."""
    text = json.dumps([asdict(part) for part in parts]).encode()
    told = everyones_rows(torch.frombuffer(bytearray(text), dtype=torch.uint8), ranks, at_once=None)
    known = {part["first"]: Part(**part) for text in told for part in json.loads(text.numpy().tobytes())}
    return [known[first] for first in sorted(known)]
