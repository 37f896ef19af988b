"""Transforms of single inputs keep the function, and do to activations what papers say."""

from dataclasses import replace

import pytest
import torch

from spinlab.config import RotationConfig
from spinlab.config.rotation import BlocksConfig, DuQuantConfig
from spinlab.errors import InputError
from spinlab.model.modules import embedding_of, linear_at, map_of
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.blocks import BlockRotation, InvertibleBlocks, rotate_blocks
from spinlab.rotation.check import BrokenSite, check_invariance
from spinlab.rotation.duquant import DualTransform, dual_transforms, random_mixers
from spinlab.rotation.fuse import fold_norms
from spinlab.rotation.initial import check_rotations, initial_rotations
from spinlab.rotation.inputs import ScaledDual, smoothing_scale
from spinlab.rotation.rotations import RotationSet
from spinlab.rotation.statistics import Statistics, gather_statistics
from spinlab.rotation.stored import read_stored

ALL = ["qkv", "o", "gate_up", "down"]
SEARCH = DuQuantConfig(block_size=8, steps=6)
CONFIGS = {
    "smoothquant": RotationConfig(r1="none", r2="none", r3="none", r4="none", smooth=0.5),
    "smooth everywhere, with R3 and R4": RotationConfig(
        r1="none", r2="none", smooth=0.7, smooth_groups=ALL
    ),
    "duquant": RotationConfig(
        r1="none", r2="none", r4="none", inputs="duquant", smooth=0.6, smooth_groups=ALL,
        duquant=SEARCH,
    ),
    "duquant without smoothing": RotationConfig(
        r1="none", r2="none", r4="none", inputs="duquant", duquant=SEARCH
    ),
    "duquant, rounded": RotationConfig(
        r1="none", r2="none", r4="none", inputs="duquant", smooth=0.6, smooth_groups=ALL,
        duquant=SEARCH, factors="bfloat16",
    ),
    "blocks, rounded": RotationConfig(
        r1="none", r4="none", inputs="blocks", blocks=BlocksConfig(8, "random"), factors="bfloat16"
    ),
    "blocks behind gains": RotationConfig(r1="none", r4="none", inputs="blocks", gains="kept"),
    "duquant as init": RotationConfig(r1="duquant", r2="duquant", duquant=SEARCH),
    "legacy index": RotationConfig(
        r1="duquant", duquant=DuQuantConfig(block_size=8, steps=6, legacy_index=True)
    ),
    "quarot": RotationConfig(r2="exact_hadamard", cross_head="hadamard"),
    "projections": RotationConfig(r1="bernoulli", r2="gaussian", r3="bernoulli", r4="gaussian"),
}  # fmt: skip


def statistics_of(model, fold: bool = True) -> Statistics:
    if fold:
        fold_norms(model)
    windows = torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(0))
    return gather_statistics(model, windows)


def made(config: RotationConfig, make, **changes) -> RotationSet:
    model_map = map_of(make(**changes))
    folded = not config.keeps_gains
    found = statistics_of(make(**changes), folded) if config.needs_statistics else None
    return initial_rotations(config, model_map, torch.Generator().manual_seed(0), found)


@pytest.mark.parametrize("kv_heads", [2, 4], ids=["grouped queries", "one head each"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_every_transform_keeps_the_logits_in_float64(make_model, ids, config, kv_heads):
    changes = {"num_key_value_heads": kv_heads, "attention_bias": True, "mlp_bias": True}
    rotations = made(config, make_model, **changes)
    networks = QuantizedNetworks(lambda: make_model(**changes), None, None)
    model, original = networks.rotated(rotations), make_model(**changes)
    assert check_invariance(lambda: original, lambda: model, rotations, ids[:1]) < 1e-9


@pytest.mark.parametrize(
    "model_type",
    [
        *("mistral", "qwen2", "qwen3", "phi3", "granite", "olmo2", "olmo3", "stablelm", "cohere"),
        *("gemma", "gemma2", "gemma3_text"),
        "mixtral",
    ],
)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_every_family_takes_every_transform(make_family_model, fitting, ids, config, model_type):
    def make(**changes):
        return make_family_model(model_type, **changes)

    rotations = made(fitting(config, map_of(make())), make)
    model = QuantizedNetworks(make, None, None).rotated(rotations)
    assert check_invariance(make, lambda: model, rotations, ids[:1]) < 1e-9


def test_scales_before_the_stream_itself_run_online_or_not_at_all(make_family_model):
    model_map = map_of(make_family_model("olmo2"))
    alone = {"r1": "none", "r2": "none", "r4": "none"}
    smooth = RotationConfig(**alone, smooth=0.5, smooth_groups=["qkv"])
    learned = RotationConfig(**{**alone, "r2": "random"}, inputs="scales")
    check_rotations(smooth, model_map)
    drawn = initial_rotations(learned, model_map, torch.Generator().manual_seed(0)).inputs
    assert {key for key, transform in drawn.items() if not transform.folded} == {
        *("0.qkv", "0.gate_up", "1.qkv", "1.gate_up")
    }
    for config in (smooth, learned):
        with pytest.raises(InputError, match=r"qkv input .*: .*rotation\.online=true"):
            check_rotations(replace(config, online=False), model_map)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_every_transform_survives_a_file(make_model, ids, config, tmp_path):
    saved = made(config, make_model)
    saved.save(tmp_path / "r.safetensors")
    model_map = map_of(make_model())
    loaded = read_stored(tmp_path / "r.safetensors", model_map)
    networks = QuantizedNetworks(make_model, None, None)
    expected, found = (networks.rotated(r)(ids).logits for r in (saved, loaded))
    assert torch.equal(found, expected)


def test_a_broken_site_behind_a_scale_is_named(make_model, ids):
    config = CONFIGS["smooth everywhere, with R3 and R4"]
    rotations = made(config, make_model)
    model = QuantizedNetworks(make_model, None, None).rotated(rotations)
    linear_at(model, "model.layers.1.mlp.up_proj").weight.data[3] *= 2
    with pytest.raises(BrokenSite, match=r"layers\.1\.mlp\.up_proj"):
        check_invariance(make_model, lambda: model, rotations, ids[:1])


def test_statistics_are_what_the_linears_read(make_model):
    model = make_model(torch.float32)
    found = statistics_of(model)
    windows = torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(0))
    kept: list = []
    norm = model.get_submodule("model.layers.1.post_attention_layernorm")
    norm.register_forward_hook(lambda module, args, out: kept.append(out))
    model(input_ids=windows)
    assert torch.allclose(found.peaks["1.gate_up"], kept[0].abs().amax((0, 1)), rtol=1e-5)
    assert torch.allclose(found.means["1.gate_up"], kept[0].mean(0), atol=1e-5)
    gate, up = (linear_at(model, f"model.layers.1.mlp.{n}_proj").weight for n in ("gate", "up"))
    assert torch.equal(found.weights["1.gate_up"], torch.cat([gate, up]).abs().amax(0))
    v = linear_at(model, "model.layers.0.self_attn.v_proj")
    values = found.means["0.qkv"] @ v.weight.T  # averaging and multiplying commute
    assert torch.allclose(found.values["0"], values, atol=1e-5)
    stored = Statistics.from_tensors(found.tensors())
    assert stored.peaks.keys() == found.peaks.keys()
    assert torch.equal(stored.values["1"], found.values["1"])


def test_smoothing_is_the_published_formula_up_to_bfloat16():
    activations, weights = torch.tensor([8.0, 0.5, 0.0, 3.0]), torch.tensor([0.5, 2.0, 1.0, 0.0])
    scale = smoothing_scale(activations, weights, 0.75)
    assert scale[:2].tolist() == pytest.approx([8**0.75 / 0.5**0.25, 0.5**0.75 / 2**0.25], rel=0.01)
    assert scale[2:].tolist() == [1, 1]
    inverse = 1 / scale
    assert torch.equal(inverse.bfloat16().double(), inverse)


def test_smoothing_evens_out_activation_peaks(make_model):
    def loud(**changes):
        model = make_model(torch.float32, **changes)
        embedding_of(model).weight.data[:, 5] *= 40
        return model

    rotations = made(CONFIGS["smoothquant"], loud)
    model = QuantizedNetworks(loud, None, None).rotated(rotations)
    before, after = (statistics_of(m, fold=f).peaks["0.qkv"] for m, f in ((loud(), 1), (model, 0)))
    assert after.max() / after.median() < 0.75 * before.max() / before.median()


def test_duquant_flattens_inputs_more_than_smoothing_does(make_model):
    smooth, dual = CONFIGS["smooth everywhere, with R3 and R4"], CONFIGS["duquant"]
    rows = statistics_of(make_model()).means["1.down"]
    flat = made(dual, make_model).inputs["1.down"]
    only_scaled = made(smooth, make_model).inputs["1.down"]
    x = (rows / only_scaled.scale).float()
    turned = flat.dual.apply((rows / flat.scale).float())
    assert turned.abs().max() / turned.std() < 0.9 * x.abs().max() / x.std()


def test_the_order_is_scale_then_turn_and_the_weight_undoes_it():
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 16, generator=g, dtype=torch.float64) for n in (5, 3))
    scale = torch.rand(16, generator=g, dtype=torch.float64) + 0.5
    dual = dual_transforms(x[None], random_mixers(8, 4, g))[0]
    both = ScaledDual(scale, folded=False, dual=dual)
    assert torch.allclose(both(x), (x / scale) @ dual.dense(), atol=1e-12)
    assert torch.allclose(both(x) @ both.of_weight(w).T, x @ w.T, atol=1e-12)
    folded = ScaledDual(scale, folded=True, dual=dual)
    assert torch.allclose(folded(x / scale), both(x), atol=1e-12)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("kind", ["dual", "rotations", "maps"])
def test_weights_get_the_inverse_of_what_was_rounded(kind, folded):
    """Against dense matrices of numbers that bfloat16 holds, inverted by themselves."""
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 16, generator=g, dtype=torch.float64) for n in (5, 3))
    scale = torch.rand(16, generator=g, dtype=torch.float64) + 0.5
    dual = dual_transforms(x[None], random_mixers(8, 4, g), shared=False)[0]
    one = BlockRotation(dual.first) if kind == "rotations" else InvertibleBlocks(1.3 * dual.first)
    transform = ScaledDual(scale, folded, dual if kind == "dual" else one, rounded=True)
    divided = torch.eye(16, dtype=torch.float64) if folded else torch.diag(1 / scale)
    wanted = (divided @ torch.block_diag(*transform.dual.first)).bfloat16().double()
    if kind == "dual":
        second = torch.block_diag(*dual.second).bfloat16().double()
        wanted = wanted[:, dual.permutation] @ second
    assert torch.allclose(transform(x), x @ wanted, atol=1e-12)
    given = w * scale if folded else w
    assert torch.allclose(transform.of_weight(w), given @ wanted.inverse().mT, atol=1e-12)
    exact = replace(transform, rounded=False)
    assert 1e-4 < (transform(x) - exact(x)).abs().max() / exact(x).abs().max() < 1e-2


def test_between_rounded_rotations_bfloat16_stays_what_it_is_and_float16_does_not():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 16, generator=g, dtype=torch.float64)
    dual = dual_transforms(x[None], random_mixers(8, 4, g))[0]
    transform = ScaledDual(dual=dual, rounded=True)
    first, second = (factor.blocks.float() for factor in transform.factors())
    for dtype, between in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)):
        found = rotate_blocks(x.to(dtype).float(), first).to(between).float()
        wanted = rotate_blocks(found[:, dual.permutation], second).to(dtype)
        assert torch.equal(transform(x.to(dtype)), wanted)


def test_files_say_whether_factors_are_rounded(make_model, tmp_path):
    for name in ("duquant, rounded", "duquant"):
        rotations = made(CONFIGS[name], make_model)
        rotations.save(tmp_path / "R.safetensors")
        loaded = read_stored(tmp_path / "R.safetensors", map_of(make_model()))
        for found in (loaded, RotationSet.load(tmp_path / "R.safetensors")):
            kinds = {transform.rounded for transform in found.inputs.values()}
            assert kinds == {name == "duquant, rounded"}
        assert ("inverses" in loaded.orthogonality()) == (name == "duquant, rounded")
        assert max(loaded.orthogonality().values()) < 1e-9


@pytest.mark.parametrize(
    ("r4", "turned"), [("hadamard", False), ("identity", True), ("none", True)]
)
def test_blocks_turn_what_r4_does_not(make_model, r4, turned):
    config = RotationConfig(r4=r4, inputs="blocks", blocks=BlocksConfig(8))
    made = initial_rotations(config, map_of(make_model()), torch.Generator().manual_seed(0))
    assert (made.inputs["0.down"].dual is not None) == turned == (made.r4 is None)
    assert made.inputs["0.qkv"].dual is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inputs": "duquant"}, "set rotation.r1=none, rotation.r2=none, rotation.r4=none"),
        ({"smooth": 1.5}, r"rotation.smooth=1.5 must lie in \[0, 1\]"),
        ({"factors": "float8"}, "rotation.factors=float8 is unknown"),
        ({"r4_block": 24}, "rotation.r4_block=24 must be a power of two"),
    ],
)
def test_what_cannot_be_combined_is_refused_in_one_sentence(settings, message):
    with pytest.raises(InputError, match=message):
        RotationConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "rotation.r1 mixes: set rotation.r1=none"),
        ({"r1": "none", "smooth_groups": ["o"]}, "rotation.r2 mixes"),
        ({"r1": "none", "smooth_groups": ["mlp"]}, "rotation.smooth_groups=mlp"),
    ],
)
def test_scales_of_what_a_rotation_mixes_are_refused_in_one_sentence(make_model, settings, message):
    with pytest.raises(InputError, match=message):
        check_rotations(RotationConfig(smooth=0.5, **settings), map_of(make_model()))


@pytest.mark.parametrize("settings", [{"r1": "hadamart"}, {"r3": "duquant"}], ids=str)
def test_a_kind_that_a_rotation_has_not_is_refused_before_anything_is_drawn(make_model, settings):
    ((name, kind),) = settings.items()
    with pytest.raises(InputError, match=f"rotation.{name}={kind} is unknown: choose one of none"):
        check_rotations(RotationConfig(**settings), map_of(make_model()))


def search(rows: torch.Tensor, config: DuQuantConfig = SEARCH) -> DualTransform:
    """DuQuant's transform of some rows, from the first random draw of seed 0."""
    block = config.block_size
    mixers = random_mixers(block, config.steps, torch.Generator().manual_seed(0))
    return dual_transforms(rows[None], mixers, legacy_index=config.legacy_index)[0]


@pytest.mark.parametrize("settings", [SEARCH, DuQuantConfig(8, 2), DuQuantConfig(8, 6, True)])
def test_an_inputs_transform_is_searched_on_its_smoothed_activations(make_model, settings):
    config = replace(CONFIGS["duquant"], duquant=settings)
    found, rows = made(config, make_model).inputs["1.down"], statistics_of(make_model()).means
    expected = search(rows["1.down"] / found.scale.float(), settings)
    assert torch.allclose(found.dual.dense(), expected.dense())


def test_the_settings_of_the_search_change_what_it_finds(make_model):
    kinds = (SEARCH, DuQuantConfig(8, 1), DuQuantConfig(8, 6, True), DuQuantConfig(4, 6))
    found = [
        made(replace(CONFIGS["duquant"], duquant=kind), make_model).inputs["0.qkv"].dual.dense()
        for kind in kinds
    ]
    assert all(not torch.allclose(found[0], other) for other in found[1:])


def test_r2_is_searched_on_the_values_of_its_own_layer(make_model):
    config = RotationConfig(r1="none", r2="duquant", duquant=SEARCH)
    r2, values = made(config, make_model).r2, statistics_of(make_model()).values
    for layer in range(2):
        rows = values[str(layer)].unflatten(-1, (-1, 8)).flatten(0, 1)
        assert torch.allclose(r2[layer], search(rows).dense())


def test_r1_is_searched_on_the_loudest_rows_of_the_stream(make_model, monkeypatch):
    monkeypatch.setattr("spinlab.rotation.initial._MOST_ROWS", 3)
    config = RotationConfig(r1="duquant", r2="none", duquant=SEARCH)
    means = statistics_of(make_model()).means
    rows = torch.cat([means[f"{i}.{group}"] for i in range(2) for group in ("qkv", "gate_up")])
    loudest = rows[rows.abs().amax(1).topk(3).indices]
    assert torch.allclose(made(config, make_model).r1, search(loudest).dense())
