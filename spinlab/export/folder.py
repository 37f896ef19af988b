"""A folder that an export fills: it appears at once and whole, and only what is its own goes.

In the place of an earlier export its files are replaced and others stay.
"""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from spinlab.config import Config
from spinlab.errors import InputError
from spinlab.export.identity import UNFINISHED, files_of, is_listed
from spinlab.export.targets import check_not_read, place_of, sole_writer, try_to_write
from spinlab.files import sync, write_json, writing
from spinlab.model.files import CONFIG, LISTING, MANIFEST


def check_folder(setting: str, target: Path, config: Config) -> None:
    """Raise InputError for a folder that holds something else, or that the model is read from."""
    check_not_read(setting, target, "model.path", config.model.path)
    _check_replaceable(setting, target)
    try_to_write(target)
    try_to_write(target.parent)  # where it is made before it gets its name


@contextmanager
def new_folder(setting: str, path: str) -> Iterator[Path]:
    """Yield an empty folder; what is there at the end takes its place at a path of the settings.

    setting: the name of the setting, as export.transformed. Raises InputError where the place holds
    something that is not of an earlier export.
    """
    folder = place_of(path)
    with writing(folder.parent, setting), sole_writer(folder) as partial:
        yield partial
        _install(partial, folder, f"{setting}={path}")


def _check_replaceable(setting: str, folder: Path) -> None:
    """Raise InputError for a folder that holds something, and no earlier export."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / MANIFEST).is_file() and not is_listed(folder):
        raise InputError(f"{setting} is there and no earlier export: name another folder")


def _install(partial: Path, folder: Path, setting: str) -> None:
    """Give a finished export its place, and leave alone what is not its own there."""
    _check_replaceable(setting, folder)
    new = [file.relative_to(partial) for file in partial.rglob("*") if file.is_file()]
    for name in new:
        (partial / name).chmod(partial.stat().st_mode & 0o666)  # safetensors: for its owner alone
        sync(partial / name)
    if not folder.exists() or not any(folder.iterdir()):
        os.replace(partial, folder)
        return
    old = {Path(name) for name in files_of(folder) or ()} or _files_of_earlier_version(folder, new)
    for name in {*new, *old}:
        if (folder / name).exists() and name not in old:
            raise InputError(f"{setting} holds {name}, which is not of the earlier export: move it")
        if not (folder / name).parent.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{setting} holds a link in the place of {name.parent}: take it away")
    if Path(LISTING) in new:
        _announce(folder, {*old, *new})
    # the config names the new manifest: until that is there too, the folder is no export
    order = {Path(CONFIG): 0, Path(MANIFEST): 2, Path(LISTING): 2}
    for name in sorted(new, key=lambda name: (order.get(name, 1), name)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / name, folder / name)
    for name in old - set(new):
        (folder / name).unlink(missing_ok=True)


def _announce(folder: Path, names: Collection[Path]) -> None:
    """List what is an export's own in a folder from now on, finished or not.

    Where the files of two exports lie beside each other, after a kill, the next one knows them.
    """
    listed = dict.fromkeys(sorted(map(Path.as_posix, names)), "")
    listed.pop(LISTING, None)
    write_json(folder / LISTING, {"spinlab": UNFINISHED, "files": listed})


def _files_of_earlier_version(folder: Path, new: list[Path]) -> set[Path]:
    """Return what an export that does not list its files must have written."""
    weights = (*folder.glob("model*.safetensors"), folder / "model.safetensors.index.json")
    return {*new, *(file.relative_to(folder) for file in weights)}
