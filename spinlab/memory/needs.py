"""What each stage takes at least, from the model's shape and the settings alone.

A stage holds weights, and beside them the largest of what it does in turn. What is small beside a
matrix of the vocabulary is left out, so that these are lower bounds: a run is refused only if it
cannot fit. Fusing works on one matrix at a time and holds it twice in float64.
"""

from collections.abc import Iterator
from dataclasses import replace

from spinlab import parallel
from spinlab.config.weights import method_title
from spinlab.learn import estimate_of
from spinlab.memory.job import FLOAT32, FLOAT64, INDEX, LEVEL, MORE, Job, Need
from spinlab.memory.measuring import measuring, outliers, states_of
from spinlab.rotation.check import GATE_TOKENS
from spinlab.weights.calibration import GATED_BYTES, batch_of
from spinlab.weights.methods import METHODS

_OF_PRODUCTS = 32 * 2**20


def needs(job: Job) -> list[Need]:
    """Return the needs of the stages that have still to run, in their order."""
    found: list[Need] = []
    if job.has("statistics"):
        found += _statistics(job)
    if job.has("rotate", "learn", "factors", "factors-learned"):
        found.append(_rotating(job))
    if job.has("learn"):
        found.append(_learning(job))
    if set(job.config.export.targets) - {"rotations"}:  # written each time
        found += _exporting(job)
    if job.has("weights-rtn"):
        found += _rounding(job, "weights-rtn")
    if job.has("weights"):
        found += _calibrating(job) if job.config.rounded_on_text else _rounding(job, "weights")
    for variant in job.config.eval.variants:
        found += measuring(job, variant)
    if job.has("outliers"):
        found.append(outliers(job))
    for index, need in enumerate(found):
        if job.offload and need.name != "learn":
            found[index] = replace(need, host=need.host + job.passing)
    found = [*_loading(job), *found] if found else []
    return [replace(need, device=need.device + _workspace(job, need)) for need in found]


def _workspace(job: Job, need: Need) -> int:
    """Return what torch gives cuBLAS for its products, on its largest GPUs so far."""
    return _OF_PRODUCTS if need.device and job.device.type == "cuda" else 0


def _loading(job: Job) -> Iterator[Need]:
    """Converting dequantizes a whole GGUF file; random weights are drawn in float32.

    With offload the host holds no more than a layer's experts on their way to the device.
    """
    model = job.config.model
    if model.weights == "random":
        drawn, cure = (
            job.numbers * max(FLOAT32, job.size),
            f"a smaller model.architecture or {MORE}",
        )
        yield Need("drawing random weights", drawn, 0, cure, "load")
    elif job.has("model"):
        read = job.numbers * FLOAT32
        yield Need("converting the GGUF file", read, 0, f"a smaller model or {MORE}", "model")
    if job.device.type != "cpu":  # read by the host, then moved
        host = job.passing if job.offload else job.numbers * job.gate_size
        yield Need("loading the model", host, 0, job.cure(), "load")


def _statistics(job: Job) -> Iterator[Need]:
    """What is gathered is on the device until a part's windows are through, then on the host.

    Of layers that come one by one it is that of one layer, and the head is never read.
    """
    windows, of_layers = job.config.rotation.statistics, job.statistics.values()
    length, tokens = windows.sequence_length, windows.samples * windows.sequence_length
    held, numbers, run = sum(of_layers), job.untied, length * job.end // job.map.hidden * job.size
    if job.offload:
        held, numbers, run = max(of_layers), job.layer, 0
    kept = tokens * INDEX + states_of(job, tokens) + sum(of_layers)
    cure = job.cure(f"a smaller rotation.statistics.sequence_length than {length}")
    made = max(job.made(job.size, fusing=job.offload), numbers * job.size + held + run)
    for host, device in ((kept - held, made), (kept, job.part * job.size)):
        yield Need("statistics", host, device, cure, "statistics")


def _exporting(job: Job) -> Iterator[Need]:
    """Rounded weights are there as stages pass them on, then packed as well.

    With offload they are read as parts are made of them, and once more when all are written. What
    an artefact has beside them is copied from a device to the host, while the ends are still there.
    """
    name, export = "export", job.config.export
    levels = job.levels if export.rounded and not job.offload else 0
    yield Need(name, levels, job.made(job.size), job.cure(), name)
    if export.rounded:
        copied = job.rest * job.size if export.artefact and job.device.type != "cpu" else 0
        size = job.size if export.artefact else min(job.size, 2)  # others cast before they pack
        there = (2 * job.end if job.offload else job.untied) * size
        yield Need(name, levels + job.packed + copied, there, job.cure(), name)


def _rotating(job: Job) -> Need:
    """The gate runs original and rotated model in turn; R1 is on the host meanwhile."""
    kept = GATE_TOKENS * job.end // job.dimensions.hidden * job.gate_size
    need = job.made(job.gate_size) + kept
    name = f"the gate of the rotated model, in float{8 * job.gate_size},"
    host = job.r1 if job.offload else 0
    return Need(name, host, need, f"a smaller model or {MORE}", "rotate")


def _learning(job: Job) -> Need:
    """Rounded weights are whole where that fits, in shards where it does not (`learn.shard`)."""
    learn = job.config.learn
    length, count = learn.sequence_length, learn.steps * learn.batch
    ways = (None, True) if learn.shard == "auto" else (None,)
    least = min(_learned_on(job, shards) for shards in ways)
    windows = count * length * INDEX
    cures = [f"a smaller learn.sequence_length than {length}"]
    if windows > least:
        cures.insert(0, f"fewer learn.steps than {learn.steps}")
    if learn.quantize_weights:
        cures.append("learn.quantize_weights=false")
    passing = job.passing * parallel.launched_here() * job.loads_no_whole  # of all at once
    return Need("learning", windows + passing, least, job.cure(*cures), "learn")


def _learned_on(job: Job, shards: bool | None) -> int:
    """Every process has the whole network, with or without offload, unless it loads shards."""
    learn, formats = job.config.learn, (job.config.learn, job.config.quant)
    found = estimate_of(job.shape, *formats, job.processes, job.device, shards)
    least = min(found.bytes(again) for again in _checkpoints(learn.checkpoint))
    by_shards = found.shards and job.loads_shards
    return least if by_shards else max(least, job.untied * job.size)


def _checkpoints(setting: str) -> tuple[bool, ...]:
    return {"on": (True,), "off": (False,)}.get(setting, (True, False))


def _rounding(job: Job, stage: str) -> Iterator[Need]:
    name = "rounding weights"
    yield Need(name, 0, job.made(job.size), job.cure(), stage)
    apart = job.offload and job.device.type != "cpu"
    host = job.levels + job.unpacked * apart  # of a layer that is not packed yet
    yield Need(name, host, job.part * job.size, job.cure(), stage)


def _calibrating(job: Job) -> Iterator[Need]:
    """All windows are there at one layer, twice where the original's are beside them.

    Methods that go by columns hold a Hessian twice in float64 while it is factored: o_proj's beside
    what it reads of all windows, the widest beside what o_proj gave, what is kept of what down_proj
    reads, and with offload the levels of the layer so far; with the original beside it, H and D
    themselves, and the weights of a layer that are rounded already.
    """
    config, d = job.config.weights, job.dimensions
    method, windows, name = METHODS[config.method], config.windows, method_title(config.method)
    weights, levels = job.untied * job.size, 0
    if job.offload:  # the ends stay
        weights, levels = (2 * job.end + job.layer) * job.size, LEVEL * job.before_last
    assert windows is not None
    yield Need(name, 0, job.made(job.size), job.cure(), "weights")
    length = windows.sequence_length
    samples = -(-windows.samples // job.processes) if method.together else windows.samples
    streams = 2 if method.reads_inputs else 1
    state = samples * length * job.size * streams  # of a number of each token
    batch = min(samples, batch_of(job.device, length))
    gated = batch * length * d.intermediate * job.size
    work = state * d.hidden + levels + 2 * gated
    if config.by_columns:
        of_number = 2 * FLOAT64 + (streams * FLOAT32 if method.reads_inputs else 0)
        attended = max(i.width for i in job.map.inputs if i.reads == "R2")
        widest = max(i.width for i in job.map.inputs if i.reads != "R2")  # experts may be narrow
        kept = 0
        if any(layer.mlp for layer in job.map.layers):  # whole batches
            kept = min(-(-samples // batch), GATED_BYTES // gated) * gated * streams
        work = state * d.hidden + max(
            levels + 2 * gated,
            state * attended + of_number * attended**2,  # next to nothing is rounded yet
            levels + state * d.hidden + kept + of_number * widest**2,
        )
        weights += (streams - 1) * job.before_last * job.size
    looked_at = job.taken_out if job.offload else 0  # one after the other, for its scale
    host = job.levels + looked_at + windows.samples * length * INDEX
    cures = [f"fewer {windows.place}.samples than {windows.samples}"]
    cures.append(f"a smaller {windows.place}.sequence_length than {length}")
    yield Need(name, host, weights + work, job.cure(*cures), "weights")
