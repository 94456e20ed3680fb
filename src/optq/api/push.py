# SPDX-License-Identifier: Apache-2.0
"""`optq.push`: upload a finished checkpoint to the Hub in one commit, so that no download gets half of it."""

import logging
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # the latter of httpx, in the version it uses

from optq.errors import CheckpointError, HubError, OptqError, ReportError
from optq.events import LOG_NAME
from optq.files.source import COMPANIONS, files_of, leads_out, place_of
from optq.reading import text_of
from optq.version import __version__

from .card import card

logger = logging.getLogger(__name__)

REMEDIES = {
    401: "Log in with `hf auth login`, or give a token that is valid and may write.",
    403: "Use a token that may write there, or a name of your own; to a gated one, ask for access on its page.",
    404: "Check the name, and that the token may see it.",
}
"""What to do, by the status that the Hub has answered with."""


def push(folder: str | os.PathLike[str], repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload a finished checkpoint to the Hub.

    Weights, config, tokenizer, chat template, generation config, custom code, licence and model card go there in one
    commit, which also removes the weights that were there before. The card is made for the new name, unless the
    folder's README.md is no longer the one that optq wrote: then it is uploaded as it is. The log of the run is not
    uploaded, since it may name folders of this machine. Nothing in the folder changes.

    Args:
        folder: the checkpoint's.
        repo_id: USER/NAME; is created if it does not exist.
        private: only its owners see it. An existing repository stays as public as it is.
        token: by default the one of `hf auth login` or of HF_TOKEN.
    Returns:
        The repository's address.
    Raises:
        CheckpointError: the folder holds no finished checkpoint, or links to files outside of it.
        ReportError: it holds neither a README.md nor the log to make one from.
        HubError: the Hub refuses, or cannot be reached. The same call again uploads what is not there yet.
    """
    folder = Path(place_of(folder))
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{str(folder)!r} holds no config.json, so it is no finished checkpoint. Name the folder that "
            "optq.quantize returned; what was interrupted is finished by the same call again."
        )
    contents: dict[str, Any] = {path.name: path for path in files_of(folder, (*COMPANIONS, "*.safetensors"))}
    if outside := [path.name for path in contents.values() if leads_out(path)]:
        raise CheckpointError(
            f"{str(folder)!r} holds links to files outside of it: {', '.join(outside[:5])}. Nothing outside of the "
            "folder is uploaded; put copies in their place, or remove them."
        )
    command = shlex.join(["optimum-cli", "gptq", "push", str(folder), repo_id, *(["--private"] if private else [])])
    logger.info("Uploading to %s; if that is interrupted, go on with: %s", repo_id, command)
    api = _api(token)
    with _explained(f"Uploading {folder} to {repo_id}", f"{folder} is whole and unchanged; go on with: {command}"):
        repository = _claimed(api, repo_id, private)
        contents["README.md"] = _readme(folder, repository.repo_id)
        stale = [
            name
            for name in api.list_repo_files(repository.repo_id)
            if fnmatch(name, "*.safetensors*") and "/" not in name and name not in contents
        ]
        added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in contents.items()]
        removed = [CommitOperationDelete(path_in_repo=name) for name in stale]
        api.create_commit(
            repository.repo_id, [*added, *removed], commit_message=f"GPTQ checkpoint made by optq {__version__}"
        )
    return str(repository)


def claim(repo_id: str, *, private: bool = False, token: str | None = None) -> None:
    """Create a repository if there is none, and make sure that it can be written to: before long work.

    Raises:
        HubError: it cannot.
    """
    with _explained(f"Claiming {repo_id}", "Nothing was begun."):
        _claimed(_api(token), repo_id, private)


def _api(token: str | None) -> Any:
    return HfApi(token=token, library_name="optq", library_version=__version__)


def _claimed(api: Any, repo_id: str, private: bool) -> Any:
    """The repository's address, as an object that also knows its full name."""
    # None instead of False: some organisations have set that what they create is private.
    repository = api.create_repo(repo_id, exist_ok=True, private=private or None)
    api.auth_check(repository.repo_id, write=True)  # create_repo is content if one that exists can be read
    if private and not api.model_info(repository.repo_id).private:
        raise HubError(
            f"A private repository was asked for, but {repository.repo_id} exists and is public. Make it private in "
            "its settings, or choose another name; nothing was uploaded."
        )
    return repository


def _readme(folder: Path, repo_id: str) -> Path | bytes:
    """The folder's own, if it is not just the card that optq has written, else the card with the name on the Hub."""
    own, has_log = folder / "README.md", (folder / LOG_NAME).exists()
    if own.exists() and not (has_log and text_of(own) == card(folder)):
        logger.info("README.md is uploaded as it is: it is not the one that optq would write.")
        return own
    if not has_log:
        raise ReportError(
            f"{str(folder)!r} holds neither a README.md nor {LOG_NAME} to make one from. Write one first."
        )
    return card(folder, repo_id=repo_id).encode()


@contextmanager
def _explained(asked: str, afterwards: str) -> Iterator[None]:
    """What huggingface_hub and its transports raise, as one error that says what to do."""
    try:
        yield
    except OptqError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        of_one_file = isinstance(error, RuntimeError) and error.__cause__ is not None
        cause, where = (error.__cause__, f" ({error})") if of_one_file else (error, "")
        found, remedy = f"{type(cause).__name__}: {cause}", ""
        if isinstance(cause, HfHubHTTPError):
            status, said = cause.response.status_code, cause.server_message or cause.response.reason_phrase
            found, remedy = f"the Hub answered {status}: {said}", REMEDIES.get(status, "Try again later.") + " "
        elif not isinstance(cause, ValueError):  # which says itself what is wrong with a name or a card
            remedy = "Check the connection and HF_ENDPOINT. "
        raise HubError(f"{asked} failed{where}: {found.rstrip('.')}. {remedy}{afterwards}") from error
