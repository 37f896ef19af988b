"""Continue prompts with a model, and show tokens as they come."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)

from spinlab.errors import InputError
from spinlab.generate.sampling import Sampling
from spinlab.model.context import context_of
from spinlab.streams import check_reader

Messages = list[dict[str, str]]
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


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
    """Continue prompts with a model; with `chat`, as a conversation in the tokenizer's template.

    Of the settings that come with the model only its special tokens are kept: tokens are chosen as
    `sampling` says, without penalties, beams or words that stop them.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    chat: bool
    said: Messages = field(default_factory=list)

    def __post_init__(self) -> None:
        # transformers fills in from here what it is not told
        tokens = {name: getattr(self.model.generation_config, name, None) for name in _TOKENS}
        self.model.generation_config = GenerationConfig(**tokens, **self.sampling.words)

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
        )
        if self.chat:
            self.said += [_message("user", prompt), _message("assistant", shown.text)]
        return shown.text

    def _ids(self, prompt: str) -> torch.Tensor:
        """Return the tokens of a prompt: (1, tokens)."""
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # bytes of a command line that are no text
            raise InputError(
                f"the prompt is no UTF-8 (character {error.start}): convert it first"
            ) from error
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


def _message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}
