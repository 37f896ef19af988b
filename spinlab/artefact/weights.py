"""The weights of an artefact, read one by one, and held against the model before any is."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from spinlab.errors import InputError
from spinlab.formats import FORMATS, Format
from spinlab.model.map import ModelMap
from spinlab.weights.quantized import QuantizedWeight

Shapes = dict[str, tuple[int, ...]]
# the names of dtypes in such a file, of those that scales are stored in
_DTYPES = {torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8"}


class StoredWeights(Mapping[str, QuantizedWeight]):
    """Give the weights of a file that `save_weights` wrote, each read when it is asked for.

    They are unpacked on the device, and none is kept.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self._file: Any = safe_open(path, framework="pt")
        self._device = device
        told = json.loads((self._file.metadata() or {})["formats"])
        self.formats = {name: _format(*words) for name, words in told.items()}

    def __getitem__(self, name: str) -> QuantizedWeight:
        format, width = self.formats[name]
        stored = {part: self._file.get_tensor(f"{name}.{part}") for part in parts_of(format)}
        on_device = {part: tensor.to(self._device) for part, tensor in stored.items()}
        weight = QuantizedWeight.from_tensors(on_device, format, width)
        # a copy: pages of the file may change with it
        return replace(weight, scale=weight.scale.clone())

    def __contains__(self, name: object) -> bool:
        return name in self.formats

    def __iter__(self) -> Iterator[str]:
        return iter(self.formats)

    def __len__(self) -> int:
        return len(self.formats)

    def check(self, place: str, model_map: ModelMap, ends: Shapes) -> None:
        """Raise InputError where a weight is not one of the model's, or its tensors do not fit.

        ends: the shapes of embedding and head, by path.
        """
        due = {site.path: (site.out_features, site.in_features) for site in model_map.sites} | ends
        found = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
        wanted: set[str] = set()
        for name, (format, width) in self.formats.items():
            if name not in due or due[name][1] != width:
                raise InputError(f"{place}: the model has no linear {name} of {width} inputs")
            wanted |= {f"{name}.{part}" for part in parts_of(format)}
        if found.keys() != wanted:
            raise InputError(
                f"{place}: {sorted(found.keys() ^ wanted)[0]} is missing among its weights, or has "
                "no place there"
            )
        for name in self.formats:
            self._check_shapes(place, name, due[name][0])

    def _check_shapes(self, place: str, name: str, rows: int) -> None:
        format, width = self.formats[name]
        slices = {part: self._file.get_slice(f"{name}.{part}") for part in parts_of(format)}
        found = {part: (s.get_dtype(), *s.get_shape()) for part, s in slices.items()}
        groups = found["scale"][-1] if len(found["scale"]) == 3 else 0
        if groups < 1 or width % groups or format.group not in (0, width // groups):
            raise InputError(f"{place}: {name}.scale is {found['scale']}, which does not fit")
        due = {part: (_DTYPES[t.dtype], *t.shape) for part, t in _sample(format, groups).items()}
        packed = format.pack(torch.full((1, width), format.lowest)).shape[1]
        due |= {"levels": ("U8", rows, packed), "zero": ("I16", rows, groups)}
        due["scale"] = (due["scale"][0], rows, groups)
        for part, tensor in found.items():
            if tensor != due[part]:
                raise InputError(f"{place}: {name}.{part} is {tensor}, which does not fit")
        stored = {part: self._file.get_tensor(f"{name}.{part}") for part in _sample(format, 1)}
        scale = format.load_scale(stored)
        if not (scale.isfinite() & (scale > 0)).all():
            raise InputError(f"{place}: {name}.scale holds what is no scale")


def _format(kind: str, bits: int, symmetric: bool, width: int) -> tuple[Format, int]:
    """Return the format of a weight and its inputs. Raises ValueError for words that are none."""
    types = [type(word) for word in (bits, symmetric, width)]
    if kind not in FORMATS or types != [int, bool, int] or not 2 <= bits < 16 or width < 1:
        raise ValueError(f"{kind!r} of {bits!r} bits for {width!r} inputs is no format")
    return FORMATS[kind](bits, symmetric), width


def parts_of(format: Format) -> list[str]:
    """Return the names of the tensors that a weight of this format is stored in."""
    parts = ["levels", *_sample(format, 1)]
    return parts if format.symmetric else [*parts, "zero"]


def _sample(format: Format, groups: int) -> dict[str, torch.Tensor]:
    """Return stored scales of one row, for their names, dtypes and shapes."""
    return format.store_scale(torch.ones(1, groups))
