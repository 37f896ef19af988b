"""The command of a record, with names in the place of what records do not tell."""

from collections.abc import Mapping
from typing import Any


def words_of_command(record: Mapping[str, Any]) -> list[str]:
    """Return the words that make a run again: its own, and what it was given by a path.

    Of a file of rotations its name is known, of a model's folder nothing.
    """
    words = list(record["overrides"])
    if "folder" in record.get("model", {}).get("source", {}):
        words.append("model.path=FOLDER_OF_THE_MODEL")
    if load := record.get("config", {}).get("rotation", {}).get("load"):
        words.append(f"rotation.load={load}")
    return words
