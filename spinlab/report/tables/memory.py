"""What the stages of a run hold and how long they take (`python -m spinlab.bench memory`)."""

from pathlib import Path

from spinlab.errors import InputError
from spinlab.report.formats import MISSING, markdown
from spinlab.report.records import read_benchmark

# of stages' names, as far as their variant, in the order of a run
_ORDER = (
    "statistics",
    "rotate",
    "learn",
    "factors",
    "weights",
    "handoff",
    "eval",
    "layers",
    "outliers",
)


def memory_table(file: Path) -> str:
    """Return a table of a record's stages: what each held at its peaks in GiB, and its seconds.

    What the host held before the first stage has a row of its own. Raises InputError for a record
    without stages.
    """
    metrics: dict[str, float] = read_benchmark("memory", str(file))["metrics"]
    stages = [name.split("/")[1] for name in metrics if name.startswith("speed/")]
    if not stages:
        raise InputError(f"{file} is no record of what stages hold")
    rows = [["stage", "device, GiB", "host, GiB", "seconds"]]
    rows.append(["before", MISSING, _gib(metrics, "start", "host"), MISSING])
    for stage in sorted(stages, key=order_of):
        held = [_gib(metrics, stage, side) for side in ("device", "host")]
        rows.append([f"`{stage}`", *held, f"{metrics[f'speed/{stage}']:.0f}"])
    return markdown(rows)


def order_of(stage: str) -> tuple[int, str]:
    """Return what stages are sorted by: those that are not known come last."""
    kind = stage.partition("-")[0]
    return (_ORDER.index(kind) if kind in _ORDER else len(_ORDER), stage)


def _gib(metrics: dict[str, float], stage: str, side: str) -> str:
    held = metrics.get(f"bytes/{stage}/{side}")
    return MISSING if held is None else f"{held / 2**30:.1f}"
