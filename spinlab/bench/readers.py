"""Programs that read exports, each as a model of transformers would be called."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from spinlab.artefact.read import load
from spinlab.bench.served import load_served
from spinlab.config import Config
from spinlab.rotation.check import GATE_TOKENS

Reader = Callable[[Path, Config], Any]


def readers_of(export: str) -> dict[str, Reader]:
    """Return what reads an export here, by name; what is not installed is left out."""
    found = dict(_READERS.get(export, {}))
    if find_spec("llama_cpp") is None:
        found.pop("llama.cpp", None)
    return found


class LlamaCpp:
    """Ask llama.cpp for logits, one sequence after the other."""

    def __init__(self, place: Path, config: Config) -> None:
        from llama_cpp import Llama  # pyright: ignore[reportMissingImports]

        self.device = torch.device("cpu")
        context = max(config.eval.window, GATE_TOKENS)  # all that is asked at once
        self._model = Llama(
            str(place), n_ctx=context, n_batch=context, logits_all=True, verbose=False
        )

    def __call__(self, input_ids: torch.Tensor) -> SimpleNamespace:
        """Return logits (batch, tokens, vocabulary) of token ids (batch, tokens)."""
        rows = []
        for row in input_ids.tolist():
            self._model.reset()
            self._model.eval(row)
            rows.append(torch.from_numpy(np.array(self._model.scores[: len(row)])))
        return SimpleNamespace(logits=torch.stack(rows))


def _artefact(place: Path, config: Config) -> PreTrainedModel:
    return load(place, config.runtime.backend, config.runtime.device)


def _stock(place: Path, config: Config, **more: Any) -> PreTrainedModel:
    """Load by transformers alone, in the dtype of the run."""
    dtype = getattr(torch, config.model.dtype)
    read: Any = AutoModelForCausalLM.from_pretrained
    return read(place, dtype=dtype, local_files_only=True, **more).eval()


def _compressed(place: Path, config: Config) -> PreTrainedModel:
    """Add by the format's own package what transformers does not read: R4."""
    return load_served(place, getattr(torch, config.model.dtype)).eval()


def _gguf(place: Path, config: Config) -> PreTrainedModel:
    return _stock(place.parent, config, gguf_file=place.name)


_READERS: Mapping[str, Mapping[str, Reader]] = {
    "artefact": {"spinlab": _artefact},
    "checkpoint": {"transformers": _stock},
    "compressed_tensors": {"transformers": _compressed},
    "gguf": {"transformers": _gguf, "llama.cpp": LlamaCpp},
}
