"""Run a benchmark: python -m spinlab.bench gptq --model llama2_7b --out experiments/bench/x.json"""

import argparse
from pathlib import Path

import torch

from spinlab.bench.gptq import bench_gptq
from spinlab.bench.models import SHAPES
from spinlab.config import RuntimeConfig
from spinlab.device import choose_device, set_arithmetic
from spinlab.stage import write_json


def main(words: list[str] | None = None) -> None:
    """Parse the command line, run, print the metrics and keep the record."""
    parser = argparse.ArgumentParser(prog="python -m spinlab.bench")
    commands = parser.add_subparsers(dest="command", required=True)
    gptq = commands.add_parser("gptq", help="quantize a whole model by GPTQ")
    gptq.add_argument("--model", choices=sorted(SHAPES), default="smollm2_135m")
    gptq.add_argument("--samples", type=int, default=128, help="calibration windows")
    gptq.add_argument("--length", type=int, default=2048, help="tokens of a window")
    gptq.add_argument("--layers", type=int, help="fewer than the model has")
    gptq.add_argument("--device", default="auto")
    gptq.add_argument("--out", type=Path, help="where the record goes")
    arguments = parser.parse_args(words)
    set_arithmetic(RuntimeConfig())
    torch.manual_seed(0)
    device = choose_device(arguments.device)
    windows = (arguments.samples, arguments.length)
    record = bench_gptq(arguments.model, windows, arguments.layers, device)
    for name, value in sorted(record["metrics"].items()):
        print(f"{name:32} {value:,.2f}")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out, record)


if __name__ == "__main__":
    main()
