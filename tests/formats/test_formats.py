"""A second number format is one class and one entry of a table: nothing else knows of it."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import spinlab.formats
from spinlab.compose import composed
from spinlab.config import ClipSearch, TensorQuant
from spinlab.config.quant import CALIBRATED
from spinlab.errors import InputError
from spinlab.formats import Format, Parameters, format_of
from spinlab.formats.base import Pulled, Rounding
from spinlab.formats.gradient import pull_back, round_in_range
from spinlab.formats.integer import extremes, nearest, settled
from spinlab.formats.quantizer import StraightThrough, TokenQuantizer
from spinlab.stages.pipeline import Pipeline
from spinlab.stages.preflight import preflight
from spinlab.weights.quantized import effective_bits, load_weights, save_weights
from spinlab.weights.rtn import rtn

HALF = (0.5, 1, 1.5, 2, 3, 4, 6)  # what a float of 2 bits of exponent and 1 of mantissa can be
NUMBERS = torch.tensor([*(-n for n in reversed(HALF)), 0, *HALF], dtype=torch.float64)
SETTINGS = TensorQuant(format="float4", bits=4, symmetric=True, group_size=32)


@dataclass(frozen=True)
class Float4(Format):
    """Code numbers as 4-bit floats times a power of two: levels are places in `NUMBERS`."""

    bits: int
    symmetric: bool

    def __post_init__(self) -> None:
        if (self.bits, self.symmetric) != (4, True):
            raise InputError("float4 has 4 bits and no zero points: bits=4 symmetric=true")

    @property
    def lowest(self) -> int:
        return 0

    def parameters(self, lowest: torch.Tensor, highest: torch.Tensor) -> Parameters:
        scale = (torch.maximum(highest, -lowest) / 6).clamp(min=2.0**-100).log2().ceil().exp2()
        return Parameters(scale, torch.zeros_like(scale))

    def encode(self, x: torch.Tensor, parameters: Parameters, rounding: Rounding) -> torch.Tensor:
        between = ((NUMBERS[1:] + NUMBERS[:-1]) / 2).to(x)
        return torch.bucketize(x / parameters.scale, between).to(x.dtype)

    def decode(self, levels: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        return NUMBERS.to(levels)[levels.long()] * parameters.scale

    def pull_back(
        self,
        x: torch.Tensor,
        gradient: torch.Tensor,
        lowest: torch.Tensor,
        highest: torch.Tensor,
        rounding: Rounding,
    ) -> Pulled:
        """Take the rounding of a scale to a power of two for a factor that stays as it is."""
        parameters = self.parameters(lowest, highest)
        exact = x / parameters.scale
        found = self.decode(self.encode(x, parameters, rounding), parameters) / parameters.scale
        inside = exact.abs() <= 6
        of_scale = (gradient * (found - exact * inside)).sum(-1, keepdim=True)
        peak = torch.maximum(highest, -lowest)
        of_peak, up = of_scale * parameters.scale / peak, highest >= -lowest
        return Pulled(gradient * inside, -of_peak * ~up, of_peak * up)

    def bounds(self, parameters: Parameters) -> tuple[torch.Tensor, torch.Tensor]:
        return -6 * parameters.scale, 6 * parameters.scale


@pytest.fixture(autouse=True)
def float4(monkeypatch):
    monkeypatch.setitem(spinlab.formats.FORMATS, "float4", Float4)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_settings_name_a_format_and_it_refuses_what_it_is_not():
    assert format_of(SETTINGS) == Float4(4, True)
    with pytest.raises(
        InputError, match=r"format=float5 is unknown: choose one of integer, .*float4"
    ):
        format_of(TensorQuant(format="float5"))
    with pytest.raises(InputError, match="float4 has 4 bits"):
        format_of(TensorQuant(format="float4", bits=3))


def test_tokens_go_to_the_nearest_number_of_the_format():
    x = random(5, 64)
    found = TokenQuantizer(Float4(4, True), 32).round(x)
    grouped = x.unflatten(1, (2, 32))
    scale = 2 ** torch.ceil(torch.log2(grouped.abs().amax(-1, keepdim=True) / 6))
    wanted = (grouped[..., None] - scale[..., None] * NUMBERS).abs().amin(-1)
    assert torch.allclose((found - x).abs().unflatten(1, (2, 32)), wanted, atol=1e-12)


def test_weights_are_rounded_searched_stored_and_counted(tmp_path: Path):
    weight = random(8, 64).float()
    found = rtn(weight, SETTINGS, ClipSearch())
    plain = rtn(weight, SETTINGS, ClipSearch(search=False))
    errors = [(w.dequantize() - weight).abs().pow(2.4).sum() for w in (found, plain)]
    assert errors[0] <= errors[1]
    assert effective_bits({"w": found}, {"w": 512}) == 4 + 32 / 32
    save_weights({"w": found}, tmp_path / "w.safetensors")
    loaded = load_weights(tmp_path / "w.safetensors")["w"]
    assert loaded.format == Float4(4, True)
    assert torch.equal(loaded.dequantize(), found.dequantize())


@pytest.mark.parametrize("ratio", [1.0, 0.6])
def test_the_range_of_a_format_learns_by_the_gradient_that_it_brings(ratio):
    """Autograd's, of scale times the number, with the power of two's rounding held fixed."""
    x, upstream = random(6, 32), random(6, 32, seed=1)
    leaf, log = x.clone().requires_grad_(), torch.tensor(ratio).double().log().requires_grad_()
    peak = extremes(leaf, 0)[0].abs().amax(-1) * log.exp()
    scale = peak * (Float4(4, True).parameters(-peak, peak).scale / peak).detach()
    exact = leaf / scale
    rounding = lambda t: NUMBERS[torch.bucketize(t, (NUMBERS[1:] + NUMBERS[:-1]) / 2)]  # noqa: E731
    number = torch.where(exact.abs() <= 6, StraightThrough.apply(exact, rounding), 6 * exact.sign())
    (number * scale).backward(upstream)
    fixed = log.detach()
    of_x, of_log = pull_back(x, upstream, fixed.exp(), Float4(4, True), 0, nearest)
    assert torch.allclose(of_x, leaf.grad, atol=1e-12)
    assert torch.allclose(of_log.sum(), log.grad, atol=1e-12)
    again = x.clone().requires_grad_()
    round_in_range(again, fixed, Float4(4, True)).backward(upstream)
    assert torch.equal(
        again.grad, pull_back(x, upstream, fixed.exp(), Float4(4, True), 0, settled)[0]
    )


@pytest.mark.usefixtures("toy_cache")
def test_the_whole_pipeline_takes_it(tmp_path: Path):
    """Learned with rounded weights and learned ranges; integer kernels leave it to floats."""
    changes = [
        f"quant.{name}.{setting}"
        for name in ("weights", "activations")
        for setting in ("format=float4", "symmetric=true", "group_size=8")
    ]
    small = ["learn.steps=2", "learn.optimizer.warmup=0", "learn.batch=1", "learn.micro_batch=1"]
    small += ["learn.sequence_length=64", "eval.max_windows=1", "eval.tasks=[]"]
    learned = ["+method=learned_ranges", "learn.lr.input_clip=0.01"]
    paths = [f"paths.cache={tmp_path / 'cache'}", f"paths.runs={tmp_path / 'runs'}"]
    run = Pipeline(composed("+experiment=toy", *learned, *changes, *small, *paths))
    preflight(run)
    assert run.handoff_error("integer") < 1e-9
    found = run.measure("fp") | run.measure("fake")
    assert found["ppl/wiki/fp"] < found["ppl/wiki/fake"] < 3 * found["ppl/wiki/fp"]


@pytest.mark.parametrize("name", sorted({*spinlab.formats.FORMATS, "float4"} - {CALIBRATED}))
def test_formats_that_say_so_round_a_multiple_to_the_multiple(name, monkeypatch):
    """But for levels that rounding of the multiple itself flips."""
    monkeypatch.setitem(spinlab.formats.FORMATS, "float4", Float4)
    bits = {"mxfp6": 6, "mxfp8": 8, "fp8": 8}.get(name.partition("_")[0], 4)
    format = spinlab.formats.FORMATS[name](bits, True)
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    quantizer = TokenQuantizer(format, format.group or 32, 1.0)
    multiples = [quantizer.round(factor * x) / factor for factor in (1.0, 1.37, 0.71)]
    same = [torch.isclose(multiples[0], other).double().mean() for other in multiples[1:]]
    assert (min(same) > 0.999) == format.homogeneous
