"""DuQuant's rotations and permutation against the paper and searches by hand."""

from itertools import product
from math import sqrt

import numpy as np
import pytest
import torch

from spinlab.errors import InputError, ResultError
from spinlab.rotation.blocks import power_block
from spinlab.rotation.duquant import (
    DualTransform,
    dual_transforms,
    greedy_rotation,
    largest_block,
    random_mixers,
    uniform_first_row,
    zigzag,
)
from spinlab.rotation.orthogonal import orthogonality_error, random_orthogonal


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def givens_product(size: int) -> np.ndarray:
    """R~ as the public code describes it: size - 1 rotations, then 0 and size - 1 exchanged."""
    r = np.eye(size)
    for i in range(size - 1):
        givens = np.eye(size)
        cos, sin = 1 / sqrt(i + 2), sqrt(i + 1) / sqrt(i + 2)
        givens[i : i + 2, i : i + 2] = [[cos, -sin], [sin, cos]]
        r = givens @ r
    exchange = exchange_matrix(size, size - 1)
    return exchange @ r @ exchange


def exchange_matrix(size: int, channel: int) -> np.ndarray:
    """E, which exchanges channel 0 with `channel`."""
    e = np.eye(size)
    e[:, [0, channel]] = e[:, [channel, 0]]
    return e


def greedy_by_hand(x: np.ndarray, mixers: np.ndarray, legacy_index: bool) -> list[np.ndarray]:
    """Return, for 0, 1, .. steps, the best product so far for one x: (rows, size)."""
    rows, size = x.shape
    rotation, best, lowest = np.eye(size), [np.eye(size)], np.abs(x).max()
    for mixer in mixers:
        r, c = max(product(range(rows), range(size)), key=lambda at: abs(x[at]))
        e = exchange_matrix(size, r % size if legacy_index else c)
        step = e @ givens_product(size) @ mixer @ e
        x, rotation = x @ step, rotation @ step
        improved = np.abs(x).max() < lowest
        best.append(rotation if improved else best[-1])
        lowest = min(lowest, np.abs(x).max())
    return best


def with_outlier(*shape: int, channel: int, factor: float, seed: int = 0) -> torch.Tensor:
    x = torch.randn(*shape, generator=generator(seed), dtype=torch.float64)
    x[..., channel] *= factor
    return x


def random_transform(blocks: int, block: int, shared: bool) -> DualTransform:
    g, k = generator(blocks), 1 if shared else blocks
    first, second = (torch.stack([random_orthogonal(block, g) for _ in range(k)]) for _ in range(2))
    return DualTransform(first, torch.randperm(blocks * block, generator=g), second)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 96, 128])
def test_uniform_first_row_is_the_product_of_givens_rotations(size):
    r = uniform_first_row(size)
    assert torch.allclose(r, torch.from_numpy(givens_product(size)), atol=1e-13)
    assert torch.allclose(r[0], torch.full_like(r[0], size**-0.5), atol=1e-15)
    assert orthogonality_error(r) < 1e-13


def test_mixers_keep_channel_0_and_turn_the_others_by_a_fresh_haar_rotation():
    mixers = random_mixers(7, 4000, generator())
    assert torch.equal(mixers[:, 0], torch.eye(7, dtype=torch.float64)[:1].expand(4000, 7))
    assert torch.equal(mixers[:, :, 0], mixers[:, 0])
    assert orthogonality_error(mixers) < 1e-13
    traces = mixers[:, 1:, 1:].diagonal(dim1=-2, dim2=-1).sum(-1)  # Haar: mean 0, variance 1
    assert abs(traces.mean()) < 4 / 4000**0.5
    assert abs(traces.square().mean() - 1) < 0.15


def test_the_pi_over_4_example_lowers_the_peak_at_each_of_its_two_stages():
    """One channel near 10 beside channels near 0.2: a Givens rotation by π/4 of columns 2 and 3
    shares it out between two, the greedy rotation (with Q' = I) between four."""
    x = np.array([[0.2, 10.0, -0.1, 0.3], [-0.3, 9.8, 0.2, 0.1], [0.1, -10.2, 0.25, -0.2]])
    cos = sin = sqrt(0.5)
    givens = np.array([[1, 0, 0, 0], [0, cos, sin, 0], [0, -sin, cos, 0], [0, 0, 0, 1]])
    shared = x @ givens
    expected_shared = np.array(
        [
            [0.2000, 7.1418, 7.0004, 0.3000],
            [-0.3000, 6.7882, 7.0711, 0.1000],
            [0.1000, -7.3893, -7.0357, -0.2000],
        ]
    )
    rotation = greedy_rotation(torch.from_numpy(shared)[None], torch.eye(4).repeat(6, 1, 1))[0]
    # channel 2 holds the peak and the first step is the best of six, so R = E R~ E
    a, b, c, d = 1 / 2, 1 / sqrt(2), 1 / sqrt(6), 1 / sqrt(12)
    spread = np.array([[a, a, a, a], [0, c, -2 * c, c], [-3 * d, d, d, d], [0, -b, 0, b]])
    expected_rotation = spread[[1, 0, 2, 3]][:, [1, 0, 2, 3]]
    expected_spread = np.array(
        [
            [5.4612, -2.4916, 5.4284, 5.8855],
            [5.2422, -2.7296, 5.6803, 5.3836],
            [-5.5434, 2.3985, -5.8073, -5.8263],
        ]
    )
    np.testing.assert_allclose(shared, expected_shared, atol=5e-5)
    np.testing.assert_allclose(rotation.numpy(), expected_rotation, atol=1e-14)
    np.testing.assert_allclose(shared @ expected_rotation, expected_spread, atol=5e-5)
    np.testing.assert_allclose(shared @ rotation.numpy(), expected_spread, atol=5e-5)
    peaks = [np.abs(m).max() for m in (x, shared, shared @ rotation.numpy())]
    np.testing.assert_allclose(peaks, [10.2, 7.3893, 5.8855], atol=5e-5)
    assert peaks[0] > peaks[1] > peaks[2]


@pytest.mark.parametrize("legacy_index", [False, True])
def test_greedy_rotation_agrees_with_a_search_by_hand_after_every_step(legacy_index):
    x = with_outlier(3, 11, 6, channel=4, factor=20)
    x[1, 7, 2] = 90.0
    mixers = random_mixers(6, 12, generator(1))
    by_hand = [greedy_by_hand(one.numpy(), mixers.numpy(), legacy_index) for one in x]
    for steps in range(13):
        found = greedy_rotation(x, mixers[:steps], legacy_index)
        expected = np.stack([best[steps] for best in by_hand])
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    improvements = {tuple(best[steps].ravel()) for best in by_hand for steps in range(1, 13)}
    assert len(improvements) > 4  # the comparison has seen more than first steps


def test_the_legacy_index_depends_on_the_order_of_rows():
    x = with_outlier(1, 11, 6, channel=4, factor=20)
    mixers = random_mixers(6, 12, generator(1))
    for legacy_index in (False, True):
        found = [greedy_rotation(y, mixers, legacy_index) for y in (x, x.roll(1, dims=1))]
        assert torch.allclose(found[0], found[1]) is not legacy_index


def test_greedy_rotation_takes_a_planted_outlier_channel_down_to_a_third():
    x = with_outlier(2, 500, 64, channel=9, factor=40)
    r = greedy_rotation(x.float(), random_mixers(64, 32, generator()))
    before, after = x.abs().amax((1, 2)), (x @ r).abs().amax((1, 2))
    assert r.dtype == torch.float64
    assert orthogonality_error(r) < 1e-12
    assert (after < before / 3).all()


def test_greedy_rotation_leaves_a_peak_alone_that_it_cannot_lower():
    """Over all sign patterns max|x R| is the largest 1-norm of a column of R, and that is 1 for
    signed permutations only."""
    signs = torch.tensor(list(product([-1.0, 1.0], repeat=5)), dtype=torch.float64)
    r = greedy_rotation(signs[None], random_mixers(5, 40, generator()))
    assert torch.equal(r[0], torch.eye(5, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(20))
def test_greedy_rotation_never_raises_the_peak(seed):
    x = torch.randn(4, 9, 5, generator=generator(seed), dtype=torch.float64)
    r = greedy_rotation(x, random_mixers(5, 1 + seed % 3, generator(seed)))
    assert ((x @ r).abs().amax((1, 2)) <= x.abs().amax((1, 2))).all()


def test_zigzag_deals_channels_back_and_forth():
    peaks = torch.tensor([3.0, 8, 1, 6, 5, 2, 7, 4])
    # 8 7 | 6 5 | 4 3 | 2 1 dealt to blocks 0 1 | 1 0 | 0 1 | 1 0
    expected = [8.0, 5, 4, 1, 7, 6, 3, 2]
    assert peaks[zigzag(peaks, 4)].tolist() == expected
    assert zigzag(peaks, 4).tolist() == [1, 4, 7, 2, 6, 3, 0, 5]
    assert zigzag(peaks, 2).tolist() == [1, 2, 6, 5, 3, 0, 4, 7]  # four blocks: 81 72 63 54


@pytest.mark.parametrize(("width", "block"), [(16, 4), (64, 8), (96, 32), (128, 16), (576, 96)])
def test_zigzag_evens_out_block_means_better_than_the_average_permutation(width, block):
    """A mean of b of C peaks drawn without replacement has variance σ²/b·(C-b)/(C-1)."""
    g = generator(width)
    for _ in range(20):
        normals = torch.randn(4, width, generator=g, dtype=torch.float64)
        peaks = normals[0].abs() / normals[1:].norm(dim=0)  # tails of Student's t, 3 degrees
        random = peaks.var(correction=0) / block * (width - block) / (width - 1)
        dealt = peaks[zigzag(peaks, block)].view(-1, block).mean(1).var(correction=0)
        assert dealt < random


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("blocks", "block", "rows"), [(1, 6, 3), (3, 4, 1), (5, 2, 7), (2, 9, 4)])
def test_dual_transform_is_a_rotation_that_keeps_every_product_with_a_weight(
    blocks, block, rows, shared
):
    t, g = random_transform(blocks, block, shared), generator(1)
    x = torch.randn(2, rows, blocks * block, generator=g, dtype=torch.float64)
    w = torch.randn(5, blocks * block, generator=g, dtype=torch.float64)
    assert t.width == blocks * block
    assert orthogonality_error(t.dense()) < 1e-13
    assert torch.allclose(t.apply(x), x @ t.dense(), atol=1e-12)
    assert torch.allclose(t.apply(x) @ t.apply(w).mT, x @ w.mT, atol=1e-12)


@pytest.mark.parametrize("legacy_index", [False, True])
@pytest.mark.parametrize("shared", [True, False])
def test_dual_transform_is_greedy_then_zigzag_then_greedy(shared, legacy_index):
    x = with_outlier(40, 24, channel=13, factor=30)
    mixers = random_mixers(8, 6, generator())
    t = dual_transforms(x[None], mixers, shared, legacy_index)[0]

    def search(y: torch.Tensor) -> torch.Tensor:
        tiles = [y.reshape(-1, 8)] if shared else y.split(8, dim=1)
        return torch.cat([greedy_rotation(tile[None], mixers, legacy_index) for tile in tiles])

    first = search(x)
    y = x @ torch.block_diag(*first.expand(3, 8, 8))
    order = zigzag(y.abs().max(dim=0).values, 8)
    assert first.shape == (1 if shared else 3, 8, 8)
    assert torch.allclose(t.first, first, atol=1e-12)
    assert torch.equal(t.permutation, order)
    assert torch.allclose(t.second, search(y[:, order]), atol=1e-12)
    assert t.apply(x).abs().max() < y.abs().max() < x.abs().max()


def test_apply_works_in_float32_and_returns_the_dtype_it_got():
    t = random_transform(4, 8, shared=True)
    x = torch.randn(64, 32, generator=generator()).bfloat16()
    exact = x.double() @ t.dense()
    assert t.apply(x).dtype == torch.bfloat16
    # only the result is rounded to bfloat16's 8 bits
    assert ((t.apply(x) - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(t.to("cpu", dtype).apply(x), t.apply(x))


def test_a_stored_transform_comes_back_the_same():
    t = random_transform(3, 4, shared=False)
    back = DualTransform.from_tensors(t.tensors())
    assert torch.equal(back.dense(), t.dense())
    assert all(tensor.is_contiguous() for tensor in t.tensors().values())  # for safetensors


def test_what_is_no_rotation_or_no_permutation_is_refused():
    eye, order = torch.eye(4).double()[None], torch.arange(8)
    for first, permutation, second, message in [
        (2 * eye, order, eye, "first rotation is not orthogonal"),
        (eye, order, 2 * eye, "second rotation is not orthogonal"),
        (eye, order.clamp(max=6), eye, "not a permutation"),
        (eye.expand(3, 4, 4), order, eye, "does not tile width 8"),
    ]:
        with pytest.raises(ResultError, match=message):
            DualTransform(first, permutation, second)


def test_blocks_alone_are_the_largest_power_of_two_that_divides_the_width():
    assert [power_block(width, 128) for width in (1536, 576, 896, 40, 7)] == [128, 64, 128, 8, 1]
    assert power_block(576, 16) == 16


def test_a_block_that_does_not_divide_the_width_is_answered_with_one_that_does(caplog):
    caplog.set_level("INFO")
    assert [largest_block(width, 128) for width in (1536, 128)] == [128, 128]
    assert not caplog.records
    assert [largest_block(width, 128) for width in (576, 64, 577)] == [96, 64, 1]
    assert "blocks of 96" in caplog.text
    with pytest.raises(InputError, match="multiple of block 128; use 96"):
        dual_transforms(torch.zeros(1, 2, 576), random_mixers(128, 0, generator()))
