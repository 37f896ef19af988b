"""Whether a network finds a number in a long text that it was told once: a needle in a haystack.

The text is made up: sentences of few words in any order, one of which says a number. It is asked
for in the same words, so that a small model that copies what it read can answer.
"""

import math
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spinlab.metrics.likelihood import Request, likelihoods
from spinlab.model.network import Network

DEPTHS = (0.05, 0.25, 0.5, 0.75, 0.95)  # of the text, before the number
ASKED = 4  # at every depth, for another number in another text
NUMBERS = len(DEPTHS) * ASKED
_NAMES = ("Anna", "Boris", "Clara", "David", "Elena")
_PEOPLE = ("The farmer", "A teacher", "Her neighbour", "The old sailor", "My sister", "A boy")
_ACTS = ("looked at", "walked past", "remembered", "painted", "talked about", "waited for")
_THINGS = ("the river", "a small house", "the green hill", "an empty road", "the church", "a boat")


def found_needles(
    model: PreTrainedModel | Network,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    batch: int,
    generator: torch.Generator,
) -> dict[str, float]:
    """Return `needle/<length>`, the share of numbers whose every token is the likeliest one, its
    standard error `needle_stderr/<length>`, and `needle_nats/<length>`, the mean of -log of a
    number's probability.

    The error is binomial, sqrt(p(1-p)/n) of n numbers: of a share of 0 or 1 it is 0, where n alone
    says how little is known.
    length: tokens of a text with its question. The generator draws texts and numbers, of which no
    network changes any.
    """
    requests = list(_requests(tokenizer, length, generator))
    longest = max(len(prompt) + len(answer) for _, prompt, answer in requests)
    answers = likelihoods(model, requests, batch=batch, longest=longest)
    logs, found = zip(*answers, strict=True)
    share = sum(found) / len(found)
    return {
        f"needle/{length}": share,
        f"needle_stderr/{length}": math.sqrt(share * (1 - share) / len(found)),
        f"needle_nats/{length}": -sum(logs) / len(logs),
    }


def _requests(
    tokenizer: PreTrainedTokenizerBase, length: int, generator: torch.Generator
) -> Iterator[Request]:
    for depth in DEPTHS:
        for _ in range(ASKED):
            number = _draw(90_000, generator) + 10_000
            says = f"The number of {_NAMES[_draw(len(_NAMES), generator)]} is"
            question = _ids(tokenizer, f" {says}")
            needle = _ids(tokenizer, f" {says} {number}.")
            answer = _ids(tokenizer, f" {says} {number}")[len(question) :]
            rest = length - len(needle) - len(question) - len(answer)
            text = _haystack(tokenizer, max(rest, 0), generator)
            place = round(depth * len(text))
            yield None, text[:place] + needle + text[place:] + question, answer


def _haystack(
    tokenizer: PreTrainedTokenizerBase, tokens: int, generator: torch.Generator
) -> list[int]:
    """Return so many tokens of sentences."""
    found: list[int] = []
    while len(found) < tokens:
        parts = (words[_draw(len(words), generator)] for words in (_PEOPLE, _ACTS, _THINGS))
        found += _ids(tokenizer, f" {' '.join(parts)}.")
    return found[:tokens]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]


def _draw(below: int, generator: torch.Generator) -> int:
    return int(torch.randint(below, (), generator=generator))
