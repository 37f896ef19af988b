"""Upload an export to the hub: python -m spinlab.push FOLDER owner/name [--private] [--revision R]

Only a whole and unaltered export is uploaded, and of its folder only the files that it lists, in
one commit. A repository is made where there is none; one that holds an earlier export is brought to
this one; any other is left alone, also one that became another while it was looked at.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of httpx or httpx2, by version  # pyright: ignore[reportPrivateImportUsage]
    OfflineModeIsEnabled,
)

from spinlab.errors import InputError
from spinlab.export.identity import files_of, is_listed
from spinlab.export.listing import read_listing
from spinlab.model.files import LISTING, MANIFEST
from spinlab.streams import ending, keep_streams

_PUSHED = (
    "export.artefact, export.checkpoint and export.compressed_tensors write what can be pushed"
)
_OF_THE_HUB = {".gitattributes"}  # which every repository begins with


def push(folder: str | Path, name: str, private: bool = False, revision: str | None = None) -> str:
    """Upload an export to the repository `owner/name`; return the address of the commit.

    private: of a repository that is made for it. revision: a branch, made where there is none; main
    by default. Raises InputError for what is no whole export, for a repository that holds something
    else, and where the hub refuses or cannot be reached.
    """
    place, folder = str(folder), Path(folder).expanduser()
    if folder.is_file():
        raise InputError(f"{place} is a file: {_PUSHED}")
    if (folder / MANIFEST).is_file():
        raise InputError(f"{place} was written by export.transformed: {_PUSHED}")
    message = _message(read_listing(place, folder))
    files = files_of(folder) or set()
    if get_token() is None:
        raise InputError(
            "there is no token for the hub: log in with `hf auth login`, or set HF_TOKEN"
        )
    api = HfApi()
    with _sentences(name):
        api.create_repo(name, private=private, exist_ok=True)
        branch = revision or "main"
        made = api.revision_exists(name, branch)
        there = api.repo_info(name, revision=branch if made else None)
        if private and not there.private:
            raise InputError(
                f"{name} is there and public: name another repository, or leave out --private"
            )
        assert there.sha is not None  # of what is looked at, and of nothing else
        old = _files_there(api, name, there.sha)
        if not made:
            api.create_branch(name, branch=branch, revision=there.sha)
        added = [CommitOperationAdd(file, folder / file) for file in sorted(files)]
        gone = [CommitOperationDelete(file) for file in sorted(old - files)]
        done = api.create_commit(
            name,
            [*added, *gone],
            commit_message=message,
            revision=branch,
            parent_commit=there.sha,
        )
    return done.commit_url


def _message(about: Mapping[str, Any]) -> str:
    record = about["record"]
    told = {"experiment", "key"} <= record.keys()
    of_run = f" of {record['experiment']} ({record['key']})" if told else ""
    return f"Upload the {about['export']}{of_run}"


def _files_there(api: HfApi, name: str, commit: str) -> set[str]:
    """Return the files of the export that a commit holds; InputError where it holds others."""
    there = set(api.list_repo_files(name, revision=commit)) - _OF_THE_HUB
    own: set[str] = set()
    if LISTING in there:
        with TemporaryDirectory() as temporary:
            api.hf_hub_download(name, LISTING, revision=commit, local_dir=temporary)
            if is_listed(Path(temporary)):
                own = files_of(Path(temporary)) or set()
    if foreign := sorted(there - own):
        raise InputError(
            f"{name} holds {foreign[0]}, which is not of an earlier export: name another "
            "repository, or remove what is in it"
        )
    return there


@contextmanager
def _sentences(name: str) -> Iterator[None]:
    """Turn refusals of the hub into sentences, none of which quotes a request: it has the token."""
    try:
        yield
    except HFValidationError as error:
        raise InputError(f"{name} is no repository's name: write owner/name") from error
    except OfflineModeIsEnabled as error:
        raise InputError(
            "the hub is switched off (HF_HUB_OFFLINE): unset that to upload"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise InputError(
                "the hub does not know this token: log in again with `hf auth login`"
            ) from error
        if status in (403, 404):
            raise InputError(
                f"this token may not write to {name}: use one with write access, or another owner"
            ) from error
        if status == 412:
            raise InputError(
                f"{name} was changed by someone else meanwhile: run it again to look at it anew"
            ) from error
        said = (error.server_message or "").partition("\n")[0]
        reason = f"{status}, {said}" if said else str(status)
        raise InputError(f"the hub refused to take {name} ({reason}): try again later") from error
    except HTTPError as error:
        raise InputError(
            f"the hub cannot be reached ({type(error).__name__}): connect, and run it again"
        ) from error


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line; exit status 2 and one sentence for what a user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m spinlab.push", description="Upload a whole export to the hub."
    )
    parser.add_argument("folder", metavar="FOLDER", help="that an export wrote")
    parser.add_argument("name", metavar="owner/name", help="the repository, made if it is missing")
    parser.add_argument("--private", action="store_true", help="make it for its owner alone")
    parser.add_argument("--revision", metavar="R", help="branch, made if it is missing (main)")
    given = parser.parse_args(words)
    with ending("spinlab.push"):
        print(push(given.folder, given.name, given.private, given.revision))


if __name__ == "__main__":
    keep_streams()
    main()
