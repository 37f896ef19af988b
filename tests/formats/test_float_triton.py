"""The kernels of small floats against their definition, on a GPU or in the interpreter."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spinlab.formats import FORMATS, Parameters
from spinlab.formats import float_triton as fused
from spinlab.formats.gradient import pull_back, round_in_range
from spinlab.formats.integer import nearest, settled
from spinlab.formats.minifloat import ScaledFloat
from spinlab.formats.nvfp4 import NVFP4
from spinlab.formats.quantizer import Encoded, TokenQuantizer
from spinlab.formats.twins import TWINS, Twin
from tests.formats.test_coded import made
from tests.formats.test_float_groups import random

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = [name for name in FORMATS if name != "integer"]
FOUR_BITS = [name for name in NAMES if "fp4" in name]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _in_one_program(monkeypatch):
    """Let programs hold more where each takes the interpreter long, and NumPy say less of NaN."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(fused, "_TILE", 1 << 12)
    with np.errstate(all="ignore"):
        yield


def tokens(width: int, format: ScaledFloat, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return (12, width): what is hard for scales, ties, and numbers that are none."""
    g, finfo = torch.Generator().manual_seed(seed), torch.finfo(dtype)
    x = random(12, width, seed=seed, dtype=torch.float64)
    x[0] = 0
    # the interpreter reads no subnormal numbers of bfloat16
    least = finfo.tiny / 16 if dtype != torch.bfloat16 or DEVICE.type == "cuda" else finfo.tiny
    for row, largest in ((1, least), (2, finfo.tiny * 300), (3, finfo.max)):
        x[row] *= largest / x[row].abs().max()
    # numbers, midpoints and what lies next to them, around scales of 1, and of 1/8 in one half
    noise = 1 + torch.randn(width, generator=g, dtype=torch.float64) * 2.0**-16
    x[4] = torch.randint(-32, 33, (width,), generator=g) / 4 * noise
    x[5] = (torch.randint(-32, 33, (width,), generator=g) / 4).clamp(-6, 6)
    x[4:6, ::16] = format.top / format.unit
    x[4:6, width // 2 :] /= 8
    x[6, :3] = torch.tensor([math.nan, 1, -math.inf])
    x[7, -1] = math.nan
    x[8, width // 2] = -math.inf
    x[9] *= 2.0 ** torch.linspace(-14, 14, width, dtype=torch.float64)
    x[9, : width // 4] = 0
    most = 16 * (format.most if isinstance(format, NVFP4) else 2688)  # of a power of two, exactly
    x[9] = x[9].clamp(-most, most)
    x[9, -1] = most
    x[10] = 3 * torch.randn(width, generator=g).sign()
    # peaks where one rule for powers of two or another takes the next
    borders = torch.tensor([1.75, 1.9375, 1.875, 1.8125, 1.0, 1.5], dtype=torch.float64)
    x[11] = torch.rand(width, generator=g).clamp(max=0.9)
    x[11, ::8] = borders[torch.arange(len(x[11, ::8])) % 6] * (1 - finfo.eps * (seed % 2))
    return x.to(dtype)


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Tell whether two tensors have the same bits; one NaN is as good as another."""
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    whole = torch.int32 if found.dtype.itemsize == 4 else torch.int16
    bits = [t.cpu().masked_fill(t.cpu().isnan(), math.nan).view(whole) for t in (found, wanted)]
    return torch.equal(*bits)


def defined(quantizer: TokenQuantizer, x: torch.Tensor) -> torch.Tensor:
    """Return what goes back from levels, in float32, on the CPU."""
    return quantizer.decode(quantizer.encode(x))


def peaks(format: ScaledFloat) -> tuple[float | None, ...]:
    return (None, 5.0) if format.of_tensor else (None,)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in NAMES)]
    + [(name, dtype) for name in ("mxfp4", "nvfp4", "fp8") for dtype in DTYPES[1:]],
    ids=str,
)
def test_rounded_numbers_have_the_bits_of_the_definition(name, dtype):
    format, inexact = made(name), dtype == torch.bfloat16 and DEVICE.type == "cpu"
    x = tokens(128, format, dtype)
    for peak in peaks(format):
        given = (x.to(DEVICE), format, format.group)
        wanted = defined(TokenQuantizer(format, format.group, 1.0, peak), x)
        if not (inexact and name == "fp8"):  # the interpreter does not round to bfloat16 to even
            assert same(fused.round_rows(*given, 1.0, peak=peak), wanted.to(dtype))
    if not inexact:
        wanted = defined(TokenQuantizer(format, format.group, 0.77), x)
        found = fused.round_rows(*given, 0.77, error=True)
        assert same(found, wanted.sub(x).to(dtype))


@pytest.mark.parametrize("name", ["mxfp4_mse", "nvfp4_four_over_six", "fp8"])
def test_groups_and_tokens_may_have_any_width(name):
    """Groups that fill no power of two, tokens of many pieces or of a part of one."""
    format = made(name)
    for width, group in ((144, 16), (72, 24), (35, 0), (3, 1)):
        x = tokens(48 * width, format, torch.float32, seed=1).view(12, 48, width)[:, :2]
        wanted = defined(TokenQuantizer(format, group, 0.9), x)
        ratio = torch.tensor(0.9, device=DEVICE)
        assert same(fused.round_rows(x.to(DEVICE), format, group, ratio), wanted)
    assert fused.round_rows(x[:0].to(DEVICE), format, group, 1.0).shape == (0, 2, 3)


@pytest.mark.parametrize("name", ["mxfp4_mse", "nvfp4", "fp8"])
def test_how_numbers_are_dealt_to_programs_changes_nothing(name, monkeypatch):
    """What does not lie in a row, too."""
    format = made(name)
    x = tokens(96, format, torch.float32)[:5].T.contiguous().T.to(DEVICE)
    whole = fused.round_rows(x, format, format.group, 0.8)
    monkeypatch.setattr(fused, "_TILE", 64)
    tile = fused.tile_of(x, format, format.group)
    assert tile.step < 5 and (tile.many < tile.count or tile.count == 1)
    assert same(fused.round_rows(x, format, format.group, 0.8), whole)


def test_scales_whose_errors_all_but_tie_are_chosen_from_by_the_definitions_sums():
    """Of scales 1 and 2. The last number makes up for what the smaller is better at in others."""
    format, x = (
        made("mxfp4_mse"),
        4 * torch.rand(200, 32, generator=torch.Generator().manual_seed(0)),
    )
    x -= 2

    def squares(x: torch.Tensor, scale: float) -> torch.Tensor:
        parameters = Parameters(torch.tensor(scale / format.unit), torch.zeros(1))
        levels = format.encode(x, parameters, nearest)
        return format.decode(levels, parameters).sub(x).square()

    fine, coarse = (squares(x.double(), scale)[:, :31].sum(1) for scale in (1.0, 2.0))
    x[:, 31] = 7 + (coarse - fine) / 4  # off by x - 6 or by 8 - x
    assert (x[:, 31] < 8).all()
    wanted = defined(TokenQuantizer(format, 32), x)
    assert same(fused.round_rows(x.to(DEVICE), format, 32, 1.0), wanted)
    # any other order chooses differently for some
    fine, coarse = (squares(x, scale).flip(1).cumsum(1)[:, -1] for scale in (1.0, 2.0))
    assert not torch.equal(coarse < fine, wanted[:, 31] == 8)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from(NAMES),
    st.lists(st.floats(width=32), min_size=64, max_size=64),
    st.sampled_from([1.0, 0.61, 0.5]),
)
def test_any_numbers_are_rounded_as_by_the_definition(name, numbers, ratio):
    format, x = made(name), torch.tensor([numbers], dtype=torch.float32)
    wanted = defined(TokenQuantizer(format, format.group, ratio), x)
    with np.errstate(all="ignore"):
        found = fused.round_rows(x.to(DEVICE), format, format.group, ratio)
    assert same(found, wanted)


@pytest.mark.parametrize("name", FOUR_BITS)
def test_levels_are_those_of_the_definition(name):
    format = made(name)
    x = tokens(128, format, torch.float32).view(3, 4, 128)
    for ratio, peak in ((1.0, None), *((torch.tensor(0.77), peak) for peak in peaks(format))):
        wanted = TokenQuantizer(format, format.group, ratio, peak).to_bytes(x)
        given = ratio.to(DEVICE) if isinstance(ratio, torch.Tensor) else ratio
        found = fused.encode_rows(x.to(DEVICE), format, format.group, given, peak=peak)
        levels, scale, zero = (t.cpu() for t in found)
        assert same(scale, wanted.scale)
        assert zero.dtype == wanted.zero.dtype and torch.equal(zero, wanted.zero)
        known = ~scale.isnan().expand_as(levels)  # others have no levels
        assert 0 < known.sum() < known.numel()
        assert levels.dtype == torch.uint8 and levels.shape == wanted.levels.shape
        assert torch.equal(levels[known], wanted.levels[known])


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_definition(name):
    format, ratio = made(name), torch.tensor(0.6)
    x, upstream = random(2, 5, 96, seed=2), random(2, 5, 96, seed=3)
    x[0, 0], x[0, 1], x[0, 2] = 0, x[0, 1].abs(), -x[0, 2].abs()
    x[0, 3] = x[0, 3].sign()  # many share an extreme
    x[0, 4] *= 1e-6
    wanted = pull_back(x, upstream, ratio, format, format.group, settled)
    given = (t.to(DEVICE) for t in (x, upstream, ratio))
    of_x, of_log = fused.pull_back_rows(*given, format, format.group)
    assert torch.allclose(of_x.cpu(), wanted[0], rtol=1e-5, atol=1e-5)
    assert abs(of_log.sum().cpu() - wanted[1].sum()) < 1e-5 * wanted[1].abs().sum()


OPERATIONS = ("round_rows", "encode_rows", "pull_back_rows")


def counted(twin: Twin, calls: list[str]) -> Twin:
    """Return a twin that takes everything and keeps the names of its operations as they run."""

    def kept(name, work):
        def run(*args, **changes):
            calls.append(name)
            return work(*args, **changes)

        return run

    works = {name: work for name in OPERATIONS if (work := getattr(twin, name)) is not None}
    works = {name: kept(name, work) for name, work in works.items()}
    return replace(twin, takes=lambda x: True, **works)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "nvfp4_calibrated", "mxfp6_e2m3", "fp8"])
def test_a_quantizer_takes_its_formats_kernels_and_tells_them_of_a_peak(name, monkeypatch):
    """The table's entry for CUDA, on whatever device this is."""
    format, calls = made(name), []
    entry = TWINS[type(format), "cuda"]
    assert (entry.encode_rows is not None) == format.is_int8
    x, log = random(6, 64).to(DEVICE), torch.tensor(0.8, device=DEVICE).log().requires_grad_()
    quantizer = TokenQuantizer(format, format.group, 0.9, x.abs().max().item() / 2)
    wanted = defined(quantizer, x)
    twins = {(type(format), DEVICE.type): counted(entry, calls)}
    monkeypatch.setattr("spinlab.formats.twins.TWINS", twins)
    assert same(quantizer.round(x), wanted) and same(quantizer.error(x), wanted - x)
    if format.is_int8:
        levels, scale, zero = quantizer.to_bytes(x)
        whole = quantizer.decode(Encoded(levels.float() - zero, scale, torch.zeros_like(scale)))
        assert torch.equal(whole, wanted)
    round_in_range(x, log, format, format.group).sum().backward()
    assert log.grad is not None and log.grad.isfinite()
    assert set(calls) == {name for name in OPERATIONS if getattr(entry, name) is not None}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((300, 576), torch.bfloat16), ((40, 14336), torch.float32), ((7, 5, 96), torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("name", [*FOUR_BITS, "mxfp6_e2m3", "mxfp8", "fp8"])
def test_on_a_gpu_whole_inputs_have_the_bits_of_the_definition(name, shape, dtype):
    """Those of the definition on the CPU, and on the GPU as well."""
    format = made(name)
    x, upstream = (random(*shape, seed=seed, dtype=dtype).cuda() for seed in (0, 1))
    for peak in peaks(format):
        quantizer = TokenQuantizer(format, format.group, 0.9, peak)
        wanted = defined(quantizer, x.cpu()).to(dtype)
        assert same(quantizer.round_trip(x), wanted)
        assert same(defined(quantizer, x).to(dtype), wanted)
        if format.is_int8:
            for ours, theirs in zip(
                quantizer.to_bytes(x), quantizer.to_bytes(x.cpu()), strict=True
            ):
                assert torch.equal(ours.cpu(), theirs)
    ratio = torch.tensor(0.9, device="cuda")
    found = fused.pull_back_rows(x, upstream, ratio, format, format.group)
    wanted = pull_back(x, upstream, ratio, format, format.group, settled)
    # sums differ by their order: by so much of what is added up
    size = upstream.float().abs().unflatten(-1, (-1, format.group or shape[-1]))
    slack = 1e-5 * size.sum(-1, keepdim=True).expand_as(size).flatten(-2)
    near = (found[0] - wanted[0]).abs() <= 2 * torch.finfo(dtype).eps * wanted[0].abs() + slack
    assert near.all()
    assert (found[1].sum() - wanted[1].sum()).abs() <= 1e-5 * wanted[1].abs().sum()
