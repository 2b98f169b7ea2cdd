"""Models on the Hugging Face hub: one commit of a model's files, downloads, and errors in one line."""

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # its __init__ names them without saying so
    EntryNotFoundError,
    HFValidationError,
    validate_repo_id,
)

from segheads.card.card import CARD, addressed, is_edited
from segheads.errors import HubError, OptionError, SegheadsError
from segheads.pretrained import why_hub_is_out_of_reach

UPLOAD = "Upload a model of segheads"  # the message of a commit
MOST_WORDS = 300  # letters of what a server says
STATES = {
    401: "it does not know the token; log in anew with `hf auth login`, or set HF_TOKEN",
    403: "the token may not do that",
    404: "there is no such repository, file or revision, or none that the token may see",
    429: "it was asked too often; try again later",
}
log = logging.getLogger(__name__)


def upload(
    files: Mapping[str, Path],
    name: str,
    *,
    message: str,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool = False,
    new_card: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> CommitInfo:
    """Commit a model's files to its repository on the hub, which is made if need be.

    A card that was edited on the hub is kept unless the new one was edited, too: see `segheads.card`.

    Args:
        files: By the names that they shall have.
        name: `OWNER/NAME`, or `NAME` for the account of the token.
        message: Of the commit.
        private: Whether a new repository is private; None leaves that to the account's settings.
        token: Of the hub; None takes that of `hf auth login` or HF_TOKEN.
        branch: To commit to, made if need be; None means main.
        create_pr: Open a pull request instead.
        new_card: Replace a card that was edited on the hub, too.
        metadata: Fields of the card's front matter, such as `{"license": "mit"}`.

    Returns:
        The commit: its `commit_url`, `oid` and, of a pull request, `pr_url`.

    Raises:
        OptionError: If the name is none, or `private` is asked of a repository that is public.
        HubError: If there is no token, the hub is out of reach, or refuses; nothing was committed then.
    """
    check_name(name)
    token = token or huggingface_hub.get_token()
    if not token:
        raise HubError("the Hugging Face hub needs a token to upload; log in with `hf auth login`, or set HF_TOKEN")
    if cause := why_hub_is_out_of_reach():
        raise HubError(f"nothing was uploaded: {cause}")
    api = HfApi(token=token)
    with said_in_a_line(f"{name}: nothing was committed"):
        repo = api.create_repo(name, private=private, exist_ok=True).repo_id
        is_private = bool(api.model_info(repo).private)
        if private and not is_private:
            raise OptionError(f"{repo} is there and public; make it private on the hub, or leave out private")
        if branch is not None and not create_pr:
            api.create_branch(repo, branch=branch, exist_ok=True)
        contents: dict[str, Path | bytes] = dict(files)
        if CARD in files:
            card = addressed(files[CARD].read_text(encoding="utf-8"), repo, metadata or {})
            contents[CARD] = card.encode()
            if not new_card and not is_edited(card) and is_edited(_card_on_hub(api, repo, branch)):
                del contents[CARD]
                log.warning("%s of %s was edited on the hub and is kept; it may tell of other weights", CARD, repo)
        sizes = ", ".join(f"{file} ({_size(content)})" for file, content in contents.items())
        log.info("to %s/%s, %s: %s", api.endpoint, repo, "private" if is_private else "public", sizes)
        operations = [CommitOperationAdd(file, content) for file, content in contents.items()]
        return api.create_commit(repo, operations, commit_message=message, revision=branch, create_pr=create_pr)


def check_name(name: str) -> None:
    """Refuse what cannot be a repository's name.

    Args:
        name: `OWNER/NAME`, or `NAME`.

    Raises:
        OptionError: The message says what is wrong.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise OptionError(f"{name!r} is no name on the hub, OWNER/NAME: {_first_line(error)}") from error


def download(name: str, file: str, **options: Any) -> Path:
    """A file of a repository, from the cache where that has it.

    Args:
        name: `OWNER/NAME`.
        file: Of the repository.
        **options: Of huggingface_hub's `hf_hub_download`.

    Raises:
        HubError: If it cannot be had.
    """
    with said_in_a_line(file):
        return Path(huggingface_hub.hf_hub_download(name, file, **options))


@contextmanager
def said_in_a_line(what: str) -> Iterator[None]:
    """Say in one line why the hub did not do what it was asked.

    Args:
        what: What the message begins with.

    Raises:
        HubError: Instead of huggingface_hub's errors, and those of whichever library it asks with.
    """
    try:
        yield
    except SegheadsError:
        raise
    except Exception as error:
        raise HubError(f"{what}: {_reason(error)}") from error


def _reason(error: BaseException | None) -> str:
    """Why, from the answer of the server among an error and its causes, or else from the last of them."""
    last = error
    while error is not None:
        response = getattr(error, "response", None)
        if (status := getattr(response, "status_code", None)) is not None:
            words = STATES.get(status, "try again later" if status >= 500 else "it refuses")
            said = " ".join((getattr(error, "server_message", None) or "").split())[:MOST_WORDS]
            return f"the hub answers {status}{f' ({said})' if said else ''}: {words}"
        last, error = error, error.__cause__ or error.__context__
    return _first_line(last)


def _first_line(error: BaseException | None) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:MOST_WORDS]


def _card_on_hub(api: HfApi, repo: str, branch: str | None) -> str:
    """The card that is there; empty where there is none."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = api.hf_hub_download(repo, CARD, revision=branch, local_dir=folder)
        except EntryNotFoundError:
            return ""
        return Path(path).read_text(encoding="utf-8", errors="replace")


def _size(content: Path | bytes) -> str:
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
