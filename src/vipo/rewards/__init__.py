"""Rewards by name: media and prompts to one number per sample, higher is better.

A new reward is one class, one entry here and one test. Factories import their file only when called. A reward of the
user's own needs no entry: ``path/to/file.py:function`` is a name too.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vipo.rewards.scoring import score
from vipo.rewards.user_file import is_user_file, load_user_reward
from vipo.types import Reward, UserError

__all__ = ["REWARDS", "RewardEntry", "build", "score"]


@dataclass(frozen=True)
class RewardEntry:
    """What is known about a reward before it is built. ``value_range`` is written for people, higher is better."""

    factory: Callable[..., Reward]
    summary: str
    value_range: str
    licence: str
    needs: str


def _redness(**options: Any) -> Reward:
    from vipo.rewards.rules import Redness

    return Redness(**options)


def _brightness(**options: Any) -> Reward:
    from vipo.rewards.rules import Brightness

    return Brightness(**options)


def _jpeg_compressibility(**options: Any) -> Reward:
    from vipo.rewards.rules import JpegCompressibility

    return JpegCompressibility(**options)


def _emoji_match(**options: Any) -> Reward:
    from vipo.rewards.embedded import EmojiMatch

    return EmojiMatch(**options)


def _emoji_judge(**options: Any) -> Reward:
    from vipo.rewards.embedded import EmojiJudge

    return EmojiJudge(**options)


def _emoji_layout(**options: Any) -> Reward:
    from vipo.rewards.embedded import EmojiLayout

    return EmojiLayout(**options)


REWARDS: dict[str, RewardEntry] = {
    "redness": RewardEntry(
        _redness, "mean of red minus the mean of green and blue", "-1 to 1", "part of vipo", "nothing"
    ),
    "brightness": RewardEntry(_brightness, "mean luma", "0 to 1", "part of vipo", "nothing"),
    "jpeg_compressibility": RewardEntry(
        _jpeg_compressibility, "minus the kilobytes of a JPEG of quality 95", "below 0", "part of vipo", "nothing"
    ),
    "emoji_match": RewardEntry(
        _emoji_match,
        "log-probability that the named objects are there; for training the embedded model",
        "below 0",
        "Apache-2.0",
        "captions of the embedded vocabulary",
    ),
    "emoji_judge": RewardEntry(
        _emoji_judge,
        "probability that the named objects are there; a held-out judge from other drawings",
        "0 to 1",
        "Apache-2.0",
        "captions of the embedded vocabulary",
    ),
    "emoji_layout": RewardEntry(
        _emoji_layout,
        "share of a caption's claims that hold: objects, relation, ground colour; held out",
        "0 to 1",
        "Apache-2.0",
        "captions of the embedded vocabulary",
    ),
}
"""Name -> entry. The factory takes the options of the class of that name."""


def build(name: str, **options: Any) -> Reward:
    """The reward ``name``, or the user's own function for ``path/to/file.py:function``.

    Raises:
        UserError: no reward of that name, an option it does not have, or a file that does not give a reward.
    """
    if is_user_file(name):
        return load_user_reward(name, **options)
    if name not in REWARDS:
        near = difflib.get_close_matches(name, REWARDS, n=2, cutoff=0.4)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise UserError(
            f"there is no reward {name!r}; choose from {', '.join(REWARDS)}, or give file.py:function.{hint}"
        )
    try:
        return REWARDS[name].factory(**options)
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"reward {name!r} refused its options {options}: {error}") from error
