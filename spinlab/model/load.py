"""Load stock transformers models: packaged GGUF, a local folder, the hub, or random weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from spinlab.config import ModelConfig
from spinlab.errors import InputError
from spinlab.model.bytes import byte_tokenizer
from spinlab.model.checkpoint import checkpoint_of, content_digest
from spinlab.model.gguf import gguf_config, gguf_of
from spinlab.model.map import Norm
from spinlab.model.modules import map_of, norm_at, prepare
from spinlab.model.random import architecture_of, random_model
from spinlab.model.settings import on_meta, ours
from spinlab.model.whole import check_numbers, check_report, check_tied

_LOOKED_UP = 1000  # tokens of a vocabulary, as far apart as they are many


def check_model(config: ModelConfig) -> None:
    """Raise InputError for a checkpoint that cannot be reached or rotated, or is not whole.

    No weight is read. Of random weights there is no more to know than `meta_model` tells, and what
    a packaged GGUF holds is told when it is converted.
    """
    if config.weights == "pretrained" and not config.is_gguf:
        checkpoint_of(config, None).check()


def source_digest(config: ModelConfig) -> dict[str, Any]:
    """Identify the weights for cache keys by content: digests of files, or the configured shape.

    Where they came from is no part of it: `describe_model` cites that. `check_model` tells whether
    the model can be had and is whole.
    """
    if config.weights == "random":
        architecture_of(config)
        return {"random": config.architecture}
    if config.is_gguf:
        return {"gguf": content_digest(gguf_of(config))}
    return checkpoint_of(config, None).weight_digests()


def tokenizer_digest(config: ModelConfig) -> dict[str, Any]:
    """Identify the tokenizer for cache keys, by content and apart from the weights."""
    if config.weights == "random":
        return {"tokens": "bytes"}
    if config.is_gguf:
        return {"gguf": content_digest(gguf_of(config))}
    return checkpoint_of(config, None).tokenizer_digests()


def check_weights(config: ModelConfig) -> None:
    """Read every weight of a folder or repository.

    Raises InputError for one that is not finite, and for a head of its own that should be tied.
    """
    checkpoint = checkpoint_of(config, None)
    check_tied(checkpoint.place, checkpoint.config, checkpoint.weights)
    check_numbers(checkpoint.place, checkpoint.weights)


def describe_model(config: ModelConfig, model: PreTrainedModel) -> dict[str, Any]:
    """Tell which model runs, ready for JSON: its origin (no path), its family and its sizes.

    model: as `meta_model` or `load_model` gives it.
    """
    sizes = dict(vars(map_of(model).dimensions))
    held = sizes.pop("held")
    return {
        "source": _origin(config),
        "family": model.config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": model.config.vocab_size,
        "tied": model.config.tie_word_embeddings,
        **sizes,
        **({} if held is None else {"cached": held._asdict()}),
    }


def _origin(config: ModelConfig) -> dict[str, str]:
    if config.weights == "random":
        return {"random": "seeded weights"}
    if config.is_gguf:
        return {"package": config.package or "", "file": gguf_of(config).name}
    return checkpoint_of(config, None).origin


def load_model(config: ModelConfig, converted: Path | None, seed: int) -> PreTrainedModel:
    """Return the model in its configured dtype and evaluation mode, frozen, on the CPU.

    `converted` is the folder that `convert_gguf` filled, for packaged models. The model comes as
    its family prepares it; `spinlab.model.modules.restore` makes it stock again. Raises InputError
    if transformers reports any tensor as missing, left over or of another shape.
    """
    dtype = getattr(torch, config.dtype)
    if config.weights == "random":
        return prepared(random_model(config, seed), dtype)
    checkpoint = checkpoint_of(config, converted)
    load: Any = AutoModelForCausalLM.from_pretrained
    model, report = load(
        checkpoint.folder,
        config=checkpoint.config,
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        ignore_mismatched_sizes=True,  # they are in the report
        output_loading_info=True,
        **ours(checkpoint.config.model_type),
    )
    check_report(checkpoint.place, checkpoint.config, report)
    return prepared(model, dtype)


def meta_model(config: ModelConfig, converted: Path | None) -> PreTrainedModel:
    """Return the model that `load_model` gives, on the meta device: names, shapes and no numbers.

    A packaged model that is not converted yet is described by its own metadata.
    """
    return prepared(on_meta(_described(config, converted)), getattr(torch, config.dtype))


def family_named(config: ModelConfig) -> str:
    """Return the model type that settings or a checkpoint's config name; no model is made."""
    if config.weights == "random":
        return config.architecture.get("model_type", "llama")
    return _described(config, None).model_type


def _described(config: ModelConfig, converted: Path | None) -> PreTrainedConfig:
    """Return the transformers config of a model without loading it."""
    if config.weights == "random":
        return architecture_of(config)
    if config.is_gguf and converted is None:
        return gguf_config(config)
    return checkpoint_of(config, converted).config


def prepared(
    model: PreTrainedModel, dtype: torch.dtype, device: torch.device | None = None
) -> PreTrainedModel:
    """Bring a stock model to what its map names, the numbers to a dtype, and freeze them.

    device: where it goes before its numbers are widened, if anywhere.
    """
    prepare(model)
    if device is not None:
        nn.Module.to(model, device)
    if dtype == torch.float64:
        exact_norms(model)
    return cast_model(model, dtype).eval().requires_grad_(False)


def cast_model(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Bring a model's numbers to a dtype, in place, except the frequencies of RoPE.

    `Module.to` would round those too: in bfloat16 angles are off by whole turns at 2048 tokens.
    What stock models keep in float32 has at least that.
    """
    rope, wide = map_of(model).rope, torch.promote_types(dtype, torch.float32)
    exact = set(model._keep_in_fp32_modules_strict or ())
    buffers = (pair for pair in model.named_buffers() if not pair[0].startswith(f"{rope}."))
    for name, tensor in (*model.named_parameters(), *buffers):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(wide if exact.intersection(name.split(".")) else dtype)
    return model


def exact_norms(model: PreTrainedModel) -> None:
    """Replace RMSNorms by torch's own: in one kernel, and in float64 where the model is.

    transformers' compute in float32, whatever the dtype, step by step.
    """
    for norm in map_of(model).norms:
        stock = norm_at(model, norm.path)
        if not isinstance(stock, nn.RMSNorm):
            model.set_submodule(norm.path, ExactNorm(stock.weight.detach(), norm))


class ExactNorm(nn.RMSNorm):
    """torch's RMSNorm with the gain convention of the norm that it stands for.

    factor: gives what the gain is multiplied by, (width,), if anything.
    """

    factor: Callable[[], torch.Tensor] | None = None

    def __init__(self, weight: torch.Tensor, norm: Norm) -> None:
        super().__init__(weight.shape[0], norm.epsilon, device="meta")
        self.weight, self.offset = nn.Parameter(weight, requires_grad=False), norm.offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Norm x: (..., width). offset + weight is more than 16 bits hold: it meets x in 32."""
        wide = torch.promote_types(x.dtype, torch.float32) if self.offset else self.weight.dtype
        gain = self.weight.to(wide) + self.offset if self.offset else self.weight
        if self.factor is not None:
            gain = (gain * self.factor()).to(wide)
        if not self.offset:
            return nn.functional.rms_norm(x, self.normalized_shape, gain, self.eps)
        return nn.functional.rms_norm(x.to(wide), self.normalized_shape, gain, self.eps).to(x.dtype)


def load_tokenizer(config: ModelConfig, converted: Path | None) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer; random models read bytes.

    Raises InputError for one that cannot be read, has more tokens than the model knows, or does not
    use its words. Tokens that were added to it (transformers adds some by itself) may lie beyond,
    until a text has one.
    """
    if config.weights == "random":
        tokenizer, place = byte_tokenizer(), "model.architecture"
    else:
        checkpoint = checkpoint_of(config, converted)
        tokenizer, place = checkpoint.tokenizer(), checkpoint.place
    rows = vocabulary(config, converted)
    ends: list[Any] = [tokenizer.bos_token_id, tokenizer.eos_token_id]  # which texts are given
    apart = set(tokenizer.added_tokens_decoder) - set(ends)
    last = max(set(tokenizer.get_vocab().values()) - apart, default=-1)
    if not 0 <= last < rows:
        raise InputError(
            f"{place}: its tokenizer's last token is {last} and vocab_size={rows}: take the "
            "tokenizer that the model was trained with, or a larger vocab_size for random weights"
        )
    _check_words(tokenizer, place)
    return tokenizer


def _check_words(tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    """Raise InputError where words that are tokens are cut into letters, as where merges are lost.

    Such a model still gives numbers, of a text that it has never seen the like of.
    """
    every = max(len(tokenizer) // _LOOKED_UP, 1)
    tokens = (cast(str, tokenizer.decode(n)).strip() for n in range(0, len(tokenizer), every))
    words = [word for word in tokens if len(word) > 2 and word.isascii() and word.isalpha()]
    cut = [word for word in words if len(tokenizer.tokenize(word)) >= len(word)]
    if len(cut) > len(words) // 2:
        raise InputError(
            f"{place}: its tokenizer, as transformers {transformers.__version__} reads it, cuts "
            f"words into letters ({', '.join(cut[:3])} are tokens of their own): use a later "
            "version of transformers, or a folder with the tokenizer's own files"
        )


def file_dtype(config: ModelConfig, converted: Path | None) -> torch.dtype:
    """Return the dtype of files in 16 bits: what the checkpoint declares, else bfloat16."""
    if config.weights == "random":
        return torch.bfloat16
    return checkpoint_of(config, converted).half


def vocabulary(config: ModelConfig, converted: Path | None) -> int:
    """Return how many tokens the model knows."""
    return _described(config, converted).vocab_size
