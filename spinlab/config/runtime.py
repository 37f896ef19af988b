"""Settings of the machine: where a run computes."""

from dataclasses import dataclass

from spinlab.config.checks import choice, count

BACKENDS = ("auto", "cpu", "torch", "triton")
_MOST_THREADS = 4096


@dataclass(frozen=True)
class RuntimeConfig:
    """Choose where it runs: device, integer back end, CPU threads (0 = all).

    offload: a device holds one layer of a network at a time, read from the checkpoint anew by every
    stage, and the host what stands between layers. Numbers are the same, to the bit.
    """

    device: str = "auto"
    backend: str = "auto"  # cpu on a CPU, triton on a GPU that has it, else torch
    threads: int = 0
    offload: bool = False

    def __post_init__(self) -> None:
        choice("runtime.backend", self.backend, BACKENDS)
        count("runtime.threads", self.threads, 0, _MOST_THREADS)
