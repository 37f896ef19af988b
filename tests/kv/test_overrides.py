"""What overrides change of the codecs of layers, and what is said of those that cannot be."""

import pytest

from spinlab.compose import composed
from spinlab.config import CodecChange, CodecConfig, KVConfig, KVOverride
from spinlab.config.kv import LloydMaxChange, QJLChange
from spinlab.errors import InputError
from spinlab.kv.codecs import unread_by_codecs
from spinlab.kv.path import kv_path

NAMES = [f"model.layers.{n}.self_attn" for n in range(3)]
OF_FIRST = "*.layers.0.*"


def test_an_override_changes_options_of_codecs_and_keeps_the_others():
    """By the grammar of a command; what it leaves out is that of the side."""
    words = [
        *("kv.keys.codec=lloyd_max", "kv.keys.lloyd_max.length=norm", "kv.values.codec=qjl"),
        "kv.overrides=[{pattern: '*.layers.0.*', keys: {lloyd_max: {turn: none}}, "
        "values: {qjl: {outliers: 2, outlier_bits: 3}, run: 4}}]",
    ]
    kv = composed("+experiment=toy", *words).kv
    path = kv_path(kv, 16, layers=NAMES)
    first, second = (path.sides(n) for n in (0, 1))
    assert first.keys.rotation is None and second.keys.rotation is not None
    assert first.keys.layout.length == second.keys.layout.length == "norm"
    assert (first.values.outliers, second.values.outliers) == (2, 0)
    assert (first.values.outlier_sketch.count, first.values.run) == (3 * 16, 4)
    assert path.sides(2) == second == (path.keys, path.values)
    unread = dict(unread_by_codecs(kv))
    assert "kv.keys.lloyd_max" not in unread["kv.keys.codec=lloyd_max"]
    assert "kv.keys.qjl" in unread["kv.keys.codec=lloyd_max"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (CodecChange(codec="kiwi"), "codec=kiwi is unknown: choose one of affine"),
        (CodecChange(bits=1), "bits=1: an affine grid codes 2 to 8 bits"),
        (CodecChange(group_size=7), "group_size=7"),
        (CodecChange(codec="lloyd_max", bits=9), "bits=9: lloyd_max codes 1 to 8 bits"),
        (CodecChange(codec="qjl", qjl=QJLChange(outliers=64)), "qjl.outliers=64 of heads of 64"),
        (CodecChange(lloyd_max=LloydMaxChange(turn="left")), "lloyd_max.turn=left is unknown"),
    ],
    ids=str,
)
@pytest.mark.parametrize("side", ["keys", "values"])
def test_errors_name_the_override_that_they_are_of(change, words, side):
    with pytest.raises(InputError) as raised:
        config = KVConfig(overrides=[KVOverride(OF_FIRST, **{side: change})])
        kv_path(config, 64, layers=NAMES)
    assert str(raised.value).startswith(f"kv.overrides[{OF_FIRST}].{side}.{words}")
    if change.codec == "kiwi":
        with pytest.raises(InputError, match=r"kv\.overrides\[.*\]\.\w+\.codec=kiwi"):
            list(unread_by_codecs(config))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (CodecChange(run=4), "run is not read with codec affine"),
        (CodecChange(lloyd_max=LloydMaxChange("none")), "lloyd_max is not read with codec affine"),
        (CodecChange(codec="kivi", qjl=QJLChange(outliers=2)), "qjl is not read with codec kivi"),
        (CodecChange(bits=16, clip_ratio=0.9), "clip_ratio is not read with 16 bits"),
    ],
    ids=str,
)
def test_what_the_codec_of_an_override_does_not_read_is_refused(change, words):
    config = KVConfig(values=CodecConfig(bits=8), overrides=[KVOverride(OF_FIRST, values=change)])
    with pytest.raises(InputError) as raised:
        list(unread_by_codecs(config))
    assert str(raised.value) == f"kv.overrides[{OF_FIRST}].values.{words}: leave it out"


def test_layers_with_equal_settings_share_a_codec_whoever_gives_them():
    change = CodecChange(codec="lloyd_max")
    overrides = [KVOverride(f"*.layers.{n}.*", keys=change) for n in (0, 2)]
    path = kv_path(KVConfig(overrides=overrides), 64, layers=NAMES)
    assert path.sides(0).keys is path.sides(2).keys
    assert path.sides(1).keys is path.keys
