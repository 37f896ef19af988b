"""What recipes take of a model on paper (`python -m spinlab.bench estimates`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from spinlab.errors import InputError
from spinlab.report.formats import MISSING, markdown
from spinlab.report.records import read_benchmark
from spinlab.report.tables.memory import order_of
from spinlab.speed import duration

Metrics = Mapping[str, float]


def estimates_table(file: Path, way: str, recipe: str = "") -> str:
    """Return a table of every recipe on a record's model, or of the stages of one.

    way: whole, or offload for layers that come one by one. A recipe's row names the stages that
    take most of a device and of the host; what comes to a GPU is one process's, of one alone.
    Raises InputError for a record without such estimates.
    """
    record = read_benchmark("estimates", str(file))
    metrics, config = record["metrics"], record.get("config", {})
    gpus: list[int] = config.get("gpus", [])
    if not gpus:
        raise InputError(f"{file} is no record of what recipes take on paper")
    names: list[str] = [recipe] if recipe else config.get("recipes", [])
    places = {name: [f"{name}/{count}/{way}" for count in gpus] for name in names}
    for name, (first, *_) in places.items():
        if not _stages(metrics, f"speed/{first}/"):
            raise InputError(f"{file} has no estimates of {name} ({way})")
    if recipe:
        stages = _stages(metrics, f"speed/{places[recipe][0]}/")
        rows = [
            [f"`{stage}`", *_cells(metrics, places[recipe], stage)]
            for stage in sorted(stages, key=order_of)
        ]
        return markdown([_head("stage", gpus, []), *rows])
    rows = [[f"`{name}`", *_summary(metrics, found)] for name, found in places.items()]
    return markdown([_head("recipe", gpus, ["disk, GiB"]), *rows])


def _head(first: str, gpus: Sequence[int], more: Sequence[str]) -> list[str]:
    counts = ["1 GPU" if count == 1 else f"{count} GPUs" for count in gpus]
    held, times = ([f"{kind} ({count})" for count in counts] for kind in ("device, GiB", "time"))
    return [first, *held, "host, GiB", *more, "to the GPU, GiB", *times]


def _cells(metrics: Metrics, places: Sequence[str], stage: str) -> list[str]:
    """Return what a stage takes with so many GPUs each."""
    held = [_gib(metrics.get(f"bytes/{place}/{stage}/device")) for place in places]
    once = [_gib(metrics.get(f"bytes/{places[0]}/{stage}/{side}")) for side in ("host", "moved")]
    times = [duration(metrics[f"speed/{place}/{stage}"]) for place in places]
    return [*held, *once, *times]


def _summary(metrics: Metrics, places: Sequence[str]) -> list[str]:
    """Return what all stages of a recipe take with so many GPUs each."""

    def most(place: str, side: str) -> str:
        found = _stages(metrics, f"bytes/{place}/", f"/{side}")
        stage = max(found, key=lambda name: found[name])
        return f"{_gib(found[stage])} `{stage}`"

    first = places[0]
    once = [most(first, "host"), _gib(metrics.get(f"bytes/{first}/disk"))]
    moved = sum(_stages(metrics, f"bytes/{first}/", "/moved").values())
    times = [sum(_stages(metrics, f"speed/{place}/").values()) for place in places]
    held = [most(place, "device") for place in places]
    return [*held, *once, _gib(moved), *map(duration, times)]


def _stages(metrics: Metrics, start: str, end: str = "") -> dict[str, float]:
    """Return what metrics say of stages, by their names."""
    found = {n: value for n, value in metrics.items() if n.startswith(start) and n.endswith(end)}
    return {name[len(start) : len(name) - len(end)]: value for name, value in found.items()}


def _gib(count: float | None) -> str:
    if count is None:
        return MISSING
    return f"{count / 2**30:.{1 if count < 100 * 2**30 else 0}f}"
