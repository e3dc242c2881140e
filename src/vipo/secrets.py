"""Keys and tokens: where they may stand, and how they are kept out of everything that is written or said.

A secret comes from an environment variable that an option names (``token_env``). One that stands in an option itself is
refused, because options go into recipe.yaml. What a server or a library says may hold one all the same, so whatever is
taken from there passes through :func:`redacted`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "***"
SHORTEST = 4  # characters of a secret; hiding shorter ones would hide words
SHORTEST_VARIABLE = 8  # of one that is taken for a secret for its variable's name alone
SHOWN_CHARACTERS = 200  # of options, in a message
INSTEAD = "put it into an environment variable and name that one, with token_env=VARIABLE where the option is offered"

_KEY = re.compile(
    r"(?:.*[_\-.])?(?:api[_\-]?key|access[_\-]?key|secret|secret[_\-]?key|pass(?:word|wd|phrase)|credentials?|"
    r"authorization|(?:access|api|auth|bearer|hf|refresh|session)[_\-]?token)|token|bearer",
    re.IGNORECASE,
)
_VARIABLE = re.compile(r".*(?:TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY)", re.IGNORECASE)
_IN_TEXT = (
    re.compile(r"(?<=://)[^/\s@'\"]+(?=@)"),  # http://name:password@host
    re.compile(
        r"(?<=[?&])(?:api_?key|key|token|access_token|auth|sig|signature|secret|password)=[^&\s'\"]+", re.IGNORECASE
    ),
    re.compile(r"\bBearer\s+[A-Za-z0-9._~+/=\-]{8,}"),
    re.compile(r"\b(?:sk-|hf_|ghp_|gho_|github_pat_|xox[abp]-|AKIA|AIza)[A-Za-z0-9_\-]{16,}"),
    re.compile(r"(?<=-----BEGIN )[A-Z ]*PRIVATE KEY[^$]*"),
)
_NAMED = re.compile(
    r"\b(?:api[_\-]?key|access[_\-]?key|secret|password|passwd|access[_\-]?token)\b['\"]?\s*[:=]\s*['\"]?[^\s'\",}]+",
    re.IGNORECASE,
)  # of text that is shown, not of options: a question to a judge may say such words
_known: set[str] = set()


def remember(secret: str) -> None:
    """From now on :func:`redacted` hides it."""
    if len(secret) >= SHORTEST:
        _known.add(secret)


def redacted(text: str) -> str:
    """The text without secrets: those that are remembered or in the environment, and what looks like one."""
    for secret in sorted(_known | _in_environment(), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    for pattern in (*_IN_TEXT, _NAMED):
        text = pattern.sub(HIDDEN, text)
    return text


def shown_options(options: Mapping[str, Any]) -> str:
    """Options in a message: without secrets, and not all of them if they are many."""
    text = redacted(repr(public(options)))
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} ..."


def public(value: Any) -> Any:
    """Nested plain values as they may be shown to others: without secrets, whether a key or a text says so."""
    if isinstance(value, Mapping):
        return {key: HIDDEN if _is_secret(key, entry) else public(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [public(entry) for entry in value]
    return redacted(value) if isinstance(value, str) else value


def in_the_open(value: Any, where: str = "") -> Iterator[str]:
    """A sentence for each secret that stands in a nested mapping. The secret is not in it."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            place = f"{where}.{key}" if where else str(key)
            if _is_secret(key, entry):
                yield f"{redacted(place)} holds a secret, which would be written into files; {INSTEAD}"
            else:
                yield from in_the_open(entry, place)
    elif isinstance(value, list | tuple):
        for number, entry in enumerate(value):
            yield from in_the_open(entry, f"{where}.{number}")
    elif isinstance(value, str) and any(pattern.search(value) for pattern in _IN_TEXT):
        yield f"{redacted(where)} has a key or password in its text, which would be written into files; {INSTEAD}"


def _is_secret(key: Any, entry: Any) -> bool:
    """A scalar under a name that only secrets have."""
    scalar = isinstance(entry, str | int | float) and not isinstance(entry, bool) and entry != ""
    return scalar and isinstance(key, str) and _KEY.fullmatch(key) is not None


def _in_environment() -> set[str]:
    return {
        value
        for name, value in os.environ.items()
        if len(value) >= SHORTEST_VARIABLE and _VARIABLE.fullmatch(name) is not None
    }
