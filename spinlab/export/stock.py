"""A stock checkpoint folder, as transformers of this version and of earlier ones reads it."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from spinlab.config import Config
from spinlab.errors import InputError
from spinlab.files import write_json
from spinlab.model.families import family_of
from spinlab.model.files import CONFIG, GENERATION, read_json
from spinlab.model.load import family_named
from spinlab.model.modules import ends_of, restore

_TOKENIZER = "tokenizer_config.json"


def check_stock(setting: str, config: Config) -> None:
    """Raise InputError for a family whose stock modules cannot compute a rotated model."""
    model_type = family_named(config.model)
    if (reason := family_of(model_type).no_stock) is not None:
        raise InputError(
            f"{setting}: a stock checkpoint of the family {model_type!r} cannot hold a rotated "
            f"model, because {reason}: use export.artefact"
        )


def save_stock(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    further: Mapping[str, torch.Tensor] | None = None,
    without: Collection[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Save a model with its tokenizer and how text is generated from it. The model is overwritten.

    further: tensors beside the model's own. without: names of its own that are left out. settings:
    further entries of the config.
    """
    restore(model)
    _tie_again(model)
    model.to(torch.device("cpu"))  # pyright: ignore[reportArgumentType]
    state = {n: t for n, t in model.state_dict().items() if n not in without} | dict(further or {})
    said, model.generation_config = model.generation_config, GenerationConfig()
    model.save_pretrained(folder, state_dict=state)
    save_generation(said or GenerationConfig(), folder)
    tokenizer.save_pretrained(folder)
    _write_for_earlier_versions(folder, settings or {})


def _tie_again(model: PreTrainedModel) -> None:
    """Let a head that holds what the embedding does be the same tensor, where nothing set it apart.

    Some readers know a family with a tie alone, as vLLM does Gemma.
    """
    embedding, head = ends_of(model)
    if head.bias is None and torch.equal(head.weight, embedding.weight):
        head.weight = embedding.weight
        model.config.tie_word_embeddings = True


def save_generation(settings: GenerationConfig, folder: Path) -> None:
    """Save how text is generated as the original says it: transformers refuses to save some."""
    settings.to_json_file(folder / GENERATION)


def _write_for_earlier_versions(folder: Path, settings: Mapping[str, Any]) -> None:
    """Say again, in transformers 4's words, what its readers would take a default for.

    It knows RoPE by other entries, and tokenizers that are no family's own by another class.
    """
    config = {**read_json(folder / CONFIG), **settings}
    config |= _earlier_rope(config.get("rope_parameters") or {})
    write_json(folder / CONFIG, {**config, "torch_dtype": config.get("dtype")})
    tokenizer = read_json(folder / _TOKENIZER)
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name in ("is_local", "local_files_only"):  # how it was loaded here
        tokenizer.pop(name, None)
    write_json(folder / _TOKENIZER, tokenizer)


def _earlier_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return RoPE's base and scaling, and the base that Gemma 3's layers with windows have."""
    local = rope.get("sliding_attention")
    rope = rope.get("full_attention", rope)
    if "rope_theta" not in rope:
        return {}
    apart = {n: rope[n] for n in ("rope_theta", "partial_rotary_factor") if n in rope}
    scaling = {name: value for name, value in rope.items() if name not in apart}
    plain = scaling.get("rope_type", "default") == "default"
    of_windows = {} if local is None else {"rope_local_base_freq": local["rope_theta"]}
    return {**apart, "rope_scaling": None if plain else scaling, **of_windows}
