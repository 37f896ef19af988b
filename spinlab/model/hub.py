"""Fetch a checkpoint from the hub, or find it in the hub's local cache, at the commit to cite."""

import logging
from functools import cache
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of httpx or httpx2, by version  # pyright: ignore[reportPrivateImportUsage]
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from spinlab.errors import InputError
from spinlab.model.files import ADAPTER, INDEX, SETTINGS, SINGLE, TOKENIZER, shards_of

log = logging.getLogger(__name__)

_PATIENCE = 10.0  # seconds for the hub to answer, once: its client would try for minutes


@cache
def snapshot(hub: str, revision: str) -> Path:
    """Return the folder of a repository's checkpoint in the hub cache; its name is the commit.

    `revision` is a branch, a tag or a commit. What lacks is downloaded; a hub that does not answer
    is asked once, and the local copy stands in for it. Raises InputError where there is none.
    """
    if not revision or ".." in revision or revision.startswith("/"):
        raise InputError(f"model.revision={revision} is no name of a branch, a tag or a commit")
    refusal = _ask(hub, revision)
    try:
        wanted = [*SETTINGS, *TOKENIZER, ADAPTER[0], SINGLE, INDEX]
        folder = _download(hub, revision, wanted, refusal)
        if (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
            folder = _download(hub, folder.name, shards_of(folder / INDEX), refusal)
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise InputError(_sentence(hub, revision, refusal or error)) from error
    if refusal is not None:
        if not any((folder / name).is_file() for name in (SINGLE, INDEX)):
            raise InputError(_sentence(hub, revision, refusal))
        log.info("%-12s %s is taken from the hub's local cache", "model", hub)
    return folder


def _ask(hub: str, revision: str) -> Exception | None:
    """Ask the hub for a repository; return why it cannot be had from there, if so."""
    try:
        HfApi().model_info(hub, revision=revision, timeout=_PATIENCE)
    except HFValidationError as error:
        raise InputError(
            f"model.hub={hub} is no repository's name, which is owner/name: a folder is given as "
            "model.path"
        ) from error
    except (HTTPError, OfflineModeIsEnabled) as error:
        return error
    return None


def _download(hub: str, revision: str, names: list[str], refusal: Exception | None) -> Path:
    """Return the snapshot folder, with these files in it as far as the repository has them."""
    return Path(
        snapshot_download(
            hub,
            revision=revision,
            allow_patterns=names,
            etag_timeout=_PATIENCE,
            local_files_only=refusal is not None,
        )
    )


def _sentence(hub: str, revision: str, error: Exception) -> str:
    """Say why a repository cannot be had, and what to do about it."""
    local = "give a local copy as model.path=/a/local/folder"
    if isinstance(error, GatedRepoError):
        return (
            f"model.hub={hub} is gated: ask for access there and log in (hf auth login), or {local}"
        )
    if isinstance(error, RepositoryNotFoundError):
        return f"model.hub={hub} does not exist, or is private: log in (hf auth login), or {local}"
    if isinstance(error, RevisionNotFoundError):
        return f"model.hub={hub} has no model.revision={revision}: name a branch, a tag or a commit"
    if isinstance(error, OfflineModeIsEnabled):
        why = "the hub is switched off (HF_HUB_OFFLINE)"
    else:
        said = str(error).partition("\n")[0] or type(error).__name__
        why = f"the hub cannot be reached ({said})"
    return (
        f"model.hub={hub} at {revision} is not, or not whole, in the local cache, and {why}: "
        f"connect once, {local}, or set model.weights=random for shapes only"
    )
