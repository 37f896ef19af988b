"""Parts of a run's rotations that stock weights cannot hold, and the refusal of what would be lost.

Settings tell of most before any work is done, and of the rest the file that rotations come from;
what was made tells of all.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from spinlab.config import Config
from spinlab.config.rotation import SAME
from spinlab.errors import InputError
from spinlab.export.targets import place_of
from spinlab.model.files import MANIFEST
from spinlab.model.load import meta_model
from spinlab.model.modules import map_of
from spinlab.rotation.exchange import made_again
from spinlab.rotation.ranges import with_fitting_ranges
from spinlab.rotation.rotations import ONLINE, RotationSet
from spinlab.rotation.stored import read_about, read_stored

# how tensors of an input's transform are called, by the parts that they make
_ENDS = {"inputs": {"first", "matrix"}, "scales": {"scale"}, "smoothing": {"scale", "folded_scale"}}


@dataclass(frozen=True)
class Part:
    """Name a part as sentences do, and the setting that leaves it out."""

    name: str
    cure: str


PARTS: Mapping[str, Part] = {
    "drawn_r3": Part("an R3 that is no exact Hadamard", "rotation.r3=hadamard"),
    "drawn_r4": Part("an R4 that is no exact Hadamard", "rotation.r4=hadamard"),
    "learned_r3": Part("a learned R3", "learn.rotations without r3"),
    "r3": Part("R3", "rotation.r3=none"),
    "r4": Part("R4", "rotation.r4=none"),
    "cross_head": Part("the rotation across heads", "rotation.cross_head=none"),
    "latents": Part("rotations of latents", "rotation.latents=none"),
    "inputs": Part("online transforms of single inputs", "rotation.inputs=none"),
    "smoothing": Part("scales of inputs", "rotation.smooth=null rotation.inputs=none"),
    "scales": Part("online scales of inputs", "rotation.smooth_groups=[qkv,gate_up]"),
    "clips": Part("learned ranges of inputs", "learn.lr.input_clip=0"),
    "kv_clips": Part("learned ranges of keys and values", "learn.lr.kv_clip=0"),
    "weight_clips": Part("learned ranges of weights", "learn.lr.clip=0"),
}


def check_settings(setting: str, form: str, cannot: Collection[str], config: Config) -> None:
    """Raise InputError for parts that settings, or a file that they name, let expect.

    setting: as the user wrote it. form: what is written, as sentences call it. cannot: what it
    cannot hold, by names of PARTS. A file that cannot be read is left to who reads it.
    """
    _refuse(setting, form, of_settings(config, cannot))
    source = source_of(config)
    brought = [] if source is None else _of_file(source[1], config)
    if source is not None and (lost := [name for name in cannot if name in brought]):
        raise InputError(
            f"{setting}: {form} cannot hold {_names(lost)}, which {source[0]} brings: use "
            "export.transformed, which keeps them, or rotations without them"
        )


def check_made(setting: str, form: str, cannot: Collection[str], rotations: RotationSet) -> None:
    """Raise InputError for parts that rotations have, however they came by them."""
    _refuse(setting, form, [name for name in cannot if name in parts_of(rotations)])


def fused_in(rotations: RotationSet) -> list[str]:
    """Return the names of what is in the weights of a rotated model."""
    both = [name for name in ("r1", "r2") if getattr(rotations, name) is not None]
    return both + (["latents"] if rotations.latents else [])


def parts_of(rotations: RotationSet) -> set[str]:
    """Return the names of the parts that there are."""
    online = [t for t in rotations.inputs.values() if t.is_online]
    there: dict[str, Any] = {name: getattr(rotations, name) is not None for name in ONLINE}
    there["inputs"] = any(t.dual is not None for t in online)
    there["scales"] = any(t.scale is not None and not t.folded for t in online)
    there["smoothing"] = any(t.scale is not None for t in rotations.inputs.values())
    there |= {f"drawn_{name}": not made_again(rotations, name) for name in ("r3", "r4")}
    own = ("latents", "clips", "kv_clips", "weight_clips")
    there |= {name: getattr(rotations, name) for name in own}
    return {name for name, found in there.items() if found}


def _refuse(setting: str, form: str, lost: Collection[str]) -> None:
    if lost:
        cures = " ".join(PARTS[name].cure for name in lost)
        raise InputError(f"{setting}: {form} cannot hold {_names(lost)}: set {cures}")


def _names(parts: Collection[str]) -> str:
    return ", ".join(PARTS[part].name for part in parts)


def of_settings(config: Config, among: Collection[str]) -> list[str]:
    """Return which parts settings ask for; what files bring is not told by them."""
    rotation, learn = config.rotation, config.learn
    there: dict[str, Any] = {"weight_clips": learn.steps and learn.lr.clip}
    there["clips"] = learn.steps and learn.lr.input_clip
    there["kv_clips"] = learn.steps and learn.lr.kv_clip
    there["learned_r3"] = learn.steps and "r3" in learn.rotations
    if source_of(config) is None:
        kinds = {name: getattr(rotation, name) for name in ONLINE if name in rotation.used}
        there |= {name: name == "r3" or kind != "identity" for name, kind in kinds.items()}
        there |= {f"drawn_{name}": kind not in SAME for name, kind in kinds.items()}
        there["inputs"] = rotation.turns_inputs
        there["latents"] = rotation.latents != "none"
        there["smoothing"] = rotation.smooth is not None or rotation.scales_inputs
        there["scales"] = there["smoothing"] and "scales" in among and _runs_online(config)
    return [name for name in among if there.get(name)]


def _runs_online(config: Config) -> bool:
    """Tell whether a scale has nowhere to go: no norm or linear takes all of it.

    Those of smoothing are drawn for every channel, those that are learned alone for every row.
    """
    inputs, rotation = map_of(meta_model(config.model, None)).inputs, config.rotation
    smoothed = () if rotation.smooth is None else rotation.smooth_groups
    return any(not i.folds if i.kind in smoothed else i.producer is None for i in inputs)


def source_of(config: Config) -> tuple[str, Path] | None:
    """Return the file that brings all rotations, after the setting that names it."""
    load, model = config.rotation.load, config.model.path
    if model and (manifest := place_of(model) / MANIFEST).is_file():
        return f"model.path={model}", manifest
    if load and load.endswith(".safetensors"):
        return f"rotation.load={load}", place_of(load)
    return None


def tensors_in(path: Path) -> list[str]:
    """Return the names of the tensors in a file; none where it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError):
        return []  # who reads it says what is wrong with it


def _of_file(path: Path, config: Config) -> set[str]:
    """Return the parts in a file of rotations, most of them by the names of its tensors."""
    names = tensors_in(path)
    try:
        about = read_about(path)
    except InputError:
        return set()  # as above
    parts = {name for name in ONLINE if f"{name}.left" in names} | _online_in(path, config)
    parts |= {"latents" for n in names if n.startswith("latents.")}
    ends = {n.rpartition(".")[2] for n in names if n.startswith("inputs.")}
    parts |= {part for part, those in _ENDS.items() if ends & those}
    if config.learn.steps:
        return parts  # ranges are learned anew
    ranges = RotationSet(
        clips={n: 1.0 for n in names if n.startswith("clip.")},
        kv_clips={n: 1.0 for n in names if n.startswith("kv_clip.")},
        weight_clips=dict.fromkeys((n for n in names if n.startswith("weight_clip.")), None),  # pyright: ignore[reportArgumentType]
        about=about,
    )
    fitting = with_fitting_ranges(ranges, config.quant, config.kv, config.weights.method)
    return parts | parts_of(fitting)


def _online_in(path: Path, config: Config) -> set[str]:
    """Return what runs online in a file; of R1, which may be large, no number is read."""
    try:
        return parts_of(read_stored(path, map_of(meta_model(config.model, None)), ONLINE))
    except InputError:
        return set()  # as above
