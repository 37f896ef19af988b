"""Kernels are compiled for GPUs that are not there, each as that GPU would be given it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spinlab.bench.__main__ import main
from spinlab.bench.compiled import GPUS, Taken, _source
from spinlab.runtime.kernels.launch import Launch


def test_what_the_compiler_takes_is_weighed_against_each_gpu(tmp_path):
    pytest.importorskip("triton")
    root, out = Path(__file__).parents[2], tmp_path / "compiled.json"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    words = "--model smollm2_135m --layers 1 --prompt 130 --batch 1 --kernel attend_kernel"
    words += f" --gpu rtx4090 h200 --out {out}"
    command = [sys.executable, "-m", "spinlab.bench", "compiled", *words.split()]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    metrics = json.loads(out.read_text())["metrics"]
    kinds = {tuple(name.split("/")[2:4]) for name in metrics}
    assert kinds == {("rtx4090", "attend_kernel"), ("h200", "attend_kernel")}
    for gpu, kernel in kinds:
        case = f"compiled/{gpu}/{kernel}"
        assert 0 < metrics[f"bytes/{case}/shared"] <= GPUS[gpu].shared
        assert 16 <= metrics[f"count/{case}/registers"] <= 255
        assert metrics[f"count/{case}/programs"] >= 1 and metrics[f"count/{case}/forms"] >= 1


def test_programs_side_by_side_are_what_a_multiprocessor_holds():
    """By the CUDA occupancy calculator's rules: registers by warps, a KiB for each program."""
    ada, hopper = GPUS["rtx4090"], GPUS["h200"]
    assert Taken(168, 0, 32 * 1024, 128).programs(ada) == 3  # 100 KiB by 33
    assert Taken(168, 0, 32 * 1024, 128).programs(hopper) == 3  # 65536 by 168 of 128 threads
    assert Taken(128, 0, 0, 256).programs(hopper) == 2
    assert Taken(129, 0, 0, 256).programs(hopper) == 1  # registers come eight at a time
    assert Taken(16, 0, 0, 1024).programs(ada) == 1  # 1536 threads
    assert Taken(16, 0, 0, 1024).programs(hopper) == 2
    assert Taken(16, 0, 100 * 1024, 32).programs(ada) == 0


def test_kinds_that_are_not_known_and_interpreted_kernels_are_refused(capsys):
    for words, reason in (
        (["--gpu", "h200", "voodoo2"], "--gpu voodoo2 is not known: known are a100, "),
        ([], "TRITON_INTERPRET is set"),
    ):
        with pytest.raises(SystemExit):
            main(["compiled", "--model", "toy", *words])
        assert re.search(reason, capsys.readouterr().err)


def test_numbers_are_special_to_the_compiler_unless_a_kernel_says_otherwise():
    """As Triton's own launch has it: 1 is a constant, multiples of 16 are known to be."""
    names = ["x", "one", "tokens", "many", "out", "clip"]
    params = [SimpleNamespace(do_not_specialize=name in ("tokens", "many")) for name in names]
    kernel = SimpleNamespace(arg_names=[*names, "BLOCK"], params=params)
    given = (torch.zeros(4, dtype=torch.bfloat16), 1, 1, 32, 2**40, 0.5)
    types, constants, even = _source(Launch(kernel, (1,), given, {"BLOCK": 64}, {}))
    assert types == {
        **{"x": "*bf16", "one": "constexpr", "tokens": "i32", "many": "i32", "out": "i64"},
        **{"clip": "fp32", "BLOCK": "constexpr"},
    }
    assert constants == {"BLOCK": 64, "one": 1}
    assert set(even) == {(0,), (4,)}
