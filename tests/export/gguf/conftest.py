"""Tiny models of every family, rotated and rounded, as an export is given them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from spinlab.config import (
    ClipSearch,
    CodecConfig,
    Config,
    EvalConfig,
    ExportConfig,
    KVConfig,
    LearnConfig,
    ModelConfig,
    QuantConfig,
    RotationConfig,
    TensorQuant,
)
from spinlab.export.base import Subject
from spinlab.model.bytes import byte_tokenizer
from spinlab.model.load import load_model
from spinlab.model.modules import map_of
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.initial import initial_rotations
from spinlab.weights.ends import quantize_tied
from spinlab.weights.layerwise import quantize_rtn

SHAPE = {
    **{"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128},
    **{"initializer_range": 0.15, "tie_word_embeddings": True},
}


def settings(kind: str = "f16", path: str = "m.gguf", **shape: Any) -> Config:
    """Return the settings of an export whose networks the type holds."""
    off = TensorQuant(bits=16, symmetric=True)
    bits = {"f16": 16, "q4_0": 4, "q8_0": 8}[kind]
    levels = TensorQuant(bits=bits, symmetric=True, group_size=32) if bits < 16 else off
    codec = CodecConfig(bits=16)
    return Config(
        model=ModelConfig(architecture={**SHAPE, **shape}),
        rotation=RotationConfig(r4="none"),
        quant=QuantConfig(weights=levels, activations=off),
        kv=KVConfig(keys=codec, values=codec),
        learn=LearnConfig(steps=0),
        eval=EvalConfig(variants=["fp", "fake"], task_variants=["fake"]),
        export=ExportConfig(gguf=path, gguf_type=kind),
    )


def original(config: Config) -> PreTrainedModel:
    """Return a model of the settings' shape with drawn weights, gains and biases."""
    model = load_model(config.model, None, 0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.3, generator=generator)
        elif "norm" in name:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    return model


@pytest.fixture
def make_original() -> Callable[[Config], PreTrainedModel]:
    return original


@pytest.fixture
def make_subject() -> Callable[..., Subject]:
    """Return a maker of subjects of these models."""

    def make(config: Config, tokenizer: PreTrainedTokenizerBase | None = None) -> Subject:
        networks = QuantizedNetworks(lambda: original(config), config.quant, config.kv)
        generator = torch.Generator().manual_seed(2)
        rotations = initial_rotations(config.rotation, map_of(original(config)), generator)
        weights = {}
        if config.quant.rounds_weights:
            tied = quantize_tied(lambda: original(config), config.quant, ClipSearch())
            model = networks.fused(rotations, tied)
            weights = {**quantize_rtn(model, config.quant, ClipSearch(), {}), **tied}
        return Subject(
            config,
            rotations,
            lambda: {"key": "0123", "metrics": {"ppl": 1.5}, "stages": []},
            original=lambda: original(config),
            rotated=lambda: networks.stream_rotated(rotations),
            fused=lambda weights: networks.fused(rotations, weights),
            tokenizer=lambda: tokenizer or byte_tokenizer(),
            weights=lambda: weights,
            dtype=lambda: torch.bfloat16,
        )

    return make


@pytest.fixture
def read_back() -> Callable[..., PreTrainedModel]:
    """Return transformers' reader of a file; config: where a GGUF does not tell it all."""

    def read(file: Path, config: Any = None) -> PreTrainedModel:
        if config is not None:
            config = type(config).from_dict(config.to_dict())
        load: Any = AutoModelForCausalLM.from_pretrained
        more = {} if config is None else {"config": config}
        return load(file.parent, gguf_file=file.name, dtype=torch.float32, **more).eval()

    return read


@pytest.fixture
def make_settings() -> Callable[..., Config]:
    return settings


@pytest.fixture
def changed() -> Callable[..., Config]:
    """Return what exchanges settings of one part of a config."""

    def change(config: Config, part: str, **values: Any) -> Config:
        return replace(config, **{part: replace(getattr(config, part), **values)})

    return change


SAMPLE = """Rotations of a stream: x·R1, and 1234 of 56789 heads. It's WE'LL they've done.
Größe, façade, naïve über-große Drehungen   mit   Lücken\tund Tabs
旋转矩阵让离群值消失。日本語のテキスト、한국어 텍스트
Вращения делают выбросы меньше; στροφή, دوران
def f(x):\n    return x**2  # ½ of ²

the theatre then thesaurus in the other there rotation rotate rotating 🌀🙂"""


@pytest.fixture
def sample() -> str:
    """Return text of many scripts, with runs of digits, spaces and line breaks."""
    return SAMPLE


@pytest.fixture
def make_tokenizer() -> Callable[[str], PreTrainedTokenizerFast]:
    """Return a maker of tokenizers, trained on a sample, of the kind that llama.cpp names so."""
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    patterns = dict.fromkeys(("llama-bpe", "smaug-bpe"), words + r"\p{N}{1,3}" + rest)
    patterns["qwen2"] = words + r"\p{N}" + rest

    def make(name: str) -> PreTrainedTokenizerFast:
        if name in ("llama", "llama-legacy"):
            return sentencepiece(name == "llama-legacy")
        tokenizer = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
        cut: list[Any] = [pre_tokenizers.ByteLevel(False, use_regex=name not in patterns)]
        if name in patterns:
            cut.insert(0, pre_tokenizers.Split(Regex(patterns[name]), "isolated"))
        if name == "smollm":
            cut.insert(0, pre_tokenizers.Digits(individual_digits=True))
        tokenizer.pre_tokenizer = cut[0] if len(cut) == 1 else pre_tokenizers.Sequence(cut)
        tokenizer.normalizer = normalizers.NFC() if name == "qwen2" else None
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator([SAMPLE] * 2, trainer)
        return finished(tokenizer, first=name == "llama-bpe")

    return make


def sentencepiece(legacy: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer as Llama-2's: merges of characters, bytes for the rest.

    legacy: spaces are written by a normalizer, one before the text whatever it begins with.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, limit_alphabet=60, show_progress=False
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.train_from_iterator([SAMPLE] * 2, trainer)
    definition = {**json.loads(tokenizer.to_str()), "pre_tokenizer": None}
    definition["added_tokens"] = [t for t in definition["added_tokens"] if t["content"] == "<unk>"]
    model = definition["model"]
    made = dict.fromkeys(left + right for left, right in model["merges"])
    # all ways to a token, at its first place, as a conversion of SentencePiece's has them
    vocab = model["vocab"]
    model["merges"] = [
        [token[:i], token[i:]]
        for token in made
        for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab
    ]
    tokenizer = Tokenizer.from_str(json.dumps(definition))
    if legacy:
        spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(spaces)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return finished(tokenizer, first=True, unk_token="<unk>")


def finished(tokenizer: Tokenizer, first: bool, **more: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with special tokens, one of them before each text where `first` is."""
    tokenizer.add_tokens([AddedToken("<own>", normalized=False)])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<s>", "</s>")])
    if first:
        place = [("<s>", tokenizer.token_to_id("<s>"))]
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=place)
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", **more
    )
    found.chat_template = "{{ messages[0].content }}"
    return found
