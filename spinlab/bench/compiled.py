"""What the compiler makes of a network's kernels for GPUs that need not be there.

Nothing runs and nothing is timed: a network's launches are collected as each GPU would be given
them, compiled, and weighed by what one program takes of a multiprocessor. That every kernel fits,
and how many of its programs run side by side, is known without the GPU; how long they take is not.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from spinlab.bench.results import Results
from spinlab.bench.runners import Online, Ours, Setting
from spinlab.errors import InputError
from spinlab.runtime.fused.operations import triton_operations
from spinlab.runtime.kernels.launch import GPU, Launch, interpreted, planning

_KIB = 1024
# CUDA C++ programming guide, compute capabilities; a program gets a KiB less than all share
GPUS = {
    "a100": GPU((8, 0), 108, 163 * _KIB, 164 * _KIB),
    "rtx3090": GPU((8, 6), 82, 99 * _KIB, 100 * _KIB),
    "rtx4090": GPU((8, 9), 128, 99 * _KIB, 100 * _KIB),
    "h200": GPU((9, 0), 132, 227 * _KIB, 228 * _KIB),
    "b200": GPU((10, 0), 148, 227 * _KIB, 228 * _KIB),
    "rtx5090": GPU((12, 0), 170, 99 * _KIB, 100 * _KIB),
}
_REGISTERS = 64 * _KIB  # of a multiprocessor, in all of these; a warp takes them by 256
_THREADS = {(8, 0): 2048, (9, 0): 2048, (10, 0): 2048}  # of a multiprocessor; others have 1536
_TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int8: "i8",
    torch.uint8: "u8", torch.int16: "i16", torch.uint16: "u16", torch.int32: "i32",
    torch.int64: "i64",
}  # fmt: skip


class Taken(NamedTuple):
    """Say what a program of a kernel takes: registers of a thread, bytes, and threads.

    spilled: bytes of a thread's stack, where what finds no register lies.
    """

    registers: int
    spilled: int
    shared: int
    threads: int

    def programs(self, gpu: GPU) -> int:
        """Return how many run side by side on a multiprocessor; 0 where none fits."""
        if self.shared > gpu.shared:
            return 0
        warps = -(-self.threads // 32)
        by_registers = _REGISTERS // (-(-self.registers * 32 // 256) * 256 * warps)
        by_shared = gpu.shared_by_all // (self.shared + _KIB)
        return min(by_registers, by_shared, _THREADS.get(gpu.capability, 1536) // (32 * warps))


def bench_compiled(
    setting: Setting,
    online: Online,
    batches: Sequence[int],
    gpus: Sequence[str] = tuple(GPUS),
    path: Path | None = None,
    kernels: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the record of a network's kernels, by GPU and name; the worst of a name's forms.

    setting: `prompt` tokens are read, then one by each of so many sequences (batches) is decoded.
    kernels: names of those that are looked at, all without any. Raises InputError where Triton
    interprets kernels.
    """
    if interpreted():
        raise InputError("TRITON_INTERPRET is set, and nothing is compiled then: unset it")
    shape = {"model": setting.model, "layers": setting.layers, "prompt": setting.prompt}
    chosen = {"batches": list(batches), "gpus": list(gpus), "kernels": list(kernels)}
    config = {**shape, **chosen, "method": setting.method, "settings": dict(setting.settings)}
    results = Results(f"bench/compiled/{setting.model}", config, path)
    for name in gpus:
        found: dict[str, list[Taken]] = {}
        for launch in _launches(setting, online, batches, GPUS[name]):
            if not kernels or launch.kernel.fn.__name__ in kernels:
                taken = compiled(launch, GPUS[name].capability)
                found.setdefault(launch.kernel.fn.__name__, []).append(taken)
        for kernel, forms in found.items():
            results.add(_metrics(f"compiled/{name}/{kernel}", forms, GPUS[name]))
    return results.record()


def _metrics(case: str, forms: Sequence[Taken], gpu: GPU) -> Mapping[str, float]:
    return {
        f"count/{case}/forms": len(forms),
        f"count/{case}/registers": max(form.registers for form in forms),
        f"bytes/{case}/spilled": max(form.spilled for form in forms),
        f"bytes/{case}/shared": max(form.shared for form in forms),
        f"count/{case}/programs": min(form.programs(gpu) for form in forms),
    }


def _launches(
    setting: Setting, online: Online, batches: Sequence[int], gpu: GPU
) -> Iterator[Launch]:
    """Yield the launches of a network's prompt and steps that differ in what is compiled."""
    host = torch.device("cpu")
    with torch.inference_mode(), planning(gpu) as launches:
        runner = Ours(setting, triton_operations(), host, online)
        for batch in batches:
            ids = torch.zeros(batch, setting.prompt, dtype=torch.long)
            cache = runner.prefill(ids[:1] if batch == 1 else ids[:, :1], setting.prompt + 1)
            runner.stepper(cache, ids[:, :1], setting.prompt)()
    known = set()
    for launch in launches:
        key = str((launch.kernel.fn.__name__, *_source(launch), launch.options))
        if key not in known:
            known.add(key)
            yield launch


def _source(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict]:
    """Return an argument's type by name, constants, and what is a multiple of 16 by place."""
    names: list[str] = launch.kernel.arg_names
    types, constants, even = dict.fromkeys(names, "constexpr"), dict(launch.constants), {}
    for place, (name, argument) in enumerate(zip(names, launch.arguments, strict=False)):
        if isinstance(argument, torch.Tensor):
            types[name] = f"*{_TYPES[argument.dtype]}"
            multiple = argument.data_ptr() % 16 == 0
        elif isinstance(argument, float):
            types[name], multiple = "fp32", False
        elif isinstance(argument, int):
            special = not launch.kernel.params[place].do_not_specialize
            if special and argument == 1:  # which Triton takes for a constant
                constants[name] = 1
                continue
            types[name] = "i64" if argument.bit_length() > 31 else "i32"
            multiple = special and argument % 16 == 0
        else:  # a descriptor of tiles
            kind = _TYPES[argument.base.dtype]
            types[name], multiple = f"tensordesc<{kind}{list(argument.block_shape)}>", False
        if multiple:
            even[place,] = [["tt.divisibility", 16]]
    return types, constants, even


def compiled(launch: Launch, capability: tuple[int, int]) -> Taken:
    """Compile a launch for GPUs of a capability, which need not be there."""
    import triton  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    types, constants, even = _source(launch)
    source = ASTSource(launch.kernel, types, constexprs=constants, attrs=even)
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    found = triton.compile(source, target=target, options=launch.options)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(found.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path  # pyright: ignore[reportAttributeAccessIssue]
        told = subprocess.run(
            [tool, "-res-usage", binary], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (re.findall(rf"{word}:(\d+)", told)[-1] for word in ("REG", "STACK"))
    threads = 32 * found.metadata.num_warps
    return Taken(int(registers), int(stack), found.metadata.shared, threads)
