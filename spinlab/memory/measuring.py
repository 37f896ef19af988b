"""What measuring a network takes at least: its hand-off, its logits, and what else is looked at."""

from collections.abc import Iterator

from spinlab.kv.bits import cache_bytes, cached_numbers
from spinlab.kv.path import kv_path
from spinlab.memory.job import FLOAT32, FLOAT64, LEVEL, Job, Need
from spinlab.metrics.continuation import PROMPTS
from spinlab.metrics.divergence import CHUNK
from spinlab.metrics.likelihood import MOST_TOKENS
from spinlab.metrics.needle import NUMBERS
from spinlab.rotation.check import GATE_TOKENS

_MASKS = 5  # bytes for every pair of tokens where a coded history is seen: one mask in the making


def measuring(job: Job, variant: str) -> Iterator[Need]:
    """Yield what a variant takes: the gate of its integers, and what is measured of it."""
    if job.has(f"handoff-{variant}"):
        yield _handing_off(job, variant)
    if job.has(f"eval-{variant}", f"layers-{variant}"):
        yield _measuring(job, variant)


def outliers(job: Job) -> Need:
    """Return what it takes to see what attentions read; the host keeps it, of one network."""
    kept = len(job.map.layers) * GATE_TOKENS * job.dimensions.hidden * FLOAT32
    return Need("looking for outliers", kept, job.made(job.size), job.cure(), "outliers")


def states_of(job: Job, tokens: int) -> int:
    """Return what stands between layers for so many tokens, in the host's memory with offload."""
    return tokens * job.map.hidden * job.size if job.offload else 0


def _handing_off(job: Job, variant: str) -> Need:
    """The gate keeps the logits of floats, which are made of levels as a linear is called.

    Both are in float64, as are numbers that come of the levels on their way.
    """
    kept = GATE_TOKENS * job.end // job.dimensions.hidden * FLOAT64
    floats = (LEVEL + 2 * FLOAT64) * max(job.linears.values(), default=0)
    device = max(job.made(job.size, replaced=True), floats) + kept
    host = max(job.unpacked, 2 * job.stacked) if job.offload else job.levels
    return Need(f"measuring {variant}", host, device, job.cure(), f"handoff-{variant}")


def _measuring(job: Job, variant: str) -> Need:
    """A window's logits are in the model's dtype, then in float32, then probabilities beside them.

    What is compared with the original has the original's head beside them, and a chunk of its
    logits in two forms. What else is measured comes after them.
    """
    measured, d = job.config.eval, job.dimensions
    batch = min(measured.batch, measured.max_windows or measured.batch)
    tokens = batch * measured.window
    numbers = tokens * (job.end // d.hidden)
    logits = numbers * _of_logit(job.size, batch)
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
    stage, cure = f"eval-{variant}", job.cure(*cures)
    passing = tokens * _of_token(job)
    if variant == "fp":
        ends, layer = (2 * job.end, job.layer) if job.offload else (job.numbers, job.numbers)
        most += tokens * d.hidden * job.size * measured.compares  # what the head reads is kept
        run = max(ends * job.size + most, layer * job.size + passing)
        return Need(name, _kept(job, variant), run, cure, stage)
    floats = job.untied - sum(job.linears.values())
    run = floats * job.size + (job.untied - floats) // 2 + max(most, passing)
    host = job.levels
    if job.offload:  # whose weights are read layer by layer
        run = max(2 * job.end * job.size + most, job.packed // len(job.map.layers) + passing)
        host = _kept(job, variant) + 2 * job.stacked
    return Need(name, host, max(job.made(job.size, replaced=True), run), cure, stage)


def _of_logit(size: int, batch: int) -> int:
    """Return the bytes of a logit in so many, in float32, and as a probability.

    The first two are one in float32, if there is one window: rows of several are copied.
    """
    if size == FLOAT32:
        return (2 if batch == 1 else 3) * FLOAT32
    return FLOAT32 + max(size, FLOAT32)


def _of_token(job: Job) -> int:
    """Return the bytes of a token on its way through a layer.

    In its MLP there are gate, up and their product; the norm's output, what attention left, what
    the layer was given, and what the embedding gave. Attention has queries, keys and values of all
    heads, what it gives in two orders, and the same of the stream but for what it will leave.
    """
    d = job.dimensions
    return (
        max(3 * d.intermediate + 4 * d.hidden, 5 * d.heads * d.head_dim + 3 * d.hidden) * job.size
    )


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
    return states_of(job, max(tokens))


def _recalling(job: Job, variant: str) -> Iterator[tuple[int, str]]:
    """Yield what the measures of a cache at work take beside a network, and what takes less.

    A layer holds gate, up and their product for all tokens of a pass, a continuation the cache of
    all its prompts, and errors of attention eight forms of a window's scores at once.
    """
    measured, d = job.config.eval, job.dimensions
    of_token = 3 * d.intermediate * job.size
    path = kv_path(job.config.kv, job.map.coded_widths, layers=job.map.attentions)
    masks = 0 if variant == "fp" or path.codes_all else _MASKS
    if measured.needle:
        longest, batch = max(measured.needle), min(measured.task_batch, NUMBERS)
        cure = f"a smaller eval.needle than {longest} or eval.task_batch than {measured.task_batch}"
        yield batch * longest * of_token + masks * longest**2, cure
    if measured.continued and measured.compares:
        prompts, window = min(PROMPTS, measured.max_windows or PROMPTS), measured.window
        cache = cached_numbers(d, window) * job.size
        if variant != "fp":
            cache = cache_bytes(path, d, window)
        work = (window - measured.continued) * of_token + cache
        yield prompts * work, f"a smaller eval.window than {window} or eval.continued=0"
    if measured.attention and variant == "fake":
        scores = d.heads * measured.window**2 * FLOAT32
        yield 8 * scores, f"a smaller eval.window than {measured.window} or eval.attention=0"
