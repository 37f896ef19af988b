"""The texts as tokens: stages `calibration` and `evaluation`."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from safetensors.torch import load_file

from spinlab.cache import Artifact
from spinlab.data.text import Text, fixed_windows, random_windows, tokenize
from spinlab.errors import InputError
from spinlab.model.load import tokenizer_digest, vocabulary
from spinlab.stages.original import Original
from spinlab.stages.run import Run
from spinlab.tensors import write_tensors

_FILE = "tokens.safetensors"


@dataclass(frozen=True)
class Calibration:
    """Hold the calibration text's tokens, and draw windows from them."""

    run: Run
    artifact: Artifact

    @property
    def key(self) -> str:
        return self.artifact.key

    @property
    def tokens(self) -> torch.Tensor:
        """The text as token ids: (N,)."""
        return load_file(self.artifact.path / _FILE)["tokens"]

    def windows(self, purpose: str, count: int, length: int) -> torch.Tensor:
        """Draw (count, length) windows, the same for the same seed and purpose."""
        return random_windows(self.tokens, length, count, self.run.generator(purpose))


def calibration(run: Run, original: Original, text: Text) -> Calibration:
    """Cut the calibration text into tokens, whatever it is called."""
    tokens = replace(text, label="tokens")
    made = _tokenized(run, original, "calibration", [tokens], [], lambda label, ids: ids)
    return Calibration(run, made)


def evaluation(run: Run, original: Original, texts: list[Text]) -> Artifact:
    """Cut the evaluation texts into windows."""
    window, most = run.config.eval.window, run.config.eval.max_windows

    def windows(label: str, ids: torch.Tensor) -> torch.Tensor:
        return fixed_windows(ids, window, most, label).contiguous()

    return _tokenized(run, original, "evaluation", texts, [window, most], windows)


def windows_in(evaluation: Artifact) -> dict[str, torch.Tensor]:
    """Return the windows of every evaluation text: (windows, length) each."""
    return load_file(evaluation.path / _FILE)


def _tokenized(
    run: Run,
    original: Original,
    stage: str,
    texts: list[Text],
    settings: list,
    cut: Callable[[str, torch.Tensor], torch.Tensor],
) -> Artifact:
    """Keep the tokens of texts as one file."""
    digests = {text.label: text.digest for text in texts}
    tokens = tokenizer_digest(original.settings)  # a model that cannot be had fails here
    tokenizer = original.tokenizer  # a packaged one is converted, as a stage of its own
    known = vocabulary(original.settings, original.converted)
    _ = original.identity  # weights are looked at before anything comes of them

    def work(out) -> None:
        ids = {text.label: tokenize(text.text, tokenizer) for text in texts}
        for label, row in ids.items():
            _check_ids(label, row, known)
        write_tensors(out / _FILE, {label: cut(label, row) for label, row in ids.items()})

    return run.cache.run(stage, [tokens, known, digests, settings], work)


def _check_ids(name: str, ids: torch.Tensor, known: int) -> None:
    """Refuse a text with special tokens that the tokenizer has and the model has not."""
    if len(ids) and (last := int(ids.max())) >= known:
        raise InputError(
            f"text {name!r} holds token {last}, which the tokenizer knows and the model, with "
            f"vocab_size={known}, does not: take the tokenizer that it was trained with"
        )
