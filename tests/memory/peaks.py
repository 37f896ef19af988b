"""Run the stages of a small experiment and print what each took at its peak: run by test_needs."""

import gc
import json
import re
import sys
from pathlib import Path

import torch

from spinlab.cache import _give_back_memory
from spinlab.compose import composed
from spinlab.config.weights import method_title
from spinlab.memory.needs import Job, needs
from spinlab.metrics import needle
from spinlab.stages.pipeline import Pipeline
from spinlab.stages.remaining import stages_of


def status(name: str) -> int:
    """Return a line of the kernel's account of this process, in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def peak(work) -> int:
    """Return by how much this process grew at most while it did the work."""
    gc.collect()
    _give_back_memory()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    work()
    return status("VmHWM") - before


def main(folder: str, *overrides: str) -> None:
    torch.set_num_threads(1)
    needle.ASKED = 1  # at every depth: one after the other, they take the memory of one
    run = Pipeline(composed(*overrides, f"paths.cache={folder}"))
    assert run.calibration and run.evaluation
    run.original.shape  # noqa: B018
    work = {"the gate of the rotated model, in float32,": lambda: run.initial}
    if run.config.learn.steps:
        work["learning"] = lambda: run.learned
    work["rounding weights"] = lambda: run.weights("integer")
    others = [
        Pipeline(composed(*overrides, f"weights={method}", f"paths.cache={folder}"))
        for method in ("gptq", "gptaq")
    ]
    for other in others:
        work[method_title(other.config.weights.method)] = lambda other=other: other.weights(
            "integer"
        )
    for variant in run.config.eval.variants:
        work[f"measuring {variant}"] = lambda v=variant: (
            v == "fp" or run.handoff_error(v),
            run.measure(v),
        )
    expected: dict[str, int] = {}
    for asked in (run, *others):
        names = {name for name, _ in stages_of(asked)}
        for need in needs(Job(asked.config, run.original.shape, run.run.device, names)):
            expected[need.stage] = max(expected.get(need.stage, 0), need.host + need.device)
    print(json.dumps({name: [expected[name], peak(call)] for name, call in work.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
