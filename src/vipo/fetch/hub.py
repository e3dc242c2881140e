"""Ask the hub about what is not known here, and download what is not there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from fnmatch import fnmatch
from typing import Any

from vipo.errors import UserError
from vipo.fetch.need import ON_HUB, Need

SECONDS = 5.0  # for the hub to answer


def looked_up(needs: Iterable[Need]) -> list[Need]:
    """Sizes, licences, gates and the present revision of what is to be downloaded, where the hub says so.

    Once it cannot be reached it is not asked again: everything stays as it was known.
    """
    reached, found = True, []
    for need in needs:
        unknown = need.size is None or need.at_least or need.gated is None
        if reached and unknown and need.kind in ON_HUB and not need.is_here:
            answer = _ask(need)
            reached, need = answer is not None, answer or need
        found.append(need)
    return found


def _ask(need: Need) -> Need | None:
    """What the hub says of a repository; None if nobody answers. Of one that is not for us nothing is known."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    ask = api.dataset_info if need.kind == "data set" else api.model_info
    try:
        info: Any = ask(need.name, revision=need.revision, files_metadata=True, timeout=SECONDS)
    except HfHubHTTPError as error:
        return replace(need, hint=f"the hub says: {_first_line(error)}") if error.response is not None else None
    except unreachable():
        return None
    wanted = [file for file in info.siblings or () if any(fnmatch(file.rfilename, p) for p in need.files or ("*",))]
    sizes = [file.size for file in wanted]
    licence = getattr(info.card_data, "license_name", None) or getattr(info.card_data, "license", None)
    known = bool(sizes) and None not in sizes
    return replace(
        need,
        size=sum(sizes) if known else need.size,
        at_least=need.at_least and not known,
        gated=bool(info.gated),
        revision=need.revision or info.sha,
        licence=need.licence or (str(licence) if licence else None),
    )


def unreachable() -> tuple[type[Exception], ...]:
    """What is raised where nobody answers: errors of the HTTP client below the hub's are no ``OSError``."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)))


def download(need: Need) -> str:
    """Get what is lacking of a model or a file of a data set into the hub's cache; where it then lies.

    Raises:
        UserError: it cannot be had, for one because its licence is not accepted yet.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    options: dict[str, Any] = {"repo_type": "dataset" if need.kind == "data set" else "model"}
    if need.files:
        options["allow_patterns"] = list(need.files)
    broken: tuple[type[Exception], ...] = (ValueError, *unreachable())
    try:
        return str(snapshot_download(need.name, revision=need.revision, **options))
    except GatedRepoError as error:
        raise UserError(
            f"{need.name} is gated: accept its licence at {need.page} and log in with `hf auth login`, then ask again"
        ) from error
    except broken as error:
        raise UserError(f"{need.name} cannot be downloaded: {_first_line(error)}") from error


def download_all(needs: Iterable[Need]) -> Iterator[tuple[Need, str]]:
    """Download what is not there, one after the other, yielding each with what became of it."""
    for need in needs:
        if need.kind not in ON_HUB or need.is_here or not (need.files or need.kind == "model"):
            continue
        try:
            yield need, f"is at {download(need)}"
        except UserError as error:
            yield need, str(error)


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
