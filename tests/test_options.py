"""Every option of every group of conf/ composes, and runs on the toy in its smallest form."""

import pytest
import torch

from spinlab.compose import CONF, composed, options_of
from spinlab.stages.pipeline import Pipeline

GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir())
GRID = ("experiment", "method", "model")  # composed in test_grid, each with each
NEED_A_PACKAGE = [("sweep", "search")]
OPTIONS = [
    (group, option)
    for group in GROUPS
    if group not in GRID
    for option in options_of(group)
    if (group, option) not in NEED_A_PACKAGE
]
NEEDED = {
    "learn=inputs": ["rotation=duquant"],  # the transforms that it learns
    "learn=fused": ["rotation=scales"],
    "learn=blocks": ["rotation=blocks"],
    "rotation=blocks": ["learn=blocks"],  # R2 is learned with what turns behind it
    # rounded weights, the only thing that depends on rotations
    "quant=w4a16": ["learn=two_cores"],
    "quant=mxfp4_weights": ["learn=two_cores"],
    "quant=nvfp4_weights": ["learn=two_cores"],
}
# run whole elsewhere: methods, with their rotations, learning and rounding (test_methods)
RUN = [
    *("rotation=identity", "rotation=block_r4", "rotation=r1_blocks", "rotation=input_blocks"),
    *(
        "quant=mxfp4",
        "quant=nvfp4",
        "quant=mxfp6",
        "quant=mxfp8",
        "quant=fp8",
        "quant=nvfp4_calibrated",
        "quant=nvfp4_weights",
        "quant=mxfp4_weights",
        "quant=w4a4_g32",
        "kv=nvfp4",
        "kv=fp8",
    ),
    *("quant=w4a4_llmc", "quant=w4a8", "quant=w4a8_ends8", "runtime=torch"),
    *("kv=kv8", "kv=lloyd_max3", "kv=turboquant_prod3", "kv=kivi2", "kv=qjl"),
    *(f"+method={name}" for name in options_of("method") if "/" in name),
]
SMALL = [
    *("learn=none", "eval.max_windows=1", "model.architecture.num_hidden_layers=1"),
    *(f"weights.{method}.samples=2" for method in ("gptq", "gptaq", "qronos")),
    *(f"weights.{method}.sequence_length=64" for method in ("gptq", "gptaq", "qronos")),
    *("weights.lwc.samples=2", "weights.lwc.sequence_length=64", "weights.lwc.epochs=1"),
    *("rotation.statistics.samples=2", "rotation.statistics.sequence_length=64"),
    *("quant.calibration.samples=2", "quant.calibration.sequence_length=64"),
    *("rotation.duquant.steps=4", "rotation.duquant.block_size=16"),
]


@pytest.mark.parametrize("group, option", OPTIONS, ids=lambda value: value)
def test_every_option_composes(group, option):
    plus = "+" if group == "sweep" else ""
    composed(*NEEDED.get(f"{group}={option}", ()), f"{plus}{group}={option}")


@pytest.mark.parametrize("option", RUN)
def test_what_no_other_test_runs_agrees_on_integers_and_in_floats(option, tmp_path):
    """The hand-off gate, and the metrics of the network that the option makes."""
    file = tmp_path / "text.txt"
    file.write_text("".join(chr(97 + i * i % 89 % 26) for i in range(2_000)))
    text = [f"data.calibration={file}", f"data.evaluation=[{file}]", "eval.window=64"]
    paths = [f"paths.cache={tmp_path / 'cache'}", f"paths.runs={tmp_path / 'runs'}"]
    run = Pipeline(composed("+experiment=toy", "model=random", option, *SMALL, *text, *paths))
    assert run.handoff_error("integer") < 1e-9
    metrics = run.measure("integer")
    assert all(torch.isfinite(torch.tensor(value)) for value in metrics.values())
