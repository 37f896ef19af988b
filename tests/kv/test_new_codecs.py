"""A codec is one class and one line in CODECS: one of rows with a seeded tensor, one of layers."""

import math
from dataclasses import dataclass, field

import pytest
import torch

from spinlab.compose import composed
from spinlab.config import CodecConfig, KVConfig
from spinlab.errors import InputError
from spinlab.formats import IntegerFormat
from spinlab.formats.quantizer import StraightThrough, check_group
from spinlab.kv.base import LayerCodec, OwnTensor, RowCodec
from spinlab.kv.cache import CodedCache, attach_kv, kv_path
from spinlab.kv.codecs import CODECS, make_codec
from spinlab.kv.codecs.affine import AffineCodec
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
class Channels(LayerCodec):
    """Keys per channel over a run of tokens, the last ones in floats, as KIVI has it."""

    reads = ("symmetric", "group_size")
    codec: AffineCodec  # of one channel's run

    @classmethod
    def make(cls, name, settings, width, generator):
        check_group(f"{name}.group_size", settings.group_size, 64, "a run of 64 tokens")
        return cls(
            AffineCodec(IntegerFormat(settings.bits, settings.symmetric), settings.group_size or 64)
        )

    @property
    def bits(self):
        return self.codec.bits

    def layer(self, values):
        return ChannelLayer(self.codec, values)


@dataclass
class ChannelLayer:
    """Rows of channels: (batch, kv_heads, runs, head_dim, row_bytes), and floats behind them."""

    codec: AffineCodec
    value_codec: RowCodec | None
    runs: torch.Tensor | None = field(default=None)
    rest: torch.Tensor | None = field(default=None)
    values: torch.Tensor | None = field(default=None)

    def append(self, keys, values):
        rest = keys if self.rest is None else torch.cat((self.rest, keys), -2)
        full = rest.shape[-2] // self.codec.width
        head, self.rest = rest.split(
            [full * self.codec.width, rest.shape[-2] % self.codec.width], 2
        )
        runs = self.codec.encode(head.unflatten(2, (full, self.codec.width)).mT)
        self.runs = runs if self.runs is None else torch.cat((self.runs, runs), 2)
        new = values if self.value_codec is None else self.value_codec.encode(values)
        self.values = new if self.values is None else torch.cat((self.values, new), 2)
        return torch.cat((self._decoded(keys.dtype), self.rest), 2), self._values(keys.dtype)

    def round(self, keys, values):
        both = ChannelLayer(self.codec, self.value_codec).append(keys.detach(), values.detach())
        pairs = zip((keys, values), both, strict=True)
        return tuple(StraightThrough.apply(x, lambda _, y=y: y.clone()) for x, y in pairs)

    def crop(self, tokens):
        keys = torch.cat((self._decoded(self.rest.dtype), self.rest), 2)[:, :, :tokens]
        whole = tokens // self.codec.width
        self.runs, self.rest = self.runs[:, :, :whole], keys[:, :, whole * self.codec.width :]
        self.values = self.values[:, :, :tokens]

    def reorder(self, sequences):
        self.runs, self.rest = self.runs[sequences], self.rest[sequences]
        self.values = self.values[sequences]

    def reset(self):
        self.runs = self.rest = self.values = None

    @property
    def tokens(self):
        return 0 if self.values is None else self.values.shape[2]

    @property
    def sequences(self):
        return 0 if self.values is None else self.values.shape[0]

    @property
    def bytes(self):
        parts = (self.runs, self.rest, self.values)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)

    def _decoded(self, dtype):
        return self.codec.decode(self.runs, dtype).mT.flatten(2, 3)

    def _values(self, dtype):
        return (
            self.values if self.value_codec is None else self.value_codec.decode(self.values, dtype)
        )


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
    ("settings", "bits"), [(SIGNS, 1 + 16 / 16), (CHANNELS, 3 + 24 / 16)], ids=["rows", "layers"]
)
@pytest.mark.usefixtures("toy_cache")
def test_a_new_codec_runs_the_toy_and_says_its_bits(tmp_path, settings, bits):
    """Learned through, emulated and stored; `fake` and `integer` are one function."""
    run = pipeline(tmp_path, *settings, "learn.steps=2", "eval.variants=[fake,integer]")
    preflight(run, settings)
    fake, integer = (run.measure(variant) for variant in ("fake", "integer"))
    assert fake["ppl/wiki/fake"] == integer["ppl/wiki/integer"] < 100  # of 256 bytes
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
        (["kv.values.codec=channels"], "kv.values.codec keeps whole layers"),
        (["kv.keys.codec=sings"], "kv.keys.codec=sings is unknown: choose one of affine, "),
        (["kv.keys.codec=affine", "kv.keys.bits=1"], "an affine grid codes 2 to 8 bits"),
    ],
    ids=str,
)
def test_what_a_codec_does_not_take_is_refused_before_the_first_stage(tmp_path, overrides, words):
    with pytest.raises(InputError, match=words):
        preflight(pipeline(tmp_path, "learn=none", *overrides), overrides)
    assert not list(tmp_path.glob("cache/*"))


def test_the_fused_runtime_refuses_whole_layers(tmp_path):
    run = pipeline(tmp_path, *CHANNELS, "learn=none", "runtime.device=cpu")
    run.run.backend = "triton"  # as on a machine that has it
    with pytest.raises(InputError, match=r"keeps whole layers.* use runtime.backend=torch"):
        preflight(run)


def channels(model):
    keys = CodecConfig(bits=4, group_size=4, codec="channels")
    path = kv_path(KVConfig(keys), 8)
    attach_kv(model, path, store=True)
    return path


def test_whole_layers_serve_generate_and_change_as_rows_do(make_model, ids):
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


def test_whole_layers_take_the_bytes_that_they_say(make_model, ids):
    model = make_model(torch.float32)
    cache = CodedCache(channels(model), 2)
    model(ids[:, :22], past_key_values=cache, use_cache=True)
    # 2 layers, sequences and heads; 20 keys in runs of 4, each 2 + 3 bytes a channel; 2 floats
    runs, floats, values = 5 * 8 * (2 + 3), 2 * 8 * 4, 22 * (4 + 3)
    assert cache.stored_bytes() == 2 * 2 * 2 * (runs + floats + values)
