"""Put a folder on the hub, for whoever asks for that by its own flag."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from vipo.errors import UserError
from vipo.fetch.hub import SECONDS, unreachable
from vipo.secrets import redacted, remember

MESSAGE = "Export of a policy trained with vipo"


@dataclass(frozen=True)
class Repository:
    """Where a folder goes.

    Args:
        name: OWNER/NAME.
        is_there: already, rather than to be made.
        public: for everybody to see.
    """

    name: str
    token: str = field(repr=False)
    is_there: bool
    public: bool

    def __str__(self) -> str:
        new = "there already" if self.is_there else "new"
        return f"{self.name} ({new}, {'public' if self.public else 'private'})"


def find_repository(name: str, *, public: bool) -> Repository:
    """Ask the hub about a model's repository, of which nothing is changed.

    Raises:
        UserError: there is no token, or that is no OWNER/NAME; the hub cannot be reached; the repository is there and
            public where that was not asked, or the other way round.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"{name!r} is no repository of the hub; give --push OWNER/NAME")
    token = get_token()
    if not token:
        raise UserError("--push needs a token that may write; log in with `hf auth login`, or set HF_TOKEN")
    remember(token)
    with _told(f"nothing is exported, because the hub does not tell about {name}"):
        try:
            private = bool(HfApi(token=token).model_info(name, timeout=SECONDS).private)
        except RepositoryNotFoundError:
            return Repository(name, token, False, public)
    if not private and not public:
        raise UserError(f"{name} is there already and public; add --public, or choose another name for --push")
    if private and public:
        raise UserError(f"{name} is there already and private; leave out --public, or make it public on its page")
    return Repository(name, token, True, public)


def what_is_uploaded(folder: Path) -> list[str]:
    """A line for each file, with its size."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [f"{path.relative_to(folder)} ({path.stat().st_size:,} bytes)" for path in files]


def upload(folder: Path, repository: Repository) -> str:
    """Upload all files of a folder into a repository, made if it is not there; where they then are.

    Raises:
        UserError: the hub does not take it, or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=repository.token)
    with _told(f"{str(folder)!r} is written, but not uploaded to {repository.name}"):
        if not repository.is_there:
            api.create_repo(repository.name, private=not repository.public)
        done = api.upload_folder(repo_id=repository.name, folder_path=folder, commit_message=MESSAGE)
        return str(done.repo_url)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Errors of the hub and its client as a sentence that begins with ``what``."""
    broken: tuple[type[Exception], ...] = (ValueError, *unreachable())
    try:
        yield
    except broken as error:
        why = redacted(" ".join(str(error).split()))[:200] or type(error).__name__
        raise UserError(f"{what}: {why}") from error
