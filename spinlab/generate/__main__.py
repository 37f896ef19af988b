"""Text from an artefact: python -m spinlab.generate FOLDER ["prompt"]

Without a prompt it is read from a pipe or a file on stdin, as a whole, or asked for on a terminal,
one after the other. Tokens are shown as they come.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from spinlab.errors import InputError
from spinlab.generate.sampling import Sampling
from spinlab.launch import repeat_sums
from spinlab.streams import ReaderLeft, ending, keep_streams

if TYPE_CHECKING:
    from spinlab.generate.writer import Writer


def converse(writer: "Writer", ask: Callable[[str], str]) -> None:
    """Answer one prompt after the other until there is none; a mistake is told, and the next asked.

    ask: as `input`.
    """
    while True:
        try:
            prompt = ask("> ")
        except UnicodeDecodeError as error:
            print(f"spinlab.generate: the prompt is {_not_utf8(error)}", file=sys.stderr)
            continue
        except EOFError:
            print()
            return
        if not prompt.strip():
            continue
        try:
            writer.answer(prompt)
        except InputError as error:
            print(f"spinlab.generate: {error}", file=sys.stderr)


def _piped() -> str | None:
    """Return what stdin holds, without its last line feed; None where it is a terminal."""
    if sys.stdin is None:  # it is closed
        return ""
    if sys.stdin.isatty():
        return None
    try:
        return sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"stdin is {_not_utf8(error)}") from error


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"no UTF-8 (byte {error.start}): convert it first"


def _run(given: argparse.Namespace) -> None:
    repeat_sums()
    import torch  # which takes seconds to load, as what follows

    from spinlab.artefact.read import load, tokenizer_of
    from spinlab.generate.writer import Writer

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
    with ending("spinlab.generate"), suppress(ReaderLeft):
        _run(_parser().parse_intermixed_args(words))


if __name__ == "__main__":
    keep_streams()
    main()
