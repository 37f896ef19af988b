"""What a learning run takes, from shapes: memory per process, and operations.

Bytes kept for the backward pass are those of torch's fused kernels: an RMSNorm keeps its input,
attention q, k, v and its output, a gated MLP gate, its activation and up, or gate and up alone
where one kernel takes both. Attention with soft caps or sinks is not fused: it keeps scores and
probabilities; nor is that of shared keys in float32 on a GPU. A frozen linear keeps nothing, one
whose weight gets a gradient its input.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from spinlab.config import LearnConfig, QuantConfig
from spinlab.learn.shape import Job, bytes_of_weights
from spinlab.learn.spaces import CHUNK
from spinlab.learn.spaces.owners import together
from spinlab.model.layer import Attention
from spinlab.model.shares import active_numbers, numbers_given

_WIDEST_SHARED = 256  # numbers of a head whose keys transformers lets torch share
_MOVING = 8  # copies of a rotation that an optimizer step or a projection works with


@dataclass(frozen=True)
class Estimate:
    """Hold bytes per process, and the operations that the whole run asks of each process.

    weights: the network's, with what is kept beside it; activations: what waits for the backward
    pass, and with layers that are run again there; rest: rotations, logits, what one layer works
    with. flops: of products in the network's dtype, and with layers run again; wide_flops: of those
    in float32. hidden and dtype tell what to time. shards: weights are spread over processes.
    """

    weights: int
    activations: int
    activations_checkpointed: int
    rest: int
    flops: float
    flops_checkpointed: float
    wide_flops: float
    hidden: int
    dtype: torch.dtype
    shards: bool

    def bytes(self, checkpoint: bool) -> int:
        """Return the peak per process."""
        kept = self.activations_checkpointed if checkpoint else self.activations
        return self.weights + kept + self.rest


def estimate_of(
    model: PreTrainedModel,
    learn: LearnConfig,
    quant: QuantConfig,
    processes: int,
    device: torch.device | None = None,
    shards: bool | None = None,
) -> Estimate:
    """Return what learning on this model takes; only its shapes and dtype are looked at.

    device: where it will learn, if that is not where the model is. shards: whether weights are
    spread over processes; as learn.shard has it if absent, where memory asks for nothing.
    """
    if shards is None:
        shards = learn.shard == "on" or (learn.shard == "auto" and not learn.rounds(quant))
    there = device or model.device
    job = Job(model, learn, quant, processes, there, shards and processes > 1)
    kept, kept_of_inputs = _activations(job)
    flops, again, wide = _operations(job)
    return Estimate(
        weights=bytes_of_weights(job),
        activations=kept,
        activations_checkpointed=min(kept, kept_of_inputs),
        rest=_rest(job),
        flops=flops,
        flops_checkpointed=flops + again,
        wide_flops=wide,
        hidden=job.map.hidden,
        dtype=job.dtype,
        shards=job.shards,
    )


def _activations(job: Job) -> tuple[int, int]:
    """Return the bytes kept for a backward pass: by all layers, and if they are run again there."""
    count, objective = len(job.map.layers), job.learn.objective
    states = (count + 1) * job.map.hidden * job.size if objective.layer_mse else 0
    if not objective.end_to_end:
        return 0, 0
    layers = [_kept_by_layer(job, layer) for layer in range(count)]
    inputs = count * job.map.hidden * job.size
    return job.tokens * (sum(layers) + states), job.tokens * (inputs + max(layers) + states)


def _kept_by_layer(job: Job, layer: int) -> int:
    """Return the bytes that a decoder layer keeps for one token."""
    attention = job.map.layers[layer].attention
    queries = attention.heads * attention.head_dim
    values = attention.kv_heads * attention.head_dim
    of_cache, *cached = attention.cached
    inputs = [input for input in job.map.inputs if input.layer == layer]
    stream = sum(job.numbers[input.key] for input in inputs if input.reads == "R1")
    gated = sum(job.numbers[input.key] for input in inputs if input.reads == "R4")
    if job.rounded:
        widths, learn = sum(job.numbers[input.key] for input in inputs), job.learn
        # as they are rounded, as a range that is learned meets them, as their transform does
        copies = 1 + (learn.lr.input_clip > 0) + ("inputs" in learn.rotations)
        kept = widths * copies
        kept += of_cache * sum(cached) if learn.lr.kv_clip else 0  # as their ranges meet them
    else:  # rounding errors of inputs from the stream, and both ends of R2
        errors = stream if job.quant.activations.quantizes else 0
        errors += stream if job.learn.optimizer.grad_norm == "euclidean" else 0  # with the inputs
        kept = errors + queries + values
    # keys as R3 meets them, as their codec does, and what that leaves
    kept += 3 * of_cache * attention.turned_dim if "r3" in job.learn.rotations else 0
    norms = [norm for norm in job.map.norms if norm.layer == layer]
    kept += sum(norm.width for norm in norms if not norm.offset)
    widened = sum(norm.width for norm in norms if norm.offset)  # such read float32
    mlp = job.map.layers[layer].mlp
    fused = job.rounded and (mlp is not None and mlp.by_silu) and job.by_kernels
    numbers = kept + 2 * queries + 2 * values + (2 if fused else 3) * gated
    numbers += numbers_given(job.map, layer)  # which is weighted
    return int(numbers * job.size) + widened * job.wide + _kept_by_scores(job, attention)


def _kept_by_scores(job: Job, attention: Attention) -> int:
    """Return the bytes that attention keeps for one token, beside its inputs and its output.

    Keys that heads share go to torch as they are, but for those behind a mask, as windows have one,
    and of other widths, of which every head gets a copy.
    """
    length, widths = job.learn.sequence_length, (attention.head_dim, attention.value_dim)
    scores = attention.heads * length
    if attention.softcap is not None or attention.sinks:
        halves = job.size if job.size < job.wide else 0  # probabilities once more, in 16 bits
        return scores * (job.size + job.wide + halves)
    masked = attention.window is not None and attention.window < length
    whole = not masked and widths[0] == widths[1] <= _WIDEST_SHARED
    copies = (attention.heads - attention.kv_heads) * sum(widths)
    if job.device.type == "cuda" and (job.size == 8 or (job.size == 4 and copies and whole)):
        # no fused kernel (`spinlab.kv.cache`): probabilities and copies, and not what it gives
        return (scores + copies - attention.heads * attention.value_dim) * job.size
    return attention.heads * 4 + (0 if whole else copies * job.size)  # normalizers are float32


def _rest(job: Job) -> int:
    """Return the bytes of the rotations, of both ends of the network, and of work in progress."""
    d, learn = job.map.dimensions, job.learn
    attentions = [layer.attention for layer in job.map.layers]
    sizes = {"r1": d.hidden**2, "r2": sum(a.value_dim**2 for a in attentions)}
    sizes["r3"] = sum(a.turned_dim**2 for a in attentions)  # at most: it may be one
    learned = sum(size for name, size in sizes.items() if name in learn.rotations)
    optimizer = learn.optimizer
    copies = 4 + (2 if optimizer.name.endswith("adam") else 1 if optimizer.momentum else 0)
    copies += optimizer.name.startswith("qr_")
    copies += optimizer.grad_norm == "euclidean"
    rotations = learned * (copies * job.wide + job.size)
    ends = 4 * job.tokens * d.hidden * job.size
    chunk = min(CHUNK["cuda" if job.device.type == "cuda" else "cpu"], job.tokens)
    logits = chunk * job.model.config.vocab_size * _of_logit(job)
    layer = job.tokens * (3 * d.intermediate + 4 * d.hidden) * job.wide
    step = _MOVING * learned * job.wide
    if job.rounded:
        largest = _largest_batch(job)
        under_way = job.processes if job.processes > 1 else 0  # sums of gradients
        step += (4 + under_way) * largest * job.wide  # of one weight and its gradient
    work = [layer, step, logits if learn.objective.on_logits else 0]
    return rotations + ends + max(work)


def _of_logit(job: Job) -> int:
    """Return the bytes that a logit takes: a kernel overwrites it, torch makes softmaxes of it."""
    objective, capped = job.learn.objective, job.map.logit_cap is not None  # and its slope
    if job.by_kernels and not objective.kl_top_k:
        return job.size * ((2 if objective.kl else 1) + 2 * capped)
    return 4 * ((5 if objective.kl else 2) + capped)


def _largest_batch(job: Job) -> int:
    """Return the numbers of linears that are rotated, rounded and pulled back together at most."""
    count, device = len(job.map.layers), job.device.type
    places = {(site.name, site.numbers) for site in job.map.sites}
    device = device if device == "cuda" else "cpu"
    return max(n * min(count, together(n, count, device, job.processes)) for _, n in places)


def _operations(job: Job) -> tuple[float, float, float]:
    """Return floating-point operations: in the network's dtype, of one more forward, in float32."""
    learn, objective = job.learn, job.learn.objective
    tokens = learn.steps * job.rows * learn.sequence_length
    linears, head = 2 * active_numbers(job.map), 2 * job.head
    attention = 2 * learn.sequence_length * job.read("R2")  # causal: half of T²
    # one product with R1 everywhere
    rotating = 0 if job.rounded else 2 * job.map.hidden * job.read("R1")
    forward = linears + attention + 2 * rotating
    whole = rotating if learn.optimizer.grad_norm == "euclidean" else 0
    backward = linears * (2 if job.rounded else 1) + 2.5 * attention + rotating + whole
    passes = objective.on_logits + (objective.layer_mse > 0)
    teachers = (objective.kl > 0) + (objective.layer_mse > 0)
    each = passes * (forward + backward) + teachers * (linears + attention)
    each += objective.on_logits * 2 * head + (objective.kl > 0) * head
    if not objective.end_to_end:
        each = forward + rotating
    # R4 in two factors of about √n, forward and backward; weights rotated, their gradients pulled
    turned = (job.numbers[i.key] * i.width**0.5 for i in job.map.inputs if i.reads == "R4")
    wide = tokens * max(passes, 1) * 2 * 2 * 2 * sum(turned)
    if job.rounded and "r1" in learn.rotations:  # what other rotations take of weights is small
        wide += learn.steps * 2 * 2 * job.layers * job.map.hidden / job.processes
    return tokens * each, tokens * passes * forward, wide
