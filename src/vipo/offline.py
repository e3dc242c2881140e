"""Whether the hub can be asked, found out once and quickly, and what to say where it cannot. No torch here."""

from __future__ import annotations

import os
from functools import cache

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")  # environment variables that huggingface_hub reads
TRIES, SECONDS = 2, 5.0  # for it to answer


def hub_is_silent() -> str | None:
    """Why the hub is not asked, in words; None if it answers.

    Where nobody answers, huggingface_hub goes offline for the rest of this process: what is in its cache is found, and
    what is not is told at once instead of after five more tries for each file.
    """
    flags = [name for name in OFFLINE if os.environ.get(name, "").lower() in ("1", "true", "yes", "on")]
    return f"{flags[0]} is set, so the hub is not asked; unset it to download" if flags else _asked_once()


@cache
def _asked_once() -> str | None:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]  # it is among its public names

    why = ""
    for _ in range(TRIES):
        try:
            get_session().head(constants.ENDPOINT, timeout=SECONDS)
            return None
        except Exception as error:  # noqa: BLE001 - whatever the HTTP client raises, nobody answered
            why = type(error).__name__
    constants.HF_HUB_OFFLINE = True
    return f"{constants.ENDPOINT} does not answer ({why})"
