"""What the page shows of records, their curves and their figures, ready for JSON."""

import base64
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spinlab.config import VARIANTS
from spinlab.config.values import values_of
from spinlab.report.records import Record, read_below, read_curve

_POINTS = 200  # of a curve: more are not seen
_FIGURE_BYTES = 500_000  # of one figure
_FIGURES_BYTES = 12_000_000  # of all of them
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass
class Content:
    """Runs as the page has them, and what was left out, by file, with the reason."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    figure_bytes: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return it without numbers that JSON has no word for: those are told as text."""
        return _finite({"runs": self.runs, "left_out": self.left_out, "variants": VARIANTS})


def page_content(folders: Sequence[Path]) -> Content:
    """Read the records below folders; what is broken, unfinished or foreign is named."""
    content = Content()
    for folder in folders:
        found = read_below(folder)
        for path, reason in found.skipped.items():
            content.left_out[_name(path, folder)] = reason
        for path, record in found.kept.items():
            content.runs.append(_run(record, path, folder, content))
    return content


def _name(path: Path, folder: Path) -> str:
    """Return a file's name from its folder of records on: no path of the machine."""
    return (Path(folder.name) / path.relative_to(folder)).as_posix()


def _run(record: Record, path: Path, folder: Path, content: Content) -> dict[str, Any]:
    settings, facts = values_of(record["config"]), record.get("environment")
    stages = [stage for stage in _list(record.get("stages")) if isinstance(stage, Mapping)]
    return {
        "id": _name(path, folder),
        "experiment": str(record["experiment"]),
        "key": str(record.get("key", "")),
        "model": str(settings.get("model.name", "")),
        "command": shlex.join(map(str, ["spinlab", *_list(record.get("overrides"))])),
        "settings": settings,
        "environment": values_of(facts) if isinstance(facts, Mapping) else {},
        "metrics": record["metrics"],
        "stages": [[s.get("name"), s.get("seconds"), s.get("cached")] for s in stages],
        "curves": _curves(path, _name(path, folder), content),
        "layers": _layers(path, _name(path, folder), content),
        "figures": _figures(path, folder, content),
    }


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _curves(path: Path, name: str, content: Content) -> dict[str, list[Any]]:
    """Return the curves beside a record by name, each as long as `step`, thinned if that is long.

    A line that is torn ends them.
    """
    lines = path.with_name("metrics.jsonl")
    if path.name != "record.json" or not lines.is_file():
        return {}
    rows, torn = read_curve(lines)
    if torn:
        content.left_out[f"{name}: metrics.jsonl"] = torn
    every = math.ceil(len(rows) / _POINTS) or 1
    chosen = rows[::every] + rows[-1:] * ((len(rows) - 1) % every != 0)
    names = dict.fromkeys(name for row in chosen for name in row)
    return {name: [row.get(name) for row in chosen] for name in names}


def _layers(path: Path, name: str, content: Content) -> dict[str, list[Any]]:
    """Return what a run keeps of every layer beside its record, by name."""
    file = path.with_name("layers.json")
    if path.name != "record.json" or not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {str(name): [*values] for name, values in found.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        content.left_out[f"{name}: layers.json"] = f"broken: {type(error).__name__}: {error}"
        return {}


def _figures(path: Path, folder: Path, content: Content) -> list[dict[str, str]]:
    """Return the figures of a record as data: those of its run, or those that begin as it does."""
    run = path.name == "record.json"
    near = path.parent.glob("figures/*.png") if run else path.parent.glob(f"{path.stem}_*.png")
    figures = []
    for file in sorted(near):
        try:
            data = file.read_bytes()
        except OSError as error:
            content.left_out[_name(file, folder)] = f"broken: {error.strerror}"
            continue
        if reason := _refused(data, content.figure_bytes):
            content.left_out[_name(file, folder)] = reason
            continue
        content.figure_bytes += len(data)
        figures.append({"name": file.stem, "data": base64.b64encode(data).decode("ascii")})
    return figures


def _refused(data: bytes, so_far: int) -> str:
    """Return why a figure is left out of the page; empty where it is not."""
    if not data.startswith(_PNG):
        return "no PNG"
    if len(data) > _FIGURE_BYTES:
        return f"too large for the page: {len(data)} bytes of {_FIGURE_BYTES}"
    if so_far + len(data) > _FIGURES_BYTES:
        return f"too many figures for the page: {_FIGURES_BYTES} bytes in all"
    return ""


def _finite(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {str(key): _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return str(tree) if isinstance(tree, float) and not math.isfinite(tree) else tree
