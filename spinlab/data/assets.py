"""Files that installed packages carry, found without importing the package."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from spinlab.errors import InputError


def packaged_file(package: str, file: str) -> Path:
    """Return the path of a file inside an installed distribution; raise InputError if missing."""
    try:
        path = Path(str(distribution(package).locate_file(file)))
    except PackageNotFoundError:
        raise InputError(f"the data package {package} is not installed: run `make setup`") from None
    if not path.is_file():
        raise InputError(f"{package} lacks {file}: run `make setup` to install the pinned version")
    return path
