"""Values and combinations of settings that no run could mean, and those that nothing reads."""

import logging
import shlex
from pathlib import Path

import pytest
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from spinlab.compose import composed, options_of
from spinlab.config import Config, DataConfig, SweepConfig, plain
from spinlab.config.unread import check_read, unread
from spinlab.config.values import text, values_of, words_of
from spinlab.errors import InputError
from spinlab.learn import unread_by_optimizer

ROOT = Path(__file__).parent.parent
PAPER = [["+experiment=paper", f"method={method}"] for method in options_of("method")]
EXPERIMENTS = [*([f"+experiment={name}"] for name in options_of("experiment")), *PAPER]
FLOATS = [
    *(
        "learn.lr.r1",
        "learn.lr.r2",
        "learn.lr.scale",
        "learn.optimizer.max_grad_norm",
        "learn.max_loss_ratio",
    ),
    *("learn.objective.kl", "weights.gptq.percdamp", "weights.clip.norm", "weights.lwc.lr"),
    *("model.outlier_scale", "rotation.smooth", "kv.keys.clip_ratio", "quant.weights.clip_ratio"),
]


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
@pytest.mark.parametrize("name", FLOATS)
def test_numbers_are_finite(name, value):
    with pytest.raises(InputError, match=name):
        composed("+experiment=toy", f"{name}={value}")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=9223372036854775808", "does not fit into 64 bits"),
        ("seed=-9223372036854775809", "does not fit into 64 bits"),
        ("learn.save_every=99999999999999999999", "does not fit into 64 bits"),
        ("learn.steps=1000000000", "goes from 0 to 1000000"),
        ("learn.batch=1000000000", "goes from 1 to 1000000"),
        ("weights.gptq.samples=1000000000", "goes from 1 to 1000000"),
        ("rotation.duquant.steps=1000000000", "goes from 1 to 1000000"),
        ("eval.batch=1000000000", "goes from 1 to 1000000"),
        ("runtime.threads=1000000000", "goes from 0 to 4096"),
        ("eval.variants=[]", "is empty: name at least one"),
        ("data.evaluation=[]", "is empty: name at least one"),
        ("learn.shard=maybe", "learn.shard=maybe is unknown: choose one of auto, on, off"),
        ("learn.lr.inputs=-1", "learn.lr.inputs=-1.0 must be at least 0"),
        ("eval.variants=[fp,fp]", "names fp twice"),
        ("data.evaluation=[wiki,wiki]", "names wiki twice"),
        ("learn.rotations=[r1,r1]", "names r1 twice"),
        ("eval.tasks=[piqa,piqa]", "names piqa twice"),
        ("data.evaluation=['']", "holds an empty name"),
        ("data.calibration=''", "data.calibration is empty"),
        ("export.rotations=''", "export.rotations is empty"),
        (
            "+model.architecture.rms_norm_eps=nan",
            "model.architecture.rms_norm_eps=nan is no finite",
        ),
        ('quant.overrides=[{pattern:"*",weights:{clip_ratio:nan}}]', "clip_ratio=nan"),
        ("learn.objective=null", "learn.objective"),
        ("quant.weights=null", "quant.weights"),
        ("quant.overrides=[1]", "quant.overrides"),
        ("learn.lr.r1=true", "learn.lr.r1"),
        ("seed=1.5", "seed"),
        ("eval.variants=fp", "eval.variants"),
        ("kv.key_bias=none", "kv.key_bias=none is unknown: choose one of apart, coded"),
    ],
)
def test_hostile_values_are_one_sentence(override, words):
    with pytest.raises((InputError, HydraException, OmegaConfBaseException)) as error:
        composed("+experiment=toy", override)
    assert words in str(error.value)


def test_every_seed_of_64_bits_is_taken():
    for seed in (-(2**63), 0, 2**63 - 1):
        assert composed("+experiment=toy", f"seed={seed}").seed == seed


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["learn=none", "learn.lr.r1=0.5"], "learn.lr.r1"),
        (["learn.steps=0", "learn.objective.kl=1"], "learn.objective.kl"),
        (["learn.rotations=[r1]", "learn.lr.r2=3"], "learn.lr.r2"),
        (["learn.lr.r3=3"], "learn.lr.r3"),
        (["rotation.r3_per_layer=true"], "rotation.r3_per_layer"),
        (["rotation.r3=none", "rotation.r3_per_layer=true"], "rotation.r3_per_layer"),
        (["rotation.load=R.safetensors", "rotation.r3_per_layer=true"], "rotation.r3_per_layer"),
        (
            ["learn.optimizer.name=qr_sgd", "learn.optimizer.cap_step=false"],
            "learn.optimizer.cap_step",
        ),
        (["learn.quantize_weights=false", "learn.clip_refresh=7"], "learn.clip_refresh"),
        (["learn.lr.clip=0.1", "learn.clip_refresh=7"], "learn.clip_refresh"),
        (
            ["learn.optimizer.name=cayley_adam", "learn.optimizer.momentum=0.5"],
            "learn.optimizer.momentum",
        ),
        (
            ["learn.optimizer.name=riemannian_sgd", "learn.optimizer.cap_step=false"],
            "learn.optimizer.cap_step",
        ),
        (["learn.objective.kl_top_k=5"], "learn.objective.kl_top_k"),
        (["learn.lr.scale=0.1"], "learn.lr.scale"),
        (["learn.lr.inputs=0.1"], "learn.lr.inputs"),
        (["+method=learned_inputs", "learn.lr.r1=0.1"], "learn.lr.r1"),
        (["learn=fused", "learn.rotations=[]", "learn.lr.r1=0.1"], "learn.lr.r1"),
        (["learn=fused", "learn.rotations=[]", "learn.optimizer.name=qr_sgd"], "optimizer.name"),
        (["weights=lwc", "weights.gptq.samples=9"], "weights.gptq.samples"),
        (["weights=rtn", "weights.gptq.percdamp=0.1"], "weights.gptq.percdamp"),
        (["weights=rtn", "weights.gptq.samples=9"], "weights.gptq.samples"),
        (["weights=gptq", "weights.lwc.lr=0.1"], "weights.lwc.lr"),
        (["weights=rtn_fixed", "weights.clip.norm=2"], "weights.clip.norm"),
        (["quant.activations.bits=16", "quant.activations.group_size=8"], "group_size"),
        (["kv=kv16", "kv.keys.group_size=8"], "kv.keys.group_size"),
        (["kv.queries.clip_ratio=0.9"], "kv.queries.clip_ratio"),
        (["kv.values.bits=16", "kv.values.codec=other"], "kv.values.codec"),
        (["rotation.duquant.steps=9"], "rotation.duquant.steps"),
        (["rotation.statistics.samples=9"], "rotation.statistics.samples"),
        (["rotation=no_had", "rotation.r4_block=64"], "rotation.r4_block"),
        (["rotation.load=R.safetensors", "rotation.r1=random"], "rotation.r1"),
        (["rotation.load=R.bin", "rotation.r2=random"], "rotation.r2"),
        (["eval.tasks=[]", "eval.limit=9"], "eval.limit"),
        (["eval.variants=[fake]", "eval.tasks=[piqa]"], "eval.tasks"),
        (["eval.variants=[fake]", "eval.paired=false"], "eval.paired"),
        (["export.profile=weights_only"], "export.profile"),
        (["export.gguf_type=q8_0"], "export.gguf_type"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_command_that_sets_what_nothing_reads_is_refused(overrides, name, caplog):
    config = composed("+experiment=toy", *overrides)
    rules = [*unread_by_optimizer(config.learn.optimizer)]
    with pytest.raises(InputError, match=rf"{name}.* is not read with .*: leave it out"):
        check_read(config, overrides, rules=rules)
    caplog.set_level(logging.INFO)
    check_read(config, [], rules=rules)  # from a preset, or shared by the runs of a sweep
    assert any(name in record.message for record in caplog.records)


@pytest.mark.parametrize(
    "overrides",
    [
        ["learn.lr.r1=0.5", "learn.lr.r2=3", "learn.clip_refresh=2"],
        ["weights=gptq", "weights.gptq.percdamp=0.1", "weights.gptq.samples=9"],
        ["rotation=duquant", "learn=none", "rotation.duquant.steps=9"],
        ["rotation=smoothquant", "learn=none", "rotation.statistics.samples=9"],
        ["learn=none", "eval.tasks=[]"],
        ["rotation.r3=random", "rotation.r3_per_layer=true"],
        ["learn.rotations=[r1,r2,r3]", "learn.lr.r3=3", "rotation.r3_per_layer=true"],
        ["rotation.load=R.bin", "rotation.r3=random", "rotation.r3_per_layer=true"],
        ["rotation.load=R.bin", "rotation.r4_block=64"],
        ["rotation.online=false", "rotation.r3=none", "rotation.r4=none"],
        ["quant.activations.bits=16", "quant.activations.clip_ratio=0.9",
         'quant.overrides=[{pattern:"*.down_proj",activations:{bits:8}}]'],
    ],
    ids=str,
)  # fmt: skip
def test_a_command_that_sets_what_is_read_is_taken(overrides):
    check_read(composed("+experiment=toy", *overrides), overrides)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["+model.architecture.hidden_size=64"], "model.architecture"),
        (["model.outlier_channels=4"], "model.outlier_channels"),
        (["model.path=/a", "model.file=b"], "model.file"),
        (["model.path=/a", "model.revision=dev"], "model.revision"),
        (["model.revision=dev"], "model.revision"),
        (["model.package=null", "model.hub=a/b", "model.file=c"], "model.file"),
        (["model=random", "model.revision=dev"], "model.revision"),
        (["model=random", "model.outlier_channels=0", "model.outlier_scale=9"], "outlier_scale"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_the_models_source_does_not_read_is_refused(overrides, name):
    with pytest.raises(InputError, match=rf"{name} is not read with .*: leave it out"):
        check_read(composed("+experiment=toy", *overrides), overrides)


@pytest.mark.parametrize("override", ["rotation.r1=random", "rotation.r4_block=64"])
def test_rotations_of_an_exported_model_are_its_own(override, caplog):
    overrides = ["model.path=/a", "learn=none", override]
    config = composed("+experiment=toy", *overrides)
    check_read(config, overrides)
    words = r"rotation\..* is not read with model.path=…, an exported model"
    with pytest.raises(InputError, match=words):
        check_read(config, overrides, exported=True)
    check_read(config, overrides[:2], exported=True)


@pytest.mark.parametrize(
    ("arguments", "logged"),
    [
        (["+experiment=llama2_7b_w4a4kv4"], {"model.architecture"}),
        (
            ["+experiment=llama2_7b_w4a4kv4", "model.path=/a"],
            {"model.architecture", "model.hub"},
        ),
        (["+experiment=llama2_7b_w4a4kv4", "model.weights=random"], {"model.hub"}),
        (["+experiment=toy", "model.path=/a"], {"model.package", "model.file"}),
        (["+experiment=toy", "model.package=null", "model.hub=a/b"], {"model.file"}),
        (["+experiment=toy", "model=random", "model.architecture.hidden_size=64"], set()),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_models_preset_carries_for_other_sources_is_only_told(arguments, logged, caplog):
    config = composed(*arguments)
    caplog.set_level(logging.INFO)
    check_read(config, arguments)
    assert {name for name in unread(config) if name.startswith("model.")} == logged
    assert all(name in caplog.text for name in logged)


@pytest.mark.parametrize("arguments", [x for x in EXPERIMENTS if "toy" not in x[0]], ids=" ".join)
def test_experiments_set_nothing_that_they_do_not_read(arguments):
    # a model's preset carries its shape as well, for random weights
    config = composed(*arguments)
    found = unread(config, rules=unread_by_optimizer(config.learn.optimizer))
    assert set(found) <= {"model.architecture"}


@pytest.mark.parametrize("model", ["llama2_7b", "llama3_8b"])
@pytest.mark.parametrize(
    "arguments",
    [*PAPER, *([f"+experiment={name}"] for name in ("llmc_quarot", "llmc_gptq"))],
    ids=" ".join,
)
def test_llama_rows_measure_what_the_paper_does(arguments, model):
    config = composed(*arguments, f"model={model}")
    assert config.name.startswith(f"{model}/")
    assert "wikitext2" in config.data.evaluation
    if not config.export.transformed:  # the first of two runs, not a row
        assert config.eval.scored
        assert set(config.eval.tasks) == {
            "boolq", "piqa", "social_iqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge",
            "openbookqa",
        }  # fmt: skip
        assert {"fp", "integer"} <= set(config.eval.variants) & set(config.eval.task_variants)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rotation.r3=none"], "which is off: set rotation.r3=hadamard rotation.online=true"),
        (["rotation.online=false"], "which is off: set rotation.r3=hadamard"),
        (["rotation.load=R.bin", "rotation.r3=none"], "which is off: set rotation.r3=hadamard"),
        (["kv=kv16"], "with keys and queries of 16 bits nothing depends on R3: leave r3 out"),
        (["kv.keys.bits=16"], "with keys and queries of 16 bits nothing depends on R3"),
        (
            [
                "learn.objective.whip=1",
                "learn.objective.cross_entropy=0",
                "learn.quantize_weights=false",
            ],
            "needs a term that sees coded keys: weigh",
        ),
    ],
    ids=str,
)
def test_an_r3_that_cannot_be_learned_is_refused(overrides, words):
    with pytest.raises(InputError, match=words):
        composed("+experiment=toy", "learn.rotations=[r1,r2,r3]", *overrides)


@pytest.mark.parametrize("overrides", [["kv.keys.bits=16", "kv.queries.bits=4"], ["kv=kv3"]])
def test_an_r3_that_a_codec_notices_is_learned(overrides):
    composed("+experiment=toy", "learn.rotations=[r3]", *overrides)


def documented() -> list[list[str]]:
    """Return the arguments of every command of the pages, and of their lines of bare settings."""
    found = []
    pages = [ROOT / "README.md", *sorted((ROOT / "experiments").glob("*.md"))]
    texts = [page.read_text(encoding="utf-8") for page in pages]
    for block in [block for page in texts for block in page.split("```")[1::2]]:
        for line in block.splitlines():
            *command, arguments = line.rpartition("spinlab +experiment=")
            settings = "=" in line.partition(" ")[0]
            if not any(command) and not settings:
                continue
            words = shlex.split(arguments, comments=True)
            base, *more = words if any(command) else ("toy", *words)
            found.append([f"+experiment={base}", *more])
    return found


@pytest.mark.parametrize("arguments", documented(), ids=" ".join)
def test_what_the_pages_say_composes_and_is_read(arguments):
    config = composed(*arguments)
    check_read(config, arguments, rules=unread_by_optimizer(config.learn.optimizer))


def test_the_pages_are_understood():
    assert len(documented()) > 15


def test_a_value_as_text_is_the_value_once_it_is_typed_again():
    override = "quant.overrides=[{pattern:*.layers.0.*,weights:{bits:8}}]"
    words = ["weights.clip.search=true", "learn.lr.r2=null", "learn.lr.r1=0.1234567891"]
    words += ["eval.variants=[fp,fake]", override]
    settings = values_of(plain(composed("+experiment=toy", *words)))
    names = list(words_of(words))
    again = [f"{name}={text(settings[name])}" for name in names]
    assert again[:4] == words[:4]
    assert values_of(plain(composed("+experiment=toy", *again))) == settings
    assert [text(value) for value in (1.5, 2.0, 1e-5, 3)] == ["1.5", "2", "1e-05", "3"]


@pytest.mark.parametrize(
    ("metric", "held_out"),
    [("ppl/wiki_dev/fake", "evaluation"), ("kl/wiki/fake", "development"), ("flips/w/fp", None)],
)
def test_a_metric_of_a_text_that_is_not_measured_is_refused(metric, held_out):
    data = DataConfig(held_out=held_out or "evaluation")
    with pytest.raises(InputError, match=f"{metric} is of a text that is not measured: with data"):
        Config(data=data, sweep=SweepConfig(metric))
    Config(data=data, sweep=SweepConfig("ppl/*/fake"))
    Config(data=data, sweep=SweepConfig("zeroshot_mean/accuracy/fake"))


def test_a_file_of_rotations_beside_the_method_that_made_it_is_refused_with_the_cure():
    words = ["+experiment=toy", "rotation.load=R.safetensors"]
    with pytest.raises(InputError, match="leave out the method or the rotation preset") as raised:
        composed(*words, "+method=duquant_gptq")
    assert "rotation.inputs=duquant, rotation.smooth=0.6 would make others" in str(raised.value)
    assert composed(*words, "weights=gptq").weights.method == "gptq"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["learn.quantize_weights=false"], "loop rounds none: set learn.quantize_weights=true or"),
        (
            ["quant.weights.bits=16", "eval.variants=[fp,fake]"],
            "they have 16 bits: set learn.lr.clip=0",
        ),
        (["weights=gptq"], "weights=gptq finds its own: set learn.lr.clip=0, or weights=rtn, "),
    ],
    ids=str,
)
def test_learned_ranges_that_nothing_learns_or_keeps_are_refused(words, said):
    with pytest.raises(InputError, match=f"learn.lr.clip=0.1 learns ranges .* {said}"):
        composed("+experiment=toy", "learn.lr.clip=0.1", *words)
    assert composed("+experiment=toy", "learn.lr.clip=0", *words)
