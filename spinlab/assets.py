"""Files that installed packages carry, found without importing the package."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import spinlab
from spinlab.errors import InputError


def packaged_file(package: str, file: str) -> Path:
    """Return the path of a file inside an installed distribution; raise InputError if missing."""
    path = _located(package, file)
    if not path.is_file():
        raise InputError(f"{package} lacks {file}: run `make setup` to install the pinned version")
    return path


def packaged_folder(package: str, folder: str) -> Path:
    """Return the path of a folder inside a distribution, spinlab's own among them."""
    path = _located(package, folder)
    if not path.is_dir():
        raise InputError(f"{package} has no folder {folder}: name one, or a .gguf file")
    return path


def _located(package: str, name: str) -> Path:
    if package == "spinlab":  # an editable install leaves its files where they are
        return Path(spinlab.__file__).parent.parent / name
    try:
        return Path(str(distribution(package).locate_file(name)))
    except PackageNotFoundError:
        raise InputError(f"the data package {package} is not installed: run `make setup`") from None
