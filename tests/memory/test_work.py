"""What stages are said to multiply, against what torch counts in them and worked out by hand."""

import json
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from spinlab.bench.estimates import RATES
from spinlab.bench.memory import Setting, experiment, job_of
from spinlab.compose import composed
from spinlab.errors import InputError
from spinlab.memory.check import check_memory
from spinlab.memory.job import Job
from spinlab.memory.work import works
from spinlab.model.load import meta_model
from spinlab.speed import INT8, MOVED, TF32, rate_of
from spinlab.stages.pipeline import Pipeline
from spinlab.stages.remaining import stages_of

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
RECORDS = Path(__file__).parents[2] / "experiments"
SHAPE = (
    "model.architecture={vocab_size:300,hidden_size:64,intermediate_size:160,"
    "num_hidden_layers:2,num_attention_heads:4,num_key_value_heads:2,max_position_embeddings:512}"
)
MIXTURE = ["model=qwen3_30b_a3b", "model.weights=random", "model.dtype=float32"]
MIXTURE.append(
    "model.architecture={vocab_size:300,hidden_size:64,moe_intermediate_size:48,num_experts:3,"
    "num_experts_per_tok:2,num_hidden_layers:1,num_attention_heads:4,num_key_value_heads:2,"
    "head_dim:16,max_position_embeddings:512}"
)
SMALL = ["+experiment=toy", "model=random", "eval.tasks=[]", "eval.window=128"]
SMALL += ["eval.max_windows=2", "eval.batch=1", "weights.clip.search=false", "weights.lwc.epochs=1"]
SMALL += [
    f"weights.{name}.{word}"
    for name in ("gptq", "gptaq", "qronos", "lwc")
    for word in ("samples=3", "sequence_length=128")
]


def _product(a: tuple, b: tuple, *args, out_shape=None, **kwargs) -> int:
    return 2 * a[0] * a[1] * b[1]


def _added(out: tuple, a: tuple, b: tuple, *args, **kwargs) -> int:
    return _product(a, b)


def _causal(q: tuple, k: tuple, v: tuple, *args, **kwargs) -> int:
    """Count the keys that a token sees; torch counts all, and on a CPU none."""
    batch, heads, tokens, width = q
    return batch * heads * tokens * (tokens + 1) * (width + v[-1])


def _causal_back(gradient: tuple, q: tuple, k: tuple, v: tuple, *args, **kwargs) -> int:
    """Four products, and the scores once more."""
    return 5 * _causal(q, k, v) // 2


COUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _causal_back,
    torch.ops.aten.addmm_: _added,
    torch.ops.aten._int_mm: _product,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _causal,
}


def counted(stages: Collection[str], folder: Path, *words: str) -> dict[str, tuple[float, int]]:
    """Return what is said of stages, and what torch multiplies when they run: (said, counted)."""
    pipeline = Pipeline(composed(*SMALL, *words, f"paths.cache={folder}"))
    assert pipeline.calibration and pipeline.evaluation
    assert "rotate" in stages or pipeline.initial
    asked = dict(stages_of(pipeline))
    job = Job(pipeline.config, pipeline.original.shape, pipeline.run.device, set(asked))
    said = {work.stage: work.operations.total() for work in works(job)}
    found = {}
    for name in dict.fromkeys(name for name, _ in stages_of(pipeline) if name in stages):
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            asked[name]()
        found[name] = said[name], counter.get_total_flops()
    return found


def test_an_originals_windows_are_counted_exactly_and_its_integers_from_below(tmp_path, short_text):
    """Gates and networks that are quantized have online rotations, which are left out, beside."""
    words = [SHAPE, "learn=none", "eval.variants=[fp,fake,integer]", *short_text]
    stages = {"rotate", "eval-fp", "handoff-fake", "eval-fake", "eval-integer", "layers-fake"}
    found = counted(stages | {"outliers"}, tmp_path, *words)
    said, exact = found.pop("eval-fp")
    assert said == exact
    for stage, (said, multiplied) in found.items():
        assert 0.75 * multiplied < said <= multiplied, stage


@pytest.mark.parametrize(
    ("method", "shape"),
    [(name, [SHAPE]) for name in ("gptq", "gptaq", "qronos", "lwc")] + [("gptaq", MIXTURE)],
    ids=["gptq", "gptaq", "qronos", "lwc", "gptaq-mixture"],
)
def test_rounding_on_text_multiplies_what_is_said_at_least(method, shape, tmp_path, short_text):
    """Factors, which torch does not count, are worked out by hand; R4 is left out."""
    words = [*shape, "learn=none", f"weights={method}", "eval.variants=[fake]"]
    words += ["rotation.r2=none", *short_text]
    said, multiplied = counted({"weights"}, tmp_path, *words)["weights"]
    widths = [64] * (2 + 3) + [48] * 3 if len(shape) > 1 else 2 * ([64] * 3 + [160])
    factors = 0 if method == "lwc" else sum(4 * n**3 // 3 for n in widths)
    assert 0.8 * multiplied < said - factors <= multiplied


@pytest.mark.parametrize("checkpoint", ["off", "on"])
@pytest.mark.parametrize("words", [["learn=spinquant"], ["learn=fused", "rotation=scales"]])
def test_learning_multiplies_what_is_said_at_least(words, checkpoint, tmp_path, short_text):
    """With 16-bit weights in the loop and with rounded ones; steps on rotations are left out."""
    sizes = ["steps=6", "batch=2", "micro_batch=1", "sequence_length=128"]
    settings = [f"learn.{word}" for word in (*sizes, f"checkpoint={checkpoint}")]
    said, multiplied = counted({"learn"}, tmp_path, SHAPE, *words, *settings, *short_text)["learn"]
    assert 0.85 * multiplied < said <= multiplied


SMOLLM2 = (
    "model.architecture={vocab_size:49152,hidden_size:576,intermediate_size:1536,"
    "num_hidden_layers:30,num_attention_heads:9,num_key_value_heads:3,tie_word_embeddings:true}"
)
LLAMA = ["+experiment=llama2_7b_w4a4kv4", "model.weights=random", "data=packaged"]
LLAMA += ["eval.tasks=[]", "eval.variants=[fp,integer]", "eval.max_windows=5"]
LAYER, END = 4 * 4096**2 + 3 * 4096 * 11008, 32000 * 4096


@pytest.fixture(scope="module")
def llama() -> Job:
    """What the work on a 7B depends on, on a GPU, with every stage still to run."""
    config = composed(*LLAMA)
    names = {name for name, _ in stages_of(Pipeline(config))}
    return Job(config, meta_model(config.model, None), GPU, names, processes=1)


def work_of(job: Job) -> dict[str, Counter[str]]:
    return {work.stage: work.operations for work in works(job)}


def seen(window: int) -> int:
    """Multiplications of a token with keys and values, on average, by hand and twice."""
    return 32 * 2 * 4096 * (window + 1)


@pytest.mark.parametrize("processes", [1, 4])
def test_the_work_of_gptq_on_a_7b_is_that_worked_out_by_hand(llama, processes):
    found = work_of(replace(llama, processes=processes))["weights"]
    tokens = 128 * 2048 // processes
    again = 2 * (tokens - 4 * 2048) * 32 * 2 * 4096 * 11008  # one batch is kept
    assert found["bfloat16"] == tokens * (2 * 32 * LAYER + seen(2048)) + again
    hessians = 32 * 2 * tokens * (3 * 4096**2 + 11008**2)
    behind = (4 * 4096 + 2 * 11008) * 4096 * (4096 - 128) + 4096 * 11008 * (11008 - 128)
    assert found["float32"] == hessians + 32 * behind
    factors = 32 * 4 / 3 * (3 * 4096**3 + 11008**3)
    fused = 32 * 2 * (LAYER * 4096 + 2 * 4096**2 * 128) + 4 * END * 4096
    assert found["float64"] == pytest.approx(factors + fused, rel=1e-9)
    assert found[MOVED] == 2 * (32 * LAYER + 2 * END + 65 * 4096)


def test_the_work_on_windows_of_a_7b_is_that_worked_out_by_hand(llama):
    """Five of each of two texts; processes share them out, and do not know where texts end."""
    for processes, windows in ((1, 10), (2, 6)):
        found, tokens = work_of(replace(llama, processes=processes)), windows * 2048
        head, attention = 2 * tokens * END, tokens * seen(2048)
        assert found["eval-fp"]["bfloat16"] == 2 * tokens * 32 * LAYER + attention + head
        assert found["eval-integer"][INT8] == 2 * tokens * 32 * LAYER
        compared = windows * 2047 * 2 * END
        assert found["eval-integer"]["bfloat16"] == attention + head + compared
        assert found["handoff-integer"][INT8] == 2 * 256 * 32 * LAYER


def test_the_work_of_the_gate_and_of_learning_beside_it_are_those_worked_out_by_hand(llama):
    found, learn = work_of(llama), llama.config.learn
    gate, learned, numbers = found["rotate"], found["learn"], 32 * LAYER + 2 * END + 65 * 4096
    assert gate["float32"] == 2 * 256 * (2 * 32 * LAYER + seen(256) + 2 * END)
    assert gate[MOVED] == 2 * 4 * numbers
    assert learned["float32"] == gate["float32"] and learned["float64"] == gate["float64"]
    assert learned[MOVED] == gate[MOVED] + 2 * numbers
    tokens = learn.steps * learn.batch * learn.sequence_length
    turned = 32 * 2 * 2 * 11008 * 11008**0.5  # by R4 in two factors, forwards and backwards
    assert learned[TF32] == pytest.approx(tokens * 2 * turned, rel=1e-9)


def test_layers_that_are_run_again_for_certain_are_counted_once_more(llama):
    """What `auto` does is not known before."""
    learn = llama.config.learn
    again = work_of(
        replace(llama, config=replace(llama.config, learn=replace(learn, checkpoint="on")))
    )
    tokens = learn.steps * learn.batch * learn.sequence_length
    found = again["learn"]["bfloat16"] - work_of(llama)["learn"]["bfloat16"]
    turned = 32 * 2 * 2 * 2 * 4096**2  # by R1 and back, at both readers of the stream
    once = tokens * (2 * 32 * LAYER + seen(learn.sequence_length) + turned)
    assert found == pytest.approx(once, rel=0.001)


def test_texts_are_as_long_as_their_words_and_no_longer_than_settings_say(llama):
    config = replace(llama.config, eval=replace(llama.config.eval, max_windows=None))
    for most, words, windows in ((5, (), 10), (None, (), 2), (None, (2048 * 3 + 9, 7), 4)):
        job = replace(llama, config=config if most is None else llama.config, words=words)
        assert work_of(job)["eval-integer"][INT8] == windows * 2048 * 2 * 32 * LAYER


def test_layers_that_come_one_by_one_bring_states_and_no_more_operations(llama):
    config = replace(llama.config, model=replace(llama.config.model, weights="auto", path="x"))
    config = replace(config, runtime=replace(config.runtime, offload=True))
    whole, parts = work_of(llama), work_of(replace(llama, config=config))
    states = 10 * 2048 * 4096 * 2 * 32
    assert parts["eval-fp"] - whole["eval-fp"] == {MOVED: states}
    assert {name: +found for name, found in parts.items() if "eval" not in name} == {
        name: +found for name, found in whole.items() if "eval" not in name
    }


def test_cached_stages_take_no_time_and_two_roundings_take_twice_that_of_one(llama):
    assert works(replace(llama, remaining=())) == []
    assert list(work_of(replace(llama, remaining={"outliers"}))) == ["outliers"]
    both = replace(llama.config, eval=replace(llama.config.eval, variants=["init", "integer"]))
    found = [work.stage for work in works(replace(llama, config=both))]
    assert found.count("weights") == 2


def test_no_rotation_is_fused_that_a_file_may_lack_or_a_model_has(llama):
    job = replace(llama, transformed=True)
    assert not work_of(job)["rotate"]["float64"] and not work_of(job)["outliers"]["float64"]
    assert work_of(llama)["outliers"]["float64"] == 2 * work_of(llama)["rotate"]["float64"]


@pytest.mark.parametrize("path", sorted(RECORDS.glob("bench/memory_*.json")), ids=lambda p: p.stem)
def test_stages_took_longer_than_is_said_at_an_h200s_rates(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    settings = {name: value for name, value in record["config"].items() if name != "device"}
    setting = Setting(**{**settings, "variants": tuple(settings["variants"])})
    config = experiment(setting, CPU, Path("unread"))
    taken = {n.split("/")[1]: s for n, s in record["metrics"].items() if n.startswith("speed/")}
    for work in works(job_of(setting, config, GPU)):
        if work.stage in taken:
            assert 0 < work.seconds(RATES) < taken[work.stage], work.stage


@pytest.mark.parametrize(
    ("name", "words", "stage", "processes"),
    [
        ("gptq_llama2_7b_h100", [], "weights", 1),
        ("learn_llama2_7b_h100", [], "learn", 1),
        ("learn_llama2_7b_fused_h200", ["method=learned_fused"], "learn", 1),
        ("learn_llama2_7b_fused_h200_x2", ["method=learned_fused"], "learn", 2),
    ],
)
def test_what_is_bound_by_products_takes_no_four_times_what_is_said(name, words, stage, processes):
    record = json.loads((RECORDS / f"bench/{name}.json").read_text(encoding="utf-8"))
    steps = [f"learn.steps={learn['steps']}"] if (learn := record["config"].get("learn")) else []
    config = composed(*LLAMA, *words, *steps)
    job = Job(config, meta_model(config.model, None), GPU, {stage}, processes=processes)
    (said,) = (work.seconds(RATES) for work in works(job))
    (taken,) = (
        s for n, s in record["metrics"].items() if n.endswith(("gptq/seconds", "learn/seconds"))
    )
    assert said < taken < 4 * said


@pytest.mark.parametrize("name", ["spinquant_had", "quarot_qronos"])
def test_runs_of_a_small_model_took_longer_than_is_said(name):
    record = json.loads((RECORDS / f"quality/smollm2_135m/{name}_seed0.json").read_text("utf-8"))
    mine = ("paths.", "tracker", "name=", "runtime.", "sweep")
    config = composed(*(word for word in record["overrides"] if not word.startswith(mine)))
    shape = composed("model=random", SMOLLM2).model
    taken = {s["name"]: s["seconds"] for s in record["stages"] if not s["cached"]}
    found = works(Job(config, meta_model(shape, None), GPU, set(taken), processes=1))
    assert {work.stage for work in found} >= {"weights", "eval-fake"}
    for work in found:
        assert 0 < work.seconds(RATES) < taken[work.stage], work.stage


def test_rates_of_an_h200_are_no_lower_than_it_was_measured():
    for name in ("kernels", "kv"):
        record = json.loads((RECORDS / f"bench/{name}_h200.json").read_text(encoding="utf-8"))
        assert 1 <= RATES["bfloat16"] / record["metrics"]["ceiling/bf16"] < 1.05
    assert RATES[INT8] == 2 * RATES["bfloat16"]


def test_time_is_told_before_the_first_stage_with_the_longest_and_refuses_nothing(
    llama, caplog, monkeypatch
):
    place = "spinlab.memory.check."
    monkeypatch.setattr(f"{place}left_on_host", lambda alone: 2**50)
    monkeypatch.setattr(f"{place}left_on_device", lambda device: 2**50)
    monkeypatch.setattr(f"{place}check_disks", lambda found: None)
    monkeypatch.setattr(f"{place}rate_of", lambda kind, device: RATES[kind] / 1000)
    asked = replace(llama.config.eval, tasks=["piqa"], task_variants=["fp"])
    for config, beside in ((llama.config, ""), (replace(llama.config, eval=asked), " without")):
        with caplog.at_level("INFO", logger="spinlab.memory.check"):
            check_memory(replace(llama, config=config))
        hours = 1000 / 3600 * sum(work.seconds(RATES) for work in works(llama))
        assert f", {hours:.0f} h{beside}" in caplog.messages[-1]
        assert "(learn) and " in caplog.messages[-1]
    monkeypatch.setattr(f"{place}rate_of", None)  # nothing is measured where little is to be done
    with caplog.at_level("INFO", logger="spinlab.memory.check"):
        check_memory(replace(llama, remaining={"weights-rtn"}))
    assert caplog.messages[-1].endswith("of the host (drawing random weights) and 3.0 GiB of disk")
    monkeypatch.setattr(f"{place}left_on_device", lambda device: 2**30)  # nor where it has no room
    with pytest.raises(InputError, match=r"of cuda:0, and 1\.0 GiB are left"):
        check_memory(llama)


@pytest.mark.parametrize("kind", ["float64", "float32", TF32, "bfloat16", INT8, MOVED])
def test_a_device_is_measured_in_less_than_a_second(kind):
    assert 1e8 < rate_of(kind, CPU) < 1e14
