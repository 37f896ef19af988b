"""What benchmarks read off a device: its time and its peak memory."""

import time

import torch

from spinlab.cache import peak_memory


def now(device: torch.device) -> float:
    """Return the time at which all work given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peaks(name: str, device: torch.device) -> dict[str, float]:
    """Return peak bytes: of the GPU's tensors and of what is held for them, or of the process."""
    if device.type != "cuda":
        return {f"bytes/{name}/peak": peak_memory()}
    return {
        f"bytes/{name}/peak": torch.cuda.max_memory_allocated(device),
        f"bytes/{name}/peak/reserved": torch.cuda.max_memory_reserved(device),
    }
