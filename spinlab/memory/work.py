"""What a process multiplies in each stage at least, and the seconds that this takes at least.

Products of tokens and weights are counted, of Hessians and of what is done with them, and bytes of
networks that come to a GPU. Left out are the questions of zero-shot, which are known when they are
cut into tokens, what runs online, searches for ranges, launches and files: a time is a floor. Of
experts each is taken to be given its share of the tokens.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from spinlab.learn import estimate_of
from spinlab.memory.job import Job
from spinlab.memory.passes import Operations, between, fusing, making, of_kind, passing
from spinlab.memory.rounding import lwc, sweeping
from spinlab.metrics.continuation import PROMPTS
from spinlab.metrics.needle import NUMBERS
from spinlab.rotation.check import GATE_TOKENS
from spinlab.speed import INT8, TF32


class Work(NamedTuple):
    """Say what a stage, by its name in the cache, does at least."""

    stage: str
    operations: Operations

    def seconds(self, rates: Mapping[str, float]) -> float:
        """Return the least that it takes where so many operations of each kind take a second."""
        return sum(count / rates[kind] for kind, count in self.operations.items())


def works(job: Job) -> list[Work]:
    """Return what the stages that have still to run do, in their order."""
    found = [Work("statistics", _statistics(job))] if job.has("statistics") else []
    if job.has("rotate"):
        found.append(Work("rotate", _gate(job)))
    if job.has("factors"):
        found.append(Work("factors", _gate(job)))
    if job.has("learn"):
        found.append(Work("learn", _learning(job)))
    if job.has("factors-learned"):
        found.append(Work("factors", _gate(job)))
    if job.has("peaks"):
        found.append(Work("peaks", _peaks(job)))
    if set(job.config.export.targets) - {"rotations"}:  # written each time
        found.append(Work("export", fusing(job) + making(job, job.size)))
    if job.has("weights-rtn"):
        found.append(Work("weights-rtn", making(job, job.size)))
    if job.has("weights"):
        found += [Work("weights", _rounding(job))] * _roundings(job)
    for variant in job.config.eval.variants:
        found += _of_variant(job, variant)
    if job.has("outliers"):  # of two rotated networks, and of the original
        seen = _seen(job, Operations())
        before = Operations() if job.transformed else seen
        found.append(Work("outliers", before + seen + fusing(job) + seen + fusing(job)))
    return [work for work in found if work.operations.total()]


def _dtype(job: Job) -> str:
    return job.config.model.dtype


def _seen(job: Job, made: Operations, levels: str = "") -> Operations:
    """Count what it takes to make a network and see what a gate's window is in its layers."""
    run = passing(job, GATE_TOKENS, GATE_TOKENS, _dtype(job), levels=levels, head=False)
    return run + made + making(job, job.size)


def _gate(job: Job) -> Operations:
    """The original and the rotated network each run the gate's window."""
    kind = "float64" if job.gate_size > 4 else "float32"
    run = passing(job, GATE_TOKENS, GATE_TOKENS, kind)
    return run + run + fusing(job) + making(job, job.gate_size, networks=2)


def _statistics(job: Job) -> Operations:
    windows = job.config.rotation.statistics
    tokens = windows.samples * windows.sequence_length
    run = passing(job, tokens, windows.sequence_length, _dtype(job), head=False)
    return run + making(job, job.size) + between(job, tokens)


def _peaks(job: Job) -> Operations:
    """Count one rotated network's: several variants may share it."""
    windows = job.config.quant.calibration
    tokens = windows.samples * windows.sequence_length
    run = passing(job, tokens, windows.sequence_length, _dtype(job), head=False)
    return run + making(job, job.size) + between(job, tokens)


def _learning(job: Job) -> Operations:
    """Layers are counted once more where they are run again for certain; the gate comes behind."""
    learn, quant = job.config.learn, job.config.quant
    found = estimate_of(job.shape, learn, quant, job.processes, job.device)
    flops = found.flops_checkpointed if learn.checkpoint == "on" else found.flops
    teacher = learn.objective.needs_teacher and learn.rounds(quant)
    kind, wide = (
        str(dtype).removeprefix("torch.")
        for dtype in (found.dtype, torch.promote_types(found.dtype, torch.float32))
    )
    if job.device.type == "cuda" and found.dtype.itemsize == 2:
        wide = TF32
    run = of_kind(kind, flops) + of_kind(wide, found.wide_flops)
    return run + making(job, job.size, networks=1 + teacher) + _gate(job)


def _roundings(job: Job) -> int:
    """Weights of the initial rotations are rounded beside those of learned ones, if none are."""
    learned = {"fake", "integer"} & set(job.config.eval.variants)
    both = "init" in job.config.eval.variants and learned and job.config.learn.steps
    anew = job.has("rotate", "factors") and job.has("learn", "factors-learned")
    return 2 if both and anew else 1


def _rounding(job: Job) -> Operations:
    made = fusing(job) + making(job, job.size)
    if not job.config.rounded_on_text:
        return made
    return made + (sweeping(job) if job.config.weights.by_columns else lwc(job))


def _of_variant(job: Job, variant: str) -> Iterator[Work]:
    """A network of integers is assembled for its gate, for what is measured, and for its layers."""
    made, levels = Operations(), ""
    if variant != "fp":
        # on a GPU `fake` multiplies levels too, as whole numbers
        levels = INT8 if variant == "integer" or job.device.type == "cuda" else "float32"
        made = fusing(job, replaced=True) if variant != "rtn" else made
    if job.has(f"handoff-{variant}"):
        run = passing(job, GATE_TOKENS, GATE_TOKENS, "float64")
        run += passing(job, GATE_TOKENS, GATE_TOKENS, "float64", levels=levels)
        twice = made + making(job, job.size)
        yield Work(f"handoff-{variant}", run + twice + twice)
    if job.has(f"eval-{variant}"):
        run = _measuring(job, variant, levels)
        yield Work(f"eval-{variant}", run + made + making(job, job.size))
    if job.has(f"layers-{variant}"):
        original = _seen(job, Operations())
        yield Work(f"layers-{variant}", original + _seen(job, made, levels))


def _measuring(job: Job, variant: str, levels: str) -> Operations:
    """Several processes share out windows; the first one reads needles and continues."""
    measured, window = job.config.eval, job.config.eval.window
    windows = sum(-(-count // job.processes) for count in job.windows_by_text)
    tokens, kind = windows * window, _dtype(job)
    found = passing(job, tokens, window, kind, levels=levels) + between(job, tokens)
    if measured.compares and variant != "fp":  # with what the original's head gives
        found += of_kind(kind, windows * (window - 1) * 2 * job.end)
    for length in measured.needle:
        read = NUMBERS * (length - 1)
        found += passing(job, read, length, kind, levels=levels, head=False) + between(job, read)
    if measured.continued and measured.compares:
        read = sum(min(PROMPTS, count) for count in job.windows_by_text) * (window - 1)
        found += passing(job, read, window, kind, levels=levels, head=False)
    return found
