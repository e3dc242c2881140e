"""Put a folder on the hub, for whoever asks for that by its own flag."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vipo.errors import UserError
from vipo.fetch.hub import SECONDS, unreachable
from vipo.secrets import redacted, remember

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MESSAGE = "Export of a policy trained with vipo"


def check_upload(repository: str) -> str:
    """The token that will be used.

    Raises:
        UserError: there is none, or that is no OWNER/NAME.
    """
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{repository!r} cannot be a repository: {' '.join(str(error).split())[:200]}") from error
    if repository.count("/") != 1:
        raise UserError(f"{repository!r} is no repository of the hub; give --push OWNER/NAME")
    token = get_token()
    if not token:
        raise UserError("--push needs a token that may write; log in with `hf auth login`, or set HF_TOKEN")
    remember(token)
    return token


def what_is_uploaded(folder: Path) -> list[str]:
    """A line for each file, with its size."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [f"{path.relative_to(folder)} ({path.stat().st_size:,} bytes)" for path in files]


def upload(folder: Path, repository: str, *, token: str, public: bool) -> str:
    """Upload all files of a folder into a model's repository, made if it is not there; where they then are.

    Raises:
        UserError: the hub does not take it, cannot be reached, or the repository is public and ``public`` was not asked.
    """
    from huggingface_hub import HfApi

    api, broken = HfApi(token=token), (ValueError, *unreachable())
    try:
        _make(api, repository, public)
        done = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=MESSAGE)
    except UserError:
        raise
    except broken as error:
        why = redacted(" ".join(str(error).split()))[:200] or type(error).__name__
        raise UserError(f"{str(folder)!r} is written, but not uploaded to {repository}: {why}") from error
    return str(done.repo_url)


def _make(api: HfApi, repository: str, public: bool) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        there = api.model_info(repository, timeout=SECONDS)
    except RepositoryNotFoundError:
        api.create_repo(repository, private=not public, exist_ok=True)
        return
    if not there.private and not public:
        raise UserError(f"{repository} is there already and public; add --public, or choose another name for --push")
    if there.private and public:
        raise UserError(f"{repository} is there already and private; leave out --public, or make it public on its page")
