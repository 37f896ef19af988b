"""What a model says of its license, for the cards of what is made of it.

Fields are those of a model card on the hub: `license`, for one without a short name there also
`license_name` and `license_link`.
"""

import logging
import re
from collections.abc import Mapping
from functools import cache
from itertools import dropwhile
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from huggingface_hub import HfApi, metadata_load
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # of httpx or httpx2, by version  # pyright: ignore[reportPrivateImportUsage]
    OfflineModeIsEnabled,
)
from yaml import YAMLError

from spinlab.config import ModelConfig
from spinlab.model.checkpoint import checkpoint_of
from spinlab.model.gguf import gguf_of

log = logging.getLogger(__name__)

_CARD, _FILES = "README.md", ("LICENSE", "LICENSE.txt", "LICENSE.md")
_FIELDS = ("license", "license_name", "license_link")
_PATIENCE = 10.0  # seconds for the hub to answer, once
_MARKS = " \t#*=-"  # around a title
# lines that may stand before the beginning of a license
_BEFORE = re.compile(r"(copyright|\(c\)|©)[^\n]*|licen[cs]e")
# with what lines licenses begin, by their short name on the hub
_BEGINNINGS = {
    "apache-2.0": r"apache license,?\sversion 2\.0(, january 2004)?\n",
    "mit": r"(the )?mit license( \(mit\))?\n"
    r"|permission is hereby granted, free of charge, to any person\sobtaining",
    **{f"llama3.{n}": rf"llama 3\.{n} community license agreement\n" for n in (1, 2, 3)},
    "llama3": r"(meta )?llama 3 community license agreement\n",
    "llama2": r"llama 2 community license agreement\n",
}


def license_of(config: ModelConfig, converted: Path | None = None) -> dict[str, str]:
    """Return the fields of a pretrained model's license; none where it does not tell.

    A packaged GGUF tells in its metadata. Of a folder the head of its README.md counts, else the
    text of its LICENSE, where that is one of a few that are known. The hub is asked where neither
    is in its local cache. converted: as of `spinlab.model.load.load_model`.
    """
    if config.weights == "random":
        return {}
    if config.is_gguf:
        return _of_gguf(gguf_of(config))
    checkpoint = checkpoint_of(config, converted)
    found = _of_card(checkpoint.folder / _CARD)
    if found is not None:
        return found
    found = _of_text(checkpoint.folder)
    if found or "hub" not in checkpoint.origin:
        return found
    return _of_hub(checkpoint.origin["hub"], checkpoint.origin["commit"])


def with_license(
    record: Mapping[str, Any], config: ModelConfig, converted: Path | None
) -> dict[str, Any]:
    """Return what a run's record tells, and of its model the license, which exports pass on.

    Whatever keeps it from being looked up is logged: a run is finished by then, and stays so.
    """
    try:
        found = license_of(config, converted)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        log.warning("the license of the model cannot be looked up: %.200s", reason)
        found = {}
    return {**record, "model": {**record.get("model", {}), "license": found}}


def _of_gguf(file: Path) -> dict[str, str]:
    fields = GGUFReader(file).fields
    found = {name: fields.get(f"general.{name.replace('_', '.')}") for name in _FIELDS}
    return _chosen({name: field and field.contents() for name, field in found.items()})


def _of_card(file: Path) -> dict[str, str] | None:
    """Return what the head of a README.md says; None where it says nothing.

    One that says something else than one license, as several, has the last word all the same.
    """
    if not file.is_file():
        return None
    try:
        head = metadata_load(file) or {}
        return _chosen(head) if any(head.get(name) for name in _FIELDS) else None
    except (YAMLError, ValueError) as error:
        log.warning("%s: its head cannot be read, and so its license is not known: %s", file, error)
        return {}


def _of_text(folder: Path) -> dict[str, str]:
    """Return the license whose text lies in a folder, if it begins as one that is known."""
    for file in (folder / name for name in _FILES if (folder / name).is_file()):
        head = _beginning(file.read_text(encoding="utf-8-sig", errors="replace"))
        for name, beginning in _BEGINNINGS.items():
            if re.match(beginning, head):
                return {"license": name}
    return {}


def _beginning(text: str) -> str:
    """Return the first lines of a license, behind a title and whose copyright it is."""
    lines = (" ".join(line.strip(_MARKS).split()) for line in text.lower().splitlines())
    kept = list(dropwhile(_BEFORE.fullmatch, filter(None, lines)))
    return "\n".join([*kept[:3], ""])


@cache
def _of_hub(hub: str, commit: str) -> dict[str, str]:
    """Ask the hub, once for all exports; nothing where it does not answer."""
    try:
        card = HfApi().model_info(hub, revision=commit, timeout=_PATIENCE).card_data
    except (HfHubHTTPError, HTTPError, OfflineModeIsEnabled) as error:
        log.warning("the hub does not tell the license of %s: %s", hub, error)
        return {}
    return _chosen(card.to_dict() if card else {})


def _chosen(told: Mapping[str, Any]) -> dict[str, str]:
    """Return the fields of a license that are told; a link to a file beside it leads nowhere."""
    found = {name: told[name] for name in _FIELDS if isinstance(told.get(name), str)}
    if not found.get("license"):
        return {}
    if not found.get("license_link", "https://").startswith("https://"):
        del found["license_link"]
    return found
