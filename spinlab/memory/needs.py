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
from spinlab.metrics.needle import NUMBERS
from spinlab.rotation.check import GATE_TOKENS
from spinlab.rotation.initial import block_orders
from spinlab.weights.calibration import batch_of
from spinlab.weights.methods import METHODS

_MASKS = 5  # bytes for every pair of tokens where a coded history is seen: one mask in the making


def needs(job: Job) -> list[Need]:
    """Return the needs of the stages that have still to run, in their order."""
    found: list[Need] = []
    if job.has("statistics"):
        found.append(_statistics(job))
    if job.has("rotate", "learn"):
        found.append(_rotating(job))
    if job.has("learn"):
        found.append(_learning(job))
    if set(job.config.export.targets) - {"rotations"}:  # written each time
        # rounded weights are there unpacked, then packed as well
        levels = 2 * job.levels if job.config.export.rounded else 0
        found.append(Need("export", levels, job.untied * job.size + job.fusing, job.cure()))
    if job.has("weights-rtn") or (job.has("weights") and not job.config.rounded_on_text):
        found += _rounding(job)
    if job.has("weights") and job.config.rounded_on_text:
        found += _calibrating(job)
    for variant in job.config.eval.variants:
        if job.has(*(f"{stage}-{variant}" for stage in ("handoff", "eval", "layers"))):
            found.append(_measuring(job, variant))
    return [*_loading(job), *found] if found or job.has("outliers") else []


def disk(job: Job) -> int:
    """Return the bytes that the stages write to the cache at least.

    Rounding on text keeps layers apart until the last is finished; of an original that others are
    compared with the head is kept, and what it read.
    """
    found = job.packed * job.has("weights-rtn")
    if job.has("weights"):
        found += job.packed * (2 if job.config.rounded_on_text else 1)
    if job.has("eval-fp") and job.config.eval.compares:
        tokens = (job.config.eval.max_windows or 0) * job.config.eval.window
        found += (job.end + tokens * job.map.hidden) * job.size
    return found


def _loading(job: Job) -> Iterator[Need]:
    """Converting dequantizes a whole GGUF file; random weights are drawn in float32.

    With offload the host holds no more than a part on its way to the device.
    """
    model = job.config.model
    if model.weights == "random":
        drawn = job.numbers * max(FLOAT32, job.size)
        yield Need("drawing random weights", drawn, 0, f"a smaller model.architecture or {MORE}")
    elif job.has("model"):
        read = job.numbers * FLOAT32
        yield Need("converting the GGUF file", read, 0, f"a smaller model or {MORE}")
    if job.device.type != "cpu":  # read by the host, then moved
        numbers = job.part if job.offload else job.numbers
        yield Need("loading the model", numbers * job.gate_size, 0, job.cure())


def _statistics(job: Job) -> Need:
    """A search keeps the mean of every input of a window, WUSH the second moments of blocks."""
    rotation, length = job.config.rotation, job.config.rotation.statistics.sequence_length
    run = length * job.end // job.map.hidden * job.size
    widths = sum(input.width for input in job.map.inputs)
    widths += sum(site.out_features for site in job.map.sites if site.writes == "R2")
    means = length * widths * FLOAT32 if rotation.searches else 0
    if rotation.inputs == "wush":
        orders = block_orders(rotation, job.map)
        means += 2 * FLOAT64 * sum(job.map.input_at[k].width * size for k, size in orders.items())
    tokens = rotation.statistics.samples * length
    host = tokens * INDEX + _states(job, tokens)
    cure = job.cure(f"a smaller rotation.statistics.sequence_length than {length}")
    made = max(job.made(job.size, fusing=job.offload), job.part * job.size + means + run)
    return Need("statistics", host, made, cure)


def _states(job: Job, tokens: int) -> int:
    """Return what stands between layers for so many tokens, in the host's memory with offload."""
    return tokens * job.map.hidden * job.size if job.offload else 0


def _rotating(job: Job) -> Need:
    """The gate runs original and rotated model in turn."""
    kept = GATE_TOKENS * job.end // job.dimensions.hidden * job.gate_size
    need = job.made(job.gate_size) + kept
    name = f"the gate of the rotated model, in float{8 * job.gate_size},"
    return Need(name, 0, need, f"a smaller model or {MORE}")


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
    return Need("learning", windows, least, job.cure(*cures))


def _checkpoints(setting: str) -> tuple[bool, ...]:
    return {"on": (True,), "off": (False,)}.get(setting, (True, False))


def _rounding(job: Job) -> Iterator[Need]:
    name = "rounding weights"
    yield Need(name, 0, job.made(job.size), job.cure())
    yield Need(name, job.levels, job.part * job.size, job.cure())


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
    yield Need(name, 0, job.made(job.size), job.cure())
    length = windows.sequence_length
    samples = -(-windows.samples // parallel.launched()) if method.together else windows.samples
    streams = 2 if method.reads_inputs else 1
    width = d.hidden + (d.heads * d.head_dim if config.by_columns else 0)
    states = samples * length * width * job.size * streams
    work = min(samples, batch_of(job.device, length)) * length * d.intermediate * 2 * job.size
    if config.by_columns:
        widest = max(
            input.width for input in job.map.inputs
        )  # the stream's, where experts are narrow
        work = max(work, (2 * FLOAT64 + streams * FLOAT32) * widest**2)
        weights += (streams - 1) * job.before_last * job.size
    host = job.levels + windows.samples * length * INDEX
    cures = [f"fewer {windows.place}.samples than {windows.samples}"]
    cures.append(f"a smaller {windows.place}.sequence_length than {length}")
    yield Need(name, host, weights + states + work, job.cure(*cures))


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
    most, name = logits, f"measuring {variant}"
    for work, shorter in _recalling(job, variant):
        if work > most:
            most, cures = work, [shorter]
    if variant == "fp":
        numbers = 2 * job.end if job.offload else job.numbers
        run = max(numbers * job.size + most, job.part * job.size)
        return Need(name, _kept(job), run, job.cure(*cures))
    floats = job.untied - sum(job.linears.values())
    run = floats * job.size + (job.untied - floats) // 2 + most
    host = job.levels
    if job.offload:  # whose weights are read layer by layer
        run, host = 2 * job.end * job.size + most, _kept(job)
    return Need(name, host, max(job.made(job.size), run), job.cure(*cures))


def _kept(job: Job) -> int:
    """Return the states between layers of all windows, as far as the settings bound them."""
    measured = job.config.eval
    return _states(job, (measured.max_windows or 0) * measured.window)


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
