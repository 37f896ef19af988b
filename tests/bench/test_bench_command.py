"""The benchmarks' command line: what each command runs on, and what it refuses."""

import pytest

from spinlab.bench.__main__ import command_line, main

COMMANDS = {
    "rounding": [],
    "learn": [],
    "forms": ["+experiment=toy"],
    "kernels": [],
    "decode": [],
    "prefill": [],
}


@pytest.mark.parametrize(("command", "words"), COMMANDS.items(), ids=COMMANDS)
def test_every_command_takes_the_gpu_where_there_is_one(command, words):
    assert command_line().parse_args([command, *words]).device == "auto"


def test_only_the_cpu_benchmark_runs_on_the_cpu_by_itself(capsys):
    assert command_line().parse_args(["cpu"]).device == "cpu"
    assert command_line().parse_args(["kernels", "--device", "cuda:1"]).device == "cuda:1"
    with pytest.raises(SystemExit) as stop:
        main(["kernels", "--device", "cpu"])
    assert stop.value.code == 2
    assert "CUDA" in capsys.readouterr().err


def test_a_default_of_one_command_is_not_anothers():
    parser = command_line()
    models = {name: parser.parse_args([name]).model for name in ("rounding", "learn", "cpu")}
    assert set(models.values()) == {"smollm2_135m"}
    assert {parser.parse_args([name]).model for name in ("decode", "prefill")} == {"llama2_7b"}
    assert (parser.parse_args(["decode"]).prompt, parser.parse_args(["prefill"]).prompt) == (
        512,
        2048,
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["forms", "+experiment=toi"], "unknown experiment 'toi': did you mean toy?"),
        (["forms", "+experiment=toy", "learn.stpes=3"], "unknown setting 'learn.stpes'"),
        (["forms", "experiment"], "write +experiment=NAME"),
        (
            ["forms", "+experiment=toy", "quant.weights.group_size=7"],
            "quant.weights.group_size=7 does not divide 96",
        ),
        (["cpu", "--device", "tpu"], "runtime.device=tpu"),
    ],
    ids=["file", "setting", "no value", "groups", "device"],
)
def test_a_mistake_is_one_sentence_and_status_2(capsys, words, said):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    told = capsys.readouterr().err.splitlines()  # libraries may warn before
    (line,) = (line for line in told if line.startswith("spinlab.bench: "))
    assert said in line and line == told[-1]
