"""Networks that come layer by layer give the bits of whole ones: every family's, every method's."""

import gc
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import PreTrainedModel

from spinlab.compose import composed
from spinlab.config import (
    ClipSearch,
    GPTAQConfig,
    GPTQConfig,
    KVConfig,
    LWCConfig,
    ModelConfig,
    QronosConfig,
    QuantConfig,
    RotationConfig,
    TensorQuant,
    WeightsConfig,
)
from spinlab.config.kv import CodecConfig
from spinlab.config.rotation import BlocksConfig
from spinlab.errors import InputError
from spinlab.model.load import load_model
from spinlab.model.modules import linear_at, map_of
from spinlab.model.network import Load, Make, Network, Resident, Streamed, as_it_is
from spinlab.model.parts import Parts
from spinlab.model.random import random_model
from spinlab.networks.exact import ExactNetworks
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.check import BrokenSite, check_invariance, logits_of
from spinlab.rotation.initial import initial_rotations
from spinlab.rotation.rotations import RotationSet
from spinlab.rotation.statistics import gather_statistics
from spinlab.runtime.fused.convert import integer_runtime, why_not_runtime
from spinlab.runtime.fused.operations import REFERENCE
from spinlab.stages.export import export
from spinlab.stages.pipeline import Pipeline
from spinlab.weights.base import Rounding
from spinlab.weights.layerwise import quantize_rtn
from spinlab.weights.methods import METHODS
from tests.shapes import fitted

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
FAMILIES = {
    "llama": {"head_dim": 8, "tie_word_embeddings": True},
    "phi3": {},
    "qwen2": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "cohere": {},
    "qwen3_moe": {"head_dim": 8, **EXPERTS},
    "glm4_moe": {
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40},
        "head_dim": 8,
    },
    "llama4_text": {
        **{"num_local_experts": 3, "intermediate_size_mlp": 40, "interleave_moe_layer_step": 2},
        **{"no_rope_layer_interval": 2, "attention_chunk_size": 5, "head_dim": 8},
    },
    "deepseek_v3": {},
}
TORCH = ("gemma2", "cohere", "qwen3_moe", "glm4_moe", "llama4_text", "deepseek_v3")
QUANT = QuantConfig(TensorQuant(symmetric=True), embedding=TensorQuant(bits=8))
KV = KVConfig(queries=CodecConfig(bits=4))


@pytest.fixture
def save(tmp_path) -> Callable[..., ModelConfig]:
    """Return what saves a tiny model of a family, in shards, and gives its settings."""

    def saved(family: str, dtype: str = "float32") -> ModelConfig:
        shape = fitted(family, {**SHAPE, "model_type": family, **FAMILIES[family]})
        random_model(ModelConfig(architecture=shape), 0).save_pretrained(
            tmp_path / family, max_shard_size="8KB"
        )
        return ModelConfig(path=str(tmp_path / family), dtype=dtype)

    return saved


def whole(config: ModelConfig, make: Make) -> Network:
    return Resident(lambda: make(partial(load_model, config, None, 0)))


def streamed(config: ModelConfig, make: Make) -> Streamed:
    parts = Parts(config, None)
    return Streamed(lambda layer: make(partial(parts.part, layer, CPU)), parts.layers)


def drawn(config: ModelConfig, **changes) -> RotationSet:
    model_map = map_of(load_model(config, None, 0))
    wanted = RotationConfig(**changes)
    wanted = replace(wanted, **dict.fromkeys(model_map.cannot, "none"))
    return initial_rotations(wanted, model_map, torch.Generator().manual_seed(0))


def networks_on(load: Load) -> QuantizedNetworks:
    return QuantizedNetworks(load, QUANT, KV)


def rounded(config: ModelConfig, network: Network, rotations, method: str, windows, folder):
    """Round the weights of a network that comes as it may."""
    settings = WeightsConfig(
        method,
        gptq=GPTQConfig(block_size=10),
        gptaq=GPTAQConfig(block_size=10),
        qronos=QronosConfig(block_size=10),
        lwc=LWCConfig(epochs=2),
    )
    model, folder = network.base(), folder / type(network).__name__ / method
    folder.mkdir(parents=True)
    kv = networks_on(lambda: model).kv_path(model, rotations)
    parts = (model, rotations, windows, QUANT, settings, folder, kv, network.part)
    return METHODS[method].work(Rounding(*parts))


@pytest.mark.parametrize("family", FAMILIES)
def test_networks_in_parts_give_the_bits_of_whole_ones(save, ids, family, tmp_path):
    config = save(family)
    rotations = drawn(config)

    def fused(load: Load) -> PreTrainedModel:
        return networks_on(load).fused(rotations)

    method = "gptaq" if family in ("qwen2", "qwen3_moe", "llama4_text") else "gptq"
    weights, packed = (
        rounded(config, network(config, fused), rotations, method, ids, tmp_path)
        for network in (whole, streamed)
    )
    assert {*weights} == {*packed}
    for name, weight in weights.items():
        assert torch.equal(weight.levels, packed[name].levels)
        assert torch.equal(weight.scale, packed[name].scale)
        assert torch.equal(weight.zero, packed[name].zero)

    def fused_runtime(load: Load) -> PreTrainedModel:
        networks = networks_on(load)
        model = networks.fused(rotations, weights)
        integer_runtime(model, networks.parts(model, rotations, weights), REFERENCE)
        return model

    makers: dict[str, Make] = {
        "original": as_it_is,
        "rotated": lambda load: networks_on(load).rotated(rotations),
        "emulated": lambda load: networks_on(load).emulated(rotations, packed),
        "integer": lambda load: networks_on(load).integer(rotations, weights, "cpu"),
        "exact": lambda load: ExactNetworks(load, QUANT, KV).dequantized(rotations, packed),
    }
    model = load_model(config, None, 0)
    if why_not_runtime(model, networks_on(lambda: model).kv_path(model, rotations)) is None:
        makers["runtime"] = fused_runtime
    for name, make in makers.items():
        expected = logits_of(whole(config, make), ids)
        assert torch.equal(logits_of(streamed(config, make), ids), expected), name
    assert len(makers) == 6 or family in TORCH


@pytest.mark.parametrize("method", METHODS)
def test_every_method_rounds_layers_that_come_one_by_one_alike(save, ids, method, tmp_path):
    config = save("llama")
    rotations = drawn(config, r4="none", inputs="blocks")

    def fused(load: Load) -> PreTrainedModel:
        return networks_on(load).fused(rotations)

    weights, packed = (
        rounded(config, network(config, fused), rotations, method, ids, tmp_path)
        for network in (whole, streamed)
    )
    assert {*weights} == {*packed} and len(weights) == 1 + 7 * 3
    assert all(torch.equal(w.levels, packed[name].levels) for name, w in weights.items())


def test_statistics_of_parts_are_those_of_the_model(save, ids):
    config, found = save("qwen3_moe"), {}

    def folded(load: Load) -> PreTrainedModel:
        return networks_on(load).stream_rotated(RotationSet())

    for part in streamed(config, folded).parts(ids.split(1)):
        if map_of(part).sites:
            found |= gather_statistics(part, ids).tensors()
    expected = gather_statistics(whole(config, folded).base(), ids).tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], x) for name, x in expected.items())


def test_the_gate_of_parts_names_the_first_broken_linear(save, ids):
    config = save("phi3", "float64")
    rotations = drawn(config)

    def rotated(load: Load) -> PreTrainedModel:
        return networks_on(load).rotated(rotations)

    def broken(load: Load) -> PreTrainedModel:
        model = rotated(load)
        for site in map_of(model).sites:
            if site.path == "model.layers.1.mlp.down_proj":
                linear_at(model, site.path).weight.mul_(1.01)
        return model

    original = streamed(config, as_it_is)
    assert check_invariance(original, streamed(config, rotated), rotations, ids[:1]) < 1e-9
    with pytest.raises(BrokenSite, match=r"first at model\.layers\.1\.mlp\.down_proj"):
        check_invariance(original, streamed(config, broken), rotations, ids[:1])


def test_no_more_than_a_layer_or_the_ends_are_there_at_once(save, ids):
    config, sizes = save("llama"), []
    largest = sum(p.numel() for p in load_model(config, None, 0).model.layers[0].parameters())
    ends = sum(p.numel() for p in load_model(config, None, 0).model.embed_tokens.parameters())
    for part in streamed(config, as_it_is).parts([ids]):
        sizes.append(sum(p.numel() for p in part.parameters()))
    assert max(sizes) <= max(largest, ends) + SHAPE["hidden_size"]


@pytest.mark.parametrize("on_runtime", [False, True])
def test_nothing_of_a_layer_is_left_when_the_next_one_comes(save, ids, on_runtime):
    """Neither its modules, which nothing but the collector of cycles could find, nor its maps'."""
    config = save("llama")
    rotations = drawn(config, inputs="blocks", r1="none", blocks=BlocksConfig(8))

    def made(load: Load) -> PreTrainedModel:
        networks = networks_on(load)
        model = networks.fused(rotations)
        parts = networks.parts(model, rotations, quantize_rtn(model, QUANT, ClipSearch(), {}))
        if on_runtime:
            integer_runtime(model, parts, REFERENCE)
            return model
        return networks.emulated(rotations, parts.weights)

    left: list[weakref.ref] = []
    gc.collect()
    gc.disable()
    try:
        for part in streamed(config, made).parts([ids[:1]]):
            assert not any(ref() for ref in left)
            left += [weakref.ref(m) for m in part.modules() if type(m).__name__.endswith("MLP")]
    finally:
        gc.enable()
    assert len(left) == SHAPE["num_hidden_layers"] and not any(
        t._moved for t in rotations.inputs.values()
    )


def test_a_run_whose_layers_come_one_by_one_has_the_numbers_of_any_other(toy_tokens, tmp_path):
    words = ["+experiment=toy", "learn=none", "eval.variants=[fp,fake,integer]", "eval.limit=2"]
    words += ["eval.max_windows=1", "eval.tasks=[piqa]", "eval.needle=[64]", "+method=smoothquant"]
    words += ["eval.task_variants=[fp,integer]", "quant=nvfp4_calibrated", "weights=gptq"]
    words += [f"{part}.samples=2" for part in ("weights.gptq", "rotation.statistics")]
    words.append("quant.calibration.samples=2")
    found = []
    for offload in ("false", "true"):
        cache = shutil.copytree(toy_tokens, tmp_path / offload)
        own = [f"paths.cache={cache}", f"export.artefact={tmp_path}/of-{offload}"]
        run = Pipeline(composed(*words, f"runtime.offload={offload}", *own))
        metrics = [run.measure(name) for name in run.config.eval.variants]
        gates = [run.handoff_error("integer"), run.layers("fake")]
        export(run)
        files = {f.name: f.read_bytes() for f in (tmp_path / f"of-{offload}").iterdir()}
        outliers = {name: peaks.tolist() for name, peaks in run.outliers().items()}
        found.append([metrics, gates, outliers, files])
    assert found[0] == found[1]
    with pytest.raises(InputError, match=r"the network fake is whole only with runtime\.offload="):
        run.network("fake")


@pytest.mark.parametrize("asked", ["eval.attention=1", "export.checkpoint=there", "model=random"])
def test_what_takes_the_whole_network_is_refused_by_name(asked):
    with pytest.raises(InputError, match=r"with runtime\.offload=true it comes layer by layer"):
        composed("+experiment=toy", "runtime.offload=true", asked)


def test_a_method_that_knows_nothing_of_parts_is_told_what_it_left(toy_tokens, tmp_path):
    cache = shutil.copytree(toy_tokens, tmp_path / "cache")
    words = ["+experiment=toy", "learn=none", "runtime.offload=true", f"paths.cache={cache}"]
    run = Pipeline(composed(*words))

    def of_the_model_alone(rounding: Rounding):
        settings = rounding.config.clip, {}
        return quantize_rtn(rounding.model, rounding.quant, *settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "rtn", replace(METHODS["rtn"], work=of_the_model_alone))
        with pytest.raises(InputError, match=r"weights\.method=rtn has not rounded .* 13 more"):
            run.weights("rtn")
