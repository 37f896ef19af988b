"""Texts in their roles, calibration and evaluation, as tokens and as windows of tokens.

`wiki` and `c4` are packaged excerpts, not the published WikiText-2 or C4 splits, and are never
called by those names. `wikitext2` is the published split, from the hub. A file is called by its
name, with the suffix. What is held out for choices is neither calibration nor evaluation text, and
its label ends in `_dev`.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from spinlab.assets import packaged_file
from spinlab.config import DataConfig
from spinlab.data.files import read_file
from spinlab.data.hub import hub_or_cache
from spinlab.errors import InputError

_PACKAGE = "exllamav3"
_FOLDER = "exllamav3/conversion/standard_cal_data"
_SHORTEST_ARTICLE = 200  # characters; shorter ones are stubs
_C4_LENGTH, _C4_END = 120_000, 420_000  # what is held out, and where the last of it ends
_DEVELOPMENT = "_dev"


class _Cut(NamedTuple):
    """Say where a text is cut: tenths that calibrate, the next one is held out, and their names."""

    tenths: int
    parts: tuple[str, str]
    c4: int  # the first character that is held out
    wikitext2: str  # the published split that is held out

    def places(self, length: int) -> tuple[int, int]:
        """Return where calibration ends and where what is held out ends."""
        return length * self.tenths // 10, length * (self.tenths + 1) // 10


_CUTS = {
    "evaluation": _Cut(9, ("first 90 %", "last 10 %"), 300_000, "test"),
    "development": _Cut(8, ("first 80 %", "80 to 90 %"), 180_000, "validation"),
}
Parts = tuple[str, str]  # what calibrates, what is held out


@dataclass(frozen=True)
class Text:
    """Hold a text in one role: what it is called, which part of its source it is, and itself."""

    label: str
    part: str
    text: str

    @property
    def digest(self) -> str:
        """The sha256 of the text, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def _packaged(name: str) -> str:
    return packaged_file(_PACKAGE, f"{_FOLDER}/{name}.utf8").read_text(encoding="utf-8")


def _wiki(at: _Cut) -> Parts:
    """Split by articles."""
    blocks = (block.strip() for block in _packaged("wiki").split("</doc>"))
    articles = [block.partition("\n")[2].strip() for block in blocks]  # the first line is a tag
    articles = [a for a in articles if len(a) > _SHORTEST_ARTICLE]
    cut, end = at.places(len(articles))
    return "\n\n".join(articles[:cut]), "\n\n".join(articles[cut:end])


def _c4(at: _Cut) -> Parts:
    text, start = _packaged("c4"), at.c4
    return text[:start] + text[_C4_END:], text[start : start + _C4_LENGTH]


def _wikitext2(at: _Cut) -> Parts:
    from datasets import load_dataset

    def join(split: str) -> str:
        try:
            rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
        except (OSError, ValueError) as error:  # what datasets raises without a connection
            raise InputError(
                "text wikitext2 is not in the local cache, and the hub cannot be reached: connect "
                "once, or use data=packaged, or name files: data.calibration=/my/train.txt "
                "data.evaluation=[/my/test.txt]"
            ) from error
        return "\n\n".join(rows["text"])

    with hub_or_cache():
        return join("train"), join(at.wikitext2)


TEXTS: Mapping[str, Callable[[_Cut], Parts]] = {
    "wiki": _wiki,
    "c4": _c4,
    "wikitext2": _wikitext2,
}


def read_texts(config: DataConfig) -> tuple[Text, list[Text]]:
    """Return the calibration text and the texts that are measured.

    A named text has a part for either role. A file is used whole; one that plays both roles, known
    by its content, is cut in tenths of its characters. Raises InputError for unknown names, missing
    packages, files without text, and texts that would be called alike.
    """
    check_labels(config)
    at = _CUTS[config.held_out]
    names = dict.fromkeys((config.calibration, *config.evaluation))
    splits = {name: TEXTS[name](at) for name in names if name in TEXTS}
    whole = {name: read_file(_path(name)) for name in names if name not in TEXTS}
    both = {whole[n] for n in config.evaluation if n in whole} & {whole.get(config.calibration)}

    def text(name: str, role: int) -> Text:
        called = label(name, config.held_out) if role else label(name)
        if name in splits:
            part = f"{('calibration', config.held_out)[role]} split"
            return Text(called, part, splits[name][role])
        content = whole[name]
        if content not in both:
            return Text(called, "whole", content)
        cut, end = at.places(len(content))
        return Text(called, at.parts[role], (content[:cut], content[cut:end])[role])

    return text(config.calibration, 0), [text(name, 1) for name in config.evaluation]


def calibration_split(name: str) -> str:
    """Return the part of a named text that calibrates before anything is reported."""
    return TEXTS[name](_CUTS["evaluation"])[0]


def source_of(label: str) -> tuple[str, str]:
    """Return what a label of a measured text tells: the text's name, and what is held out."""
    name = label.removesuffix(_DEVELOPMENT)
    return name, "evaluation" if name == label else "development"


def label(name: str, held_out: str = "evaluation") -> str:
    """Return how a text is called in metrics: its name, or a file's without folders.

    What choices are made on is told from what is reported, a whole file too.
    """
    ending = _DEVELOPMENT if held_out == "development" else ""
    return (name if name in TEXTS else _path(name).name) + ending


def check_labels(config: DataConfig) -> None:
    """Raise InputError where two texts, or a file and a named text, would be called alike."""
    for name in (config.calibration, *config.evaluation):
        if name not in TEXTS and source_of(label(name))[0] in TEXTS:
            raise InputError(
                f"the file {name} would be called {label(name)}, as one of the named texts: give "
                "it another name, or a suffix"
            )
    called: dict[str, str] = {}
    for name in config.evaluation:
        if other := called.get(label(name)):
            raise InputError(
                f"data.evaluation: {other} and {name} would both be called {label(name)}: give one "
                "of them another name, or link it under another"
            )
        called[label(name)] = name


def _path(name: str) -> Path:
    """Return the path of a user's file; raise InputError for what is neither file nor name."""
    path = Path(name).expanduser()
    if path.suffix or len(path.parts) > 1 or path.exists():
        return path
    raise InputError(f"text {name!r} is unknown: choose {', '.join(TEXTS)} or the path of a file")


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Return the token ids of a text as one int64 row, with the tokenizer's own BOS, if any."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def fixed_windows(tokens: torch.Tensor, length: int, most: int | None, name: str) -> torch.Tensor:
    """Cut tokens (N,) into (n, length) windows without overlap; the tail is dropped."""
    check_length(tokens, length, name, "eval.window")
    count = len(tokens) // length
    count = count if most is None else min(count, most)
    return tokens[: count * length].view(count, length)


def random_windows(
    tokens: torch.Tensor, length: int, count: int, generator: torch.Generator
) -> torch.Tensor:
    """Draw (count, length) windows from tokens (N,), uniformly and with replacement."""
    starts = torch.randint(0, len(tokens) - length + 1, (count,), generator=generator)
    return tokens[starts[:, None] + torch.arange(length)]


def check_length(tokens: torch.Tensor, length: int, name: str, setting: str) -> None:
    """Raise InputError for a text of tokens (n,) that is shorter than one window."""
    if len(tokens) < length:
        raise InputError(
            f"text {name!r} has {len(tokens)} tokens, fewer than one window of {length}: lower "
            f"{setting} or take a longer text"
        )
