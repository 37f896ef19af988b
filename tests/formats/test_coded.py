"""Floats of 6 and 8 bits against tables of all their numbers, ties included, and torch's float8."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from spinlab.config import ClipSearch, TensorQuant
from spinlab.errors import InputError
from spinlab.formats import FORMATS, Parameters, format_of, name_of
from spinlab.formats.clip import search_clip
from spinlab.formats.coded import E2M3, E3M2, E4M3, FP8, MXFP8, CodedFloat
from spinlab.formats.gradient import pull_back
from spinlab.formats.integer import extremes, nearest, settled
from spinlab.formats.minifloat import ScaledFloat
from spinlab.formats.quantizer import StraightThrough, TokenQuantizer
from spinlab.weights.quantized import effective_bits, load_weights, save_weights
from spinlab.weights.rtn import round_to_nearest, rtn
from tests.formats.test_float_groups import around, nearest_even, random

NAMES = [name for name in FORMATS if name.startswith(("mxfp6", "mxfp8", "fp8"))]
# exponent bits, mantissa bits, bias, largest code: as the specification's table has them
WORDS = {E2M3: (2, 3, 1, 31), E3M2: (3, 2, 3, 31), E4M3: (4, 3, 7, 126)}
LARGEST = {E2M3: 7.5, E3M2: 28.0, E4M3: 448.0}
KINDS = list(WORDS)


def plain(kind: type[CodedFloat]) -> CodedFloat:
    return kind(kind.width, True)


def table(kind: type[CodedFloat]) -> tuple[float, ...]:
    """Return the magnitudes by their codes: (1 + m/2^M) 2^(e - bias), or m/2^M 2^(1 - bias)."""
    _, bits, bias, last = WORDS[kind]
    found = []
    for code in range(last + 1):
        exponent, m = code >> bits, code & ((1 << bits) - 1)
        whole = m / 2**bits + (exponent > 0)
        found.append(whole * 2.0 ** (max(exponent, 1) - bias))
    return tuple(found)


def made(name: str) -> ScaledFloat:
    """Return a format of small floats, with the bits that it has."""
    bits = next(n for part, n in (("fp4", 4), ("fp6", 6), ("fp8", 8)) if part in name)
    format = FORMATS[name](bits, True)
    assert isinstance(format, ScaledFloat)
    return format


def settings(name: str, **changes) -> TensorQuant:
    format = made(name)
    given = {"format": name, "bits": format.bits, "symmetric": True, "group_size": format.group}
    return TensorQuant(**{**given, **changes})


def one(dtype: torch.dtype) -> Parameters:
    return Parameters(torch.ones(1, dtype=dtype), torch.zeros(1, dtype=dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_levels_are_the_places_of_all_numbers(kind):
    numbers, format = table(kind), plain(kind)
    assert numbers[-1] == LARGEST[kind] == format.top and format.highest == len(numbers) - 1
    assert list(numbers) == sorted(set(numbers))
    levels = torch.arange(format.lowest, format.highest + 1).double()
    decoded = format.decode(levels, one(torch.float64))
    assert decoded.tolist() == [math.copysign(numbers[abs(int(n))], n) for n in levels]
    for rounding in (nearest, settled):
        assert torch.equal(format.encode(decoded, one(torch.float64), rounding), levels)
    packed = format.pack(levels.to(torch.int16))
    assert torch.equal(format.unpack(packed, len(levels)).double(), levels)
    even = format.pack(torch.zeros(3, 64, dtype=torch.int16))
    assert even.shape == (3, 64 * format.bits // 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_are_rounded_half_to_even(kind, dtype):
    numbers, format = table(kind), plain(kind)
    wild = torch.tensor([format.top * n for n in (1.03, 1.07, 2.0, 1e6)], dtype=dtype)
    x = torch.cat((around(list(numbers), dtype), wild))
    wanted = [nearest_even(v, numbers) for v in x.tolist()]
    for sign in (1, -1):
        levels = format.encode(sign * x, one(dtype), nearest)
        assert format.decode(levels, one(dtype)).tolist() == [sign * v for v in wanted]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_e4m3_agrees_with_torch(dtype):
    format = plain(E4M3)
    codes = torch.arange(127, dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).to(dtype)
    x = torch.cat((around(values.tolist(), dtype), values, -values))
    x = x.clamp(-448, 448)
    levels = format.encode(x, one(dtype), nearest)
    # torch rounds a double by way of float32, which puts a neighbour of a tie on it
    wanted = x.float().to(torch.float8_e4m3fn).to(dtype)
    found = format.decode(levels, one(dtype))
    same = found == wanted
    assert same[x.float().to(dtype) == x].all()
    # and the stored byte is torch's own
    stored = format.pack(format.encode(values, one(dtype), nearest))
    assert torch.equal(stored, codes)
    negative = format.pack(format.encode(-values[1:], one(dtype), nearest))
    assert torch.equal(negative.view(torch.float8_e4m3fn).to(dtype), -values[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_tie_and_neighbour_agrees_with_ml_dtypes(kind):
    oracle = pytest.importorskip("ml_dtypes")
    names = {E2M3: "float6_e2m3fn", E3M2: "float6_e3m2fn", E4M3: "float8_e4m3fn"}
    format, unit = plain(kind), one(torch.float32)
    x = around(list(table(kind)), torch.float32).clamp(max=format.top)
    x = torch.cat((x, -x))
    found = format.decode(format.encode(x, unit, nearest), unit)
    wanted = x.numpy().astype(getattr(oracle, names[kind])).astype("float64")
    assert found.double().tolist() == wanted.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_noise_moves_off_a_tie_are_rounded_as_on_it(kind):
    format, numbers = plain(kind), table(kind)
    ties = torch.tensor([(a + b) / 2 for a, b in pairwise(numbers)])
    wanted = format.encode(ties, one(torch.float32), nearest)
    for noise in (1 - 2**-18, 1, 1 + 2**-18):
        assert torch.equal(format.encode(ties * noise, one(torch.float32), settled), wanted)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "fp8" and not n.endswith("_mse")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_of_mx_follow_their_rule(name, dtype):
    """⌊log2 max|x|⌋ - e, and one more where the rule says so, for all exponents and borders."""
    format = made(name)
    power = math.floor(math.log2(format.top))
    half = (format.top - table(type(format).__mro__[2])[-2]) / 2
    border = 2.0 if name.endswith("_floor") else (format.top + half) / 2.0**power
    borders = torch.tensor([1.0, 1.5, border, 1.75], dtype=dtype)
    inf = torch.full_like(borders, math.inf)
    near = torch.cat((borders, torch.nextafter(borders, inf), torch.nextafter(borders, -inf)))
    for exponent in range(-90, 100):
        peaks = near * 2.0**exponent
        found = format.parameters(-peaks, peaks / 2).scale
        for peak, scale in zip(peaks.tolist(), found.tolist(), strict=True):
            mantissa, place = math.frexp(peak)
            assert scale == 2.0 ** (place - 1 - power + (mantissa * 2 >= border))
    stored = format.store_scale(found.float())["scale"]
    assert stored.dtype == torch.uint8
    assert torch.equal(format.load_scale({"scale": stored}), found.float())


def test_only_what_would_be_rounded_to_the_largest_anyway_is_clipped():
    for name in ("mxfp6_e2m3", "mxfp6_e3m2", "mxfp8"):
        format = made(name)
        peaks = torch.linspace(1, 2, 4001)[:-1, None]
        scale = format.parameters(-peaks, peaks).scale
        levels = format.encode(peaks, Parameters(scale, scale * 0), nearest)
        found = format.decode(levels, Parameters(scale, scale * 0))
        step = 2.0 ** -type(format).mantissa
        assert ((found - peaks).abs() <= step / 2).all()


@pytest.mark.parametrize(
    "names", [(f"{n}_floor", f"{n}_mse") for n in ("mxfp6_e2m3", "mxfp6_e3m2", "mxfp8")]
)
def test_a_format_that_chooses_takes_the_smaller_error(names):
    weight = random(8, 128)
    floor, mse = (round_to_nearest(weight, settings(name), 1.0).dequantize() for name in names)
    errors = [
        (found - weight).double().square().unflatten(1, (-1, 32)).sum(-1) for found in (mse, floor)
    ]
    assert (errors[0] <= errors[1]).all() and errors[0].sum() < errors[1].sum()


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_is_the_definition_in_float64(name):
    weight = random(8, 64)
    found = round_to_nearest(weight, settings(name), 1.0)
    numbers = next(table(kind) for kind in KINDS if issubclass(type(found.format), kind))
    grouped = weight.double().unflatten(1, (found.groups, -1))
    dense = found.dequantize(torch.float64).unflatten(1, (found.groups, -1))
    for row in range(8):
        for group in range(found.groups):
            s = found.scale[row, group].double().item()
            # in float32, where a weight's quotient is rounded
            exact = (grouped[row, group].float() / found.scale[row, group]).tolist()
            wanted = [s * math.copysign(nearest_even(abs(v), numbers), v) for v in exact]
            assert dense[row, group].tolist() == wanted
    assert not found.format.is_int8 and not found.format.is_int4


def test_fp8_scales_the_largest_number_of_a_row_to_448():
    x = random(16, 96)
    found = TokenQuantizer(FP8(8, True)).encode(x)
    assert torch.equal(found.scale.flatten(), x.abs().amax(-1) / torch.full((16,), 448.0))
    assert (found.levels.abs().amax(-1) == 126).all()
    oracle = (x / found.scale.flatten(1)).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    near = TokenQuantizer(FP8(8, True)).decode(found) / found.scale.flatten(1)
    assert ((near - oracle).abs() <= oracle.abs() / 8 + 2**-9).all()  # noise of ties apart
    assert (near.sub(oracle).abs() > oracle.abs() * 1e-6).double().mean() < 0.02


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_stored_and_counted_as_they_are(name, tmp_path: Path):
    weight = random(8, 64)
    weight[3] = 0
    weight[5, :32] = 1e-30
    found = rtn(weight, settings(name), ClipSearch(search=False))
    scale = 32 / 64 if name == "fp8" else 8 / 32
    assert effective_bits({"w": found}, {"w": 512}) == found.format.bits + scale
    save_weights({"w": found}, tmp_path / "w.safetensors")
    loaded = load_weights(tmp_path / "w.safetensors")["w"]
    assert name_of(loaded.format) == name
    assert torch.equal(loaded.levels, found.levels) and torch.equal(loaded.scale, found.scale)
    assert not found.dequantize()[3].any()


@pytest.mark.parametrize("name", NAMES)
def test_tokens_do_not_see_each_other(name):
    quantizer = TokenQuantizer(made(name), made(name).group)
    x = random(6, 64)
    whole = quantizer.round(x)
    assert torch.equal(whole, torch.stack([quantizer.round(row[None])[0] for row in x]))
    assert torch.equal(quantizer.round(x * 8), whole * 8)
    assert torch.equal(quantizer.error(x), whole - x)


@pytest.mark.parametrize("name", NAMES)
def test_a_token_without_numbers_and_one_of_zeros(name):
    x = torch.zeros(3, 32)
    x[1, 3], x[2, 3] = math.nan, math.inf
    found = TokenQuantizer(made(name), made(name).group).round(x)
    assert not found[0].any()
    assert not found[1].isfinite().all() and not found[2].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_clip_search_never_does_worse(name):
    weight, format = random(8, 64), made(name)
    ratios = search_clip(weight, format, format.group, ClipSearch(norm=2.0))
    kept, whole = (round_to_nearest(weight, settings(name), r) for r in (ratios, 1.0))
    errors = [(w.dequantize() - weight).double().square().sum() for w in (kept, whole)]
    assert errors[0] <= errors[1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ratio", [1.0, 0.6])
def test_ranges_learn_by_the_gradient_of_a_scale_that_grows_with_them(name, ratio):
    """Autograd's, of scale times number, with the roundings held fixed."""
    format = made(name)
    x, upstream = (random(6, 32, seed=s, dtype=torch.float64) for s in (3, 4))
    leaf, log = x.clone().requires_grad_(), torch.tensor(ratio).double().log().requires_grad_()
    grouped, lowest, highest = extremes(leaf, 0)
    lowest, highest = lowest * log.exp(), highest * log.exp()
    peak = torch.maximum(highest, -lowest)
    fixed = format.choose(grouped.detach(), lowest.detach(), highest.detach(), None)
    scale = peak * (fixed.scale / peak).detach()
    levels = format.encode(grouped.detach(), fixed, nearest)
    numbers = format.decode(levels, Parameters(torch.ones_like(fixed.scale), fixed.zero))
    exact = grouped / scale
    wide = exact.detach().abs() > format.top
    rounded = torch.where(wide, numbers, StraightThrough.apply(exact, lambda t: numbers.clone()))
    (rounded * scale).flatten(-2).backward(upstream)
    of_x, of_log = pull_back(x, upstream, log.detach().exp(), format, 0, nearest)
    assert torch.allclose(of_x, leaf.grad, atol=1e-12)
    assert torch.allclose(of_log.sum(), log.grad, atol=1e-12)


def test_settings_that_are_no_such_format_are_refused():
    with pytest.raises(InputError, match="fp8 has 8 bits and no zero points: bits=8 symmetric=tr"):
        format_of(settings("fp8", bits=4))
    with pytest.raises(InputError, match="mxfp6_e2m3 has 6 bits and no zero points"):
        format_of(settings("mxfp6_e2m3", symmetric=False))
    with pytest.raises(InputError, match="one scale for 32 numbers: group_size=32, not 0"):
        format_of(settings("mxfp8", group_size=0))
    assert format_of(settings("fp8", group_size=32)) == FP8(8, True) != MXFP8(8, True)
