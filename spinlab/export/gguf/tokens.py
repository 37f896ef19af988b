"""A tokenizer as GGUF holds it: byte-level BPE, or SentencePiece's with byte fallback.

llama.cpp knows how a text is cut before merges by a name alone. It is found by comparing the
tokenizer's definition with those that the names stand for, and never guessed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from spinlab.errors import InputError
from spinlab.export.gguf.writer import Writer

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d"
_BEHIND = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"(?i:{_WORDS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_BEHIND}"
_QWEN2 = rf"(?i:{_WORDS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_BEHIND}"
_UNDERLINE = "\u2581"  # what SentencePiece writes for a space


def _split(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return {**split, "invert": False}


def _bytes(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}


# what cuts a text, whether whole words are looked up before merging, llama.cpp's name for it
_CUTS = (
    ([_bytes(True)], False, "gpt-2"),
    ([{"type": "Digits", "individual_digits": True}, _bytes(True)], False, "smollm"),
    ([_split(_LLAMA3), _bytes(False)], True, "llama-bpe"),
    ([_split(_LLAMA3), _bytes(False)], False, "smaug-bpe"),
    ([_split(_QWEN2), _bytes(False)], False, "qwen2"),
)
_NORMALIZED = ("qwen2",)  # by NFC; llama.cpp leaves a text as it is, which most are in already


@dataclass(frozen=True)
class Vocabulary:
    """Hold tokens by id with their types, how they are found, and settings by key."""

    model: str
    pre: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str] | None = None
    scores: list[float] | None = None
    settings: dict[str, int | bool | str] = field(default_factory=dict)

    def add(self, writer: Writer) -> None:
        """Put it into a file."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_strings("tokenizer.ggml.tokens", self.tokens)
        writer.add_token_types(self.types)
        if self.merges is not None:
            writer.add_strings("tokenizer.ggml.merges", self.merges)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        kinds = {int: writer.add_uint32, bool: writer.add_bool, str: writer.add_string}
        for key, value in self.settings.items():
            kinds[type(value)](f"tokenizer.{key}", value)


def vocabulary_of(setting: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
    """Return the vocabulary of a tokenizer, filled up to so many rows of the embedding.

    Raises InputError for a tokenizer that llama.cpp would not repeat.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    definition = json.loads(backend.to_str()) if backend is not None else {}
    model = definition.get("model") or {}
    plain = not any(model.get(k) for k in ("dropout", "continuing_subword_prefix"))
    if model.get("type") != "BPE" or not plain or model.get("end_of_word_suffix"):
        kind = model.get("type", type(tokenizer).__name__)
        raise InputError(f"{setting}: GGUF holds tokenizers of pairs (BPE), and not {kind}")
    tokens, types = _tokens(definition, rows)
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    settings = _settings(setting, tokenizer, rows)
    if not model.get("byte_fallback"):
        pre = _cut(setting, definition)
        joined = [" ".join(pair) for pair in merges]
        return Vocabulary("gpt2", pre, tokens, types, merges=joined, settings=settings)
    unknown = str(tokenizer.unk_token)
    types = [_sentencepiece(*pair, unknown) for pair in zip(tokens, types, strict=True)]
    scores = _scores(setting, tokens, merges)
    settings["ggml.add_space_prefix"] = _adds_space(setting, definition)
    return Vocabulary("llama", "default", tokens, types, scores=scores, settings=settings)


def _tokens(definition: Mapping[str, Any], rows: int) -> tuple[list[str], list[TokenType]]:
    """Return tokens and their types by id; rows of the embedding without one are unused."""
    found = {i: (text, TokenType.NORMAL) for text, i in definition["model"]["vocab"].items()}
    for token in definition["added_tokens"]:
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        found[token["id"]] = token["content"], kind
    pairs = [found.get(i, (f"[PAD{i}]", TokenType.UNUSED)) for i in range(rows)]
    return [text for text, _ in pairs], [kind for _, kind in pairs]


def _cut(setting: str, definition: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for what cuts a text before merges."""
    cut, whole = _parts(definition["pre_tokenizer"]), definition["model"].get("ignore_merges")
    normalizer = _parts(definition["normalizer"])
    for parts, ignores, name in _CUTS:
        normal = name in _NORMALIZED and normalizer == [{"type": "NFC"}]
        if cut == parts and bool(whole) == ignores and (normal or not normalizer):
            return name
    known = ", ".join(name for *_, name in _CUTS)
    raise InputError(
        f"{setting}: the tokenizer cuts texts in a way that is none of {known} of llama.cpp, which "
        "would make other tokens: use export.checkpoint"
    )


def _parts(definition: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a pre-tokenizer or normalizer, without what changes no token."""
    if definition is None:
        return []
    if definition["type"] == "Sequence":
        inner = definition.get("pretokenizers") or definition.get("normalizers") or []
        return [part for step in inner for part in _parts(step)]
    return [{name: value for name, value in definition.items() if name != "trim_offsets"}]


def _adds_space(setting: str, definition: Mapping[str, Any]) -> bool:
    """Tell whether SentencePiece's tokenizer puts a space before a text.

    Some put none where there is one; llama.cpp then has one token more.
    """
    steps = [*_parts(definition["normalizer"]), *_parts(definition["pre_tokenizer"])]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _UNDERLINE}
    if steps == [{"type": "Prepend", "prepend": _UNDERLINE}, replace]:
        return True
    if steps == [replace]:
        return False
    space = {"type": "Metaspace", "replacement": _UNDERLINE, "split": False}
    if len(steps) == 1 and {**steps[0], **space} == steps[0]:
        return steps[0]["prepend_scheme"] != "never"
    raise InputError(
        f"{setting}: the tokenizer prepares texts otherwise than SentencePiece, so that llama.cpp "
        "would make other tokens: use export.checkpoint"
    )


def _sentencepiece(text: str, kind: TokenType, unknown: str) -> TokenType:
    """Return the type of a token in a vocabulary of SentencePiece."""
    if text == unknown:
        return TokenType.UNKNOWN
    is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return TokenType.BYTE if is_byte else kind


def _scores(setting: str, tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """Return scores that make llama.cpp merge in the order of the merges: the first is highest.

    SentencePiece has one score for each token, however it is put together, so merges into one token
    follow each other.
    """
    order = [made for made, _ in groupby("".join(pair) for pair in merges)]
    if len(order) != len(set(order)):
        raise InputError(
            f"{setting}: the tokenizer's merges are in no order that scores of tokens could make: "
            "use export.checkpoint"
        )
    rank = {token: place for place, token in enumerate(order)}
    return [-float(rank.get(token, len(rank))) for token in tokens]


def _settings(
    setting: str, tokenizer: PreTrainedTokenizerBase, rows: int
) -> dict[str, int | bool | str]:
    """Return special tokens, which of them a text gets, and the template of a chat."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    bare = tokenizer("a", add_special_tokens=False).input_ids
    given = tokenizer("a").input_ids
    adds = {(b, e): [*[bos] * b, *bare, *[eos] * e] for b in (False, True) for e in (False, True)}
    found = next((flags for flags, ids in adds.items() if ids == given), None)
    if found is None:
        raise InputError(
            f"{setting}: the tokenizer adds more to a text than its first and last token, which "
            "llama.cpp does not: use export.checkpoint"
        )
    ids: dict[str, Any] = {"bos": bos, "eos": eos}
    ids |= {"unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id}
    settings: dict[str, int | bool | str] = {
        f"ggml.{name}_token_id": i for name, i in ids.items() if i is not None and i < rows
    }
    settings |= {"ggml.add_bos_token": found[0], "ggml.add_eos_token": found[1]}
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    return {**settings, "chat_template": template} if template else settings
