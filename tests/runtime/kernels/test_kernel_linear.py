"""Products with packed weights: kernels against their definition, and that against float64."""

import pytest
import torch
import triton
import triton.language as tl

from spinlab.errors import InputError
from spinlab.formats import IntegerFormat
from spinlab.formats.quantizer import TokenQuantizer
from spinlab.runtime.kernels.formats import PackedWeight, TokenLevels, into_int8, pack_weight
from spinlab.runtime.kernels.launch import GPU
from spinlab.runtime.kernels.linear import launch as gpu
from spinlab.runtime.kernels.linear import reference, triton_decode
from spinlab.weights.quantized import QuantizedWeight


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["by descriptors", "by pointers"])
def loads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Load tiles of many tokens as Hopper does, and as GPUs before it."""
    before_hopper = GPU((8, 6), multiprocessors=2, shared=99 * 1024, shared_by_all=100 * 1024)
    if request.param == "by pointers":
        monkeypatch.setattr(gpu, "gpu_of", lambda device: before_hopper)


def random_weight(out: int, width: int, groups: int, symmetric: bool) -> QuantizedWeight:
    grid = IntegerFormat(4, symmetric)
    levels = torch.randint(grid.lowest, grid.highest + 1, (out, width)).short()
    zero = torch.zeros(out, groups) if symmetric else torch.randint(0, 16, (out, groups)).float()
    return QuantizedWeight(levels, torch.rand(out, groups) + 0.1, zero, grid)


def quantized(x: torch.Tensor, quantizer: TokenQuantizer) -> TokenLevels:
    levels, scale, zero = quantizer.encode(x)
    shift = into_int8(quantizer.format)
    levels = (levels - shift).to(torch.int8)
    sums = levels.sum(-1, dtype=torch.int32)
    zero = (zero - shift).squeeze(-1).int()
    return TokenLevels(levels.flatten(-2), scale.squeeze(-1), zero, sums)


def on(device: torch.device, inputs: TokenLevels, weight: PackedWeight) -> tuple:
    return TokenLevels(*(t.to(device) for t in inputs)), weight.to(device)


# tokens, out, in, groups of weight and input, symmetric weight, bits of the input, bias
CASES = [
    (1, 64, 96, 1, 1, True, 4, False),  # in/2 is no multiple of a tile
    (5, 72, 288, 1, 1, False, 4, True),
    (17, 72, 512, 1, 1, True, 8, True),  # columns split among programs
    (3, 64, 256, 1, 4, True, 4, True),  # inputs in groups
    (4, 40, 256, 4, 1, False, 8, False),  # weights in groups
    (6, 40, 512, 2, 8, False, 4, False),  # both
    (130, 136, 160, 1, 1, False, 4, True),  # many tokens
    (131, 40, 128, 1, 2, True, 8, False),
    (129, 24, 256, 4, 2, False, 4, True),
]


@pytest.mark.usefixtures("loads")
@pytest.mark.parametrize("case", CASES)
def test_linear_equals_its_definition(case: tuple, device: torch.device) -> None:
    tokens, out, width, weight_groups, input_groups, symmetric, bits, with_bias = case
    weight = random_weight(out, width, weight_groups, symmetric)
    quantizer = TokenQuantizer(IntegerFormat(bits, False), width // input_groups)
    inputs = quantized(torch.randn(tokens, width), quantizer)
    bias = torch.randn(out) if with_bias else None
    packed = pack_weight(weight, input_groups)
    expected = reference.linear(inputs, packed, bias, torch.float32)
    placed = on(device, inputs, packed)
    found = gpu.linear(*placed, None if bias is None else bias.to(device), torch.float32).cpu()
    bare = gpu.linear(placed[0]._replace(sums=None), placed[1], None, torch.float32).cpu()
    assert torch.equal(bare, gpu.linear(*placed, None, torch.float32).cpu())
    # a float64 product of what the levels stand for
    grouped = inputs.levels.double().unflatten(1, (input_groups, -1))
    dense = ((grouped - inputs.zero[..., None]) * inputs.scale.double()[..., None]).flatten(1)
    exact = dense @ weight.dequantize(torch.float64).mT
    exact = exact if bias is None else exact + bias
    own = (expected - exact).abs().max()
    assert own <= 1e-6 * exact.abs().max()
    if packed.blocks == 1:
        assert torch.equal(found, expected)  # integers, then the same float operations
    else:
        assert (found - exact).abs().max() <= 2 * own + 1e-7 * exact.abs().max()


@pytest.mark.usefixtures("loads")
@pytest.mark.parametrize("tokens", [1, 20, 130])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_sum_is_that_of_two_tensors(tokens: int, groups: int, dtype, device: torch.device):
    """The product is rounded before it is added: bit for bit what torch adds."""
    weight = pack_weight(random_weight(72, 512, groups, False), 1).to(device)
    added = (100 * torch.randn(tokens, 144).to(device, dtype))[:, ::2]
    x, kept, bias = torch.randn(tokens, 512), added.clone(), torch.randn(72).to(device, dtype)
    inputs = on(device, quantized(x, TokenQuantizer(IntegerFormat(4, False))), weight)[0]
    for take, given in ((gpu.linear, (inputs, weight, bias, dtype)),
                        (gpu.linear16, (x.to(device, dtype), weight, bias))):  # fmt: skip
        assert torch.equal(take(*given, added), added + take(*given))
        assert torch.equal(added, kept)


@pytest.mark.usefixtures("loads")
def test_every_output_is_written_and_none_else(device: torch.device) -> None:
    """Shapes that fill no tile leave what lies behind the result alone."""
    weight = pack_weight(random_weight(40, 96, 1, True), 1)
    for tokens in (1, 3, 130):
        inputs = quantized(torch.randn(tokens, 96), TokenQuantizer(IntegerFormat(4, False)))
        room = torch.full((tokens + 2, 40), float("nan"), device=device)
        real = torch.empty

        def poisoned(*shape, room=room, tokens=tokens, real=real, **options):
            return room[:tokens] if shape == (tokens, 40) else real(*shape, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "empty", poisoned)
            found = gpu.linear(*on(device, inputs, weight), None, torch.float32)
        assert found.data_ptr() == room.data_ptr()
        assert not room[:tokens].isnan().any()
        assert room[tokens:].isnan().all()


def test_repeated_products_leave_their_counters_at_zero(device: torch.device) -> None:
    weight = pack_weight(random_weight(64, 1024, 1, True), 1)
    inputs = quantized(torch.randn(2, 1024), TokenQuantizer(IntegerFormat(4, False)))
    placed = on(device, inputs, weight)
    assert gpu._decode_tile(2, placed[1])["SPLIT"] > 1
    results = [gpu.linear(*placed, None, torch.float32) for _ in range(3)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("groups", "symmetric"), [(1, True), (1, False), (4, False)])
@pytest.mark.parametrize("tokens", [1, 20, 129])
def test_sixteen_bit_inputs_meet_packed_weights(
    dtype: torch.dtype, groups: int, symmetric: bool, tokens: int, device: torch.device
) -> None:
    weight = random_weight(72, 256, groups, symmetric)
    packed = pack_weight(weight, 1)
    x = torch.randn(tokens, 256).to(dtype)
    bias = torch.randn(72).to(dtype)
    exact = x.double() @ weight.dequantize(torch.float64).mT + bias.double()
    own = (reference.linear16(x, packed, bias) - exact).norm() / exact.norm()
    found = gpu.linear16(x.to(device), packed.to(device), bias.to(device)).cpu()
    # many tokens meet a weight rounded to their dtype; float32 sums depend on their order
    own += torch.finfo(dtype).eps if tokens > 128 or dtype == torch.float32 else 0
    if dtype == torch.bfloat16 and device.type == "cpu":
        own *= 2  # the interpreter cuts off where it should round
    assert found.dtype == dtype
    assert (found - exact).norm() / exact.norm() <= 2 * own


@pytest.mark.parametrize(
    ("out", "width", "groups", "word"),
    [(24, 40, 1, "multiples"), (20, 64, 1, "multiples"), (24, 192, 3, None), (24, 96, 3, "power")],
)
def test_shapes_without_a_kernel_are_named(
    out: int, width: int, groups: int, word: str | None
) -> None:
    reason = gpu.why_not(width, out, groups)
    assert (reason is None) == (word is None)
    if word is not None:
        assert word in str(reason)
        weight = pack_weight(random_weight(out, width, 1, True), groups)
        inputs = quantized(torch.randn(2, width), TokenQuantizer(IntegerFormat(4, False)))
        with pytest.raises(InputError, match=word):
            gpu.linear(inputs, weight, None, torch.float32)


@triton.jit
def _lines_kernel(w_ptr, found_ptr, out, at, IN: tl.constexpr, BN: tl.constexpr):
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    line = triton_decode._first_lines(w_ptr, n, out, at, IN)
    tl.store(found_ptr + n, line.to(tl.int64) - w_ptr.to(tl.int64))


def test_lines_that_are_asked_for_lie_in_the_weight(device: torch.device) -> None:
    """Rows behind the last one, and parts behind a row, ask for the last byte there is."""
    out, width, rows = 40, 96, 64
    packed = torch.zeros(out, width // 2, dtype=torch.uint8, device=device)
    for at in (0, 16, 47, 48, 1000):
        found = torch.full((rows,), -1, dtype=torch.int64, device=device)
        _lines_kernel[(rows // 16,)](packed, found, out, at, IN=width, BN=16)
        wanted = [min(n, out - 1) * width // 2 + min(at, width // 2 - 1) for n in range(rows)]
        assert found.tolist() == wanted and max(wanted) < packed.numel()


def test_operands_that_do_not_fit_are_refused() -> None:
    weight = pack_weight(random_weight(24, 256, 1, True), 2)
    inputs = quantized(torch.randn(4, 256), TokenQuantizer(IntegerFormat(4, False), 64))
    with pytest.raises(AssertionError, match="4 groups"):
        gpu.linear(inputs, weight, None, torch.float32)
    with pytest.raises(AssertionError, match="in groups"):
        gpu.linear16(torch.randn(4, 256), weight, None)
    whole = quantized(torch.randn(4, 256), TokenQuantizer(IntegerFormat(4, False), 128))
    with pytest.raises(AssertionError, match="one piece"):
        gpu.linear(TokenLevels(*(t[::2] for t in whole)), weight, None, torch.float32)


def test_no_tokens_give_no_rows(device: torch.device) -> None:
    weight = pack_weight(random_weight(24, 64, 1, True), 1).to(device)
    inputs = quantized(torch.randn(2, 64), TokenQuantizer(IntegerFormat(4, False)))
    none = TokenLevels(*(t[:0].to(device) for t in inputs))
    assert gpu.linear(none, weight, None, torch.bfloat16).shape == (0, 24)
    x = torch.randn(0, 64, dtype=torch.bfloat16, device=device)
    assert gpu.linear16(x, weight, None).shape == (0, 24)
