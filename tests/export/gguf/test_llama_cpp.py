"""llama.cpp itself runs what is exported, with its logits and its tokens near ours.

Its linears multiply in less than float32: inputs are rounded to float16 before float16 weights, and
to blocks of 8 bits before blocks. So logits differ by the noise of that, which is what is allowed.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spinlab.compose import composed
from spinlab.config import DataConfig
from spinlab.data.text import read_texts
from spinlab.experiment import run
from spinlab.export.gguf import write
from spinlab.metrics.perplexity import perplexity
from spinlab.model.bytes import byte_tokenizer
from spinlab.stages.pipeline import Pipeline
from spinlab.stages.text import windows_in

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

# of the spread of logits, the mean difference; a layout that is wrong makes it 1
HALF, BYTE = 4e-3, 6e-2
FAMILIES = {
    "llama": {"attention_bias": True},
    "mistral": {"head_dim": 32},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "phi3": {"num_key_value_heads": 4, "pad_token_id": None},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "pad_token_id": None},
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
BYTE_LEVEL = ["gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2"]
ROPES = {
    "llama3": ("llama", LLAMA3),
    "linear": ("qwen2", {}),
    "yarn": ("llama", {"original_max_position_embeddings": 32, "beta_fast": 16}),
    "yarn in its own words": ("qwen2", {"original_max_position_embeddings": 32}),
    "yarn, not lengthened": (
        "qwen3",
        {"original_max_position_embeddings": 32, "attention_factor": 1.0},
    ),
    "default": ("phi3", {"partial_rotary_factor": 0.5}),  # of a part of each head
}


@pytest.fixture
def open_file() -> Iterator[Callable[..., Any]]:
    """Return what loads a file, and frees it before the interpreter goes."""
    with contextlib.ExitStack() as end:

        def load(file: Path, length: int = 64) -> Any:
            sizes = {"n_ctx": length, "n_batch": length, "n_ubatch": length, "n_threads": 1}
            model = llama_cpp.Llama(str(file), **sizes, logits_all=True, verbose=False)
            end.callback(model.close)
            return model

        yield load


def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    """Return logits (length, vocabulary) of a text."""
    model.reset()
    model.eval(ids)
    return torch.from_numpy(np.array(model.scores[: len(ids)]))


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).square().mean().sqrt() / expected.std()).item()


IDS = torch.randint(0, 256, (48,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_f16_is_the_original_function(
    make_subject, make_original, make_settings, open_file, tmp_path, family
):
    file = tmp_path / "m.gguf"
    config = make_settings("f16", str(file), model_type=family, **FAMILIES[family])
    write(make_subject(config), str(file))
    expected = make_original(config)(torch.tensor([IDS])).logits[0]
    assert difference(logits_of(open_file(file), IDS), expected) < HALF


@pytest.mark.parametrize("case", ROPES)
def test_rope_is_scaled_alike(
    make_subject, make_original, make_settings, open_file, tmp_path, case
):
    file, (family, more) = tmp_path / "m.gguf", ROPES[case]
    rope = {"rope_theta": 10000.0, "rope_type": re.split("[ ,]", case)[0], "factor": 4.0, **more}
    shape = {**FAMILIES[family], "model_type": family, "rope_parameters": rope}
    config = make_settings("f16", str(file), **shape)
    write(make_subject(config), str(file))
    expected = make_original(config)(torch.tensor([IDS])).logits[0]
    assert difference(logits_of(open_file(file), IDS), expected) < HALF


@pytest.mark.parametrize("kind", ["q4_0", "q8_0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_the_rounded_network_but_for_inputs_of_8_bits(
    make_subject, make_settings, open_file, tmp_path, family, kind
):
    file = tmp_path / "m.gguf"
    config = make_settings(kind, str(file), model_type=family, **FAMILIES[family])
    subject = make_subject(config)
    write(subject, str(file))
    model = subject.fused({})
    before = model(torch.tensor([IDS])).logits[0]
    for name, weight in subject.weights().items():
        model.get_submodule(name).weight.data = weight.dequantize()
    expected = model(torch.tensor([IDS])).logits[0]
    found = logits_of(open_file(file), IDS)
    assert difference(found, expected) < BYTE
    if kind == "q4_0":  # it is this network, and not the one before rounding
        assert difference(found, before) > 2 * difference(found, expected)


@pytest.mark.parametrize("name", [*BYTE_LEVEL, "llama", "llama-legacy"])
def test_tokens_are_the_same(
    make_subject, make_settings, make_tokenizer, open_file, sample, tmp_path, name
):
    file, tokenizer = tmp_path / "m.gguf", make_tokenizer(name)
    config = make_settings("f16", str(file), vocab_size=len(tokenizer) + 5)
    write(make_subject(config, tokenizer), str(file))
    model = open_file(file)
    for text in (sample, *sample.split("\n"), "1234 it's"):
        if name == "llama":  # it puts no space before one, which llama.cpp does
            text = text.lstrip(" ")
        found = model.tokenize(text.encode(), add_bos=True, special=False)
        assert found == tokenizer(text).input_ids
    marked = "a<own>b</s>c"
    if name != "llama":  # nor does it put one behind special tokens
        found = model.tokenize(marked.encode(), add_bos=False, special=True)
        assert found == tokenizer(marked, add_special_tokens=False).input_ids


def test_bytes_are_the_same(make_subject, make_settings, open_file, sample, tmp_path):
    file, tokenizer = tmp_path / "m.gguf", byte_tokenizer()
    write(make_subject(make_settings("f16", str(file))), str(file))
    found = open_file(file).tokenize(sample.encode(), add_bos=True, special=False)
    assert found == tokenizer(sample).input_ids


def perplexity_of(model: Any, windows: torch.Tensor) -> float:
    """Return what spinlab.metrics.perplexity does, from llama.cpp's logits."""
    losses = [
        torch.nn.functional.cross_entropy(logits_of(model, ids.tolist())[:-1], ids[1:]).double()
        for ids in windows
    ]
    return torch.stack(losses).mean().exp().item()


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f16", "q4_0"])
def test_smollm2_has_the_perplexity_of_its_record(open_file, read_back, cache, tmp_path, kind):
    file = tmp_path / "smollm2.gguf"
    words = ["+experiment=smollm2_135m_w4a4kv4", "rotation=no_had", "learn=none", "kv=kv16"]
    words += ["quant.activations.bits=16", "quant.weights.group_size=32", "weights=rtn"]
    words += ["eval.variants=[fp,fake]", "eval.tasks=[]", "eval.window=512", "eval.max_windows=1"]
    words += ["tracker=none"]
    words += [f"export.gguf={file}", f"export.gguf_type={kind}"]
    words += [f"paths.cache={cache}", f"paths.runs={tmp_path}"]
    config = composed(*words)
    record = run(config, words)
    windows = windows_in(Pipeline(config).evaluation)["wiki"].long()
    found = perplexity_of(open_file(file, 512), windows)
    expected = record.metrics[f"ppl/wiki/{'fp' if kind == 'f16' else 'fake'}"]
    tokens = Pipeline(config).original.tokenizer
    text = read_texts(DataConfig())[1][0].text[:4000]
    assert open_file(file, 512).tokenize(text.encode(), add_bos=True) == tokens(text).input_ids
    exact = perplexity(read_back(file), windows, 1, "gguf")
    assert exact == pytest.approx(expected, rel=1e-3)
    # 8-bit inputs, where there are blocks, cost a little
    assert found == pytest.approx(expected, rel=2e-3 if kind == "f16" else 2e-2)
