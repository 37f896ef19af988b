"""A quantized weight as integers: what is saved, what kernels multiply, what fake quant decodes."""

import json
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from torch import nn

from spinlab.formats import FORMATS, Format, Parameters, name_of
from spinlab.tensors import write_tensors

Stored = tuple[dict[str, torch.Tensor], dict[str, list]]  # tensors, formats by weight


@dataclass(frozen=True)
class QuantizedWeight:
    """Hold integer-valued levels (out, in) with float32 scale and zero (out, in/g).

    Levels are kept as int16, wide enough for every format up to 15 bits; in their stored form they
    take the format's bits.
    """

    levels: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    format: Format

    @property
    def groups(self) -> int:
        return self.scale.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the floats (out, in) that the levels stand for."""
        wide = torch.promote_types(dtype, torch.float32)
        grouped = self.levels.to(wide).unflatten(1, (self.groups, -1))
        parameters = Parameters(*(t.to(wide)[..., None] for t in (self.scale, self.zero)))
        return self.format.decode(grouped, parameters).flatten(1).to(dtype)

    def to(self, device: torch.device) -> "QuantizedWeight":
        """Return the same weight on a device."""
        moved = (t.to(device) for t in (self.levels, self.scale, self.zero))
        return QuantizedWeight(*moved, format=self.format)

    def cpu(self) -> "QuantizedWeight":
        """Return the same weight in the host's memory."""
        return self.to(torch.device("cpu"))

    def split(self, rows: Sequence[int]) -> list["QuantizedWeight"]:
        """Cut a stack of weights with common inputs into weights of so many rows each."""
        levels, scale, zero = (t.split(list(rows)) for t in (self.levels, self.scale, self.zero))
        parts = zip(levels, scale, zero, strict=True)
        return [QuantizedWeight(*part, format=self.format) for part in parts]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the stored form: packed levels, scales, and zero where the format has one."""
        stored = {"levels": self.format.pack(self.levels), **self.format.store_scale(self.scale)}
        return stored if self.format.symmetric else {**stored, "zero": self.zero.to(torch.int16)}

    @staticmethod
    def from_tensors(
        stored: Mapping[str, torch.Tensor], format: Format, width: int
    ) -> "QuantizedWeight":
        """Rebuild a weight of `width` inputs from its stored form."""
        levels, scale = format.unpack(stored["levels"], width), format.load_scale(stored)
        zero = torch.zeros_like(scale) if format.symmetric else stored["zero"].to(scale.dtype)
        return QuantizedWeight(levels.to(torch.int16), scale, zero, format)


def set_dequantized(module: nn.Linear | nn.Embedding, weight: QuantizedWeight) -> None:
    """Replace a module's weight by the floats of its quantized form, in its own dtype.

    They are made where the module is: of what they take meanwhile the host has nothing.
    """
    dense = weight.to(module.weight.device).dequantize(module.weight.dtype)
    module.weight = nn.Parameter(dense, requires_grad=False)


def empty_weight(
    linear: nn.Linear | nn.Embedding, dtype: torch.dtype, device: torch.device | None = None
) -> None:
    """Take the memory of a module's weight and leave its shape. device: its own unless named."""
    number = linear.weight.new_zeros((), dtype=dtype, device=device)
    linear.weight = nn.Parameter(number.expand(linear.weight.shape), requires_grad=False)


def dequantize_in_calls(linear: nn.Linear, weight: QuantizedWeight) -> None:
    """Give a module the floats of a quantized weight while it is called, and empty it after."""
    dtype = linear.weight.dtype
    empty_weight(linear, dtype)
    linear.register_forward_pre_hook(
        lambda module, args: set_dequantized(cast(nn.Linear, module), weight)
    )
    linear.register_forward_hook(
        lambda module, args, out: empty_weight(cast(nn.Linear, module), dtype)
    )


class PackedWeights(MutableMapping[str, QuantizedWeight]):
    """Keep weights in their stored form, and take each out of it whenever it is asked for.

    Those of a file are left there, and read then.
    """

    def __init__(self, weights: Mapping[str, QuantizedWeight] | None = None) -> None:
        self._kept: dict[str, Callable[[], Stored]] = {}
        self.update(weights or {})

    @staticmethod
    def load(path: Path) -> "PackedWeights":
        """Read what `save_weights` wrote."""
        found, file = PackedWeights(), safe_open(path, framework="pt")
        keys: dict[str, list[str]] = {}
        for key in file.keys():  # noqa: SIM118
            keys.setdefault(key.rpartition(".")[0], []).append(key)

        def read(name: str, format: list) -> Stored:
            return {key: file.get_tensor(key) for key in keys[name]}, {name: format}

        for name, format in json.loads(file.metadata()["formats"]).items():
            found._kept[name] = partial(read, name, format)
        return found

    def stored(self) -> Stored:
        """Return what `stored_form` does, without a copy of what is packed in memory."""
        tensors: dict[str, torch.Tensor] = {}
        formats: dict[str, list] = {}
        for take in self._kept.values():
            of_one, format = take()
            tensors |= of_one
            formats |= format
        return tensors, formats

    def __getitem__(self, name: str) -> QuantizedWeight:
        return from_stored_form(*self._kept[name]())[name]

    def __setitem__(self, name: str, weight: QuantizedWeight) -> None:
        found = stored_form({name: weight})
        self._kept[name] = lambda: found

    def __delitem__(self, name: str) -> None:
        del self._kept[name]

    def __contains__(self, name: object) -> bool:
        return name in self._kept

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)


def effective_bits(weights: Mapping[str, QuantizedWeight], numbers: Mapping[str, int]) -> float:
    """Return stored bits per weight over named linears, scales and zero points counted.

    numbers: how many weights each linear has; one that is not quantized has 16 bits.
    """
    bits = 16 * sum(count for name, count in numbers.items() if name not in weights)
    stored = (t for n in numbers if n in weights for t in weights[n].tensors().values())
    bits += sum(8 * t.numel() * t.element_size() for t in stored)
    return bits / sum(numbers.values())


def save_weights(weights: Mapping[str, QuantizedWeight], path: Path) -> None:
    """Write named weights, each with a format of its own, into a safetensors file."""
    tensors, formats = stored_form(weights)
    write_tensors(path, tensors, {"formats": formats})


def load_weights(path: Path) -> dict[str, QuantizedWeight]:
    """Read what `save_weights` wrote."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return from_stored_form(tensors, json.loads(file.metadata()["formats"]))


def stored_form(weights: Mapping[str, QuantizedWeight]) -> Stored:
    """Return the tensors of named weights for a file, and each one's format and width for JSON."""
    if isinstance(weights, PackedWeights):
        return weights.stored()
    tensors = {
        f"{name}.{part}": tensor.cpu().contiguous()
        for name, weight in weights.items()
        for part, tensor in weight.tensors().items()
    }
    formats = {
        name: [name_of(w.format), w.format.bits, w.format.symmetric, w.levels.shape[1]]
        for name, w in weights.items()
    }
    return tensors, formats


def from_stored_form(
    tensors: Mapping[str, torch.Tensor], formats: Mapping[str, list]
) -> dict[str, QuantizedWeight]:
    """Rebuild what `stored_form` took apart."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(".")
        parts.setdefault(name, {})[part] = tensor
    return {
        name: QuantizedWeight.from_tensors(parts[name], FORMATS[kind](bits, symmetric), width)
        for name, (kind, bits, symmetric, width) in formats.items()
    }
