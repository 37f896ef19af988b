"""Code rows as floats of 4 to 8 bits: codes, the scales of groups, and what those need."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from spinlab.config import CodecConfig
from spinlab.errors import InputError
from spinlab.formats import MXFP4, NVFP4
from spinlab.formats.coded import FP8, MXFP6E2M3, MXFP6E3M2, MXFP8
from spinlab.formats.gradient import round_by_range
from spinlab.formats.microscaling import Microscaled
from spinlab.formats.minifloat import ScaledFloat, e8m0_of, powers_of
from spinlab.formats.pack import packed_bytes
from spinlab.formats.quantizer import Encoded, TokenQuantizer, check_group
from spinlab.kv.base import RowCodec

_FLOAT32 = 4  # bytes
FLOATS: Mapping[str, type[ScaledFloat]] = {
    make.name: make for make in (MXFP4, NVFP4, MXFP6E2M3, MXFP6E3M2, MXFP8, FP8)
}


@dataclass(frozen=True)
class FloatGroupCodec(RowCodec):
    """Code rows of `width` numbers in a format of groups, each row by itself.

    A group's scale takes a byte, and that of a row without groups, as in FP8, four. With a scale of
    the whole tensor each row has one of its own, a power of two, whose exponent is one byte more.
    """

    reads = ("clip_ratio",)
    format: ScaledFloat
    width: int
    clip_ratio: float = 1.0

    @classmethod
    def make(
        cls, name: str, settings: CodecConfig, width: int, generator: torch.Generator
    ) -> "FloatGroupCodec":
        """Make the codec of a setting. Raises InputError for other bits and widths."""
        make = FLOATS[settings.codec]
        if settings.bits != make.width:
            raise InputError(
                f"{name}.bits={settings.bits}: {settings.codec} codes {make.width} bits; 16 "
                "switches it off"
            )
        format = make(make.width, True)
        check_group(f"{name}.codec={settings.codec}: its group", format.group, width, "one head")
        return cls(format, width, settings.clip_ratio)

    @property
    def row_bytes(self) -> int:
        return sum(self._sizes)

    @cached_property
    def _quantizer(self) -> TokenQuantizer:
        return TokenQuantizer(self.format, self.format.group, self.clip_ratio)

    @property
    def _sizes(self) -> list[int]:
        """The bytes of a row's numbers, of the scales of its groups, and of its own."""
        numbers = packed_bytes(self.width, self.format.bits)
        scales = self.width // self.format.group if self.format.group else _FLOAT32
        return [numbers, scales, int(self.format.of_tensor)]

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """Return decode(encode(x)) without the bytes in between: (..., width)."""
        return self._quantizer.round_trip(x)

    def pass_by_range(self, x: torch.Tensor) -> torch.Tensor:
        """Return round(x): (..., width), with the gradient of the format."""
        return round_by_range(x, self._quantizer)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Code x: (..., width) as (..., row_bytes) uint8."""
        return self._pack(self._quantizer.encode(x))

    def encode_and_round(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return encode(x) and what it decodes to, in x's dtype."""
        encoded = self._quantizer.encode(x)
        return self._pack(encoded), self._quantizer.decode(encoded).to(x.dtype)

    def decode(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers (..., width) behind coded rows."""
        packed, groups, row = rows.split(self._sizes, dim=-1)
        wide = torch.promote_types(dtype, torch.float32)
        levels = self.format.unpack(packed, self.width).to(wide)
        levels = levels.unflatten(-1, (-1, self.format.group or self.width))
        scale = self.format.load_scale(self._scales(groups, row)).to(wide)[..., None]
        return self._quantizer.decode(Encoded(levels, scale, torch.zeros_like(scale))).to(dtype)

    def _pack(self, encoded: Encoded) -> torch.Tensor:
        parts, scale = [self.format.pack(encoded.levels.flatten(-2))], encoded.scale.squeeze(-1)
        if isinstance(self.format, NVFP4):
            stored = self.format.store_scale(scale, scale.amax(-1, keepdim=True))
            parts += [stored["scale"].view(torch.uint8), e8m0_of(stored["tensor_scale"])]
        else:
            parts.append(self.format.store_scale(scale)["scale"].view(torch.uint8))
        return torch.cat(parts, dim=-1)

    def _scales(self, groups: torch.Tensor, row: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what the format loads scales from, of their bytes."""
        if isinstance(self.format, Microscaled):
            return {"scale": groups}
        # contiguous() would leave odd strides to dimensions of size 1
        groups = groups.clone(memory_format=torch.contiguous_format)
        if not self.format.of_tensor:
            return {"scale": groups.view(torch.float32)}
        return {"scale": groups.view(torch.float8_e4m3fn), "tensor_scale": powers_of(row)}
