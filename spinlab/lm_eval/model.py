"""The class that lm-eval asks: its own wrapper of transformers models, around an artefact."""

from typing import Any

from lm_eval.models.huggingface import HFLM

from spinlab.artefact.read import Artefact
from spinlab.device import choose_backend, choose_device
from spinlab.errors import InputError, did_you_mean
from spinlab.files import file_digest
from spinlab.model.files import LISTING

# arguments of HFLM that mean something for a model that is loaded already
_OPTIONS = (
    *("truncation", "logits_cache", "max_length", "softmax_dtype", "batch_size", "max_batch_size"),
    *("add_bos_token", "prefix_token_id", "think_end_token", "enable_thinking"),
    "chat_template_args",
)
_UNNAMED = "cuda:0"  # what lm-eval says where nobody named a device; it takes a CPU then, too


class ArtefactLM(HFLM):
    """Score and generate with the network of an artefact, on spinlab's integer kernels.

    pretrained: the folder that `export.artefact` wrote. backend, device: as of a run. Others are
    HFLM's. Raises InputError for a folder that is none, and for an argument that would be ignored.
    """

    def __init__(
        self, pretrained: str, backend: str = "auto", device: str = "auto", **options: Any
    ) -> None:
        for name in options:
            if name not in _OPTIONS:
                meant = did_you_mean(name, ["pretrained", "backend", "device", *_OPTIONS])
                raise InputError(f"--model_args {name}: an artefact does not read it; {meant}")
        on = choose_device("auto" if device == _UNNAMED else device)
        artefact = Artefact(pretrained)
        model = artefact.model(on, choose_backend(backend, on))
        model.config.use_cache = False  # to score with; generate asks for one by itself
        tokenizer = artefact.checkpoint.tokenizer()
        wrap: Any = super().__init__  # lm-eval's decorators hide the signature
        wrap(model, backend="causal", tokenizer=tokenizer, **options)
        self._digest = file_digest(artefact.folder / LISTING)

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval keeps of a model in its results; its digest is the manifest's."""
        whole: Any = super()
        return {**whole.get_model_info(), "model_sha": self._digest}
