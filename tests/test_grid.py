"""Experiments, models and methods go together, each with each; methods run on every family."""

import json
from dataclasses import replace
from functools import cache

import pytest

from spinlab.compose import CONF, composed, options_of
from spinlab.config import Config, ModelConfig, plain
from spinlab.model.families import FAMILIES
from spinlab.model.load import meta_model
from spinlab.model.modules import map_of
from spinlab.stages.pipeline import Pipeline
from tests.shapes import fitted

EXPERIMENTS, METHODS, MODELS = (options_of(g) for g in ("experiment", "method", "model"))
GRIDS = ("paper", "methods", "methods_smollm2")  # a point of a grid is named after it
WITH_METHOD = (*GRIDS, "llama2_7b_w4a4kv4", "llmc_quarot", "smollm2_135m_w4a4kv4_best")
NAMES = {
    **dict.fromkeys(("paper", "llama2_7b_w4a4kv4"), "llama2_7b/spinquant_had"),
    "methods": "methods/qwen2_5_coder_0_5b/spinquant_had",
    "methods_smollm2": "methods_smollm2/spinquant_had",
    **{name: f"llama2_7b/{name}" for name in ("llmc_quarot", "llmc_gptq")},
    **{"kv": "kv/smollm2_135m/kv4", "formats": "formats/smollm2_135m/w4a4_g32_hadamard_rtn"},
}
WINDOWS = (
    *(f"weights.{method}" for method in ("gptq", "gptaq", "qronos", "lwc")),
    "rotation.statistics",
)
TINY = [
    *(f"{part}.samples=2" for part in WINDOWS),
    *(f"{part}.sequence_length=16" for part in WINDOWS),
    *("weights.lwc.epochs=1", "rotation.duquant.steps=1", "rotation.duquant.block_size=8"),
    *("learn.micro_batch=1", "learn.batch=1", "learn.sequence_length=16"),
    *("learn.optimizer.warmup=0", "model.dtype=float64"),
    *("eval.window=32", "eval.max_windows=1", "eval.tasks=[]"),
]
SHAPE = {
    **{"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "vocab_size": 256},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
}
# two experts for a token, and more experts than tokens are sent to
EXPERTS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 16, "num_experts_per_tok": 1, "moe_intermediate_size": 32},
    "olmoe": {"num_experts": 16, "num_experts_per_tok": 1},
    "qwen2_moe": {
        **{"num_experts": 16, "num_experts_per_tok": 1, "moe_intermediate_size": 32},
        "shared_expert_intermediate_size": 32,
    },
    "granitemoe": {"num_local_experts": 16, "num_experts_per_tok": 1},
    "glm4_moe": {
        **{"n_routed_experts": 16, "num_experts_per_tok": 1, "moe_intermediate_size": 32},
        "first_k_dense_replace": 0,
    },
    "llama4_text": {"num_local_experts": 16, "num_experts_per_tok": 1},
    "gpt_oss": {
        **{"num_local_experts": 4, "num_experts_per_tok": 2},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "phimoe": {"num_local_experts": 4},
}


@cache
def point(experiment: str, method: str) -> Config:
    plus = "" if experiment in WITH_METHOD else "+"
    return composed(f"+experiment={experiment}", f"{plus}method={method}")


@cache
def model_of(name: str) -> ModelConfig:
    """Return the settings of a model, which are no more than its part of them all."""
    assert "@package" not in (CONF / "model" / f"{name}.yaml").read_text()
    return composed(f"model={name}").model


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_under_its_own_name(name):
    assert composed(f"+experiment={name}").name == NAMES.get(name, name)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_with_every_method_and_model(experiment):
    """The settings check each other again where one part of them is exchanged.

    A third of all triples, so that every two of them meet.
    """
    shift = EXPERIMENTS.index(experiment)
    for place, method in enumerate(METHODS):
        for model in MODELS[(place + shift) % 3 :: 3]:
            config = replace(point(experiment, method), model=model_of(model))
            assert config.model.name == model


def test_what_composes_to_the_same_settings_has_one_name():
    configs = [composed(f"+experiment={name}") for name in EXPERIMENTS]
    named: dict[str, set[str]] = {}
    for config in (*configs, *(point(grid, method) for grid in GRIDS for method in METHODS)):
        settings = json.dumps(plain(replace(config, name="x")), sort_keys=True)
        named.setdefault(settings, set()).add(config.name)
    assert all(len(names) == 1 for names in named.values())


# families that are read by the same lines take turns
KIN = (
    ("llama", "mistral", "ministral", "qwen2", "qwen3", "seed_oss", "smollm3"),
    ("exaone4", "olmo2", "olmo3"),
    ("gemma", "gemma2", "gemma3_text"),
    ("mixtral", "qwen2_moe", "olmoe", "granitemoe", "qwen3_moe", "glm4_moe"),
    ("gpt_oss", "llama4_text", "phimoe"),
    ("deepseek_v3", "deepseek_v2"),
)


def in_turn(place: int) -> list[str]:
    """Return one family of each kin, and all that have none."""
    kin = {family for families in KIN for family in families}
    assert kin <= FAMILIES.keys()
    return [families[place % len(families)] for families in KIN] + sorted(FAMILIES.keys() - kin)


@pytest.mark.parametrize("method", [name for name in METHODS if "/" not in name])
def test_every_method_runs_on_every_family(method, fitting, tmp_path):
    """From a tiny random model to integers; published formats differ in settings alone."""
    file = tmp_path / "text.txt"
    file.write_text("".join(chr(97 + i * i % 89 % 26) for i in range(2_000)))
    text = [f"data.calibration={file}", f"data.evaluation=[{file}]", f"paths.cache={tmp_path}"]
    config = composed("+experiment=toy", "model=random", f"+method={method}", *TINY, *text)
    learn = replace(config.learn, steps=min(config.learn.steps, 1))
    for family in in_turn(METHODS.index(method)):
        shape = fitted(family, {**SHAPE, **EXPERTS.get(family, {}), "model_type": family})
        model = replace(config.model, architecture=shape)
        rotation = fitting(config.rotation, map_of(meta_model(model, None)))
        run = Pipeline(replace(config, learn=learn, model=model, rotation=rotation))
        assert run.handoff_error("integer") < 1e-9, family
        assert (run.learned.path != run.initial.path) == (learn.steps > 0), family
