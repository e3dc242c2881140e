"""Does a picture hold what GenEval (arXiv 2310.11513) asks for? From detections to a verdict; no network in here.

A prompt's metadata lists clauses: so many of a class, perhaps of a colour, perhaps somewhere beside an earlier clause's
objects; and classes of which there may not be so many. Three ways to count them:

    official  1 if every clause is met by the surest of at least ``count`` detections and nothing excluded is there
    strict    1 if every clause is met by exactly ``count`` detections
    partial   mean over all claims of the share that holds, with the counts of ``strict``

    count     max(0, 1 - |count - found| / count)
    colour    share of the found objects that have it; 0 unless the count holds
    position  1 if every found object stands so to every object of the other clause, 0 otherwise or if either is missing

``official`` is the benchmark. The other two are what Flow-GRPO (2505.05470) trains on; its partial reward differs where
more than twice as many are found (below 0 there) and where only the position is wrong (half a point there).

A stands left of B when the vector between the centres, shortened along each axis by 0.1 of both boxes' sides, points
more than half to the left, relative to its full length; and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Bool
from torch import Tensor

from vipo.errors import UserError

Mode = Literal["official", "strict", "partial"]
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
SLACK = 0.1  # share of both boxes' sides within which two objects stand at the same place
TOWARDS = 0.5  # of the distance, along an axis


@dataclass(frozen=True)
class Detection:
    """One object found. The box is (left, top, right, bottom) in px; the mask says which pixels are the object's."""

    box: tuple[float, float, float, float]
    score: float
    mask: Bool[Tensor, "Y X"]


Found = Mapping[str, Sequence[Detection]]
"""Class name -> detections, surest first."""
Painter = Callable[[str, Sequence[Detection]], Sequence[str]]
"""A class and detections of it to the colour of each."""


@dataclass(frozen=True)
class Clause:
    """``count`` objects of a class, perhaps of a colour, perhaps in a relation to the objects of clause ``target``."""

    name: str
    count: int
    colour: str | None = None
    relation: str | None = None
    target: int = 0


@dataclass(frozen=True)
class Claims:
    """What a prompt asks for. ``excluded`` says from how many of a class on the picture is wrong."""

    included: tuple[Clause, ...]
    excluded: tuple[Clause, ...]
    counting: bool  # whether the prompt is about numbers, where only sure detections count

    @property
    def names(self) -> set[str]:
        return {clause.name for clause in (*self.included, *self.excluded)}


def read_claims(metadata: Mapping[str, Any]) -> Claims | None:
    """The claims of a line of GenEval's prompt file; None for a prompt that has none.

    Raises:
        UserError: a claim that cannot be understood.
    """
    if not metadata.get("include"):
        return None
    try:
        included = tuple(_clause(table) for table in metadata["include"])
        excluded = tuple(_clause(table) for table in metadata.get("exclude", ()))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _unreadable(metadata, f"{type(error).__name__}: {error}") from error
    for place, clause in enumerate(included):
        if clause.colour not in (None, *COLOURS) or clause.relation not in (None, *RELATIONS):
            raise _unreadable(metadata, f"{clause.colour or clause.relation!r} is not known")
        if clause.relation and not 0 <= clause.target < place:
            raise _unreadable(
                metadata, f"clause {place} stands beside clause {clause.target}, which must come before it"
            )
    if any(clause.count < 1 for clause in (*included, *excluded)):
        raise _unreadable(metadata, "a count is less than 1")
    return Claims(included, excluded, metadata.get("tag") == "counting")


def verdict(claims: Claims, found: Found, painter: Painter, mode: Mode) -> float:
    """In [0, 1]; see the top of this file."""
    exact = mode != "official"
    groups: list[Sequence[Detection] | None] = []
    shares: list[float] = []
    for clause in claims.included:
        objects = found.get(clause.name, ())
        objects = objects if exact else objects[: clause.count]
        held = _shares(clause, objects, groups, painter)
        groups.append(objects if min(held) == 1.0 else None)
        shares += held
    if mode == "partial":
        return sum(shares) / len(shares)
    too_many = any(len(found.get(clause.name, ())) >= clause.count for clause in claims.excluded)
    return float(min(shares) == 1.0 and not too_many)


def stands(a: Detection, b: Detection, relation: str) -> bool:
    """Whether ``a`` stands in ``relation`` to ``b``, as seen in the picture (y grows downwards)."""
    offset, direction = [], []
    for low, high in ((0, 2), (1, 3)):
        apart = (a.box[low] + a.box[high] - b.box[low] - b.box[high]) / 2
        slack = SLACK * (a.box[high] - a.box[low] + b.box[high] - b.box[low])
        offset.append(apart)
        direction.append(max(abs(apart) - slack, 0.0) * (1 if apart > 0 else -1))
    axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[relation]
    distance = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    return sign * direction[axis] > TOWARDS * distance


def _shares(
    clause: Clause, objects: Sequence[Detection], groups: Sequence[Sequence[Detection] | None], painter: Painter
) -> list[float]:
    """How far each claim of one clause holds; a claim rests on those before it."""
    shares = [max(0.0, 1.0 - abs(clause.count - len(objects)) / clause.count)]
    if clause.colour is not None:
        painted = painter(clause.name, objects) if shares[0] == 1.0 else ()
        shares.append(sum(colour == clause.colour for colour in painted) / clause.count)
    if clause.relation is not None:
        others = groups[clause.target] if min(shares) == 1.0 else None
        pairs = [(a, b) for a in objects for b in others or ()]
        shares.append(float(bool(pairs) and all(stands(a, b, clause.relation) for a, b in pairs)))
    return shares


def _clause(table: Mapping[str, Any]) -> Clause:
    relation, target = table.get("position") or (None, 0)
    return Clause(str(table["class"]), int(table["count"]), table.get("color"), relation, int(target))


def _unreadable(metadata: Mapping[str, Any], reason: str) -> UserError:
    return UserError(
        f"the claims {dict(metadata)} of a prompt cannot be read: {reason}. Accepted: lines as in GenEval's"
        ' evaluation_metadata.jsonl, such as {"include": [{"class": "car", "count": 1, "color": "red"}]}'
    )
