"""MXFP4 and NVFP4 against tables, torch's own float8 and compressed-tensors, ties included."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from spinlab.compose import composed
from spinlab.config import ClipSearch, TensorQuant
from spinlab.errors import InputError
from spinlab.formats import FORMATS, Parameters, format_of, name_of
from spinlab.formats.clip import search_clip
from spinlab.formats.gradient import pull_back
from spinlab.formats.integer import extremes, nearest, settled
from spinlab.formats.minifloat import (
    codes_of,
    levels_of,
    round_e4m3,
    round_mantissa,
    sum_of_pairs,
)
from spinlab.formats.mxfp4 import MXFP4
from spinlab.formats.nvfp4 import NVFP4
from spinlab.formats.quantizer import StraightThrough, TokenQuantizer
from spinlab.model.load import meta_model
from spinlab.model.modules import map_of
from spinlab.weights.ends import check_ends
from spinlab.weights.layerwise import check_weight_groups
from spinlab.weights.quantized import effective_bits, load_weights, save_weights
from spinlab.weights.rtn import round_to_nearest, rtn

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code, of which 3 bits are magnitude
NAMES = [name for name in FORMATS if "fp4" in name]
ONE = Parameters(torch.tensor([0.5]), torch.tensor([0.0]))  # half the scale 1


def settings(name: str, **changes) -> TensorQuant:
    format = FORMATS[name](4, True)
    return TensorQuant(
        **{"format": name, "bits": 4, "symmetric": True, "group_size": format.group, **changes}
    )


def random(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    """Groups of very different size, with outliers."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64).pow(3)
    return (x * torch.randn(*shape[:-1], 1, generator=g).exp()).to(dtype)


def around(values: list[float], dtype: torch.dtype) -> torch.Tensor:
    """Every value, every midpoint of two neighbours, and what stands next to all of them."""
    middles = [(a + b) / 2 for a, b in pairwise(values)]
    x = torch.tensor([*values, *middles], dtype=dtype)
    inf = torch.full_like(x, math.inf)
    return torch.cat((x, torch.nextafter(x, inf), torch.nextafter(x, -inf).abs()))


def nearest_even(x: float, table: tuple[float, ...]) -> float:
    """Return the nearest entry, of two the one with the even code: the standard's rounding."""
    distances = [(abs(x - value), code % 2, code) for code, value in enumerate(table)]
    return table[min(distances)[2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_are_rounded_to_e2m1_half_to_even(dtype):
    magnitudes = torch.cat((around(list(E2M1), dtype), torch.tensor([7.0, 9.0, 1e3], dtype=dtype)))
    for x in (magnitudes, -magnitudes):
        found = MXFP4(4, True).encode(x, Parameters(*(p.to(dtype) for p in ONE)), nearest) / 2
        wanted = [math.copysign(nearest_even(abs(v), E2M1), v) for v in x.tolist()]
        assert found.tolist() == wanted


def test_ties_go_where_published_kernels_send_them():
    ties = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5.0: 4}
    for rounding in (nearest, settled):
        found = MXFP4(4, True).encode(torch.tensor(list(ties)), ONE, rounding) / 2
        assert found.tolist() == list(ties.values())


def test_inputs_that_noise_moves_off_a_tie_are_rounded_as_on_it():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    for noise in (1 - 2**-18, 1 + 2**-18):
        found = MXFP4(4, True).encode(ties * noise, ONE, settled) / 2
        assert found.tolist() == [0, 1, 1, 2, 2, 4, 4]


def test_e2m1_agrees_with_compressed_tensors():
    reader = pytest.importorskip("compressed_tensors.quantization.quant_args")
    x = around(list(E2M1), torch.float32)
    x = torch.cat((x, -x))
    found = MXFP4(4, True).encode(x, ONE, nearest) / 2
    assert torch.equal(found, reader.FP4_E2M1_DATA.cast_to_fp4(x.clone()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_are_rounded_to_e4m3_as_by_torch(dtype):
    bits = torch.arange(127, dtype=torch.uint8)  # all but the sign and NaN
    table = bits.view(torch.float8_e4m3fn).double()
    assert table[-1] == 448 and (table.diff() > 0).all()
    x = around(table.tolist(), dtype)
    wanted = [nearest_even(v, tuple(table.tolist())) for v in x.tolist()]
    assert round_e4m3(x).tolist() == wanted
    if dtype == torch.float32:
        assert torch.equal(round_e4m3(x), x.clamp(max=448).to(torch.float8_e4m3fn).float())
    assert round_e4m3(torch.tensor([449.0, 1e30], dtype=dtype)).tolist() == [448, 448]
    normal = x[x >= 2**-6]
    assert torch.equal(round_mantissa(normal).clamp(max=448), round_e4m3(normal))
    assert torch.equal(round_mantissa(normal * 2.0**-40), round_mantissa(normal) * 2.0**-40)


@pytest.mark.parametrize(
    ("name", "rule"),
    [("mxfp4_floor", lambda m: m >= 2), ("mxfp4", lambda m: m >= 1.75)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_of_mxfp4_follow_their_rule(name, rule, dtype):
    """⌊log2 max|x|⌋ - 2, and one more where the rule says so, for all exponents and borders."""
    one = torch.tensor(1.0, dtype=dtype)
    borders = torch.stack([one, one * 1.5, one * 1.74, one * 1.75])
    inf = torch.full_like(borders, math.inf)
    near = torch.cat((borders, torch.nextafter(borders, inf), torch.nextafter(borders, -inf)))
    for exponent in range(-90, 100):
        peaks = near * 2.0**exponent
        found = FORMATS[name](4, True).parameters(-peaks, peaks / 2).scale * 2
        for peak, scale in zip(peaks.tolist(), found.tolist(), strict=True):
            mantissa, power = math.frexp(peak)
            assert scale == 2.0 ** (power - 1 - 2 + rule(mantissa * 2))


def test_scales_of_mxfp4_agree_with_compressed_tensors():
    reader = pytest.importorskip("compressed_tensors.quantization.utils.mxfp_utils")
    peaks = random(4096).abs()
    peaks[:4] = torch.tensor([1.74, 1.75, 3.5, 7.0])
    format = MXFP4(4, True)
    stored = format.store_scale(format.parameters(-peaks, peaks).scale)["scale"]
    assert torch.equal(stored.float(), reader.generate_mx_scales(peaks))
    assert (stored[:2].int() - 127).tolist() == [-2, -1]


@pytest.mark.parametrize(
    ("plain", "chooses"), [("mxfp4_floor", "mxfp4_mse"), ("nvfp4", "nvfp4_four_over_six")]
)
def test_a_format_that_chooses_takes_the_smaller_error(plain, chooses):
    weight = random(8, 128)
    errors = {}
    for name in (plain, chooses):
        found = round_to_nearest(weight, settings(name), 1.0).dequantize()
        group = FORMATS[name](4, True).group
        errors[name] = (found - weight).double().square().unflatten(1, (-1, group)).sum(-1)
    if chooses == "mxfp4_mse":  # of NVFP4 the scale of the tensor differs too
        assert (errors[chooses] <= errors[plain]).all()
    assert errors[chooses].sum() < errors[plain].sum()


@pytest.mark.parametrize("width", [1, 2, 5, 12, 16, 33])
def test_errors_are_added_up_in_an_order_that_no_library_sets(width):
    """Neighbours, then neighbouring sums, one float32 after the other."""
    x = random(20, width).abs()
    for row, found in zip(x.numpy(), sum_of_pairs(x), strict=True):
        sums = list(row)
        while len(sums) > 1:
            pairs = [a + b for a, b in zip(sums[::2], sums[1::2], strict=False)]
            sums = pairs + sums[len(sums) - len(sums) % 2 :]
        assert found.item() == sums[0]


def test_the_largest_number_becomes_four_where_that_is_nearer():
    weight = torch.tensor([[4.0, 3.0, 2.0, 1.0, *[0.5] * 12]])
    found = round_to_nearest(weight, settings("nvfp4_four_over_six"), 1.0)
    assert torch.equal(found.dequantize(), weight)
    assert found.levels[0, 0] == 8
    assert not torch.equal(round_to_nearest(weight, settings("nvfp4"), 1.0).dequantize(), weight)


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_is_the_definition_in_float64(name):
    weight = random(16, 128)
    found = round_to_nearest(weight, settings(name), 1.0)
    scale = 2 * found.scale.double()
    grouped = weight.double().unflatten(1, (found.groups, -1))
    for row in range(16):
        for group in range(found.groups):
            s = scale[row, group].item()
            wanted = [math.copysign(nearest_even(abs(v) / s, E2M1), v) for v in grouped[row, group]]
            levels = found.levels[row].view(found.groups, -1)[group] / 2
            assert levels.tolist() == wanted


def test_scales_of_nvfp4_are_those_of_the_definition():
    weight = random(16, 128)
    found = round_to_nearest(weight, settings("nvfp4"), 1.0)
    peaks = weight.abs().unflatten(1, (-1, 16)).amax(-1).double()
    tensor = 2.0 ** math.ceil(math.log2(peaks.max() / (6 * 448)))
    exact = (peaks / 6 / tensor).float()
    wanted = exact.to(torch.float8_e4m3fn).double().clamp(min=2**-9) * tensor
    assert torch.equal(2 * found.scale.double(), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_every_number_and_product_of_groups_is_exact(name):
    """Numbers in bfloat16; products of groups, with their scales, in float32."""
    x, w = (round_to_nearest(random(4, 64, seed=s), settings(name), 1.0) for s in (1, 2))
    assert torch.equal(x.dequantize(), x.dequantize(torch.bfloat16).float())
    a, b = (t.levels.double().unflatten(1, (t.groups, -1)) for t in (x, w))
    sums = torch.einsum("tgi,ogi->tog", a, b)
    scales = x.scale.double()[:, None] * w.scale.double()[None]
    exact = sums * scales
    assert torch.equal(exact.float().double(), exact)
    in_float32 = sums.float() * (x.scale[:, None] * w.scale[None])
    assert torch.equal(in_float32.double(), exact)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_stored_and_counted_as_they_are(name, tmp_path: Path):
    weight = random(8, 64)
    weight[3] = 0
    weight[5, :32] = 1e-30
    found = rtn(weight, settings(name), ClipSearch(search=False))
    bits = {32: 4.25, 16: 4.5 + 32 / 512}[FORMATS[name](4, True).group]
    assert effective_bits({"w": found}, {"w": 512}) == bits
    save_weights({"w": found}, tmp_path / "w.safetensors")
    loaded = load_weights(tmp_path / "w.safetensors")["w"]
    assert name_of(loaded.format) == name
    assert torch.equal(loaded.levels, found.levels) and torch.equal(loaded.scale, found.scale)
    assert not found.dequantize()[3].any()


def test_scales_that_grew_smaller_are_still_stored_exactly():
    """A part of a stack of weights, and groups that were ranged as they were reached."""
    whole = round_to_nearest(random(64, 64), settings("nvfp4"), 1.0)
    for part in whole.split([1] * 64):
        stored = part.tensors()
        assert torch.equal(part.format.load_scale(stored), part.scale)
        assert stored["scale"].float().max() > 224


def test_codes_are_sign_and_magnitude():
    codes = torch.arange(16, dtype=torch.uint8)
    wanted = [2 * v for v in E2M1]
    assert levels_of(codes).tolist() == [*wanted, *(-v for v in wanted)]
    again = codes_of(levels_of(codes))
    assert again.tolist() == [*range(8), 0, *range(9, 16)]  # no zero with a sign
    levels = levels_of(codes).repeat(3, 2)
    format = NVFP4(4, True)
    assert torch.equal(format.unpack(format.pack(levels), 32), levels)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_do_not_see_each_other(name):
    quantizer = TokenQuantizer(FORMATS[name](4, True), FORMATS[name](4, True).group)
    x = random(6, 64)
    whole = quantizer.round(x)
    assert torch.equal(whole, torch.stack([quantizer.round(row[None])[0] for row in x]))
    assert torch.equal(quantizer.round(x * 8), whole * 8)
    assert torch.equal(quantizer.error(x), whole - x)
    levels, scale, zero = quantizer.to_bytes(x)
    assert levels.dtype == torch.uint8 and levels.max() <= 24 and (zero == 12).all()
    assert torch.equal(((levels.int() - zero) * scale).flatten(1), whole)


def test_a_token_without_numbers_and_one_of_zeros():
    x = torch.zeros(3, 32)
    x[1, 3] = math.nan
    x[2, 3] = math.inf
    for name in NAMES:
        found = TokenQuantizer(FORMATS[name](4, True), FORMATS[name](4, True).group).round(x)
        assert not found[0].any()
        assert not found[1].isfinite().all() and not found[2].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_clip_search_never_does_worse(name):
    weight, format = random(16, 64), FORMATS[name](4, True)
    search = ClipSearch(norm=2.0)
    ratios = search_clip(weight, format, format.group, search)
    kept, whole = (round_to_nearest(weight, settings(name), r) for r in (ratios, 1.0))
    errors = [(w.dequantize() - weight).double().square().sum() for w in (kept, whole)]
    assert errors[0] <= errors[1]
    rows, *ends = extremes(weight, format.group)
    for ratio in search.ratios():  # none is better than what the search stopped at
        parameters = format.choose(rows, *(end * ratio for end in ends), None)
        found = format.decode(format.encode(rows, parameters, nearest), parameters)
        best = format.choose(rows, *(end * ratios for end in ends), None)
        least = format.decode(format.encode(rows, best, nearest), best)
        one, other = ((t - rows).square().sum(-1) for t in (found, least))
        assert (other <= one * (1 + 1e-4) + 1e-12).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ratio", [1.0, 0.6])
def test_ranges_learn_by_the_gradient_of_a_scale_that_grows_with_them(name, ratio):
    """Autograd's, of scale times level, with the roundings held fixed."""
    format = FORMATS[name](4, True)
    x, upstream = (random(6, format.group, seed=s, dtype=torch.float64) for s in (3, 4))
    leaf, log = x.clone().requires_grad_(), torch.tensor(ratio).double().log().requires_grad_()
    grouped, lowest, highest = extremes(leaf, 0)
    lowest, highest = lowest * log.exp(), highest * log.exp()
    peak = torch.maximum(highest, -lowest)
    fixed = format.choose(grouped.detach(), lowest.detach(), highest.detach(), None)
    scale = peak * (fixed.scale / peak).detach()
    levels = format.encode(grouped.detach(), fixed, nearest)
    exact = grouped / scale
    wide = exact.detach().abs() > 12  # of 6 scales; up to 7 they are rounded to it
    assert ratio == 1 or (wide & (exact.detach().abs() < 14)).any()
    rounded = torch.where(wide, levels, StraightThrough.apply(exact, lambda t: levels.clone()))
    (rounded * scale).flatten(-2).backward(upstream)
    of_x, of_log = pull_back(x, upstream, log.detach().exp(), format, 0, nearest)
    assert torch.allclose(of_x, leaf.grad, atol=1e-12)
    assert torch.allclose(of_log.sum(), log.grad, atol=1e-12)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_ranges_learn_what_shrinking_them_does_to_the_error(name):
    """Of many groups: the slope of the error between ratios on both sides, for NVFP4 closely.

    A range of .9 that clips the largest number of each group costs more than it gains.
    """
    format = FORMATS[name](4, True)
    x = random(2048, 4 * format.group, dtype=torch.float64)

    def error(log):
        found = TokenQuantizer(format, format.group, math.exp(log)).round_trip(x)
        return ((found - x).square().sum() / x.square().sum()).item()

    for ratio in (0.94, 0.9, 0.8):
        log = torch.tensor(ratio, dtype=torch.float64).log()
        found = TokenQuantizer(format, format.group, ratio).round_trip(x)
        upstream = 2 * (found - x) / x.square().sum()
        _, of_log = pull_back(x, upstream, log.exp(), format, format.group, nearest)
        slope = (error(log + 0.03) - error(log - 0.03)) / 0.06
        near = {"nvfp4": {"rel": 0.1, "abs": 0.01}, "mxfp4": {"abs": 0.025}}[name]
        assert of_log.sum().item() == pytest.approx(slope, **near)
        assert name == "mxfp4" or of_log.sum() < 0


@pytest.mark.parametrize("name", NAMES)
def test_groups_of_zeros_have_gradients(name):
    format = FORMATS[name](4, True)
    x = random(4, 2 * format.group)
    x[1], x[2, : format.group] = 0, 0
    of_x, of_log = pull_back(
        x, torch.ones_like(x), torch.tensor(0.9), format, format.group, nearest
    )
    assert of_x.isfinite().all() and of_log.isfinite().all()
    assert (of_x[1] == 1).all()


def test_settings_that_are_no_such_format_are_refused():
    with pytest.raises(InputError, match="nvfp4 has 4 bits and no zero points"):
        format_of(settings("nvfp4", symmetric=False))
    with pytest.raises(InputError, match="one scale for 32 numbers: group_size=32, not 16"):
        format_of(settings("mxfp4", group_size=16))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["quant.weights.format=fp4"], "quant.weights.format=fp4 is unknown: choose one of"),
        (["quant.weights.format=mxfp4"], "quant.weights.format=mxfp4 has one scale for 32"),
        (["quant.activations.format=nvfp4"], "quant.activations.format=nvfp4: nvfp4 has 4 bits"),
        (["quant.head.bits=4", "quant.head.format=nvfp4"], "quant.head.format=nvfp4 has one"),
        (
            ["quant.overrides=[{pattern: '*.0.*', weights: {format: mxfp4}}]"],
            "quant.overrides[*.0.*].weights.format=mxfp4 has one scale for 32 numbers",
        ),
        (
            ["quant.overrides=[{pattern: '*.o_proj', activations: {group_size: 7}}]"],
            "quant.overrides[*.o_proj].activations.group_size=7 does not divide",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named_by_its_setting(words, said):
    quant = composed("+experiment=toy", "quant.o_proj_per_head=false", *words).quant
    model = meta_model(composed("+experiment=toy").model, None)
    with pytest.raises(InputError) as raised:
        check_weight_groups(map_of(model), quant)
        check_ends(model, quant)
    assert str(raised.value).startswith(said)
