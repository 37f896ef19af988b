"""A tiny whole checkpoint with a tokenizer, to be spoiled in one way or another."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spinlab.config import ClipSearch, ModelConfig
from spinlab.model import hub
from spinlab.model.bytes import byte_tokenizer
from spinlab.model.modules import linears_of
from spinlab.model.random import random_model
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.check import logits
from spinlab.rotation.rotations import RotationSet
from spinlab.runtime.fused.convert import why_not_runtime
from spinlab.weights.rtn import rtn
from tests.shapes import fitted

SHAPE = {
    "vocab_size": 256,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
Change = Callable[[dict], object]


@pytest.fixture(scope="session")
def save_checkpoint() -> Callable[..., None]:
    """Return what saves random weights of a family, in shards of at most `size`."""

    def save(folder: Path, dtype: torch.dtype = torch.float32, size: str = "1GB", **shape) -> None:
        known = fitted(shape.get("model_type", "llama"), {**SHAPE, **shape})
        model = random_model(ModelConfig(architecture=known), 0).to(dtype)
        model.save_pretrained(folder, max_shard_size=size)
        byte_tokenizer().save_pretrained(folder)

    return save


@pytest.fixture
def change_json() -> Callable[[Path, Change], None]:
    """Return what applies a change to a JSON file."""

    def apply(file: Path, change: Change) -> None:
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return apply


@pytest.fixture
def change_tensors() -> Callable[[Path, Change], None]:
    """Return what applies a change to the tensors of a folder's weights."""

    def apply(folder: Path, change: Change) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return apply


@pytest.fixture(scope="session")
def saved(tmp_path_factory, save_checkpoint) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_checkpoint(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """Return a copy of a whole checkpoint, which a test may spoil."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


@pytest.fixture(autouse=True)
def forget_snapshots():
    """A repository is looked up once per process; each test has repositories of its own."""
    hub.snapshot.cache_clear()


@pytest.fixture
def left_to_torch(ids: torch.Tensor, caplog: pytest.LogCaptureFixture) -> Callable[..., None]:
    """Return what sees that the fused runtime refuses a network, whose integers run in torch."""

    def check(networks: QuantizedNetworks, rotations: RotationSet, reason: str) -> None:
        fused = networks.fused(rotations)
        assert reason in (why_not_runtime(fused, networks.kv_path(fused, rotations)) or "")
        weights = {
            site.path: rtn(linear.weight, networks.quant.weights, ClipSearch())
            for site, linear in linears_of(fused)
            if site.quantized
        }
        found = logits(networks.integer(rotations, weights, "auto"), ids)
        assert reason in caplog.text
        assert torch.equal(found, logits(networks.emulated(rotations, weights), ids))

    return check
