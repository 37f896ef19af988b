"""Linears of other packages, where they are installed, beside ours on the same inputs.

Each adapter takes a bf16 weight, packs it by the package's own means, and multiplies bf16 inputs.
`peer/<name>/<phase>/<case>` is our time over the peer's, both from bf16 inputs to bf16 outputs with
the same bits of activations; `peer/<name>/linear/…` leaves out the quantization of both.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spinlab.bench.operands import random_floats
from spinlab.bench.products import DECODE, PREFILL, SHAPES, Shape, ours
from spinlab.bench.results import Results
from spinlab.bench.timing import Work, copies_for, measure
from spinlab.formats import IntegerFormat
from spinlab.formats.quantizer import TokenQuantizer
from spinlab.runtime.fused.operations import Operations

_GROUP = 128  # of weight scales, where a package has no scale per output
_CASES = {"decode": (DECODE, SHAPES), "prefill": (PREFILL, SHAPES)}


@dataclass(frozen=True)
class Product:
    """Hold one packed weight: `run` takes (tokens, in) to (tokens, out).

    Where activations are quantized, `quantize` and `multiply` are the two halves of `run`.
    """

    run: Callable[[torch.Tensor], torch.Tensor]
    quantize: Callable[[torch.Tensor], Any] | None = None
    multiply: Callable[[Any], torch.Tensor] | None = None


@dataclass(frozen=True)
class LinearPeer:
    """Name a way to multiply: bits of activations, the maker, the error that its formats allow.

    error: relative, of normal inputs and weights: about 0.1 per 4-bit operand at its best
    """

    bits: int
    make: Callable[[torch.Tensor], Product]
    error: float


def _humming(inputs: str | None) -> Callable[[torch.Tensor], Product]:
    def make(weight: torch.Tensor) -> Product:
        from humming.layer import HummingLayer  # pyright: ignore[reportMissingImports]

        layer = HummingLayer(
            shape_n=weight.shape[0],
            shape_k=weight.shape[1],
            weight_config={"dtype": "int4"},
            input_config=None if inputs is None else {"dtype": inputs},
            torch_dtype=weight.dtype,
        ).to(weight.device)
        layer.load_from_unquantized(weight)
        layer.transform()
        if inputs is None:
            return Product(layer)

        def quantize(x: torch.Tensor) -> Any:
            from humming.forward import may_quant_input  # pyright: ignore[reportMissingImports]

            return may_quant_input(layer.humming_config, x)

        return Product(layer, quantize, lambda pair: layer(pair[0], input_scale=pair[1]))

    return make


def _gemlite_levels(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return 4-bit levels (out, in) uint8, with scale and zero (out·groups, 1) in bf16."""
    grouped = weight.float().unflatten(1, (-1, _GROUP))
    lowest, highest = grouped.aminmax(dim=2, keepdim=True)
    scale = (highest - lowest) / 15
    zero = (-lowest / scale).round()
    levels = (grouped / scale + zero).round().clamp(0, 15).to(torch.uint8).flatten(1)
    scale, zero = (t.reshape(-1, 1).to(weight.dtype) for t in (scale, zero))
    return levels, scale, zero


def _gemlite16(weight: torch.Tensor) -> Product:
    from gemlite.helper import A16W4_HQQ_INT  # pyright: ignore[reportMissingImports]

    maker = A16W4_HQQ_INT(device=str(weight.device), dtype=weight.dtype)
    return Product(maker.from_weights(*_gemlite_levels(weight)))


def _gemlite8(dtype: torch.dtype) -> Callable[[torch.Tensor], Product]:
    def make(weight: torch.Tensor) -> Product:
        from gemlite.helper import A8W4_HQQ_INT_dynamic  # pyright: ignore[reportMissingImports]

        maker = A8W4_HQQ_INT_dynamic(device=str(weight.device), dtype=weight.dtype, fp8=dtype)
        return Product(maker.from_weights(*_gemlite_levels(weight)))

    return make


def _fbgemm16(weight: torch.Tensor) -> Product:
    import fbgemm_gpu.experimental.gen_ai  # pyright: ignore[reportMissingImports]  # noqa: F401
    from fbgemm_gpu.experimental.gen_ai.quantize import (  # pyright: ignore[reportMissingImports]
        quantize_int4_preshuffle,
    )

    packed, scales = quantize_int4_preshuffle(weight, _GROUP, dtype="bf16")
    return Product(lambda x: torch.ops.fbgemm.bf16i4bf16_shuffled(x, packed, *scales))


def _fbgemm8(weight: torch.Tensor) -> Product:
    import fbgemm_gpu.experimental.gen_ai  # pyright: ignore[reportMissingImports]  # noqa: F401
    from fbgemm_gpu.experimental.gemm.triton_gemm.fp8_gemm import (  # pyright: ignore[reportMissingImports]
        quantize_fp8_row,
    )
    from fbgemm_gpu.experimental.gen_ai.quantize import (  # pyright: ignore[reportMissingImports]
        quantize_int4_preshuffle,
    )

    packed, (groups, rows) = quantize_int4_preshuffle(weight, _GROUP)

    def multiply(pair: Any) -> torch.Tensor:
        return torch.ops.fbgemm.f8i4bf16_shuffled(pair[0], packed, pair[1], rows, groups)

    return Product(lambda x: multiply(quantize_fp8_row(x)), quantize_fp8_row, multiply)


def _tinygemm(weight: torch.Tensor) -> Product:
    levels, scale, zero = _gemlite_levels(weight)
    pairs = (levels[:, ::2] << 4) | levels[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    # the kernel's zero is a float, and its level 8 stands for 0
    offset = (8 - zero) * scale
    meta = torch.stack((scale, offset), dim=-1).view(weight.shape[0], -1, 2).transpose(0, 1)
    meta = meta.contiguous()
    return Product(lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, _GROUP, meta))


LINEAR_PEERS: dict[str, LinearPeer] = {
    "torch_tinygemm_w4a16": LinearPeer(16, _tinygemm, 0.2),
    "humming_w4a16": LinearPeer(16, _humming(None), 0.2),
    "humming_w4a8": LinearPeer(8, _humming("int8"), 0.2),
    "humming_w4a4": LinearPeer(4, _humming("int4"), 0.35),
    "gemlite_w4a16": LinearPeer(16, _gemlite16, 0.2),
    "gemlite_w4a8_fp8": LinearPeer(8, _gemlite8(torch.float8_e4m3fn), 0.25),
    "gemlite_w4a8_int8": LinearPeer(8, _gemlite8(torch.int8), 0.25),
    "fbgemm_w4a16": LinearPeer(16, _fbgemm16, 0.2),
    "fbgemm_w4a8_fp8": LinearPeer(8, _fbgemm8, 0.25),
}


def linear_peers(
    operations: Operations,
    device: torch.device,
    names: tuple[str, ...],
    results: Results,
    cases: Mapping[str, tuple[Sequence[int], Sequence[Shape]]] = _CASES,
) -> None:
    """Time the linears whose names begin with one of `names`; cases: phase -> tokens, shapes.

    With 16-bit activations only decode is timed: many tokens are bound by bf16 operations.
    """
    named = {n: p for n, p in LINEAR_PEERS.items() if n.startswith(names)}
    for phase, (counts, shapes) in cases.items():
        chosen = {n: p for n, p in named.items() if phase == "decode" or p.bits < 16}
        for out, width in shapes:
            for tokens in counts:
                generator = torch.Generator(device).manual_seed(5)
                x = random_floats(tokens, width, generator=generator)
                case = (phase, f"{tokens}x{out}x{width}")
                for name, peer in chosen.items():
                    work = _SideBySide(operations, x, out, generator)
                    results.attempt(
                        f"peer/{name}/{'/'.join(case)}",
                        lambda n=name, p=peer, c=case, w=work: w.run(n, p, c, results),
                    )


class _SideBySide:
    """Time one peer and our own kernels on the same inputs x: (tokens, in)."""

    def __init__(
        self, operations: Operations, x: torch.Tensor, out: int, generator: torch.Generator
    ) -> None:
        self.operations, self.x, self.out, self.generator = operations, x, out, generator

    def run(self, name: str, peer: LinearPeer, case: tuple[str, str], results: Results) -> None:
        """Check the peer, time both and keep the ratios; raises what the peer raises."""
        works = self._peer(peer)
        shape = (self.out, self.x.shape[1])
        quantizer = TokenQuantizer(IntegerFormat(min(peer.bits, 8), symmetric=peer.bits == 8))
        mine = ours(self.operations, self.x, shape, self.generator, quantizer)
        pairs = {"peer": "w4a16" if peer.bits == 16 else "ours", "peer_linear": "linear"}
        pairs = {theirs: label for theirs, label in pairs.items() if theirs in works}
        works |= {label: mine[label] for label in pairs.values()}
        timings = measure(works, self.x.device)
        phase, shapes = case
        results.times(f"peer/{name}/{phase}/{shapes}", timings)
        for theirs, label in pairs.items():
            ratio = timings[label].seconds / timings[theirs].seconds
            where = phase if theirs == "peer" else f"linear/{phase}"
            results.add({f"peer/{name}/{where}/{shapes}": ratio})

    def _peer(self, peer: LinearPeer) -> dict[str, list[Work]]:
        width = self.x.shape[1]
        count = copies_for(self.out * width // 2, self.x.device)
        weights = (
            random_floats(self.out, width, generator=self.generator) / width**0.5
            for _ in range(count)
        )
        first = next(weights)
        product = peer.make(first)
        check(product.run(self.x), self.x, first, peer.error)
        products = [product, *(peer.make(weight) for weight in weights)]
        works: dict[str, list[Work]] = {"peer": [lambda p=p: p.run(self.x) for p in products]}
        if product.quantize is not None:
            inputs = product.quantize(self.x)
            works["peer_linear"] = [lambda p=p: _halved(p, inputs) for p in products]
        return works


def _halved(product: Product, inputs: Any) -> torch.Tensor:
    assert product.multiply is not None
    return product.multiply(inputs)


def check(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, error: float) -> None:
    """Raise ValueError where a product is further from x Wᵀ than its formats explain."""
    expected = x.float() @ weight.float().mT
    off = ((found.float() - expected).norm() / expected.norm()).item()
    if not off < error:
        raise ValueError(f"the result is off by {off:.3g}, more than {error}: not timed")
