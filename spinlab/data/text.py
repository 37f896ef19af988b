"""Named texts, split into a calibration and an evaluation part, and cut into windows of tokens.

`wiki` and `c4` are packaged excerpts, not the published WikiText-2 or C4 splits, and are never
called by those names. `wikitext2` is the published split, from the hub.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from spinlab.data.assets import packaged_file
from spinlab.errors import InputError

_PACKAGE = "exllamav3"
_FOLDER = "exllamav3/conversion/standard_cal_data"
_SHORTEST_ARTICLE = 200  # characters; shorter ones are stubs
_C4_HELD_OUT = (300_000, 420_000)  # characters


def _packaged(name: str) -> str:
    return packaged_file(_PACKAGE, f"{_FOLDER}/{name}.utf8").read_text(encoding="utf-8")


def _wiki() -> tuple[str, str]:
    """Split by articles: the first 90 % calibrate, the last 10 % are held out."""
    blocks = (block.strip() for block in _packaged("wiki").split("</doc>"))
    articles = [block.partition("\n")[2].strip() for block in blocks]  # the first line is a tag
    articles = [a for a in articles if len(a) > _SHORTEST_ARTICLE]
    cut = len(articles) * 9 // 10
    return "\n\n".join(articles[:cut]), "\n\n".join(articles[cut:])


def _c4() -> tuple[str, str]:
    text, (start, end) = _packaged("c4"), _C4_HELD_OUT
    return text[:start] + text[end:], text[start:end]


def _wikitext2() -> tuple[str, str]:
    from datasets import load_dataset

    def join(split: str) -> str:
        try:
            rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
        except (OSError, ValueError) as error:  # what datasets raises without a connection
            raise InputError(
                "text wikitext2 cannot be loaded from the hub: connect once, or use data=packaged"
            ) from error
        return "\n\n".join(rows["text"])

    return join("train"), join("test")


def _own_file(name: str) -> tuple[str, str]:
    path = Path(name).expanduser()
    if not path.is_file():
        raise InputError(f"text file {name} does not exist: name a .txt file or one of {_NAMES}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"text file {name} is not UTF-8: convert it first") from None
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


TEXTS: Mapping[str, Callable[[], tuple[str, str]]] = {
    "wiki": _wiki,
    "c4": _c4,
    "wikitext2": _wikitext2,
}
_NAMES = ", ".join(TEXTS)


def read_text(name: str) -> tuple[str, str]:
    """Return (calibration, evaluation) parts of a named text or of a user's .txt file.

    A user's file is cut at 90 % of its characters. Raises InputError for unknown names and
    missing packages.
    """
    if name in TEXTS:
        return TEXTS[name]()
    if name.endswith(".txt"):
        return _own_file(name)
    raise InputError(f"text {name!r} is unknown: choose {_NAMES} or the path of a .txt file")


def label(name: str) -> str:
    """Return how a text is called in metrics: its name, or a file's name without folders."""
    return name if name in TEXTS else Path(name).stem


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Return the token ids of a text as one int64 row, with the tokenizer's own BOS, if any."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def fixed_windows(tokens: torch.Tensor, length: int, most: int | None, name: str) -> torch.Tensor:
    """Cut tokens (N,) into (n, length) windows without overlap; the tail is dropped."""
    count = len(tokens) // length
    if count == 0:
        raise InputError(
            f"text {name!r} has {len(tokens)} tokens, fewer than one window of {length}: "
            "shorten the window or take a longer text"
        )
    count = count if most is None else min(count, most)
    return tokens[: count * length].view(count, length)


def random_windows(
    tokens: torch.Tensor, length: int, count: int, generator: torch.Generator, name: str
) -> torch.Tensor:
    """Draw (count, length) windows from tokens (N,), uniformly and with replacement."""
    if len(tokens) < length:
        raise InputError(
            f"text {name!r} has {len(tokens)} tokens, fewer than one window of {length}: "
            "shorten the window (sequence_length) or take a longer text"
        )
    starts = torch.randint(0, len(tokens) - length + 1, (count,), generator=generator)
    return tokens[starts[:, None] + torch.arange(length)]
