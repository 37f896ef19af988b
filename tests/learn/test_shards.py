"""Networks that two processes load by shards, against whole ones: same weights, same curve.

Run as a module, with a rank, a port and a folder, this file does what one of the two does.
"""

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from spinlab import parallel
from spinlab.compose import composed
from spinlab.config import (
    ClipSearch,
    KVConfig,
    LearnConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    QuantConfig,
    RatesConfig,
    RotationConfig,
)
from spinlab.errors import InputError
from spinlab.kv.cache import kv_path_of
from spinlab.learn import (
    Learnable,
    RotationLearner,
    estimate_of,
    in_shards,
    learn_rotations,
    placement,
    recompute_layers,
)
from spinlab.learn.shards import sharded
from spinlab.learn.spaces import WeightSpace
from spinlab.model.load import cast_model, load_model, meta_model
from spinlab.model.modules import layers_of, map_of
from spinlab.model.network import Load, Make, Network, Resident, Streamed, as_it_is
from spinlab.model.parts import Parts
from spinlab.model.random import random_model
from spinlab.networks.rotated import RotatedNetworks
from spinlab.rotation.initial import initial_rotations
from spinlab.rotation.rotations import RotationSet
from spinlab.stages.learn import Learning
from spinlab.stages.pipeline import Pipeline
from tests.conftest import EXPERTS
from tests.shapes import fitted
from tests.two import find_as_one_of_two, found_by_two

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}
SETTINGS: dict[str, Any] = {
    "steps": 3,
    "batch": 4,
    "micro_batch": 2,
    "sequence_length": 16,
    "objective": ObjectiveConfig(kl=1.0, layer_mse=0.5, kurtosis=0.1),
    "optimizer": OptimizerConfig(grad_norm="euclidean"),
    "rotations": ["r1", "r2", "r3"],
}
ROUNDED = {**SETTINGS, "quantize_weights": True, "lr": RatesConfig(clip=0.03)}
LEARNED = ("llama", "qwen2", "qwen3_moe")  # tied ends, biases of keys, experts
FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "phi3": {},
    "qwen3": {"num_hidden_layers": 7},
    "mistral": {
        **{"hidden_size": 128, "intermediate_size": 512, "head_dim": 32},
        **{"num_hidden_layers": 12, "vocab_size": 512},
    },
    "gpt_oss": EXPERTS["gpt_oss"],
    "glm4_moe": EXPERTS["glm4_moe"],
    "deepseek_v3": {},
}
WINDOWS = torch.randint(0, 64, (12, 16), generator=torch.Generator().manual_seed(2))


def saved(folder: Path, family: str, dtype: str) -> ModelConfig:
    """Save a tiny model of a family in several files, if it is not there; return its settings."""
    place = folder / family
    if not place.is_dir():
        given = {
            **SHAPE,
            "model_type": family,
            **EXPERTS.get(family, {}),
            **FAMILIES.get(family, {}),
        }
        shape = fitted(family, given)
        random_model(ModelConfig(architecture=shape), 0).save_pretrained(
            place, max_shard_size="8KB"
        )
    return ModelConfig(path=str(place), dtype=dtype)


def start_of(config: ModelConfig) -> RotationSet:
    described = map_of(load_model(config, None, 0))
    wanted = replace(RotationConfig(r3_per_layer=True), **dict.fromkeys(described.cannot, "none"))
    return initial_rotations(wanted, described, torch.Generator().manual_seed(0))


def spread(config: ModelConfig, network: Network, dtype: str | None = None) -> PreTrainedModel:
    """Return a network over all processes, as 16-bit weights are."""
    return sharded(network, map_of(load_model(config, None, 0)), dtype)


def learnable(start: RotationSet, load: Load) -> PreTrainedModel:
    return RotatedNetworks(load, QuantConfig(), KVConfig()).learnable(start)


def whole(config: ModelConfig) -> Network:
    load = partial(load_model, config, None, 0)
    return Resident(partial(learnable, start_of(config), load))


def in_parts(config: ModelConfig) -> Network:
    return parts_of(config, partial(learnable, start_of(config)))


def parts_of(config: ModelConfig, make: Make) -> Network:
    parts = Parts(config, None)
    return Streamed(lambda layer: make(partial(parts.part, layer, CPU)), parts.layers)


def rounding(config: ModelConfig, shards: bool, **changes) -> RotationLearner:
    """Return a learner with rounded weights, which are whole or in shards."""
    formats = LearnConfig(**{**ROUNDED, **changes}), QuantConfig()
    start = start_of(config)
    if shards:
        described = map_of(load_model(config, None, 0))
        parts = in_parts(config), parts_of(config, as_it_is), described
        found = in_shards(*parts, *formats)
    else:
        found = Learnable(whole(config).base(), load_model(config, None, 0))
    parts = found.model, start, *formats, ClipSearch(), found.teacher
    return RotationLearner(*parts, linears=found.linears)


def gradients_of(learner: RotationLearner) -> dict[str, torch.Tensor]:
    """Return the gradients of a step, of rotations and of ranges."""
    learner.gradients(0, WINDOWS[:8])
    found = {n: p.grad for n, p in learner.rotations.parameters.items()}
    assert isinstance(learner.space, WeightSpace)
    for name, log in learner.space.ranges.logs.items():
        found[name] = parallel.sum_(torch.zeros_like(log) if log.grad is None else log.grad)
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def learned(learner: RotationLearner) -> dict:
    """Learn three steps; return what came of it."""
    curve: list[dict] = []
    learn_rotations(learner, WINDOWS, 0, lambda step, values: curve.append(values))
    return {"curve": curve, "state": learner.state()}


def learner_on(model: PreTrainedModel, config: ModelConfig) -> RotationLearner:
    learn = LearnConfig(**SETTINGS)
    return RotationLearner(model, start_of(config), learn, QuantConfig(), ClipSearch())


def gathered(learner: RotationLearner) -> int:
    """Return how many layers are whole at most as the backward passes of a step reach them."""
    layers = layers_of(learner.model)

    def count() -> int:
        numbers = [layer.get_parameter("self_attn.q_proj.weight") for layer in layers]
        return sum(not isinstance(weight, DTensor) for weight in numbers)

    found = in_backward_passes(learner, WINDOWS[:4], count)
    assert len(found) == 2 * len(layers)  # of both terms
    return max(found)


def in_backward_passes(
    learner: RotationLearner, batch: torch.Tensor, see: Callable[[], int]
) -> list[int]:
    """Return what is seen whenever the backward passes of a step reach a layer."""
    found: list[int] = []

    def watch(module: nn.Module, args: tuple, out: Any) -> None:
        if out.requires_grad:
            out.register_hook(lambda gradient: found.append(see()))

    for layer in layers_of(learner.model):
        layer.register_forward_hook(watch)
    learner.gradients(0, batch)
    return found


def held_and_said(config: ModelConfig, **changes) -> tuple[int, int]:
    """Return what a step in shards holds at most in its backward passes, and what is estimated."""
    before, few = held(), {"batch": 4, "micro_batch": 1, "rotations": ["r2"], "dtype": "bfloat16"}
    terms = {"objective": ObjectiveConfig(kl=0.5), **few, **changes}
    learner = rounding(config, shards=True, **terms)
    found = in_backward_passes(learner, WINDOWS[:4], held)
    shape = meta_model(config, None)
    said = estimate_of(shape, learner.learn, learner.quant, 2, CPU, shards=True)
    return max(found) - before, said.bytes(False)


def resumed(config: ModelConfig) -> dict:
    """Learn a step, begin anew with what it left, and learn the rest on what is loaded again."""
    curve: list[dict] = []
    first, second = (learner_on(spread(config, in_parts(config)), config) for _ in range(2))
    curve.append(first.step(0, WINDOWS[:4]))
    second.load_state(first.state())
    learn_rotations(second, WINDOWS, 1, lambda step, values: curve.append(values))
    return {"curve": curve, "state": second.state()}


def numbers_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return a network's numbers, gathered where they are spread, with biases that are apart."""
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors = {n: x.full_tensor() if hasattr(x, "full_tensor") else x for n, x in found.items()}
    biases = [bias for bias in kv_path_of(model).biases if bias is not None]
    return {n: x.detach() for n, x in tensors.items()} | {
        f"key_bias.{layer}": bias.bias for layer, bias in enumerate(biases)
    }


def held() -> int:
    """Return the bytes of all tensors that there are, each storage once."""
    gc.collect()
    storages: dict[int, int] = {}
    for found in gc.get_objects():
        if issubclass(type(found), torch.Tensor) and hasattr(type(found), "untyped_storage"):
            tensor = getattr(found, "_local_tensor", found)
            if tensor.device == CPU:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def loaded_by_shards(config: ModelConfig, rounded: bool) -> dict:
    """Tell what a process holds, beyond what it did before, each time a part is there."""
    network, most = in_parts(config), []
    assert network.part is not None
    make, before = network.part, held()

    def watched(layer: int | None) -> PreTrainedModel:
        part = make(layer)
        most.append(held() - before)
        return part

    network.part = network._part = watched  # type: ignore[attr-defined]
    described = map_of(load_model(config, None, 0))
    learn = LearnConfig(**{**(ROUNDED if rounded else SETTINGS), "objective": ObjectiveConfig()})
    found = in_shards(network, network, described, learn, QuantConfig())
    layers = len(map_of(found.model).layers)
    return {"most": most, "after": held() - before, "layers": layers}


def _found(folder: Path) -> dict[str, Any]:
    """Return what one of the two processes finds."""
    config = saved(folder, "mistral", "bfloat16")
    clips = {"plain": RatesConfig(), "ranges": RatesConfig(clip=0.03)}
    found: dict[str, Any] = {
        f"estimate {name}": held_and_said(config, lr=lr) for name, lr in clips.items()
    }
    for rounded in (False, True):
        config = saved(folder, "llama", "float64")
        found["held rounded" if rounded else "held"] = loaded_by_shards(config, rounded)
    for family in FAMILIES:
        config = saved(folder, family, "float32")
        found[f"numbers {family}"] = numbers_of(spread(config, in_parts(config), "bfloat16"))
    for family in LEARNED:
        config = saved(folder, family, "float64")
        for name, network in (("parts", in_parts(config)), ("whole", whole(config))):
            model = spread(config, network)
            if name == "whole":
                recompute_layers(model)
            found[f"{name} {family}"] = learned(learner_on(model, config))
        for name in ("rounded", "rounded again"):
            learner = rounding(config, shards=True)
            if name == "rounded again":
                recompute_layers(learner.model)
            found[f"{name} {family}"] = learned(learner)
    # one term: whole gradients of two backward passes meet in 16 bits
    narrow = {"batch": 8, "micro_batch": 1, "dtype": "bfloat16", "objective": ObjectiveConfig()}
    for shards in (False, True):
        learner = rounding(saved(folder, "llama", "float32"), shards, **narrow)
        found["gradients in shards" if shards else "gradients"] = gradients_of(learner)
    config = saved(folder, "qwen3", "float32")
    learners = learner_on(spread(config, in_parts(config)), config), rounding(config, shards=True)
    found["gathered"] = [gathered(learner) for learner in learners]
    found["resumed"] = resumed(saved(folder, "llama", "float64"))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder of models, for both processes and for tests."""
    folder = tmp_path_factory.mktemp("shards")
    for family in {*FAMILIES, *LEARNED}:
        saved(folder, family, "float32")
    return folder


@pytest.fixture(scope="module")
def two_processes(folder, forks) -> list[dict]:
    """What each of two processes found."""
    return found_by_two(forks, "tests.learn.test_shards", folder)


@pytest.mark.parametrize("family", LEARNED)
@pytest.mark.parametrize("way", ["parts", "whole", "rounded", "rounded again"])
def test_what_is_spread_before_it_learns_learns_what_one_process_learns(
    folder, two_processes, family, way
):
    """By parts; as a whole, layers run again; with rounded weights, and layers run again."""
    config = saved(folder, family, "float64")
    alone = learned(
        rounding(config, shards=False)
        if way.startswith("rounded")
        else learner_on(whole(config).base(), config)
    )
    for found in (each[f"{way} {family}"] for each in two_processes):
        for ours, expected in zip(found["curve"], alone["curve"], strict=True):
            assert ours == pytest.approx(expected, rel=1e-8, abs=1e-12)
        assert found["state"].keys() == alone["state"].keys()
        for name, expected in alone["state"].items():
            assert torch.allclose(found["state"][name], expected, rtol=1e-6, atol=1e-9), name
    assert any("rotation.r1" in name for name in alone["state"])


def test_learning_by_shards_resumes_with_the_same_bits(two_processes):
    for found in two_processes:
        ours, expected = found["resumed"], found["parts llama"]
        assert ours["curve"] == expected["curve"]
        for name, tensor in expected["state"].items():
            assert torch.equal(ours["state"][name], tensor), name


@pytest.mark.parametrize("rates", ["plain", "ranges"])
def test_estimates_of_rounded_weights_in_shards_lie_above_what_is_held(two_processes, rates):
    for most, said in (each[f"estimate {rates}"] for each in two_processes):
        assert most < said < 1.25 * most


def test_few_layers_are_whole_at_once(two_processes):
    """The one whose turn it is, the next one, and one that is about to go; each term's pass."""
    for found in two_processes:
        assert max(found["gathered"]) <= 3


def test_gradients_of_16_bits_add_up_in_float32_in_shards_as_well(two_processes):
    """Passes are the same to the bit, and four micro-batches on each process give 8e-3 of noise."""
    for found in two_processes:
        expected, ours = found["gradients"], found["gradients in shards"]
        assert expected.keys() == ours.keys() and len(expected) > 20
        for name, gradient in expected.items():
            assert (ours[name] - gradient).norm() < 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_in_shards_are_those_of_a_whole_network_to_the_bit(folder, two_processes, family):
    config = saved(folder, family, "float32")
    expected = numbers_of(cast_model(whole(config).base(), torch.bfloat16))
    for found in (each[f"numbers {family}"] for each in two_processes):
        assert found.keys() == expected.keys()
        for name, numbers in expected.items():
            assert found[name].dtype == numbers.dtype, name
            assert torch.equal(found[name], numbers), name


@pytest.mark.parametrize("kind", ["held", "held rounded"])
def test_a_process_holds_its_shards_the_ends_and_a_layer(folder, two_processes, kind):
    """Of rounded weights those that are written, and those that it works with."""
    model = whole(saved(folder, "llama", "float64")).base()
    sizes = {n: x.numel() * x.element_size() for n, x in model.named_parameters()}
    ends = sum(size for name, size in sizes.items() if "layers" not in name)
    layer = sum(size for name, size in sizes.items() if "layers.0." in name)
    small = 0.2 * layer  # rotations that run online, frequencies, rows that no two processes share
    first, second = (each[kind] for each in two_processes)
    shares = 2 if kind == "held" else 4  # of a layer, in both processes
    most = list(zip(first["most"][1:], second["most"][1:], strict=True))
    for count, found in enumerate(most):
        assert ends + layer <= min(found)
        assert sum(found) <= 2 * (ends + layer + small) + count * shares / 2 * layer
    assert len(most) == first["layers"] == 4
    after = first["after"] + second["after"]
    assert after <= 2 * (ends * 3 / 4 + small) + 4 * shares / 2 * layer
    assert abs(first["after"] - second["after"]) < 4 * layer / 4


def test_what_does_not_fit_is_refused_before_anything_is_loaded(monkeypatch, tmp_path):
    run = Pipeline(composed("+experiment=toy", f"paths.cache={tmp_path}"))
    nothing = cast(Any, None)
    learning = Learning(run.run, run.original, nothing, nothing, nothing)
    monkeypatch.setattr(placement, "memory_for", lambda device, swap=True: 1000)
    with pytest.raises(InputError, match=r"learning needs about .* GiB"):
        learning.learner()
    assert not list(tmp_path.iterdir())


def test_how_weights_are_held_is_no_part_of_a_key(tmp_path):
    keys, nothing, known = set(), cast(Any, None), cast(Any, SimpleNamespace(key="known"))
    for how in ("learn.shard=auto", "learn.shard=on", "learn.shard=off", "learn.clip_refresh=2"):
        run = Pipeline(composed("+experiment=toy", how, f"paths.cache={tmp_path}"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(run.run.cache), "run", lambda *args, **kwargs: args[2])
            learning = Learning(run.run, run.original, known, known, nothing)
            keys.add(repr(learning.artifact()))
    assert len(keys) == 2


def test_rounded_experts_need_a_torch_that_adds_up_what_some_processes_lack(monkeypatch):
    monkeypatch.delattr(FSDPModule, "set_reduce_scatter_unused_params")
    shape = {**SHAPE, **EXPERTS["qwen3_moe"], "model_type": "qwen3_moe"}
    described = map_of(meta_model(ModelConfig(weights="random", architecture=shape), None))
    network = Resident(lambda: pytest.fail("nothing is loaded"))
    with pytest.raises(InputError, match=r"go into shards by torch 2\.13, and this is"):
        in_shards(network, network, described, LearnConfig(quantize_weights=True), QuantConfig())


if __name__ == "__main__":
    find_as_one_of_two(_found)
