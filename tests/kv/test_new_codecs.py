"""A codec is one class and one line in CODECS: one with a seeded tensor, one of runs of tokens."""

import math
from dataclasses import dataclass

import pytest
import torch

from spinlab.compose import composed
from spinlab.config import CodecConfig, KVConfig
from spinlab.errors import InputError
from spinlab.formats import IntegerFormat
from spinlab.formats.quantizer import check_group
from spinlab.kv.base import OwnTensor, RowCodec
from spinlab.kv.cache import CodedCache, attach_kv
from spinlab.kv.codecs import CODECS, make_codec
from spinlab.kv.codecs.affine import AffineCodec
from spinlab.kv.path import kv_path
from spinlab.rotation.orthogonal import random_orthogonal
from spinlab.stages.pipeline import Pipeline
from spinlab.stages.preflight import preflight


@dataclass(frozen=True, eq=False)
class Signs(RowCodec):
    """One bit per number of a randomly rotated head, and its norm in float16."""

    width: int
    rotation: OwnTensor

    @classmethod
    def make(cls, name, settings, width, generator):
        if settings.bits != 1:
            raise InputError(f"{name}.bits={settings.bits}: signs take 1 bit")
        return cls(width, OwnTensor(random_orthogonal(width, generator)))

    @property
    def row_bytes(self):
        return self.width // 8 + 2

    def encode(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        norm = wide.norm(dim=-1, keepdim=True).half().contiguous().view(torch.uint8)
        bits = (wide @ self.rotation.like(x) > 0).unflatten(-1, (-1, 8))
        powers = 1 << torch.arange(8, device=x.device)
        return torch.cat(((bits * powers).sum(-1).to(torch.uint8), norm), -1)

    def decode(self, rows, dtype):
        places = torch.arange(8, device=rows.device)
        signs = (rows[..., :-2, None] >> places & 1).flatten(-2) * 2 - 1
        norm = rows[..., -2:].clone(memory_format=torch.contiguous_format).view(torch.float16)
        x = signs.to(dtype) * norm.to(dtype) * math.sqrt(2 / math.pi / self.width)
        return (x @ self.rotation.like(x).mT).to(dtype)


@dataclass(frozen=True)
class Channels(RowCodec):
    """Numbers per channel over a run of tokens, as KIVI has keys."""

    reads = ("symmetric", "group_size", "run")
    codec: AffineCodec  # of one channel's run
    width: int

    @classmethod
    def make(cls, name, settings, width, generator):
        run, group = settings.run, settings.group_size
        check_group(f"{name}.group_size", group, run, f"a run of {run} tokens")
        grid = IntegerFormat(settings.bits, settings.symmetric)
        return cls(AffineCodec(grid, run, group or run), width)

    @property
    def run(self):
        return self.codec.width

    @property
    def row_bytes(self):
        return self.width * self.codec.row_bytes

    def encode(self, x):
        return self.codec.encode(x.unflatten(-2, (-1, self.run)).mT).flatten(-2)

    def decode(self, rows, dtype):
        return self.codec.decode(rows.unflatten(-1, (self.width, -1)), dtype).mT.flatten(-3, -2)


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    monkeypatch.setitem(CODECS, "signs", Signs)
    monkeypatch.setitem(CODECS, "channels", Channels)


def pipeline(folder, *overrides):
    settings = ["+experiment=toy", "eval.tasks=[]", "eval.max_windows=2", *overrides]
    paths = f"paths.cache={folder / 'cache'}"
    return Pipeline(composed(*settings, paths))


SIGNS = ["kv.keys.codec=signs", "kv.keys.bits=1"]
CHANNELS = ["kv.keys.codec=channels", "kv.keys.bits=3", "kv.keys.group_size=16"]


@pytest.mark.parametrize(
    ("settings", "bits"), [(SIGNS, 1 + 16 / 16), (CHANNELS, 3 + 24 / 16)], ids=["tokens", "runs"]
)
@pytest.mark.usefixtures("toy_cache")
def test_a_new_codec_runs_the_toy_and_says_its_bits(tmp_path, settings, bits):
    """Learned through, emulated and stored; `fake` and `integer` are one function."""
    run = pipeline(tmp_path, *settings, "learn.steps=2", "eval.variants=[fake,integer]")
    preflight(run, settings)
    fake, integer = (run.measure(variant) for variant in ("fake", "integer"))
    on_a_gpu = torch.cuda.is_available()  # sums of products in another order
    same = pytest.approx(fake["ppl/wiki/fake"], rel=1e-6 if on_a_gpu else 0, abs=0)
    assert integer["ppl/wiki/integer"] == same
    assert fake["ppl/wiki/fake"] < 100  # of 256 bytes
    assert fake["bits/kv/fake"] == integer["bits/kv/integer"] == (bits + 4 + 24 / 16) / 2
    assert run.handoff_error("integer") < 1e-9


def test_what_a_codec_draws_comes_from_the_seed_and_the_side():
    settings = CodecConfig(bits=1, codec="signs")
    first, again, other, values = (
        make_codec(name, settings, 16, seed)
        for name, seed in (("kv.keys", 0), ("kv.keys", 0), ("kv.keys", 1), ("kv.values", 0))
    )
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first.encode(x), again.encode(x))
    assert not torch.equal(first.encode(x), other.encode(x))
    assert not torch.equal(first.encode(x), values.encode(x))
    assert first == first and first != again and len({first, again}) == 2


def test_a_tensor_moves_to_a_device_and_dtype_once():
    own = OwnTensor(torch.eye(3, dtype=torch.float64))
    wide, narrow = own.like(torch.zeros(1)), own.like(torch.zeros(1, dtype=torch.bfloat16))
    assert wide.dtype == torch.float32 and narrow is wide
    assert own.like(torch.zeros(1, dtype=torch.float64)) is own.like(own.like(wide).double())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["kv.keys.codec=signs"], "kv.keys.bits=4: signs take 1 bit"),
        ([*SIGNS, "kv.keys.clip_ratio=0.9"], "kv.keys.clip_ratio is not read with kv.keys.codec"),
        (["kv.queries.codec=channels", "kv.queries.bits=4"], "channels codes runs of tokens, and"),
        (["kv.keys.codec=sings"], "kv.keys.codec=sings is unknown: choose one of affine, "),
        (["kv.keys.codec=affine", "kv.keys.bits=1"], "an affine grid codes 2 to 8 bits"),
    ],
    ids=str,
)
def test_what_a_codec_does_not_take_is_refused_before_the_first_stage(tmp_path, overrides, words):
    with pytest.raises(InputError, match=words):
        preflight(pipeline(tmp_path, "learn=none", *overrides), overrides)
    assert not list(tmp_path.glob("cache/*"))


def test_the_fused_runtime_refuses_runs_of_tokens(tmp_path):
    run = pipeline(tmp_path, *CHANNELS, "learn=none", "runtime.device=cpu")
    run.run.backend = "triton"  # as on a machine that has it
    with pytest.raises(InputError, match=r"codes runs of tokens.* use runtime.backend=torch"):
        preflight(run)


def channels(model):
    keys = CodecConfig(bits=4, run=4, codec="channels")
    path = kv_path(KVConfig(keys), 8)
    attach_kv(model, path, store=True)
    return path


def test_runs_serve_generate_and_change_as_rows_do(make_model, ids):
    model = make_model(torch.float32)
    cache, settings = CodedCache(channels(model), 2), dict(do_sample=False, pad_token_id=0)
    model(ids[:, :10], past_key_values=cache, use_cache=True)
    step = model(ids[:, 10:11], past_key_values=cache).logits
    cache.crop(-1)
    assert cache.get_seq_length() == 10
    assert torch.equal(model(ids[:, 10:11], past_key_values=cache).logits, step)
    cache.crop(-3)  # into a run
    cache.batch_select_indices(torch.tensor([1, 0]))
    swapped = model(ids[[1, 0], 8:9], past_key_values=cache).logits
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    assert cache.get_seq_length() == 9
    cache.reset()
    assert cache.get_seq_length() == cache.stored_bytes() == 0
    assert swapped.isfinite().all()
    found = model.generate(ids[:, :9], max_new_tokens=6, num_beams=2, **settings)
    assert found.shape == (2, 15)


def test_runs_take_the_bytes_that_they_say(make_model, ids):
    model = make_model(torch.float32)
    cache = CodedCache(channels(model), 2)
    model(ids[:, :22], past_key_values=cache, use_cache=True)
    # 2 layers, sequences and heads; 20 tokens in runs of 4, whose keys take 2 + 3 bytes a channel;
    # 2 tokens of floats
    runs, values, floats = 5 * 8 * (2 + 3), 20 * (4 + 3), 2 * 2 * 8 * 4
    assert cache.stored_bytes() == 2 * 2 * 2 * (runs + values + floats)
