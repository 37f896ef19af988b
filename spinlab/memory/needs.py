"""What each stage takes at least, from the model's shape and the settings alone.

A stage holds weights, and beside them the largest of what it does in turn. What is small beside a
matrix of the vocabulary is left out, so that these are lower bounds: a run is refused only if it
cannot fit. Fusing works on one matrix at a time and holds it twice in float64.
"""

from collections.abc import Iterator

from spinlab import parallel
from spinlab.config.weights import method_title
from spinlab.kv.bits import cache_bytes
from spinlab.kv.path import kv_path
from spinlab.learn import estimate_of
from spinlab.memory.job import FLOAT32, FLOAT64, INDEX, LEVEL, MORE, Job, Need
from spinlab.metrics.continuation import PROMPTS
from spinlab.metrics.divergence import CHUNK
from spinlab.metrics.likelihood import MOST_TOKENS
from spinlab.metrics.needle import NUMBERS
from spinlab.rotation.check import GATE_TOKENS
from spinlab.weights.calibration import batch_of
from spinlab.weights.methods import METHODS

_MASKS = 5  # bytes for every pair of tokens where a coded history is seen: one mask in the making


def needs(job: Job) -> list[Need]:
    """Return the needs of the stages that have still to run, in their order."""
    found: list[Need] = []
    if job.has("statistics"):
        found += _statistics(job)
    if job.has("rotate", "learn"):
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
        if job.has(*(f"{stage}-{variant}" for stage in ("handoff", "eval", "layers"))):
            found.append(_measuring(job, variant))
    return [*_loading(job), *found] if found or job.has("outliers") else []


def _loading(job: Job) -> Iterator[Need]:
    """Converting dequantizes a whole GGUF file; random weights are drawn in float32.

    With offload the host holds no more than a part on its way to the device.
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
        numbers = job.part if job.offload else job.numbers
        yield Need("loading the model", numbers * job.gate_size, 0, job.cure(), "load")


def _statistics(job: Job) -> Iterator[Need]:
    """What is gathered is on the device until a part's windows are through, then on the host.

    Of layers that come one by one it is that of one layer, and the head is never read.
    """
    windows, of_layers = job.config.rotation.statistics, job.statistics.values()
    length, tokens = windows.sequence_length, windows.samples * windows.sequence_length
    held, numbers, run = sum(of_layers), job.untied, length * job.end // job.map.hidden * job.size
    if job.offload:
        held, numbers, run = max(of_layers), job.layer, 0
    kept = tokens * INDEX + _states(job, tokens) + sum(of_layers)
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


def _states(job: Job, tokens: int) -> int:
    """Return what stands between layers for so many tokens, in the host's memory with offload."""
    return tokens * job.map.hidden * job.size if job.offload else 0


def _rotating(job: Job) -> Need:
    """The gate runs original and rotated model in turn."""
    kept = GATE_TOKENS * job.end // job.dimensions.hidden * job.gate_size
    need = job.made(job.gate_size) + kept
    name = f"the gate of the rotated model, in float{8 * job.gate_size},"
    return Need(name, 0, need, f"a smaller model or {MORE}", "rotate")


def _learning(job: Job) -> Need:
    learn = job.config.learn
    length, count = learn.sequence_length, learn.steps * learn.batch
    found = estimate_of(job.shape, learn, job.config.quant, parallel.launched())
    least = min(found.bytes(again) for again in _checkpoints(learn.checkpoint))
    windows = count * length * INDEX
    cures = [f"a smaller learn.sequence_length than {length}"]
    if windows > least:
        cures.insert(0, f"fewer learn.steps than {learn.steps}")
    if learn.quantize_weights:
        cures.append("learn.quantize_weights=false")
    return Need("learning", windows, least, job.cure(*cures), "learn")


def _checkpoints(setting: str) -> tuple[bool, ...]:
    return {"on": (True,), "off": (False,)}.get(setting, (True, False))


def _rounding(job: Job, stage: str) -> Iterator[Need]:
    name = "rounding weights"
    yield Need(name, 0, job.made(job.size), job.cure(), stage)
    yield Need(name, job.levels, job.part * job.size, job.cure(), stage)


def _calibrating(job: Job) -> Iterator[Need]:
    """All windows are there at one layer, twice where the original's are beside them.

    Methods that go by columns hold what o_proj reads beside the layer's input, and a Hessian twice
    in float64 while it is factored; with the original beside it, what D takes, and the weights of a
    layer that are rounded already.
    """
    config, d = job.config.weights, job.dimensions
    method, windows, name = METHODS[config.method], config.windows, method_title(config.method)
    weights = job.untied * job.size
    if job.offload:  # the ends stay; of the layer the levels so far
        weights = (2 * job.end + job.layer) * job.size + LEVEL * job.before_last
    assert windows is not None
    yield Need(name, 0, job.made(job.size), job.cure(), "weights")
    length = windows.sequence_length
    samples = -(-windows.samples // parallel.launched()) if method.together else windows.samples
    streams = 2 if method.reads_inputs else 1
    width = d.hidden + (d.heads * d.head_dim if config.by_columns else 0)
    states = samples * length * width * job.size * streams
    work = min(samples, batch_of(job.device, length)) * length * d.intermediate * 2 * job.size
    if config.by_columns:
        widest = max(i.width for i in job.map.inputs)  # the stream's, where experts are narrow
        work = max(work, (2 * FLOAT64 + streams * FLOAT32) * widest**2)
        weights += (streams - 1) * job.before_last * job.size
    host = job.levels + windows.samples * length * INDEX
    cures = [f"fewer {windows.place}.samples than {windows.samples}"]
    cures.append(f"a smaller {windows.place}.sequence_length than {length}")
    yield Need(name, host, weights + states + work, job.cure(*cures), "weights")


def _measuring(job: Job, variant: str) -> Need:
    """A window's logits are there in the model's dtype, in float32 and as probabilities.

    What is compared with the original has the original's head beside them, and a chunk of its
    logits in two forms. What else is measured comes after them.
    """
    measured, d = job.config.eval, job.dimensions
    batch = min(measured.batch, measured.max_windows or measured.batch)
    tokens = batch * measured.window
    copy = job.size != FLOAT32 or batch > 1
    numbers = tokens * (job.end // d.hidden)
    logits = numbers * (job.size + (1 + copy) * FLOAT32)
    cures = [f"a smaller eval.window than {measured.window}"]
    if batch > 1:
        cures.insert(0, f"a smaller eval.batch than {batch}")
    if measured.compares and variant != "fp":
        chunk = min(numbers // batch, CHUNK)  # windows are compared one by one
        logits = max(logits, 2 * (numbers + chunk) * FLOAT32) + job.end * job.size
    most, name, stage = logits, f"measuring {variant}", f"eval-{variant}"
    for work, shorter in _recalling(job, variant):
        if work > most:
            most, cures = work, [shorter]
    if variant == "fp":
        numbers = 2 * job.end if job.offload else job.numbers
        run = max(numbers * job.size + most, job.part * job.size)
        return Need(name, _kept(job, variant), run, job.cure(*cures), stage)
    floats = job.untied - sum(job.linears.values())
    run = floats * job.size + (job.untied - floats) // 2 + most
    host = job.levels
    if job.offload:  # whose weights are read layer by layer
        run, host = 2 * job.end * job.size + most, _kept(job, variant)
    return Need(name, host, max(job.made(job.size), run), job.cure(*cures), stage)


def _kept(job: Job, variant: str) -> int:
    """Return the states between layers: of all windows, or of as many answers as go together.

    Tasks fill the room for these unless `eval.limit` leaves few questions, whose tokens nobody
    knows yet; a text of a needle is read in passes, and only whole ones go together.
    """
    measured = job.config.eval
    tokens = [job.windows * measured.window]
    if measured.tasks and variant in measured.task_variants and measured.limit is None:
        tokens.append(MOST_TOKENS)
    for length in measured.needle:
        of_pass = min(measured.task_batch, NUMBERS) * length
        tokens.append(min(max(MOST_TOKENS // of_pass, 1) * of_pass, NUMBERS * length))
    return _states(job, max(tokens))


def _recalling(job: Job, variant: str) -> Iterator[tuple[int, str]]:
    """Yield what the measures of a cache at work take beside a network, and what takes less.

    A layer holds gate, up and their product for all tokens of a pass, a continuation the cache of
    all its prompts, and errors of attention eight forms of a window's scores at once.
    """
    measured, d = job.config.eval, job.dimensions
    of_token = 3 * d.intermediate * job.size
    path = kv_path(job.config.kv, job.map.width("r3"), layers=job.map.attentions)
    masks = 0 if variant == "fp" or path.codes_all else _MASKS
    if measured.needle:
        longest, batch = max(measured.needle), min(measured.task_batch, NUMBERS)
        cure = f"a smaller eval.needle than {longest} or eval.task_batch than {measured.task_batch}"
        yield batch * longest * of_token + masks * longest**2, cure
    if measured.continued and measured.compares:
        prompts, window = min(PROMPTS, measured.max_windows or PROMPTS), measured.window
        cache = 2 * d.layers * d.kv_heads * d.head_dim * window * job.size
        if variant != "fp":
            cache = cache_bytes(path, d, window)
        work = (window - measured.continued) * of_token + cache
        yield prompts * work, f"a smaller eval.window than {window} or eval.continued=0"
    if measured.attention and variant == "fake":
        scores = d.heads * measured.window**2 * FLOAT32
        yield 8 * scores, f"a smaller eval.window than {measured.window} or eval.attention=0"
