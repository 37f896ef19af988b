"""Which files of a checkpoint folder are read, and the sentences for those that cannot be."""

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from spinlab.errors import InputError

CONFIG = "config.json"
GENERATION = "generation_config.json"
SETTINGS = (CONFIG, GENERATION)
MANIFEST = "transform.safetensors"  # of a transformed model: what its weights lack
LISTING = "manifest.json"  # of every other export: what it is, and its files
EXPORTED = "spinlab"  # entry of an export's config: the manifest that belongs to it
SINGLE = "model.safetensors"  # comes before an index, as in transformers
INDEX = "model.safetensors.index.json"
ADAPTER = ("adapter_config.json", "adapter_model.*")
VOCABULARY = ("tokenizer.json", "*.model", "tokenizer.model.*", "vocab.json", "tekken.json")
TOKENIZER = (
    *VOCABULARY,
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    "chat_template*",
)
_POINTER = b"version https://git-lfs"
_BOM = b"\xef\xbb\xbf"


def check_folder(place: str, folder: Path) -> None:
    """Raise InputError unless a folder looks like a checkpoint of a whole model."""
    if folder.is_file():
        raise InputError(f"{place} is a file: give the folder that holds {CONFIG} and the weights")
    try:
        names = sorted(file.name for file in folder.iterdir())
    except FileNotFoundError:
        hint = " (a hub repository is model.hub=owner/name)" if len(folder.parts) == 2 else ""
        raise InputError(f"{place} does not exist: give a folder with {CONFIG}{hint}") from None
    except OSError as error:
        raise InputError(f"{place} cannot be read: {error.strerror}") from error
    adapters = [file.name for file in files_like(folder, ADAPTER)]
    if adapters:
        raise InputError(
            f"{place} holds an adapter ({adapters[0]}), which is not applied: merge it into its "
            "base model and save that, or move it elsewhere"
        )
    if CONFIG not in names:
        inside = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}"))
        hint = f"; did you mean its folder {inside[0]}?" if inside else ""
        raise InputError(f"{place} holds no {CONFIG}: give a checkpoint folder{hint}")


def files_like(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Return the files of a folder whose names follow one of the patterns, in order."""
    return sorted({f for pattern in patterns for f in folder.glob(pattern) if f.is_file()})


def weights_of(place: str, folder: Path) -> list[Path]:
    """Return the files that the weights are read from, as transformers chooses them.

    Raises InputError where there are none, where an index names others than lie in the folder, and
    for a folder that newer transformers would read otherwise.
    """
    if split := files_like(folder, ["shard-*-model-*-of-*.safetensors"]):
        raise InputError(
            f"{place} holds parts of a distributed checkpoint ({split[0].name}): save it as a whole"
        )
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise InputError(f"{place} holds no {SINGLE} and no {INDEX}: {_instead(folder)}")
    shards = [folder / name for name in shards_of(folder / INDEX)]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise InputError(
            f"{place} lacks {missing[0]}, one of {len(shards)} files that {INDEX} names: copy or "
            "download it again"
        )
    return shards


def shards_of(index: Path) -> list[str]:
    """Return the names of the files that an index of shards lists, without repetition."""
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise InputError(f"{index} lists no shards (weight_map): copy or download it again")
    names = sorted(set(map(str, placed.values())))
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or path.suffix != ".safetensors":
            raise InputError(
                f"{index} names {name}, which is no *.safetensors file in its folder: only those "
                "are read"
            )
    return names


def _instead(folder: Path) -> str:
    """Say what the weights of a folder without readable ones may be, and the cure."""
    if (folder / LISTING).is_file():
        return "it is an exported network, so load it with spinlab.load, or name its original"
    if (folder / SINGLE).is_symlink():
        return f"{SINGLE} is a link to nothing, so copy or download it again"
    names = [file.name for file in folder.iterdir()]
    if any(name.startswith("model-0") and name.endswith(".safetensors") for name in names):
        return f"it has shards, so copy {INDEX} beside them"
    if any(name.startswith("consolidated") for name in names):
        return (
            "consolidated.* is another layout, so take the repository's transformers files or "
            "convert it"
        )
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return "pickled weights are not read, so save the model with safe serialization"
    return "give a folder with the weights as safetensors"


def read_bytes(file: Path, most: int = -1) -> bytes:
    """Read a file, or its first bytes; raise InputError where it cannot be or is a pointer."""
    try:
        with file.open("rb") as stream:
            found = stream.read(most)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    if found.startswith(_POINTER):
        raise InputError(
            f"{file} is a Git LFS pointer and not the file itself: run `git lfs pull` in its folder"
        )
    return found


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; raise InputError for anything else."""
    content = read_bytes(file)
    if content.startswith(_BOM):
        raise InputError(f"{file} starts with a byte order mark: save it as UTF-8 without one")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is no JSON ({error}): copy or download it again") from error
    if not isinstance(found, dict):
        raise InputError(f"{file} holds a {type(found).__name__}, not settings by name")
    return found
