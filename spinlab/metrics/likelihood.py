"""Likelihoods of answers, where the head reads nothing but the places that predict them.

Of the logits of a prompt with its answer a few rows are asked for: the head's product and the
softmax over a vocabulary are taken for these alone, and nothing waits for the device in between.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from spinlab.errors import InputError
from spinlab.model.modules import head_of
from spinlab.model.network import Network, drop

MOST_TOKENS = 2**18  # whose states are kept between the layers of a network in parts
Request = tuple[Any, list[int], list[int]]  # anything, tokens of a prompt, tokens of its answer
Answer = tuple[float, bool]


class _Asked(NamedTuple):
    """What is read of one forward pass: places in the flattened batch, and what should be there."""

    ids: torch.Tensor  # (n, length), filled up on the right
    places: torch.Tensor
    tokens: torch.Tensor


class _Sequence(NamedTuple):
    """Hold the tokens that the network reads, and the answers whose likelihood is asked after."""

    tokens: tuple[int, ...]
    answers: list[tuple[int, list[int]]]  # number of a request, tokens of its answer


@torch.no_grad()
def likelihoods(
    model: PreTrainedModel | Network, requests: Sequence[Request], *, batch: int, longest: int
) -> list[Answer]:
    """Return of every answer its log-likelihood in nats, and whether each token is the likeliest.

    batch: sequences of a forward pass. longest: tokens of a sequence; of a longer one the beginning
    is cut. Softmax is taken in float32 and summed in float64. Sequences that differ in nothing but
    the last token of the answer pass once. One is filled up on the right, where a causal network
    does not look. Raises InputError for an answer longer than `longest`, and for a prompt or an
    answer without tokens.
    """
    if not requests:
        return []
    sequences = _sequences(requests, longest)
    groups = [sequences[n : n + batch] for n in range(0, len(sequences), batch)]
    found = []
    with tqdm(total=len(requests), desc="answers") as bar:
        for group, (asked, part) in zip(groups, _parts(model, map(_asked, groups)), strict=True):
            found.append(_ask(part, asked))
            bar.update(sum(len(sequence.answers) for sequence in group))
    logs, same = (torch.cat(part).cpu().numpy() for part in zip(*found, strict=True))
    asked = [answer for sequence in sequences for answer in sequence.answers]
    starts = np.cumsum([0, *(len(tokens) for _, tokens in asked)])[:-1]
    sums = np.add.reduceat(logs.astype(float), starts)
    likeliest = np.logical_and.reduceat(same, starts)
    answers: list[Answer] = [(0.0, False)] * len(requests)
    for (number, _), total, greedy in zip(asked, sums.tolist(), likeliest.tolist(), strict=True):
        answers[number] = total, greedy
    return answers


def _parts(
    model: PreTrainedModel | Network, groups: Iterable[_Asked]
) -> Iterator[tuple[_Asked, PreTrainedModel]]:
    """Yield groups, each with what gives their logits.

    A network in parts takes as many groups through all of them as `MOST_TOKENS` has room for.
    """
    if not isinstance(model, Network):
        yield from ((asked, model) for asked in groups)
        return
    together: list[_Asked] = []
    for asked in (*groups, None):
        tokens = sum(one.ids.numel() for one in together)
        if together and (asked is None or tokens + asked.ids.numel() > MOST_TOKENS):
            last = model.last([one.ids for one in together], use_cache=False)
            last.config.use_cache = False
            yield from ((one, last) for one in together)
            drop(last)  # whoever names it: the next one takes its place
            together = []
        together += [] if asked is None else [asked]


def _sequences(requests: Sequence[Request], longest: int) -> list[_Sequence]:
    """Return the sequences that answer all requests, the longest first."""
    found: dict[tuple[int, ...], _Sequence] = {}
    for number, (_, prompt, answer) in enumerate(requests):
        if not prompt or not answer:
            raise InputError("a prompt and its answer need a token each: one of them has none")
        if len(answer) > longest:
            raise InputError(
                f"an answer of {len(answer)} tokens is longer than the model reads ({longest})"
            )
        tokens = tuple((prompt + answer)[-longest - 1 : -1])
        found.setdefault(tokens, _Sequence(tokens, [])).answers.append((number, answer))
    return sorted(found.values(), key=lambda sequence: (-len(sequence.tokens), sequence.tokens))


def _asked(group: Sequence[_Sequence]) -> _Asked:
    """Lay out sequences, the longest first, and the answers that are asked of each."""
    width = len(group[0].tokens)
    ids = torch.zeros(len(group), width, dtype=torch.long)
    places: list[int] = []
    wanted: list[int] = []
    for row, (tokens, answers) in enumerate(group):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        end = row * width + len(tokens)
        for _, answer in answers:
            places += range(end - len(answer), end)
            wanted += answer
    return _Asked(ids, torch.tensor(places), torch.tensor(wanted))


def _ask(model: PreTrainedModel, asked: _Asked) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities (m,) of tokens at their places, and whether they are likeliest."""
    ids, places, tokens = (part.to(model.device) for part in asked)
    with _reading(head_of(model), places):
        logits = model(input_ids=ids).logits[0].float()
    logs = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
    return logs, logits.argmax(-1) == tokens


@contextmanager
def _reading(head: nn.Module, places: torch.Tensor) -> Iterator[None]:
    """Let the head read rows of its flattened input alone, as one sequence."""

    def pick(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (inputs[0].flatten(0, -2)[places][None],)

    hook = head.register_forward_pre_hook(pick, prepend=True)
    try:
        yield
    finally:
        hook.remove()
