"""Learning on two processes, weights sharded over them, against one: same tokens, same curve."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

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
from spinlab.learn import RotationLearner, learn_rotations, recompute_layers, shard_layers
from spinlab.model.load import load_model
from spinlab.model.modules import layers_of, map_of
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.initial import initial_rotations

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
CASES = [(False, False), (False, True), (True, False)]  # rounded in the loop, layers recomputed
WINDOWS = torch.randint(0, 64, (12, 16), generator=torch.Generator().manual_seed(2))
OBJECTIVE = ObjectiveConfig(kl=1.0, layer_mse=0.5, kurtosis=0.1)


def original():
    return load_model(ModelConfig(architecture=ARCHITECTURE, dtype="float64"), None, 0)


def learned(rounded: bool, recompute: bool) -> dict:
    """Learn three steps on the processes there are; return what came of it and what was sharded."""
    learn = LearnConfig(
        steps=3,
        batch=4,
        sequence_length=16,
        objective=OBJECTIVE,
        quantize_weights=rounded,
        optimizer=OptimizerConfig(grad_norm="euclidean"),
        rotations=["r1", "r2", "r3"],
        lr=RatesConfig(clip=0.03, input_clip=0.01, kv_clip=0.01) if rounded else RatesConfig(),
    )
    networks = QuantizedNetworks(original, QuantConfig(), KVConfig())
    model_map = map_of(original())
    start = initial_rotations(
        RotationConfig(r3_per_layer=True), model_map, torch.Generator().manual_seed(0)
    )
    model, teacher = networks.learnable(start), original() if rounded else None
    learner = RotationLearner(model, start, learn, QuantConfig(), ClipSearch(), teacher)
    if recompute:
        recompute_layers(model)
    if not rounded:
        shard_layers(model)
    curve: list[dict] = []
    learn_rotations(learner, WINDOWS, 0, lambda step, values: curve.append(values))
    weight = next(p for p in layers_of(model)[0].parameters() if p.dim() == 2)
    local = weight.to_local() if hasattr(weight, "to_local") else weight
    result = learner.result()
    return {
        "curve": curve,
        "r1": result.r1,
        "r2": result.r2,
        "r3": result.r3.dense(),
        "clips": result.clips,
        "kv_clips": result.kv_clips,
        "share": local.numel() / weight.numel(),
    }


def _process(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    parallel.start("cpu")
    torch.save([learned(*case) for case in CASES], folder / f"{rank}.pt")
    parallel.stop()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[tuple[dict, dict]]:
    """What both processes learn in each case; most of the time goes into their imports."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_process, (port, folder), nprocs=2)
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    return list(zip(first, second, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_learns(case, two_processes):
    """Only the order of summation differs, and float64 leaves it nothing to flip."""
    rounded, _ = case
    alone, (first, second) = learned(*case), two_processes[CASES.index(case)]
    for found in (first, second):
        for ours, expected in zip(found["curve"], alone["curve"], strict=True):
            assert ours == pytest.approx(expected, rel=1e-8, abs=1e-12)
        assert torch.allclose(found["r1"], alone["r1"], atol=1e-9)
        assert torch.allclose(found["r2"], alone["r2"], atol=1e-9)
        assert torch.allclose(found["r3"], alone["r3"], atol=1e-9)
        assert found["clips"] == pytest.approx(alone["clips"], rel=1e-6)
    assert torch.equal(first["r1"], second["r1"])
    assert first["share"] + second["share"] == pytest.approx(2 if rounded else 1)
