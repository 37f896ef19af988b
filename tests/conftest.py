"""Shared fixtures: tiny stock models that stand for the real ones."""

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

# as commands do before torch is there: what runs here has the bits of what they run
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import torch

if not torch.cuda.is_available():  # kernels run in Triton's interpreter, chosen at its import
    os.environ["TRITON_INTERPRET"] = "1"

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from spinlab.collector import leave_modules
from spinlab.config import ModelConfig, RotationConfig
from spinlab.errors import InputError
from spinlab.formats.quantizer import TokenQuantizer
from spinlab.model.load import exact_norms, load_model
from spinlab.model.map import ModelMap
from spinlab.rotation.initial import check_rotations
from tests.forks import Forks
from tests.interpreted import interpret_sooner
from tests.remembered import remember_settings
from tests.shapes import fitted

ARCHITECTURE = {
    "vocab_size": 64,
    "hidden_size": 24,  # 12·2: no power of two
    "intermediate_size": 40,  # 20·2
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,  # not hidden / heads
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
# of its own, Qwen3-MoE would have 128 experts of 768 inputs, 30 times the rest of a tiny model
EXPERTS = {
    "qwen2_moe": {
        **{"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
        "shared_expert_intermediate_size": 20,
    },
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "glm4_moe": {
        **{"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40},
        **{"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5},
    },
    "llama4_text": {
        **{"num_local_experts": 4, "intermediate_size_mlp": 40, "attention_chunk_size": 5},
        **{"no_rope_layer_interval": 2, "floor_scale": 4},
    },
    "gpt_oss": {
        **{"num_local_experts": 8, "num_experts_per_tok": 2},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "phimoe": {"num_local_experts": 4},
}


# at least 10 s each, the longest first
LONG = [
    *("test_smollm2.py", "test_grid.py", "test_experiment.py", "test_shards.py"),
    *("test_parallel.py", "test_needs.py", "test_compiled.py", "test_notebooks.py"),
    *("test_commands.py", "test_methods.py"),
    *("test_triton_runtime.py", "test_options.py", "test_sweep.py", "test_measure.py"),
    *("test_load.py", "test_extending.py", "test_families.py", "test_spaces.py"),
    *("test_resume.py", "test_offload.py", "test_floats.py"),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with what takes longest: no process then works on after the others have ended."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))


def pytest_collection_finish() -> None:
    leave_modules()  # each garbage collection would walk them, and all tests


@pytest.fixture(scope="module", autouse=True)
def collections_are_short() -> None:
    """Leave what earlier files loaded out of garbage collections, of which stages start many."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def stages_end_at_once(request) -> Iterator[None]:
    """Let no stage of a toy give memory back or wait for the disk: both take longer than it."""
    with pytest.MonkeyPatch.context() as patch:
        of_cache = request.node.path.name in (
            "test_cache.py",
            "test_files.py",
        )  # where it is tested
        if request.node.get_closest_marker("slow") is None and not of_cache:
            patch.setattr("spinlab.cache._give_back_memory", lambda: None)
            patch.setattr("os.fsync", lambda number: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def settings_are_read_once() -> Iterator[None]:
    """Let Hydra parse and merge the files of conf/ once a session: they stay."""
    if find_spec("hydra") is None:  # a GPU node may lack it
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        remember_settings(patch)
        yield


@pytest.fixture(scope="session", autouse=True)
def kernels_are_interpreted_without_detours() -> Iterator[None]:
    """Let Triton's interpreter do once what it does at every call."""
    if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
        with pytest.MonkeyPatch.context() as patch:
            interpret_sooner(patch)
            yield
    else:
        yield


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """What starts commands in processes that have imported everything."""
    started = Forks()
    yield started
    started.close()


@pytest.fixture(scope="session")
def short_text(tmp_path_factory) -> list[str]:
    """Settings of a text of 10 000 letters: cutting the packaged ones into tokens takes seconds."""
    text: Path = tmp_path_factory.mktemp("short") / "text.txt"
    text.write_text("".join(chr(97 + i * i % 89 % 26) for i in range(10_000)))
    return [f"data.calibration={text}", f"data.evaluation=[{text}]"]


@pytest.fixture(scope="session")
def toy_tokens(tmp_path_factory) -> Path:
    """A cache with no more than the packaged texts, as tokens of the toy."""
    from spinlab.compose import composed  # Hydra loads here: a GPU node may lack it
    from spinlab.stages.pipeline import Pipeline

    folder = tmp_path_factory.mktemp("tokens")
    run = Pipeline(composed("+experiment=toy", "eval.max_windows=1", f"paths.cache={folder}"))
    assert run.calibration and run.evaluation
    return folder


@pytest.fixture
def toy_cache(tmp_path, toy_tokens) -> Path:
    """A copy of it for a test of its own."""
    return Path(shutil.copytree(toy_tokens, tmp_path / "cache"))


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """Return a maker of identical tiny Llamas with random weights and norm gains."""

    def make(dtype: torch.dtype = torch.float64, seed: int = 0, **changes) -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = LlamaForCausalLM(LlamaConfig(**{**ARCHITECTURE, **changes}))
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.data.uniform_(0.3, 2.0)
                else:
                    parameter.data.mul_(10)  # logits with some spread
        if dtype == torch.float64:
            exact_norms(model)
        return model.to(dtype).eval().requires_grad_(False)

    return make


@pytest.fixture
def make_family_model() -> Callable[..., PreTrainedModel]:
    """Return a maker of identical tiny float64 models of any family, as `load_model` gives them.

    Gains and biases are random, and weights large enough for logits and attention with contrast.
    head_dim=None leaves it to the family; heads of StableLM and OLMoE always make up the stream.
    """

    def make(model_type: str, seed: int = 0, **changes) -> PreTrainedModel:
        shape = {**ARCHITECTURE, "model_type": model_type, "initializer_range": 0.2}
        shape = {**fitted(model_type, shape), **EXPERTS.get(model_type, {}), **changes}
        if model_type in ("stablelm", "olmoe") and (width := shape.pop("head_dim")) is not None:
            shape["hidden_size"] = width * shape["num_attention_heads"]
        if shape.get("head_dim", 0) is None:
            del shape["head_dim"]
        return load_model(ModelConfig(architecture=shape, dtype="float64"), None, seed)

    return make


@pytest.fixture
def fitting() -> Callable[[RotationConfig, ModelMap], RotationConfig]:
    """Return what leaves out the rotations that a family refuses, and sees that it does."""

    def fit(config: RotationConfig, model_map: ModelMap) -> RotationConfig:
        for name in set(model_map.cannot) & set(config.used):
            with pytest.raises(
                InputError, match=rf"{name} does not fit .* set rotation\.{name}=none"
            ):
                check_rotations(config, model_map)
        return replace(config, **dict.fromkeys(model_map.cannot, "none"))

    return fit


@pytest.fixture
def by_package() -> Callable[[TokenQuantizer, torch.Tensor], torch.Tensor]:
    """Return what quantizes and dequantizes inputs with compressed-tensors' own functions."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    def round_trip(quantizer: TokenQuantizer, x: torch.Tensor) -> torch.Tensor:
        args = QuantizationArgs(
            num_bits=quantizer.format.bits, symmetric=True, strategy="token", dynamic=True
        )
        scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Linear(1, 1))
        return fake_quantize(x, scale, zero, args)

    return round_trip


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))
