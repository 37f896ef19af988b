"""Every method of the field as a preset, run on the toy model, and what passes between two runs."""

import json
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spinlab.compose import composed
from spinlab.errors import InputError
from spinlab.experiment import export
from spinlab.export.identity import manifest_of
from spinlab.learn import warn_of_mismatch
from spinlab.rotation.rotations import RotationSet
from spinlab.stages.pipeline import Pipeline
from spinlab.stages.rotations import networks_of
from spinlab.track.record import Record

pytestmark = pytest.mark.usefixtures("toy_cache")
CONF = Path(__file__).parent.parent / "conf"
METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
CALIBRATED = ("gptq", "gptaq", "qronos", "lwc")
SMALL = [
    *(f"weights.{method}.samples=3" for method in CALIBRATED),
    *(f"weights.{method}.sequence_length=64" for method in CALIBRATED),
    "rotation.statistics.samples=3",
    "rotation.statistics.sequence_length=64",
    "rotation.duquant.steps=8",
    "rotation.duquant.block_size=16",
    "rotation.blocks.size=16",
    "learn.micro_batch=1",
    "learn.optimizer.warmup=0",
    "learn.batch=1",
    "learn.sequence_length=64",
]

_NEITHER, _BOTH = (False, False), (True, True)
_DUQUANT = (_NEITHER, "r3", {(True, True)})  # every input has a scale and a dual transform
# method -> R1 and R2 fused, what turns online, kinds of input transforms (scale, dual)
PARTS = {
    "rtn": (_NEITHER, "", set()),
    "gptq": (_NEITHER, "", set()),
    "smoothquant": (_NEITHER, "", {(True, False)}),
    "duquant": _DUQUANT,
    "duquant_gptq": _DUQUANT,
    "duquant_lwc": _DUQUANT,
    "learned_inputs": _DUQUANT,
    **dict.fromkeys(("wush", "wush_gptq"), (_NEITHER, "r3", {(False, True)})),
    "spinquant_no_had": (_BOTH, "", set()),
    "learned_fused": (_BOTH, "r3r4", {(True, False)}),
    "learned_blocks": ((False, True), "r3r4", {(True, True), (True, False)}),
    **dict.fromkeys(
        (
            *("random", "quarot", "quarot_gptaq", "duquant_learned"),
            *("spinquant_had", "learned_ranges"),
        ),
        (_BOTH, "r3r4", set()),
    ),
}


def pipeline(folder: Path, *overrides: str) -> Pipeline:
    paths = [f"paths.cache={folder / 'cache'}", "eval.max_windows=1", "eval.tasks=[]"]
    return Pipeline(composed("+experiment=toy", *overrides, *paths))


@pytest.fixture
def text(short_text) -> list[str]:
    return [*short_text, "eval.window=64"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_hands_off_to_integers(method, tmp_path):
    learned = ("duquant_learned", *(name for name in METHODS if name.startswith("learned_")))
    steps = dict.fromkeys((*learned, "spinquant_had", "spinquant_no_had"), 2)
    lwc = ["weights.lwc.epochs=1"] if method == "duquant_lwc" else []
    run = pipeline(
        tmp_path, f"+method={method}", *SMALL, *lwc, f"learn.steps={steps.get(method, 0)}"
    )
    assert run.handoff_error("integer") < 1e-9
    metrics = run.measure("fp") | run.measure("fake")
    # 4 bits cost something, and random weights would leave it at 256
    assert metrics["ppl/wiki/fp"] < metrics["ppl/wiki/fake"] < 4 * metrics["ppl/wiki/fp"]
    rotations = run.rotations("fake")
    fused, online, inputs = PARTS[method]
    assert (rotations.r1 is not None, rotations.r2 is not None) == fused
    assert "".join(n for n in ("r3", "r4") if getattr(rotations, n) is not None) == online
    kinds = {(t.scale is not None, t.dual is not None) for t in rotations.inputs.values()}
    assert kinds == inputs
    learned = run.learned.path != run.initial.path
    assert learned == (method in steps)


def test_a_transformed_model_brings_its_online_rotations_along(tmp_path, text):
    """LLMC's two runs: nothing in the second one says that anything has to run online."""
    folder = tmp_path / "transformed"
    quiet = [
        "rotation=quarot",
        "model=random",
        "model.architecture.num_attention_heads=4",
        "learn=none",
        *SMALL,
        *text,
    ]
    first = pipeline(tmp_path, *quiet, f"export.transformed={folder}")
    export(first)
    loaded = ["eval=llmc", "model.weights=pretrained", f"model.path={folder}", "learn=none"]
    loaded += [*SMALL, *text]
    second = pipeline(tmp_path, *loaded, "weights=gptq_llmc", *SMALL)

    rotations = second.rotations("fake")
    assert rotations.r1 is None
    assert rotations.r2 is None
    for name in ("r3", "r4", "cross_head"):
        expected = getattr(first.rotations("fake"), name).dense()
        assert torch.equal(getattr(rotations, name).dense(), expected)
    assert rotations.about["fused"] == ["r1", "r2"]
    # the checkpoint alone is the original; with the rotations of its manifest it still is
    ids = first.calibration.windows("gate", 1, 32)
    original = first.network("fp")[0](ids).logits
    assert torch.allclose(
        second.network("fp")[0](ids).logits,
        original,
        atol=1e-4,
    )
    rotated = networks_of(second.run, second.original).rotated(rotations)
    assert torch.allclose(rotated(ids).logits, original, atol=1e-4)
    # and it is rounded as the first run's own network would be
    rtn = pipeline(tmp_path, *loaded, "weights=rtn")
    found, expected = (run.network("fake")[0](ids).logits for run in (rtn, first))
    assert (found - expected).norm() < 0.1 * (expected - original).norm()
    assert second.handoff_error("integer") < 1e-9


def test_a_transformed_models_rotations_are_not_mixed_with_others(tmp_path, text):
    export(pipeline(tmp_path, *text, "learn=none", f"export.transformed={tmp_path / 't'}"))
    path = ["eval=llmc", "model.weights=pretrained", f"model.path={tmp_path / 't'}", *text]
    for more in (
        ["learn.steps=3"],
        ["learn=none", "rotation.load=R.bin"],
        ["learn=none", "eval.variants=[fp,rtn]"],
    ):
        with pytest.raises(InputError, match="holds a transformed model"):
            _ = pipeline(tmp_path, *path, *more).initial
    loaded = pipeline(tmp_path, *path, "learn=none")
    assert set(loaded.outliers()) == {"init", "learned"}  # it has no "before"
    manifest = tmp_path / "t" / "transform.safetensors"
    with pytest.raises(InputError, match=r"has r1, r2 in its weights: take a file of"):
        _ = pipeline(tmp_path, "learn=none", f"rotation.load={manifest}").initial


def test_an_export_that_does_not_tell_of_its_run_looks_up_no_license(tmp_path, monkeypatch):
    monkeypatch.setattr("spinlab.stages.export.with_license", None)
    files = (f"export.transformed={tmp_path / 't'}", f"export.rotations={tmp_path / 'r.bin'}")
    export(pipeline(tmp_path, "learn=none", *files))
    assert (tmp_path / "t").is_dir() and (tmp_path / "r.bin").is_file()


def test_an_exported_model_is_exported_again_with_all_that_it_brought(tmp_path, text):
    export(pipeline(tmp_path, *text, "learn=none", f"export.transformed={tmp_path / 't'}"))
    model = ["eval=llmc", "model.weights=pretrained", f"model.path={tmp_path / 't'}", *text]
    again = pipeline(tmp_path, *model, "learn=none", f"export.transformed={tmp_path / 'u'}")
    export(again)
    assert manifest_of(str(tmp_path / "u")) == tmp_path / "u" / "transform.safetensors"
    copy = RotationSet.load(tmp_path / "u" / "transform.safetensors")
    assert copy.about["fused"] == ["r1", "r2"]
    (tmp_path / "t" / "transform.safetensors").unlink()
    with pytest.raises(InputError, match=r"lost its transform\.safetensors"):
        pipeline(tmp_path, *model, "learn=none")


@pytest.mark.parametrize(
    "overrides",
    [
        '[{pattern:"*.q_proj",weights:{bits:16}}]',
        '[{pattern:"*.v_proj",weights:{bits:16}}]',
        '[{pattern:"*.gate_proj",weights:{bits:10}},{pattern:"*.up_proj",weights:{bits:12}}]',
    ],
)
def test_wide_and_narrow_weights_may_share_an_input(tmp_path, overrides):
    variants = "eval.variants=[fp,fake]"
    run = pipeline(tmp_path, "learn=none", f"quant.overrides={overrides}", variants)
    assert run.handoff_error("integer") < 1e-9
    assert "bits/weights/fake" in run.measure("fake")


def test_settings_without_a_part_in_the_learning_do_not_learn_again(tmp_path):
    base = ["learn.steps=2", "learn.quantize_weights=false"]
    key = pipeline(tmp_path, *base).learned.key
    for same in (
        "quant.weights.bits=3",
        "rotation.duquant.steps=3",
        "rotation.statistics.samples=5",
        'quant.overrides=[{pattern:"*.up_proj",weights:{bits:8}}]',
    ):
        assert pipeline(tmp_path, *base, same).learned.key == key
    for other in (
        "rotation.r4_block=64",
        "kv.values.clip_ratio=0.9",
        "kv.queries.bits=4",
        'quant.overrides=[{pattern:"*.down_proj",activations:{bits:8}}]',
    ):
        assert pipeline(tmp_path, *base, other).learned.key != key


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_a_rotation_learned_elsewhere_is_used_as_it_is(tmp_path, suffix):
    file = tmp_path / f"R.{suffix}"
    first = pipeline(tmp_path, f"export.rotations={file}", "learn.steps=3")
    export(first)
    second = pipeline(tmp_path, f"rotation.load={file}", "learn=none")
    learned, loaded = (run.rotations("fake") for run in (first, second))
    assert torch.allclose(loaded.r1, learned.r1, atol=1e-6)
    assert torch.allclose(loaded.r2, learned.r2, atol=1e-6)
    assert torch.equal(loaded.r4.dense(), learned.r4.dense())
    drawn = pipeline(tmp_path, "learn=none").rotations("fake")
    assert not torch.allclose(loaded.r1, drawn.r1, atol=1e-3)


LEARNED = {
    "rotations": ["learn.steps=3"],
    "rotations and weight ranges": ["learn.steps=3", "learn.lr.clip=0.3"],
    "rotations for GPTQ": ["learn.steps=3", "weights=gptq", "learn.quantize_weights=false", *SMALL],
    "transforms and all ranges": [
        "+method=learned_inputs",
        *SMALL,
        *("learn.steps=3", "learn.lr.scale=0.3", "learn.lr.clip=0.3", "learn.lr.input_clip=0.3"),
        "learn.lr.kv_clip=0.3",
    ],
}
PLAIN = ["rotation=hadamard", "learn=none"]


@pytest.mark.parametrize("how", LEARNED)
def test_what_was_learned_together_gives_the_same_number_wherever_it_went(tmp_path, text, how):
    """Through a file of rotations, and through a checkpoint with its manifest: bit for bit.

    The checkpoint is its run's original, rotated: a divergence from it has its float noise.
    """
    settings = LEARNED[how]
    file, folder = tmp_path / "R.safetensors", tmp_path / "t"
    exports = [f"export.rotations={file}", f"export.transformed={folder}"]
    first = pipeline(tmp_path, *text, *settings, *exports)
    export(first)
    expected = first.measure("fake")
    weights = [s for s in settings if s.startswith("weights")]
    loaded = pipeline(tmp_path, *text, *PLAIN, *weights, f"rotation.load={file}")
    assert loaded.measure("fake") == expected
    model = ["eval.variants=[fp,fake]", "model.weights=pretrained", f"model.path={folder}"]
    found = pipeline(tmp_path, *text, *PLAIN, *weights, *model).measure("fake")
    for of_noise in [name for name in expected if name.startswith("kl")]:
        assert found.pop(of_noise) == pytest.approx(expected.pop(of_noise), rel=1e-5)
    assert found == expected
    if "learn.lr.clip=0.3" in settings:  # and it is not the number without them
        forgetful = replace(loaded.rotations("fake"), weight_clips={}, clips={}, kv_clips={})
        forgetful.save(file)
        found = pipeline(tmp_path, *text, *PLAIN, f"rotation.load={file}").measure("fake")
        assert found["ppl/text.txt/fake"] != expected["ppl/text.txt/fake"]


def test_a_loaded_rotation_is_learned_on_in_one_line(tmp_path, text, caplog):
    caplog.set_level("INFO", "spinlab")
    file = tmp_path / "R.safetensors"
    export(
        pipeline(tmp_path, *text, f"export.rotations={file}", "learn.steps=3", "learn.lr.clip=0.3")
    )
    assert "further" not in caplog.text
    further = pipeline(tmp_path, *text, f"rotation.load={file}", "learn.steps=2", "learn.lr.clip=0")
    start, end = (further.rotations(variant) for variant in ("init", "fake"))
    assert not torch.allclose(end.r1, start.r1, atol=1e-6)
    assert (bool(start.weight_clips), bool(end.weight_clips)) == (True, False)
    (line,) = (r.getMessage() for r in caplog.records if "further" in r.getMessage())
    assert "R.safetensors, which was learned for 3 steps" in line
    assert "learn.lr.clip=0 leaves weight ranges to the clip search" in line
    assert pipeline(tmp_path, *text, f"rotation.load={file}").rotations("rtn").weight_clips == {}


def test_ranges_of_other_formats_are_left_out_and_the_log_says_so(tmp_path, text, caplog):
    file = tmp_path / "R.safetensors"
    export(
        pipeline(tmp_path, *text, f"export.rotations={file}", "learn.steps=2", "learn.lr.clip=0.3")
    )
    same = pipeline(tmp_path, *text, "learn=none", f"rotation.load={file}")
    assert same.rotations("fake").weight_clips
    assert "carries" not in caplog.text
    for other in ("quant.weights.bits=3", "weights=gptq"):
        caplog.clear()
        run = pipeline(tmp_path, *text, "learn=none", f"rotation.load={file}", other)
        assert run.rotations("fake").weight_clips == {}
        assert caplog.text.count("R.safetensors carries weight ranges learned for") == 1


def test_learned_rotations_say_what_they_were_learned_for(tmp_path, caplog):
    run = pipeline(tmp_path, "learn.steps=2", "learn.quantize_weights=true", "weights=gptq", *SMALL)
    rotations = run.rotations("fake")
    warn_of_mismatch(rotations, "gptq")
    assert "learned with 4-bit weights in the loop and are used with weights=gptq" in caplog.text
    assert rotations.about["trained"]["weights_bits"] == 4
    assert rotations.about["family"] == "llama"
    caplog.clear()
    warn_of_mismatch(rotations, "rtn")
    warn_of_mismatch(run.rotations("init"), "gptq")
    assert not caplog.text


def test_down_proj_keeps_eight_bits_where_a_pattern_says_so(tmp_path):
    ends = ["quant.head.bits=8", "quant.embedding.bits=8"]
    run = pipeline(tmp_path, "quant=w4a4_down8", *ends, "learn=none")
    model, weights = run.network("integer")
    bits = {name.rpartition(".")[2]: weight.format.bits for name, weight in weights.items()}
    assert bits == {"lm_head": 8, "embed_tokens": 8, "down_proj": 8} | dict.fromkeys(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"), 4
    )
    assert model.get_submodule("model.layers.0.mlp.down_proj").path.quantizer.format.bits == 8
    assert model.get_submodule("model.layers.0.mlp.up_proj").whole.path.quantizer.format.bits == 4
    for name in ("lm_head", "model.embed_tokens"):
        assert torch.equal(model.get_submodule(name).weight, weights[name].dequantize())
    assert run.handoff_error("integer") < 1e-9
    assert run.network("fp")[1] is None


def test_what_was_exported_is_in_no_record(tmp_path):
    run = pipeline(tmp_path, f"export.rotations={tmp_path / 'R.bin'}")
    record = Record(run.config, [f"export.rotations={tmp_path / 'R.bin'}"], {}, run.identity)
    assert "R.bin" not in json.dumps(record.as_json())
    assert record.key == Record(pipeline(tmp_path).config, [], {}, run.identity).key


def test_a_manifest_holds_plain_tensors(tmp_path):
    export(pipeline(tmp_path, "rotation=quarot", "learn=none", f"export.transformed={tmp_path}/t"))
    assert set(load_file(tmp_path / "t" / "transform.safetensors")) == {
        "r3.left", "r3.right", "r4.left", "r4.right",
    }  # fmt: skip
    assert (tmp_path / "t" / "config.json").is_file()


def test_a_record_tells_loaded_rotations_apart_by_content_and_keeps_no_path(tmp_path):
    file, keys = tmp_path / "R.bin", []
    for seed in (0, 1):
        export(pipeline(tmp_path, f"export.rotations={file}", "learn=none", f"seed={seed}"))
        overrides = [f"rotation.load={file}"]
        run = pipeline(tmp_path, *overrides)
        record = Record(run.config, overrides, {}, run.identity)
        assert str(tmp_path) not in json.dumps(record.as_json())
        keys.append(record.key)
    assert keys[0] != keys[1]


@pytest.mark.parametrize(
    ("experiment", "choice", "setting", "value"),
    [
        ("paper method=learned_ranges", "learn=none", "learn.steps", 0),
        ("llmc_quarot", "rotation=hadamard", "rotation.r3", "hadamard"),
        ("paper method=published/duquant_lwc", "rotation=smoothquant", "rotation.smooth", 0.5),
        ("paper method=published/duquant_lwc", "rotation=hadamard", "rotation.smooth", None),
        ("paper method=published/quarot", "kv=kv8", "kv.keys.clip_ratio", 1.0),
    ],
)
def test_a_chosen_group_beats_what_the_experiment_chose(experiment, choice, setting, value):
    config = composed(*f"+experiment={experiment}".split(), choice)
    assert attrgetter(setting)(config) == value
