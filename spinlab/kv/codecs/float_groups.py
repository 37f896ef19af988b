"""Code rows as MXFP4 or NVFP4: codes of E2M1, the scales of groups, and what those need."""

from dataclasses import dataclass
from functools import cached_property

import torch

from spinlab.config import CodecConfig
from spinlab.errors import InputError
from spinlab.formats import FORMATS, NVFP4
from spinlab.formats.gradient import round_by_range
from spinlab.formats.minifloat import GroupFloat, e8m0_of, powers_of
from spinlab.formats.quantizer import Encoded, TokenQuantizer, check_group
from spinlab.kv.base import RowCodec


@dataclass(frozen=True)
class FloatGroupCodec(RowCodec):
    """Code rows of `width` numbers in a format of groups, each row by itself.

    A number takes half a byte and a group's scale one. With a scale of the whole tensor each row
    has one of its own, a power of two, whose exponent is one byte more.
    """

    reads = ("clip_ratio",)
    format: GroupFloat
    width: int
    clip_ratio: float = 1.0

    @classmethod
    def make(
        cls, name: str, settings: CodecConfig, width: int, generator: torch.Generator
    ) -> "FloatGroupCodec":
        """Make the codec of a setting. Raises InputError for other bits and widths."""
        if settings.bits != 4:
            raise InputError(
                f"{name}.bits={settings.bits}: {settings.codec} codes 4 bits; 16 switches it off"
            )
        format = FORMATS[settings.codec](4, True)
        assert isinstance(format, GroupFloat)
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
        return [self.width // 2, self.width // self.format.group, int(self.format.of_tensor)]

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
        levels = (
            self.format.unpack(packed, self.width).to(wide).unflatten(-1, (-1, self.format.group))
        )
        scale = self.format.load_scale(self._scales(groups, row)).to(wide)[..., None]
        return self._quantizer.decode(Encoded(levels, scale, torch.zeros_like(scale))).to(dtype)

    def _pack(self, encoded: Encoded) -> torch.Tensor:
        parts, scale = [self.format.pack(encoded.levels.flatten(-2))], encoded.scale.squeeze(-1)
        if isinstance(self.format, NVFP4):
            stored = self.format.store_scale(scale, scale.amax(-1, keepdim=True))
            parts += [stored["scale"].view(torch.uint8), e8m0_of(stored["tensor_scale"])]
        else:
            parts.append(self.format.store_scale(scale)["scale"])
        return torch.cat(parts, dim=-1)

    def _scales(self, groups: torch.Tensor, row: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what the format loads scales from, of their bytes."""
        if not isinstance(self.format, NVFP4):
            return {"scale": groups}
        # contiguous() would leave odd strides to dimensions of size 1
        groups = groups.clone(memory_format=torch.contiguous_format).view(torch.float8_e4m3fn)
        return {"scale": groups, "tensor_scale": powers_of(row)}
