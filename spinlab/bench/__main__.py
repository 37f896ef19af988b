"""Run a benchmark: python -m spinlab.bench gptq --model llama2_7b --out experiments/bench/x.json"""

import argparse
from pathlib import Path
from typing import Any

import torch

from spinlab import parallel
from spinlab.bench.gptq import bench_gptq
from spinlab.bench.models import SHAPES
from spinlab.config import LearnConfig, RuntimeConfig
from spinlab.device import choose_device, set_arithmetic
from spinlab.stage import write_json


def main(words: list[str] | None = None) -> None:
    """Parse the command line, run, print the metrics and keep the record."""
    arguments = _parser().parse_args(words)
    set_arithmetic(RuntimeConfig())
    torch.manual_seed(0)
    device = choose_device(arguments.device)
    parallel.start(device.type)
    record = arguments.run(arguments, device)
    if parallel.is_main():
        for name, value in sorted(record["metrics"].items()):
            print(f"{name:32} {value:,.3f}")
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(arguments.out, record)
    parallel.stop()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m spinlab.bench")
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--model", choices=sorted(SHAPES), default="smollm2_135m")
    common.add_argument("--layers", type=int, help="fewer than the model has")
    common.add_argument("--length", type=int, default=2048, help="tokens of a window")
    common.add_argument("--device", default="auto")
    common.add_argument("--out", type=Path, help="where the record goes")
    gptq = commands.add_parser("gptq", parents=[common], help="quantize a whole model by GPTQ")
    gptq.add_argument("--samples", type=int, default=128, help="calibration windows")
    gptq.set_defaults(run=_gptq)
    learn = commands.add_parser("learn", parents=[common], help="learn the rotations of a model")
    learn.add_argument("settings", nargs="*", help="of the learning: steps=100 micro_batch=2 ...")
    learn.set_defaults(run=_learn)
    forms = commands.add_parser("forms", help="an experiment's learning against its definition")
    forms.add_argument("overrides", nargs="+", help="as for spinlab: +experiment=NAME ...")
    forms.add_argument("--out", type=Path, help="where the record goes")
    forms.set_defaults(run=_forms, device="auto")
    return parser


def _gptq(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    windows = (arguments.samples, arguments.length)
    return bench_gptq(arguments.model, windows, arguments.layers, device)


def _learn(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    from spinlab.bench.learn import bench_learn, with_settings  # geoopt loads here

    settings = with_settings(LearnConfig(sequence_length=arguments.length), arguments.settings)
    return bench_learn(arguments.model, settings, arguments.layers, device)


def _forms(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    from spinlab.bench.forms import bench_forms  # Hydra and the rest load here
    from spinlab.compose import composed

    return bench_forms(composed(*arguments.overrides))


if __name__ == "__main__":
    main()
