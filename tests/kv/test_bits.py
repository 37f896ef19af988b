"""Which share of the cache is coded, of what tokens see of it."""

import pytest

from spinlab.config import CodecConfig, KVConfig
from spinlab.kv.bits import coded_share
from spinlab.kv.path import kv_path

NAMES = [f"model.layers.{n}.self_attn" for n in range(4)]
KIVI = CodecConfig(codec="kivi", bits=2, run=8)
OFF = CodecConfig(bits=16)


@pytest.mark.parametrize(
    "config",
    [
        KVConfig(),
        KVConfig(keys=OFF),
        KVConfig(OFF, OFF),
        KVConfig(KIVI, sinks=3, window=5),
        KVConfig(window=20),
        KVConfig(first_layers=1, last_layers=2, window=4),
    ],
    ids=["all", "values", "none", "runs", "beyond", "layers"],
)
def test_the_share_that_is_coded_is_that_of_all_that_is_seen(config):
    path, tokens, seen, coded = kv_path(config, 16, layers=NAMES), 20, 0, 0
    for layer in range(len(NAMES)):
        history = path.history(layer)
        for n in range(1, tokens + 1):
            done = [t for t in range(n) if t < n - history.window and t >= history.sinks]
            done = done[: len(done) // history.run * history.run]
            for codec in path.sides(layer):
                seen += n
                coded += 0 if codec is None else len(done)
    assert coded_share(path, tokens) == pytest.approx(coded / seen, abs=1e-15)
