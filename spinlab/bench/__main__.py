"""Run a benchmark: python -m spinlab.bench decode --model llama2_7b --out place/x.json"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from spinlab import parallel
from spinlab.bench.collect import collect
from spinlab.bench.models import SHAPES
from spinlab.bench.rounding import SETTINGS, bench_rounding
from spinlab.bench.settings import settings_of
from spinlab.code import code_digest
from spinlab.config import VARIANTS, RuntimeConfig
from spinlab.device import choose_device, set_arithmetic
from spinlab.errors import InputError
from spinlab.files import write_json
from spinlab.streams import ending

_SELF = "spinlab.bench.__main__"
_PARTS = ("prefill", "decode", "producers", "transforms", "formats", "groups", "kv", "peers")
_MEASURED = ("fp", "fake", "integer")
_PEERS = ("torch", "humming", "gemlite", "fbgemm", "mslk", "dao")


def main(words: list[str] | None = None) -> None:
    """Parse the command line, run, print the metrics and keep the record."""
    arguments = command_line().parse_args(words)
    with ending("spinlab.bench"):
        _run(arguments)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.repeatable:
        set_arithmetic(RuntimeConfig())
    torch.manual_seed(0)
    device = choose_device(arguments.device)
    parallel.start(device.type)
    if arguments.out:  # what cannot be written is known before hours of work
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
    record = arguments.run(arguments, device)
    if "environment" in record:  # gathered records have their own
        record["environment"]["code"] = code_digest(_SELF)
    if parallel.is_main():
        for name, value in sorted(record["metrics"].items()):
            print(f"{name:32} {value:,.6g}")
        if arguments.out:
            write_json(arguments.out, record)
            if not arguments.repeatable:
                _draw(record, arguments.out)
    parallel.stop()


def _draw(record: dict[str, Any], out: Path) -> None:
    """Draw a benchmark's ratios beside its record, which counts more than the figure."""
    try:  # a GPU node may lack what draws
        from spinlab.report.figures.bars import draw_ratios, title_of

        draw_ratios(record["metrics"], title_of(record)).save(out.with_suffix(".png"))
    except (ImportError, InputError) as error:
        print(f"no figure: {error}", file=sys.stderr)


def command_line() -> argparse.ArgumentParser:
    """Return the parser of every benchmark and its options."""
    parser = argparse.ArgumentParser(prog="python -m spinlab.bench")
    commands = parser.add_subparsers(dest="command", required=True)
    rounding = commands.add_parser("rounding", help="round a whole model column by column")
    _add_place(rounding)
    _add_model(rounding)
    rounding.add_argument("--method", choices=sorted(SETTINGS), default="gptq")
    rounding.add_argument("--length", type=int, default=2048, help="tokens of a window")
    rounding.add_argument("--samples", type=int, default=128, help="calibration windows")
    rounding.set_defaults(run=_rounding, repeatable=True)
    learn = commands.add_parser("learn", help="learn the rotations of a model")
    _add_place(learn)
    _add_model(learn)
    learn.add_argument("--method", help="its rotations and its learning, as in conf/method")
    learn.add_argument("--length", type=int, help="tokens of a window")
    learn.add_argument("settings", nargs="*", help="of the learning: steps=100 lr.r1=0.3 ...")
    learn.set_defaults(run=_learn, repeatable=True)
    forms = commands.add_parser("forms", help="an experiment's learning against its definition")
    forms.add_argument("overrides", nargs="+", help="as for spinlab: +experiment=NAME ...")
    forms.add_argument("--out", type=Path, help="where the record goes")
    forms.set_defaults(run=_forms, device="auto", repeatable=True)
    exports = commands.add_parser("exports", help="what an experiment exports, read back")
    exports.add_argument("overrides", nargs="+", help="+experiment=NAME export.artefact=PLACE ...")
    exports.add_argument("--out", type=Path, help="where the record goes")
    exports.set_defaults(run=_exports, device="auto", repeatable=True)
    _add_memory(commands)
    _add_kernels(commands)
    return parser


# every command gets options of its own: argparse changes the option itself where one sets a default


def _add_place(command: argparse.ArgumentParser, device: str = "auto") -> None:
    command.add_argument("--device", default=device, help="auto, cpu, cuda or cuda:N")
    command.add_argument("--out", type=Path, help="where the record goes, a figure beside it")


def _add_model(command: argparse.ArgumentParser, model: str = "smollm2_135m") -> None:
    command.add_argument("--model", choices=sorted(SHAPES), default=model)
    command.add_argument("--layers", type=int, help="fewer than the model has")


def _add_memory(commands: Any) -> None:
    memory = commands.add_parser("memory", help="what the stages of an experiment hold")
    _add_place(memory)
    memory.add_argument("--model", default="llama2_7b", help="known here, or a name in conf/model")
    memory.add_argument("--layers", type=int, help="fewer than the model has")
    memory.add_argument("--method", choices=("rtn", *sorted(SETTINGS), "lwc"), default="gptq")
    memory.add_argument("--samples", type=int, default=8, help="calibration windows")
    memory.add_argument("--windows", type=int, default=4, help="evaluation windows")
    memory.add_argument("--window", type=int, default=2048, help="tokens of a window")
    memory.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(_MEASURED))
    memory.add_argument("--whole", action="store_true", help="without runtime.offload")
    memory.add_argument("--folder", type=Path, help="where the checkpoint lies meanwhile")
    memory.set_defaults(run=_memory, repeatable=True)
    estimates = commands.add_parser("estimates", help="what every recipe takes, on paper")
    estimates.add_argument("--model", required=True, help="a name in conf/model")
    estimates.add_argument("--gpus", type=int, nargs="+", default=[1, 4, 8], help="processes")
    estimates.add_argument("--out", type=Path, help="where the record goes")
    estimates.set_defaults(run=_estimates, device="cpu", repeatable=True)


def _add_kernels(commands: Any) -> None:
    """Add what times integer kernels; deterministic algorithms would slow torch's side down."""
    kernels = commands.add_parser("kernels", help="the integer kernels alone")
    _add_place(kernels)
    kernels.add_argument("--only", nargs="+", choices=_PARTS, default=list(_PARTS))
    kernels.add_argument("--peers", nargs="+", choices=_PEERS, default=list(_PEERS))
    kernels.set_defaults(run=_kernels, repeatable=False)
    for name, batches, prompt in (("decode", [1, 16, 64], 512), ("prefill", [1, 8], 2048)):
        whole = commands.add_parser(name, help=f"{name} of a whole model")
        _add_place(whole)
        _add_model(whole, "llama2_7b")
        whole.add_argument("--batch", type=int, nargs="+", default=batches)
        whole.add_argument("--prompt", type=int, default=prompt, help="tokens of a prompt")
        whole.add_argument("--tokens", type=int, default=256, help="tokens to decode")
        _add_method(whole)
        whole.set_defaults(run=_end_to_end, repeatable=False)
    _add_compiled(commands)
    cpu = commands.add_parser("cpu", help="int8 products and decoding on a CPU")
    _add_place(cpu, "cpu")
    _add_model(cpu)
    cpu.add_argument("--context", type=int, default=128, help="tokens in the cache at the start")
    cpu.add_argument("--repeats", type=int, default=100, help="timed calls")
    cpu.add_argument("--threads", type=int, nargs="+", default=[1], help="to decode on")
    cpu.add_argument("--method", nargs="+", default=[], help="to decode by, as in conf/method")
    cpu.set_defaults(run=_cpu, repeatable=False)
    artefact = commands.add_parser("artefact", help="load a packed network in a fresh process")
    _add_place(artefact)
    _add_model(artefact, "llama2_7b")
    artefact.set_defaults(run=_artefact, repeatable=False)
    gather = commands.add_parser("collect", help="gather the records of several runs in one")
    gather.add_argument("records", type=Path, nargs="+", help="of two that overlap the last counts")
    gather.add_argument("--out", type=Path, required=True, help="where the record goes")
    gather.set_defaults(run=_collect, device="cpu", repeatable=False)


def _add_method(command: Any) -> None:
    shown = "whose rotations run online, as in conf/method, and settings of it"
    command.add_argument("--method", nargs="+", metavar=("METHOD", "KEY=VALUE"), help=shown)


def _add_compiled(commands: Any) -> None:
    compiled = commands.add_parser("compiled", help="kernels for GPUs that need not be there")
    compiled.add_argument("--out", type=Path, help="where the record goes")
    _add_model(compiled, "llama2_7b")
    compiled.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    compiled.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    _add_method(compiled)
    compiled.add_argument("--gpu", nargs="+", help="kinds, all that are known unless given")
    compiled.add_argument("--kernel", nargs="+", default=[], help="names, all unless given")
    compiled.set_defaults(run=_compiled, device="cpu", repeatable=False, tokens=1)


def _rounding(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    windows = (arguments.samples, arguments.length)
    return bench_rounding(arguments.method, arguments.model, windows, arguments.layers, device)


def _memory(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    from spinlab.bench.memory import Setting, bench_memory  # the whole pipeline loads here

    sizes = arguments.samples, arguments.windows, arguments.window
    kinds = arguments.method, not arguments.whole, tuple(arguments.variants)
    setting = Setting(arguments.model, arguments.layers, *sizes, *kinds)
    return bench_memory(setting, device, arguments.out, arguments.folder)


def _estimates(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    from spinlab.bench.estimates import bench_estimates  # the whole pipeline loads here

    return bench_estimates(arguments.model, arguments.gpus)


def _learn(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    from spinlab.bench.learn import bench_learn  # geoopt loads here: a GPU node may lack it

    length, method = arguments.length, arguments.method
    settings = [f"sequence_length={length}"] * bool(length) + arguments.settings
    learned = f"+method={method}" if method else "learn=spinquant"
    config = settings_of([learned, *(f"learn.{word}" for word in settings)])
    return bench_learn(arguments.model, config, arguments.layers, device)


def _forms(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    from spinlab.bench.forms import bench_forms

    return bench_forms(settings_of(arguments.overrides))


def _exports(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    from spinlab.bench.exports import bench_exports

    return bench_exports(settings_of(arguments.overrides), arguments.overrides)


def _kernels(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    from spinlab.bench.kernels import bench_kernels
    from spinlab.runtime.fused.operations import triton_operations

    peers = arguments.peers if "peers" in arguments.only else []
    parts = [part for part in arguments.only if part != "peers"]
    return bench_kernels(triton_operations(), device, parts, peers, arguments.out)


def _end_to_end(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    from spinlab.bench.end_to_end import bench_decode, bench_prefill
    from spinlab.runtime.fused.operations import REFERENCE, triton_operations

    operations = triton_operations() if device.type == "cuda" else REFERENCE
    bench = bench_decode if arguments.command == "decode" else bench_prefill
    setting, online = _online(arguments)
    return bench(operations, device, setting, arguments.batch, arguments.out, online)


def _compiled(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    from spinlab.bench.compiled import GPUS, bench_compiled

    gpus = arguments.gpu or list(GPUS)
    if unknown := set(gpus) - GPUS.keys():
        raise InputError(f"--gpu {min(unknown)} is not known: known are {', '.join(GPUS)}")
    setting, online = _online(arguments)
    return bench_compiled(setting, online, arguments.batch, gpus, arguments.out, arguments.kernel)


def _online(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Return what is run, and how a method's rotations are made for it."""
    from spinlab.bench.methods import hadamards, random_rotations
    from spinlab.bench.runners import Setting
    from spinlab.config.unread import check_read
    from spinlab.report.online import online_settings

    method, online, settings = None, hadamards, {}
    if arguments.method:
        method, *words = arguments.method
        config = settings_of([f"+method={method}", *words])
        if other := [word for word in words if not word.startswith(("rotation.", "learn."))]:
            raise InputError(
                f"--method takes settings of rotation and learn, and {other[0]} is none"
            )
        check_read(config, words)
        online, settings = partial(random_rotations, config), online_settings(config)
    sizes = (arguments.model, arguments.layers, arguments.prompt, arguments.tokens)
    return Setting(*sizes, method, settings), online


def _cpu(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    from spinlab.bench.cpu import bench_cpu

    if device.type != "cpu":
        raise InputError(f"cpu times a CPU and --device is {device}: use kernels or decode")
    methods = {method: settings_of([f"+method={method}"]) for method in arguments.method}
    sizes = (arguments.layers, arguments.context, arguments.repeats)
    return bench_cpu(arguments.model, *sizes, arguments.threads, methods=methods)


def _artefact(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    from spinlab.bench.artefact import bench_artefact

    return bench_artefact(arguments.model, arguments.layers, device)


def _collect(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    return collect(arguments.records, "bench/kernels")


if __name__ == "__main__":
    main()
