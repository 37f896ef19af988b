"""Text from an artefact: python -m spinlab.generate FOLDER ["prompt"]

Without a prompt it is read from a pipe or a file on stdin, as a whole, or asked for on a terminal,
one after the other. Tokens are shown as they come.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from spinlab.artefact.read import load, tokenizer_of
from spinlab.errors import InputError
from spinlab.model.context import context_of
from spinlab.streams import ReaderLeft, check_reader, keep_streams

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Sampling:
    """Say how tokens are chosen: temperature 0 takes the likeliest, top_p the likeliest share."""

    new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.new_tokens < 1:
            raise InputError(f"--max-new-tokens {self.new_tokens} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"--temperature {self.temperature} must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p {self.top_p} must lie above 0 and at most at 1")

    @property
    def words(self) -> dict[str, Any]:
        """What `generate` of transformers takes, whatever the model's own defaults are."""
        if not self.temperature:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


class Shown(TextStreamer):
    """Show text as it comes, and keep it; a reader that left ends the generation."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        print(text, flush=True, end="\n" if stream_end else "")
        check_reader()


@dataclass
class Writer:
    """Continue prompts with a model; with `chat`, as a conversation in the tokenizer's template."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    chat: bool
    said: Messages = field(default_factory=list)

    def answer(self, prompt: str) -> str:
        """Show and return what the model makes of a prompt. Raises InputError for one it cannot."""
        ids = self._ids(prompt).to(self.model.device)
        room = self._room(ids.shape[1])
        shown = Shown(self.tokenizer)
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        generate: Any = self.model.generate
        generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(self.sampling.new_tokens, room),
            pad_token_id=end if pad is None else pad,
            streamer=shown,
            **self.sampling.words,
        )
        if self.chat:
            self.said += [_message("user", prompt), _message("assistant", shown.text)]
        return shown.text

    def _ids(self, prompt: str) -> torch.Tensor:
        """Return the tokens of a prompt: (1, tokens)."""
        if self.chat:
            found: Any = self.tokenizer.apply_chat_template(
                [*self.said, _message("user", prompt)],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
            ids = found["input_ids"]
        else:
            ids = torch.tensor([self.tokenizer(prompt, verbose=False)["input_ids"]]).long()
        if not ids.numel():
            raise InputError("the prompt is empty: give at least one character")
        if (last := int(ids.max())) >= self.model.config.vocab_size:
            raise InputError(
                f"the prompt holds token {last}, and the model knows "
                f"{self.model.config.vocab_size}: leave out special tokens"
            )
        return ids

    def _room(self, length: int) -> int:
        """Return how many tokens fit behind a prompt."""
        context = context_of(self.model.config)
        if context is None:
            return self.sampling.new_tokens
        if length >= context:
            told = "the conversation" if self.said else "the prompt"
            raise InputError(
                f"{told} has {length} tokens, and the model reads {context} at once: shorten it"
            )
        return context - length


def converse(writer: Writer, ask: Callable[[str], str]) -> None:
    """Answer one prompt after the other until there is none; a mistake is told, and the next asked.

    ask: as `input`.
    """
    while True:
        try:
            prompt = ask("> ")
        except EOFError:
            print()
            return
        if not prompt.strip():
            continue
        try:
            writer.answer(prompt)
        except InputError as error:
            print(f"spinlab.generate: {error}", file=sys.stderr)


def _message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _piped() -> str | None:
    """Return what stdin holds, without its last line feed; None where it is a terminal."""
    if sys.stdin is None:  # it is closed
        return ""
    if sys.stdin.isatty():
        return None
    try:
        return sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"stdin is no UTF-8 (byte {error.start}): convert it first") from error


def _run(given: argparse.Namespace) -> None:
    sampling = Sampling(given.max_new_tokens, given.temperature, given.top_p, given.seed)
    model, tokenizer = load(given.folder, given.backend, given.device), tokenizer_of(given.folder)
    templated = bool(getattr(tokenizer, "chat_template", None))
    if given.chat and not templated:
        raise InputError(f"--chat: {given.folder} has no chat template: leave the option out")
    chat = templated if given.chat is None else given.chat
    prompt = _piped() if given.prompt is None else given.prompt
    torch.manual_seed(sampling.seed)
    writer = Writer(model, tokenizer, sampling, chat)
    if prompt is None:
        converse(writer, input)
    else:
        writer.answer(prompt)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m spinlab.generate", description="Continue a prompt with an artefact."
    )
    parser.add_argument("folder", metavar="FOLDER", help="that export.artefact wrote")
    parser.add_argument("prompt", nargs="?", help="else stdin, or asked for on a terminal")
    own = Sampling()
    shown = "(%(default)s)"
    parser.add_argument("--max-new-tokens", type=int, default=own.new_tokens, help=shown)
    parser.add_argument(
        "--temperature", type=float, default=own.temperature, help=f"0 is greedy {shown}"
    )
    parser.add_argument("--top-p", type=float, default=own.top_p, help=shown)
    parser.add_argument("--seed", type=int, default=own.seed, help=f"of sampling {shown}")
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="as a conversation, in the tokenizer's template (where it has one)",
    )
    parser.add_argument("--backend", default="auto", help=f"as runtime.backend {shown}")
    parser.add_argument("--device", default="auto", help=f"as runtime.device {shown}")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line; exit status 2 and one sentence for what a user can mend."""
    try:
        _run(_parser().parse_intermixed_args(words))
    except InputError as error:
        print(f"spinlab.generate: {error}", file=sys.stderr)
        sys.exit(2)
    except ReaderLeft:
        return
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    keep_streams()
    main()
