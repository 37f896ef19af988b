"""WUSH's maps: the closed form against brute force, what they keep, and what they refuse."""

import pytest
import torch

from spinlab.compose import composed
from spinlab.config import RotationConfig
from spinlab.config.rotation import WushConfig
from spinlab.errors import InputError, ResultError
from spinlab.learn.check import check_learning
from spinlab.model.modules import linear_at, map_of
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.blocks import InvertibleBlocks, inverse_transposed
from spinlab.rotation.check import check_invariance
from spinlab.rotation.fuse import fold_norms
from spinlab.rotation.initial import block_orders, initial_rotations, stream_rotations
from spinlab.rotation.inputs import ScaledDual
from spinlab.rotation.orthogonal import exact_hadamard, random_orthogonal
from spinlab.rotation.rotations import WORDS, RotationSet
from spinlab.rotation.statistics import Statistics, gather_statistics
from spinlab.rotation.stored import read_stored
from spinlab.rotation.wush import wush_blocks
from spinlab.stages.pipeline import Pipeline
from spinlab.tensors import write_tensors


def drawn(rows: int, width: int, seed: int) -> torch.Tensor:
    """Rows with correlated channels of very different size."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=g, dtype=torch.float64)
    sizes = torch.randn(width, generator=g, dtype=torch.float64).mul(1.5).exp()
    return torch.randn(rows, width, generator=g, dtype=torch.float64) @ mix * sizes


def second_moment(rows: torch.Tensor) -> torch.Tensor:
    return rows.mT @ rows / len(rows)


def proxy(x: torch.Tensor, w: torch.Tensor, map: torch.Tensor) -> float:
    """E|x|² E|w|² behind a map: twice the error of their product, of the second order."""
    return (norms(x @ map) * norms(w @ inverse_transposed(map))).item()


def norms(rows: torch.Tensor) -> torch.Tensor:
    return rows.square().sum(-1).mean()


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    return drawn(512, 16, 0), drawn(128, 16, 1)


def closed(x: torch.Tensor, w: torch.Tensor, percdamp: float = 0.0) -> torch.Tensor:
    return wush_blocks(second_moment(x)[None], second_moment(w)[None], percdamp)[0]


def test_both_sides_are_the_papers_formulas_and_each_others_inverse(pair):
    """T_act = H S^-1/2 Uᵀ W'ᵀ and T_w = H S^-1/2 Vᵀ X'ᵀ, for columns."""
    x, w = pair
    found, hadamard = closed(x, w), exact_hadamard(16)
    lower_x, lower_w = (torch.linalg.cholesky(second_moment(t)) for t in pair)
    u, s, vt = torch.linalg.svd(lower_w.mT @ lower_x)
    signs = (found @ hadamard / (lower_w @ u @ s.rsqrt().diag())).mean(0).round()
    act = hadamard @ signs.diag() @ s.rsqrt().diag() @ u.mT @ lower_w.mT
    weight = hadamard @ signs.diag() @ s.rsqrt().diag() @ vt @ lower_x.mT
    scale = act.abs().max()
    assert (found - act.mT).abs().max() / scale < 1e-9
    assert (act @ weight.mT - torch.eye(16)).abs().max() < 1e-12
    inverse = inverse_transposed(found)
    assert (inverse - weight.mT).abs().max() / inverse.abs().max() < 1e-9
    assert (found @ inverse.mT - torch.eye(16)).abs().max() < 1e-12


def test_inputs_and_weights_have_one_moment_and_all_channels_one_variance(pair):
    x, w = pair
    found = closed(x, w)
    of_x, of_w = second_moment(x @ found), second_moment(w @ inverse_transposed(found))
    scale = of_x.diagonal().mean()
    assert (of_x - of_w).abs().max() / scale < 1e-8
    assert (of_x.diagonal() - scale).abs().max() / scale < 1e-8


def test_no_other_map_has_a_smaller_error(pair):
    """Not near it, not far from it; and the bound is the squared nuclear norm."""
    x, w = pair
    found = closed(x, w)
    least, g = proxy(x, w, found), torch.Generator().manual_seed(2)
    lower_x, lower_w = (torch.linalg.cholesky(second_moment(t)) for t in pair)
    bound = torch.linalg.matrix_norm(lower_w.mT @ lower_x, "nuc").square().item()
    assert least == pytest.approx(bound, rel=1e-8)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(25):
            noise = torch.randn(16, 16, generator=g, dtype=torch.float64)
            assert proxy(x, w, found + size * found.norm() / 16 * noise) >= least * (1 - 1e-10)
            assert proxy(x, w, found @ (torch.eye(16) + size * noise / 4)) >= least * (1 - 1e-10)
    for _ in range(25):
        rotation = random_orthogonal(16, g)
        assert proxy(x, w, rotation) > 2 * least  # and equal for the best one behind it
        assert proxy(x, w, found @ rotation) == pytest.approx(least, rel=1e-9)


def test_gradient_steps_come_to_the_same_error(pair):
    x, w = (second_moment(t) for t in pair)
    x, w = x / x.trace(), w / w.trace()
    least = wush_blocks(x[None], w[None], 0.0)[0]
    map = torch.eye(16, dtype=torch.float64, requires_grad=True)

    def loss(map: torch.Tensor) -> torch.Tensor:
        inverse = torch.linalg.inv(map).mT
        return ((map.mT @ x @ map).trace() * (inverse.mT @ w @ inverse).trace()).log()

    optimizer = torch.optim.LBFGS([map], max_iter=4000, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(map)
        value.backward()
        return value

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    assert loss(map).item() >= loss(least).item() - 1e-9
    assert loss(map).item() == pytest.approx(loss(least).item(), abs=1e-2)


def test_white_inputs_and_weights_get_a_hadamard_matrix():
    eye = torch.eye(8, dtype=torch.float64)[None]
    found = wush_blocks(4 * eye, eye, 0.01)
    factor = found[0, 0, 0].abs() * 8**0.5  # |x| and |w| become alike
    assert factor.item() == pytest.approx(4**-0.25)
    assert torch.allclose(found.abs(), torch.full_like(found, factor.item() / 8**0.5))
    assert torch.allclose(found @ found.mT, factor**2 * eye)


def test_a_block_of_zeros_gets_a_hadamard_matrix_alone():
    moments = torch.stack([torch.zeros(8, 8), second_moment(drawn(64, 8, 3))]).double()
    found = wush_blocks(moments, moments.flip(0) + moments, 0.01)
    assert torch.allclose(found[0].abs(), torch.full((8, 8), 8**-0.5, dtype=torch.float64))
    assert found.isfinite().all()


def test_damping_bounds_what_few_rows_leave_open():
    x, w = drawn(4, 16, 0), drawn(128, 16, 1)  # 12 directions are empty
    mild, strong = (torch.linalg.cond(closed(x, w, d)).item() for d in (1e-4, 1.0))
    assert strong < mild < 1e6


def test_a_map_is_undone_by_the_weights_it_goes_to():
    x, w = drawn(5, 32, 0), drawn(3, 32, 1)
    blocks = torch.stack([closed(drawn(64, 16, n), drawn(64, 16, n + 1), 0.01) for n in (2, 4)])
    transform = ScaledDual(dual=InvertibleBlocks(blocks))
    exact = x @ w.T
    assert torch.allclose(transform(x) @ transform.of_weight(w).T, exact, rtol=1e-10)
    assert torch.allclose(transform(x), x @ torch.block_diag(*blocks), rtol=1e-12)
    again = ScaledDual.from_tensors(transform.tensors())
    assert torch.equal(again(x), transform(x))
    with pytest.raises(ResultError, match="not finite"):
        InvertibleBlocks(blocks * torch.nan)


STREAMS = {"none": ("none", "none"), "hadamard": ("hadamard", "hadamard")}


def config_of(r1: str = "none", r2: str = "none", r4: str = "none", **changes) -> RotationConfig:
    settings = {"inputs": "wush", "wush": WushConfig(8), **changes}
    return RotationConfig(r1=r1, r2=r2, r4=r4, **settings)


def made(config: RotationConfig, make, **changes) -> tuple[RotationSet, Statistics]:
    """Do what the stages do."""
    model_map = map_of(make(**changes))
    stream = stream_rotations(config, model_map, torch.Generator().manual_seed(0))
    networks = QuantizedNetworks(lambda: make(**changes), None, None)
    windows = torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(0))
    orders = block_orders(config, model_map)
    found = gather_statistics(networks.stream_rotated(stream), windows, False, orders)
    drawn = initial_rotations(config, model_map, torch.Generator().manual_seed(0), found)
    return drawn, found


@pytest.mark.parametrize("r4", ["none", "hadamard"])
@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS.keys())
@pytest.mark.parametrize("kv_heads", [2, 4], ids=["grouped queries", "one head each"])
def test_the_network_keeps_its_function(make_model, ids, tmp_path, stream, r4, kv_heads):
    changes = {"num_key_value_heads": kv_heads, "attention_bias": True, "mlp_bias": True}
    rotations, _ = made(config_of(*stream, r4), make_model, **changes)
    assert ("0.down" in rotations.inputs) == (r4 == "none")
    networks = QuantizedNetworks(lambda: make_model(**changes), None, None)
    model, original = networks.rotated(rotations), make_model(**changes)
    assert check_invariance(lambda: original, lambda: model, rotations, ids[:1]) < 1e-9
    assert rotations.orthogonality()["inverses"] < 1e-9
    rotations.save(tmp_path / "r.safetensors")
    loaded = read_stored(tmp_path / "r.safetensors", map_of(original))
    assert torch.equal(networks.rotated(loaded)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3", "phi3", "mixtral"])
def test_every_family_takes_it(make_family_model, ids, model_type):
    def make(**changes):
        return make_family_model(model_type, **changes)

    rotations, _ = made(config_of("hadamard", "hadamard"), make)
    model = QuantizedNetworks(make, None, None).rotated(rotations)
    assert check_invariance(make, lambda: model, rotations, ids[:1]) < 1e-9


def test_moments_are_those_of_what_r1_gives_and_of_all_linears_that_read_it(make_model):
    config = config_of("hadamard")
    rotations, found = made(config, make_model)
    model = make_model()
    fold_norms(model)
    kept: list = []
    norm = model.get_submodule("model.layers.1.post_attention_layernorm")
    norm.register_forward_hook(lambda module, args, out: kept.append(out))
    windows = torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(0))
    model(input_ids=windows)
    x = kept[0].flatten(0, 1) @ rotations.r1
    gate, up = (linear_at(model, f"model.layers.1.mlp.{n}_proj").weight for n in ("gate", "up"))
    w = torch.cat([gate, up]) @ rotations.r1
    for rows, moments in ((x, found.moments), (w, found.weight_moments)):
        whole = second_moment(rows.double())
        blocks = torch.stack([whole[n : n + 8, n : n + 8] for n in range(0, len(whole), 8)])
        assert torch.allclose(moments["1.gate_up"], blocks, rtol=1e-6, atol=1e-12)
    maps = wush_blocks(found.moments["1.gate_up"], found.weight_moments["1.gate_up"], 0.01)
    assert torch.equal(rotations.inputs["1.gate_up"].dual.first, maps)
    stored = Statistics.from_tensors(found.tensors())
    assert torch.equal(stored.moments["0.qkv"], found.moments["0.qkv"])


def test_a_file_whose_maps_cannot_be_undone_is_refused(make_model, tmp_path):
    rotations, _ = made(config_of(), make_model)
    matrix = rotations.inputs["0.qkv"].dual.first
    for broken, said in (
        (torch.zeros_like(matrix), "has no inverse to speak of"),
        (matrix * torch.inf, "holds numbers that are not finite"),
        (matrix[:1], "square blocks that tile 24"),
        (matrix[:, :4, :4], "square blocks that tile 24"),
        (matrix[:, :4], "square blocks that tile 24"),
    ):
        stored = rotations.tensors() | {"inputs.0.qkv.matrix": broken.contiguous()}
        path = tmp_path / "broken.safetensors"
        _write(path, stored)
        with pytest.raises(InputError, match=said):
            read_stored(path, map_of(make_model()))


def _write(path, stored: dict[str, torch.Tensor]) -> None:
    write_tensors(path, stored, {WORDS: {"about": {}, "blocks": {"r3": 1}}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r1": "duquant"}, "rotation.r1=duquant is made from activations, .* set rotation.r1=had"),
        ({"smooth": 0.5}, "rotation.smooth=0.5 .* set rotation.smooth=null"),
        ({"online": False}, "rotation.inputs=wush runs online: set none, or rotation.online=true"),
        ({"cross_head": "hadamard"}, "rotation.inputs=wush takes the place of CROSS_HEAD"),
    ],
)
def test_what_cannot_stand_before_it_is_refused_in_one_sentence(settings, message):
    with pytest.raises(InputError, match=message):
        config_of(**{"r1": "none", **settings})
    with pytest.raises(InputError, match=r"rotation\.wush\.size=24 must be a power of two"):
        WushConfig(size=24)
    with pytest.raises(InputError, match=r"rotation\.wush\.percdamp=0"):
        WushConfig(percdamp=0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["learn.rotations=[inputs]"], "makes maps that are no rotations"),
        (["rotation.r1=hadamard"], "turns what R1 give, and is not learned along .* learn=none"),
        (["rotation=input_blocks", "rotation.r2=hadamard"], "add inputs to learn.rotations"),
    ],
    ids=str,
)
def test_learning_it_or_in_front_of_it_is_refused_in_one_sentence(words, message):
    with pytest.raises(InputError, match=message):
        composed("+experiment=toy", "rotation=wush", *words)


@pytest.mark.parametrize("learned", ["inputs", "r1"])
def test_a_file_that_holds_it_is_not_learned_on(make_model, learned):
    rotations, _ = made(config_of("hadamard"), make_model)
    words = [f"learn.rotations=[{learned}]", "rotation.load=r.safetensors"]
    said = {"inputs": r"a map that is none, of rotation\.inputs=wush", "r1": "behind its R1 and R2"}
    config = composed("+experiment=toy", "learn.quantize_weights=true", *words)
    with pytest.raises(InputError, match=said[learned]):
        check_learning(config, rotations)


def test_statistics_are_those_of_the_r1_and_the_blocks_that_settings_ask_for(tmp_path, short_text):
    def keys(*words: str) -> tuple[str, str]:
        places = [f"paths.cache={tmp_path}", "rotation.statistics.samples=2", *short_text]
        places += ["rotation.statistics.sequence_length=64", "learn=none", "model=random"]
        run = Pipeline(composed("+experiment=toy", "rotation=wush", *places, *words))
        return run.statistics.key, run.initial.key

    plain, *others = (
        keys(*words)
        for words in (
            (),
            ("rotation.r1=hadamard",),
            ("rotation.wush.size=16",),
            ("rotation.r4=hadamard",),
        )
    )
    assert len({plain[0], *(key for key, _ in others)}) == 4
    damped = keys("rotation.wush.percdamp=0.1")
    assert damped[0] == plain[0] and damped[1] != plain[1]
