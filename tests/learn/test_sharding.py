"""Learning on two processes, weights sharded over them, against one: same tokens, same curve.

Run as a module, with a rank, a port and a folder, this file learns as one of the two.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from spinlab import parallel
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
from spinlab.config.rotation import BlocksConfig
from spinlab.learn import (
    Learnable,
    RotationLearner,
    in_shards,
    learn_rotations,
    recompute_layers,
)
from spinlab.learn.spaces import WeightSpace
from spinlab.model.load import load_model
from spinlab.model.modules import layers_of, map_of
from spinlab.model.network import Resident
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.initial import initial_rotations
from tests.two import find_as_one_of_two, found_by_two

ARCHITECTURE = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
CASES = [
    "16-bit weights",
    "layers run again",
    "rounded weights",
    "blocks before inputs",
    "searched",
]
ROUNDED = CASES[2:]
IN_SHARDS = {f"{case}, in shards": case for case in ROUNDED}
CASES += IN_SHARDS
STARTS = {
    "blocks before inputs": RotationConfig(
        r1="none", r4="none", inputs="blocks", blocks=BlocksConfig(8)
    )
}
ROTATIONS = {"blocks before inputs": ["r2", "inputs"]}
OBJECTIVES = {"blocks before inputs": ObjectiveConfig(kl=1.0, layer_mse=0.5)}
WINDOWS = torch.randint(0, 64, (12, 16), generator=torch.Generator().manual_seed(2))


def drawn(**changes) -> PreTrainedModel:
    """Return a small model, with biases of any size where it has some."""
    architecture = {**ARCHITECTURE, **changes}
    model = load_model(ModelConfig(architecture=architecture, dtype="float64"), None, 0)
    for name, bias in model.named_parameters():
        if name.endswith("bias"):
            bias.data.copy_(torch.linspace(-0.5, 0.3, len(bias)))
    return model


def rates(case: str) -> RatesConfig:
    """Return rates of everything that learns in a case, beside rotations."""
    if case == "rounded weights":
        return RatesConfig(clip=0.03, input_clip=0.01, kv_clip=0.01)
    if case == "blocks before inputs":
        return RatesConfig(r1=0.003, r2=None, clip=0.03, input_clip=0.01, scale=0.03)
    return RatesConfig()


def learned(case: str) -> dict:
    """Learn three steps on the processes there are; return what came of it and what was sharded."""
    spread, case = case in IN_SHARDS or case not in ROUNDED, IN_SHARDS.get(case, case)
    spread &= parallel.world() > 1
    rounded, searched = case in ROUNDED, case == "searched"
    learn = LearnConfig(
        steps=3,
        batch=4,
        micro_batch=1 if searched else 2,
        clip_refresh=2 if searched else 10,
        sequence_length=16,
        objective=OBJECTIVES.get(case, ObjectiveConfig(kl=1.0, layer_mse=0.5, kurtosis=0.1)),
        quantize_weights=rounded,
        optimizer=OptimizerConfig(grad_norm="euclidean"),
        rotations=ROTATIONS.get(case, ["r1", "r2", "r3"]),
        lr=rates(case),
    )

    def original() -> PreTrainedModel:
        return drawn(attention_bias=searched)

    networks = QuantizedNetworks(original, QuantConfig(), KVConfig())
    model_map = map_of(original())
    rotation = STARTS.get(case, RotationConfig(r3_per_layer=True))
    start = initial_rotations(rotation, model_map, torch.Generator().manual_seed(0))
    network = Resident(lambda: networks.learnable(start, inputs="inputs" in learn.rotations))
    formats = learn, QuantConfig()
    if spread:
        found = in_shards(network, Resident(original), model_map, *formats)
    else:
        found = Learnable(network.base(), original() if rounded else None)
    model, teacher, linears = found
    learner = RotationLearner(model, start, *formats, ClipSearch(), teacher, linears=linears)
    if case == "layers run again":
        recompute_layers(model)
    curve: list[dict] = []
    learn_rotations(learner, WINDOWS, 0, lambda step, values: curve.append(values))
    result = learner.result()
    rotations = {"r1": result.r1, "r2": result.r2, "r3": result.r3.dense()}
    inputs = {key: found.dual.first for key, found in result.inputs.items() if found.dual}
    return {
        "curve": curve,
        "rotations": {name: r for name, r in {**rotations, **inputs}.items() if r is not None},
        "scales": {key: found.scale for key, found in result.inputs.items()},
        "clips": result.clips,
        "kv_clips": result.kv_clips,
        "weight_clips": result.weight_clips,
        "state": learner.state(),
        "share": kept(learner),
        "shares_in_shards": shares_in_shards(learner) if spread and rounded else {},
    }


def kept(learner: RotationLearner) -> float:
    """Return the share of the frozen weights that this process keeps."""
    if isinstance(learner.space, WeightSpace):
        frozen = sum(linear.frozen.numel() for linear in learner.space.linears)
        return frozen / sum(linear.module.weight.numel() for linear in learner.space.linears)
    weight = next(p for p in layers_of(learner.model)[0].parameters() if p.dim() == 2)
    return here(weight) / weight.numel()


def here(tensor: Any) -> int:
    """Count the numbers of a tensor that this process has."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).numel()


def shares_in_shards(learner: RotationLearner) -> dict[str, float]:
    """Return the shares of written weights, their gradients and the teacher's layers."""
    space = learner.space
    assert isinstance(space, WeightSpace) and learner.teacher is not None
    learner.rotations.begin()
    space.begin(0)
    learner._backward(WINDOWS[:4])
    written = [linear.module.weight for linear in space.linears]
    teachers = [p for layer in layers_of(learner.teacher) for p in layer.parameters()]
    held = {"written": written, "gradients": [w.grad for w in written], "teacher": teachers}
    return {n: sum(map(here, x)) / sum(w.numel() for w in x) for n, x in held.items()}  # type: ignore


def _found(folder: Path) -> list[dict[str, Any]]:
    """Return what one of the two processes learns in each case."""
    return [learned(case) for case in CASES]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, forks) -> list[tuple[dict, dict]]:
    """What both processes learn in each case."""
    folder = tmp_path_factory.mktemp("two")
    first, second = found_by_two(forks, "tests.learn.test_sharding", folder)
    return list(zip(first, second, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_learns(case, two_processes):
    """Only the order of summation differs, and float64 leaves it nothing to flip."""
    alone, (first, second) = learned(case), two_processes[CASES.index(case)]
    for found in (first, second):
        for ours, expected in zip(found["curve"], alone["curve"], strict=True):
            assert ours == pytest.approx(expected, rel=1e-8, abs=1e-12)
        for kind in ("rotations", "scales", "weight_clips", "state"):
            assert found[kind].keys() == alone[kind].keys()
            for name, expected in alone[kind].items():
                ours = found[kind][name]
                assert torch.allclose(ours, expected, rtol=1e-6, atol=1e-9), (kind, name)
        for kind in ("clips", "kv_clips"):
            assert found[kind] == pytest.approx(alone[kind], rel=1e-6)
    assert alone["rotations"]
    for name, rotation in first["rotations"].items():
        assert torch.equal(rotation, second["rotations"][name])
    assert first["share"] + second["share"] == pytest.approx(1)
    assert first["share"] == pytest.approx(0.5, abs=0.15)
    assert len(first["shares_in_shards"]) == (3 if case in IN_SHARDS else 0)
    for name, share in first["shares_in_shards"].items():
        assert share + second["shares_in_shards"][name] == pytest.approx(1)
        assert share == pytest.approx(0.5, abs=0.02)


if __name__ == "__main__":
    find_as_one_of_two(_found)
