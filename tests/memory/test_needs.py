"""What stages are said to take, against what they take and what was worked out by hand."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from spinlab.compose import composed
from spinlab.config import ModelConfig
from spinlab.errors import InputError
from spinlab.memory.check import check_memory, check_needs
from spinlab.memory.disk import Write, check_disks, disk, writes
from spinlab.memory.measuring import _recalling
from spinlab.memory.needs import Job, Need, needs
from spinlab.metrics.likelihood import MOST_TOKENS
from spinlab.model.load import meta_model
from spinlab.stages.pipeline import Pipeline
from spinlab.stages.remaining import stages_of

GIB, CPU, GPU = 2**30, torch.device("cpu"), torch.device("cuda", 0)
LLAMA = ["+experiment=llama2_7b_w4a4kv4", "model.weights=random", "data=packaged"]
MIDDLE = (
    "model.architecture={vocab_size:12000,hidden_size:512,intermediate_size:1408,"
    "num_hidden_layers:4,num_attention_heads:8,num_key_value_heads:4,head_dim:64,"
    "max_position_embeddings:1024,tie_word_embeddings:true}"
)
SMOLLM2 = (
    "model.architecture={vocab_size:49152,hidden_size:576,intermediate_size:1536,"
    "num_hidden_layers:30,num_attention_heads:9,num_key_value_heads:3}"
)
SHAPES: dict[str, PreTrainedModel] = {}
_SLACK = 64 * 2**20  # of allocators, and of libraries as they are first called
PRODUCTS = 32 * 2**20  # of cuBLAS, wherever something is on a GPU


def shape_of(model: ModelConfig) -> PreTrainedModel:
    """Return a model of names and shapes, which are looked at alone: each is made once."""
    if repr(model) not in SHAPES:
        SHAPES[repr(model)] = meta_model(model, None)
    return SHAPES[repr(model)]


def needs_of(*overrides: str, device: torch.device = CPU) -> list[Need]:
    config = composed(*overrides)
    names = {name for name, _ in stages_of(Pipeline(config))}
    return needs(Job(config, shape_of(config.model), device, names))


def need_of(stage: str, *overrides: str, device: torch.device = CPU) -> Need:
    """Return the largest need of a stage."""
    found = [n for n in needs_of(*overrides, device=device) if n.stage == stage]
    return max(found, key=lambda need: need.host + need.device)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux")
def test_what_is_estimated_is_what_stages_take(tmp_path, short_text):
    script = Path(__file__).parent / "peaks.py"
    small = ["learn.steps=1", "learn.batch=1", "learn.sequence_length=256", "eval.tasks=[]"]
    small.append("weights.clip.search=false")
    for method in ("gptq", "gptaq"):
        small += [f"weights.{method}.samples=4", f"weights.{method}.sequence_length=128"]
    small += ["eval.window=512", "eval.max_windows=1", "eval.variants=[fp,integer,fake]"]
    small += ["eval.attention=1", "eval.continued=64", "eval.needle=[512]", "eval.task_batch=1"]
    command = [sys.executable, str(script), str(tmp_path), "+experiment=toy", "model=random"]
    done = subprocess.run([*command, MIDDLE, *small, *short_text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 8
    for stage, (expected, taken) in found.items():
        assert expected - _SLACK / 4 < taken < 2 * expected + _SLACK, (stage, found)


def test_needs_of_a_7b_are_those_worked_out_by_hand():
    layers, end = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 32000 * 4096
    whole = layers + 2 * end
    gate = need_of("the gate of the rotated model, in float32,", *LLAMA)
    assert gate.device == pytest.approx(4 * whole + 16 * end, rel=0.01)
    windows, hessian = (
        128 * 2048 * (4096 + 4096) * 2,
        11008**2 * 16 + 4 * 2048 * 11008 * 2,
    )  # a batch that is gated
    gptq = need_of("GPTQ", *LLAMA, device=GPU)
    assert gptq.device == pytest.approx(2 * whole + windows + hessian, rel=0.01)
    assert gptq.host == pytest.approx(2 * layers, rel=0.01)
    logits, read = 2048 * 32000 * (4 + 4), 2048 * 4096 * 2
    fp = need_of("measuring fp", *LLAMA)
    assert fp.device == 2 * (whole + 65 * 4096) + logits + read
    assert need_of("measuring integer", *LLAMA).host == 2 * layers
    drawn = need_of("drawing random weights", *LLAMA, device=GPU)
    assert (drawn.host, drawn.device) == (pytest.approx(4 * whole, rel=0.01), 0)


def test_needs_of_layers_that_come_one_by_one_do_not_grow_with_their_number():
    """But for what the host keeps packed; a 13B and a 70B, worked out by hand."""
    shapes = {"llama2_13b": (5120, 13824, 5120, 40), "llama2_70b": (8192, 28672, 1024, 80)}
    for name, (hidden, inner, heads, count) in shapes.items():
        words = [*LLAMA, f"model={name}", "model.path=x", "learn=none", "eval.tasks=[]"]
        words += ["runtime.offload=true", "eval.variants=[fp,integer]", "eval.max_windows=9"]
        words.append("export.artefact=x")
        config = composed(*(word for word in words if word != "model.weights=random"))
        layer = 2 * hidden * (hidden + heads) + 3 * hidden * inner
        end, norms = 32000 * hidden, 2 * hidden
        for layers in (2, count):
            shape = {**config.model.architecture, "num_hidden_layers": layers}
            model = replace(config.model, path=None, weights="random", architecture=shape)
            names = {name for name, _ in stages_of(Pipeline(config))}
            found: dict[str, list[int]] = {}
            for need in needs(Job(config, meta_model(model, None), GPU, names)):
                sides = found.setdefault(need.stage, [0, 0])
                found[need.stage] = [max(sides[0], need.host), max(sides[1], need.device)]
            r1, kept = 8 * hidden**2, 256 * 32000 * 4
            fused = max(2 * end * 4 + 16 * end, (layer + norms) * 4 + 16 * hidden * inner)
            gate = found["the gate of the rotated model, in float32,"]
            assert gate == [r1, fused + r1 + kept + PRODUCTS]  # layers come from their files
            states = 128 * 2048 * 2 * hidden * 2
            stays = (2 * end + layer + norms) * 2 + 2 * (layer - hidden * inner)
            packed = layers * layer // 2 + 3 * hidden * inner + 128 * 2048 * 8
            batch = 4 * 2048 * inner * 2  # of what is gated, if there is room for one
            work = 16 * inner**2 + batch * (batch <= 2**28) + PRODUCTS
            assert found["GPTQ"] == [packed, stays + states + work]
            between = 2 * 9 * 2048 * hidden * 2  # of wiki and c4
            levels = 2 * hidden * inner * 2  # of gate and up
            assert found["measuring integer"][0] == between + 2 * levels
            replaced = max(2 * end * 2 + 16 * end + r1, (layer + norms) * 2 + 16 * hidden * inner)
            assert found["measuring integer"][1] == replaced + 256 * 32000 * 8 + PRODUCTS
            passing = 2048 * (3 * inner + 4 * hidden) * 2
            logits = 2048 * (32000 * (4 + 4) + hidden * 2)
            original = max(2 * end * 2 + logits, (layer + norms) * 2 + passing) + PRODUCTS
            assert found["measuring fp"] == [between, original]
            fused_half = max(2 * end * 2 + 16 * end, (layer + norms) * 2 + 16 * hidden * inner)
            seen = [layers * 256 * hidden * 4, fused_half + r1 + PRODUCTS]
            assert found["looking for outliers"] == seen
            rest = (2 * end + layers * norms + hidden) * 2
            exported = [layers * layer // 2 + rest, fused_half + r1 + PRODUCTS]
            assert found["export"] == exported
            assert max(device for _, device in found.values()) < (20, 32)[hidden > 5120] * GIB


OFFLOAD = ["+experiment=llama2_7b_w4a4kv4", "data=packaged", "learn=none", "model.path=x"]
OFFLOAD += ["runtime.offload=true", "eval.variants=[fp,integer]"]


def offloaded(*overrides: str, device: torch.device = GPU) -> Job:
    """Return what the needs of a 7B depend on whose layers come one by one."""
    config = composed(*OFFLOAD, *overrides)
    shape = shape_of(replace(config.model, path=None, weights="random"))
    names = {name for name, _ in stages_of(Pipeline(config))}
    return Job(config, shape, device, names)


@pytest.mark.parametrize(
    ("overrides", "fp", "integer"),
    [
        (["eval.tasks=[]", "eval.max_windows=null"], 2 * 2048, 2 * 2048),  # one window of each text
        (["eval.tasks=[]", "eval.max_windows=9"], 18 * 2048, 18 * 2048),
        (["eval.tasks=[piqa]", "eval.task_variants=[fp]"], MOST_TOKENS, 2 * 2048),
        (["eval.tasks=[piqa]", "eval.limit=5"], 2 * 2048, 2 * 2048),
        (["eval.tasks=[]", "eval.needle=[64,1000]"], 20 * 1000, 20 * 1000),
        (
            ["eval.tasks=[]", "eval.task_batch=8", "eval.needle=[64,20000]"],
            8 * 20000,
            8 * 20000,
        ),  # two passes: more
        (["eval.tasks=[]", "eval.task_batch=8", "eval.needle=[64,50000]"], 8 * 50000, 8 * 50000),
    ],
)
def test_the_host_keeps_the_states_of_what_goes_through_a_layer_together(overrides, fp, integer):
    """Beside the levels of gate and up, which are put together unpacked."""
    found = {n.name: n.host for n in needs(offloaded("eval.max_windows=null", *overrides))}
    assert found["eval-fp"] == fp * 4096 * 2
    assert found["eval-integer"] == integer * 4096 * 2 + 2 * (2 * 4096 * 11008 * 2)


def test_statistics_of_layers_that_come_one_by_one_wait_on_the_host():
    """Of DuQuant's search: three inputs of 4096, one of 11008 and the values, in float32."""
    job = offloaded("rotation=duquant", "eval.tasks=[]")
    windows = job.config.rotation.statistics
    length, tokens = windows.sequence_length, windows.samples * windows.sequence_length
    layer = length * (3 * 4096 + 11008 + 4096) * 4
    found = [n for n in needs(job) if n.stage == "statistics"]
    assert max(n.host for n in found) == tokens * (8 + 4096 * 2) + 32 * layer
    assert disk(job) == 32 * layer + disk(replace(job, remaining={*job.remaining} - {"statistics"}))
    made = 2 * 32000 * 4096 * (2 + 8)  # of the ends, beside which those of a layer fit; no R1
    assert max(n.device for n in found) == made + PRODUCTS
    long = offloaded("rotation=duquant", "rotation.statistics.sequence_length=65536")
    beside = 2 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
    of_long = max(n.device for n in needs(long) if n.stage == "statistics")
    assert of_long == beside + layer * 65536 // length + PRODUCTS
    whole = offloaded("rotation=duquant", "eval.tasks=[]", "runtime.offload=false")
    of_whole = [n for n in needs(whole) if n.stage == "statistics"]
    logits = length * 32000 * 2
    weights = 2 * whole.untied
    assert [n.host for n in of_whole] == [tokens * 8, tokens * 8 + 32 * layer]
    most = weights + 32 * layer + logits
    assert [n.device for n in of_whole] == [most + PRODUCTS, weights + PRODUCTS]


def test_rounded_weights_are_packed_beside_the_model_that_is_exported():
    layers, end = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 32000 * 4096
    norms = 65 * 4096
    for device, copied in ((CPU, 0), (GPU, 4 * (2 * end + norms))):
        found = [n for n in needs_of(*LLAMA, "model.dtype=float32", "export.artefact=x",
                                     device=device) if n.stage == "export"]  # fmt: skip
        assert [n.host for n in found] == [2 * layers, 2 * layers + layers // 2 + copied]
        whole = 4 * (layers + 2 * end + norms)
        products = PRODUCTS * (device == GPU)
        assert [n.device for n in found] == [whole + 16 * end + products, whole + products]


def test_needs_of_a_mixture_count_all_experts_and_one_hessian():
    mixture = [*LLAMA, "model=qwen3_30b_a3b"]
    attention, experts = 2048 * (2 * 4096 + 2 * 512), 128 * 3 * 2048 * 768
    layer, end = attention + 128 * 2048 + experts, 151936 * 2048
    whole = 48 * layer + 2 * end
    gate = need_of("the gate of the rotated model, in float32,", *mixture)
    kept = 256 * 151936 * 4
    assert gate.device == pytest.approx(4 * whole + 16 * end + kept, rel=0.01)
    windows, hessian = 128 * 2048 * (2048 + 4096) * 2, 4096**2 * 16  # of what o_proj reads
    gptq = need_of("GPTQ", *mixture, device=GPU)
    assert gptq.device == pytest.approx(2 * whole + windows + hessian, rel=0.01)
    assert gptq.host == pytest.approx(2 * 48 * (attention + experts), rel=0.01)
    beside = need_of("GPTAQ", *mixture, "weights=gptaq", device=GPU)
    twice = 2 * (layer - 4096 * 2048)  # of one layer, but for its largest linear
    states = 2 * windows + 2048**2 * 24
    assert beside.device == pytest.approx(2 * whole + twice + states, rel=0.01)


def test_experts_of_a_layer_are_stacked_on_their_way_to_a_device():
    """As `spinlab.model.parts` reads them: gates, ups and downs, then gates and ups together."""
    gate = "the gate of the rotated model, in float32,"
    experts, r1 = 128 * 3 * 2048 * 768, 8 * 2048**2
    words = [LLAMA[0], LLAMA[2], "model=qwen3_30b_a3b", "model.path=x", "runtime.offload=true"]
    config, shape = composed(*words), shape_of(composed(*LLAMA, "model=qwen3_30b_a3b").model)
    for device, stacked in ((GPU, 2 * (experts + 2 * experts // 3)), (CPU, 0)):
        (found,) = (n for n in needs(Job(config, shape, device, {"rotate"})) if n.stage == gate)
        assert found.host == stacked + r1


def test_each_of_several_processes_has_the_whole_network_before_it_is_shared_out():
    config = composed(*LLAMA, "learn.micro_batch=1")
    whole = 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 2 * 32000 * 4096 + 65 * 4096)
    jobs = (Job(config, shape_of(config.model), GPU, {"learn"}, processes=n) for n in (1, 2, 8))
    found = [[need.device for need in needs(job) if need.name == "learn"] for job in jobs]
    assert found[0][0] > whole + PRODUCTS
    assert found[1:] == [[whole + PRODUCTS]] * 2


def test_several_processes_load_a_checkpoint_by_shards():
    """By hand: three layers are gathered and the embedding, the head is whole, the rest shared."""
    words = ["+experiment=paper", "method=spinquant_had", "model=llama2_70b", "model.path=x"]
    layers = 80 * (2 * 8192**2 + 2 * 1024 * 8192 + 3 * 8192 * 28672 + 2 * 8192)
    config = composed(*words, "data=packaged", "learn.micro_batch=1", "learn.sequence_length=64")
    shape = shape_of(replace(config.model, path=None, weights="random"))
    end = 32000 * 8192
    for count in (1, 4, 8):
        job = Job(config, shape, GPU, {"learn"}, processes=count)
        (need,) = (need for need in needs(job) if need.name == "learn")
        shared = (layers + end) / count + layers * 3 / 80 + 2 * end
        held = 2 * (layers + 2 * end if count == 1 else shared)
        assert held < need.device < held + 4 * 2**30  # R1 and its steps


@pytest.mark.parametrize("shard", ["auto", "on", "off"])
def test_rounded_weights_need_no_more_than_they_do_in_shards_unless_these_are_off(shard):
    """By hand: in 16 bits 2 and 2 bytes whole, with the frozen's share; or 4 + 4 + 2 + 2 of it."""
    words = ["+experiment=paper", "method=learned_fused", "model=llama2_70b", "model.path=x"]
    words += ["data=packaged", "learn.micro_batch=1", "learn.sequence_length=64"]
    config = composed(*words, f"learn.shard={shard}", "learn.dtype=bfloat16")
    shape = shape_of(replace(config.model, path=None, weights="random"))
    layers = 80 * (2 * 8192**2 + 2 * 1024 * 8192 + 3 * 8192 * 28672 + 2 * 8192)
    job = Job(config, shape, GPU, {"learn"}, processes=8)
    (need,) = (need for need in needs(job) if need.name == "learn")
    held = layers * (2 + 2 + 2 + 4 + 2 / 8 if shard == "off" else 12 / 8 + 12 / 80)
    assert held < need.device < held + 16 * 2**30  # the ends and R1
    assert job.loads_shards == (shard != "off")


@pytest.mark.parametrize(
    ("overrides", "more"),
    [
        ([], 0),  # assembling a network of 7B takes more than running it
        (["eval.window=65536"], 2 * 32000 * 4096 + 2 * 4 * 2**24),
        (["eval.window=131072", "model.dtype=float32"], 4 * 32000 * 4096 + 2 * 4 * 2**24),
    ],
)
def test_a_comparison_takes_the_originals_head_and_a_chunk_of_its_logits(overrides, more):
    alone, beside = (
        need_of("measuring integer", *LLAMA, *overrides, f"eval.paired={paired}")
        for paired in ("false", "true")
    )
    assert beside.device - alone.device == more
    assert beside.host == alone.host


@pytest.mark.parametrize(
    ("variant", "settings", "work"),
    [
        ("fp", ["eval.needle=[4000,64]", "eval.task_batch=8"], 8 * 4000 * 3 * 11008 * 2),
        ("fp", ["eval.needle=[4000]", "eval.task_batch=99"], 20 * 4000 * 3 * 11008 * 2),
        ("fp", ["eval.continued=48", "eval.max_windows=3"],
         3 * (2000 * 3 * 11008 * 2 + 2 * 32 * 4096 * 2048 * 2)),
        ("fake", ["eval.attention=1"], 8 * 32 * 2048**2 * 4),
        ("fake", ["eval.continued=2047", "kv.keys.bits=4", "kv.values.bits=4"],
         8 * (3 * 11008 * 2 + 2 * 32 * 32 * 2048 * (64 + 3))),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_measured_of_a_cache_at_work_is_counted(variant, settings, work):
    """On networks that need no fusing, and whose logits are small beside it."""
    config = composed(*LLAMA, "eval.variants=[fp,fake]", "eval.window=2048", *settings)
    job = Job(config, shape_of(config.model), CPU, {f"eval-{variant}"})
    cure = settings[0].split("=")[0].replace("continued", "window").replace("attention", "window")
    (found,) = _recalling(job, variant)
    assert found[0] == work and f"a smaller {cure} than" in found[1]


def test_recall_is_refused_where_it_takes_more_than_logits():
    words = ["eval.variants=[fp,fake]", "eval.window=256", "eval.needle=[200000]"]
    words.append("eval.task_batch=8")
    (need,) = (n for n in needs_of(*LLAMA, *words) if n.stage == "measuring fp")
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 2 * 32000 * 4096
    assert need.device == pytest.approx(2 * weights + 8 * 200000 * 3 * 11008 * 2, rel=0.01)
    assert need.cure.startswith("a smaller eval.needle than 200000 or eval.task_batch than")


def test_a_stage_that_is_cached_needs_no_memory():
    config = composed(*LLAMA, "eval.variants=[fp,integer]")
    shape = shape_of(config.model)

    def stages(*remaining: str) -> set[str]:
        return {need.stage for need in needs(Job(config, shape, CPU, remaining))}

    assert stages() == set()
    drawn, gate = "drawing random weights", "the gate of the rotated model, in float32,"
    assert stages("outliers") == {drawn, "looking for outliers"}
    assert stages("eval-fp") == {drawn, "measuring fp"}
    assert stages("handoff-integer") == {drawn, "measuring integer"}
    assert stages("layers-integer") == {drawn, "measuring integer"}
    assert stages("learn") == {drawn, gate, "learning"}
    assert stages("weights") == {drawn, "GPTQ"}
    assert stages("weights-rtn") == {drawn, "rounding weights"}


def test_a_batch_holds_no_more_windows_than_there_are():
    one, many = (
        need_of("measuring fp", *LLAMA, "eval.max_windows=1", f"eval.batch={batch}")
        for batch in (1, 64)
    )
    assert one == many


def test_what_fits_is_not_refused():
    """Machines that these have been run on."""
    default = ["+experiment=toy", "model=random", "learn=two_cores", "eval=quick", SMOLLM2]
    check_needs(needs_of(*default), 4 * GIB, None, CPU)
    of_gpu = needs_of(*LLAMA, device=GPU)
    gptq = [need for need in of_gpu if need.stage == "GPTQ"]
    check_needs(gptq, 16 * GIB, 24 * GIB, GPU)
    check_needs(of_gpu, 64 * GIB, 32 * GIB, GPU)


@pytest.mark.parametrize(
    ("overrides", "stage", "cure"),
    [
        ([], "drawing random weights", "model.architecture"),
        ([], "the gate of the rotated model, in float32,", "a smaller model"),
        (["eval.batch=64"], "measuring fp", "a smaller eval.batch than 64"),
        (["eval.window=200000"], "measuring fp", "a smaller eval.window than 200000"),
        (["learn.steps=1000000"], "learning", "fewer learn.steps than 1000000"),
        (["learn.sequence_length=500000"], "learning", "learn.sequence_length than 500000"),
        (["weights.gptq.samples=100000"], "GPTQ", "fewer weights.gptq.samples than 100000"),
        (["rotation=duquant", "rotation.statistics.sequence_length=100000", "learn=none"],
         "statistics", "a smaller rotation.statistics.sequence_length than 100000"),
        (["export.transformed=x", "learn=none"], "export", "a smaller model"),
    ],
)  # fmt: skip
def test_a_stage_that_cannot_fit_is_named_with_what_it_needs_and_a_cure(overrides, stage, cure):
    stages = [need for need in needs_of(*LLAMA, *overrides) if need.stage == stage]
    most = max(n.host + n.device for n in stages)
    check_needs(stages, most, None, CPU)
    with pytest.raises(InputError) as refused:
        check_needs(stages, most - 1, None, CPU)
    sentence = str(refused.value)
    assert sentence.startswith(stage)
    assert f"needs at least {most / GIB:.1f} GiB of memory" in sentence
    assert cure in sentence


def test_host_and_gpu_are_held_apart():
    need = Need("it", 2 * GIB, 4 * GIB, "less", "eval-it")
    check_needs([need], 2 * GIB, 4 * GIB, GPU)
    with pytest.raises(InputError, match=r"2\.0 GiB of host memory, and 1\.0 GiB are left"):
        check_needs([need], GIB, 4 * GIB, GPU)
    with pytest.raises(InputError, match=r"4\.0 GiB of memory of cuda:0, and 3\.0 GiB"):
        check_needs([need], 2 * GIB, 3 * GIB, GPU)
    with pytest.raises(InputError, match=r"6\.0 GiB of memory, and 5\.0 GiB are left: use less"):
        check_needs([need], 5 * GIB, None, CPU)


def test_a_disk_that_is_too_small_is_told_before_the_first_stage(tmp_path):
    cache, artefact = tmp_path / "later", tmp_path / "packed"
    places = [f"paths.cache={cache}", f"export.artefact={artefact}"]
    config = composed(*LLAMA, "eval.max_windows=4", *places)
    job = Job(config, meta_model(config.model, None), CPU, {"weights", "eval-fp"})
    layers, end = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 32000 * 4096
    texts = 2 * 4 * 2048 * 4096
    assert disk(job) == 2 * layers // 2 + (end + texts) * 2
    of_cache, of_artefact = writes(job)
    assert of_cache == (places[0], cache, disk(job))
    assert of_artefact == (places[1], artefact, layers // 2 + (2 * end + 65 * 4096) * 2)
    rotations = 4096**2 + 32 * 128**2
    assert disk(replace(job, remaining={"rotate", "learn"})) == 2 * 8 * rotations
    assert disk(replace(job, remaining={"model"})) == 4 * (layers + 2 * end + 65 * 4096)
    check_disks([Write(places[0], cache, 0)])
    with pytest.raises(InputError, match=r"write at least .* GiB to paths\.cache=.*later"):
        check_disks([Write(places[0], cache, 2**60)])
    free = shutil.disk_usage(tmp_path).free
    check_disks([Write(places[0], cache, free // 2)])
    with pytest.raises(InputError, match=r"paths\.cache=.*later and export\.artefact=.*packed,"):
        check_disks([Write(places[0], cache, free // 2), Write(places[1], artefact, free)])


def test_one_memory_is_told_as_one(caplog, monkeypatch, tmp_path):
    """A CPU's device and host are; the largest need is that of both together."""
    monkeypatch.setattr("spinlab.memory.check.left_on_host", lambda alone: 2**50)
    monkeypatch.setattr("spinlab.memory.check.left_on_device", lambda device: 2**50)
    monkeypatch.setattr("spinlab.memory.check.check_disks", lambda found: None)
    monkeypatch.setattr("spinlab.memory.check.rate_of", lambda kind, device: 1e14)
    config, both = composed(*LLAMA), {}
    names = {name for name, _ in stages_of(Pipeline(config))}
    for device in (CPU, GPU):
        job = Job(config, shape_of(config.model), device, names)
        with caplog.at_level("INFO", logger="spinlab.memory.check"):
            check_memory(job)
        both[device.type] = caplog.messages[-1]
    most = max(n.host + n.device for n in needs(Job(config, shape_of(config.model), CPU, names)))
    assert f"at least {most / GIB:.1f} GiB of memory (" in both["cpu"]
    assert "host" not in both["cpu"] and both["cpu"].count("GiB") == 2
    assert "GiB of cuda:0 (" in both["cuda"] and "GiB of the host (" in both["cuda"]
    assert both["cuda"].count("GiB") == 3 and both["cuda"].endswith("GiB of disk")
