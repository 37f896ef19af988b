"""The clip search against brute force."""

import pytest
import torch

from spinlab.config import ClipSearch
from spinlab.formats import IntegerFormat, clip
from spinlab.formats.clip import search_clip
from spinlab.formats.integer import nearest


def brute_force(
    weight: torch.Tensor, grid: IntegerFormat, group: int, search: ClipSearch
) -> torch.Tensor:
    """Try every ratio with pow and no pruning; written from the definition."""
    rows = weight.double().reshape(-1, group or weight.shape[1])
    best = []
    for row in rows:
        low, high = min(row.min().item(), 0), max(row.max().item(), 0)
        errors = []
        for ratio in search.ratios():
            if grid.symmetric:
                scale, zero = max(row.abs().max().item(), 0) * ratio / grid.highest, 0
            else:
                scale = (high - low) * ratio / grid.highest
                zero = round(-low * ratio / scale)
            q = torch.clamp(torch.round(row / scale) + zero, grid.lowest, grid.highest)
            errors.append(((scale * (q - zero) - row).abs() ** search.norm).sum().item())
        best.append(min(errors))
    return torch.tensor(best)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [0, 32])
def test_search_finds_the_brute_force_optimum(symmetric, group):
    """Errors, not ratios, are compared: two ratios may tie within rounding."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 64, generator=g) * torch.rand(12, 1, generator=g)
    weight[0, 5] = 9.0  # an outlier that wants clipping
    grid, search = IntegerFormat(4, symmetric), ClipSearch()
    ratios = search_clip(weight, grid, group, search).reshape(-1)
    expected = brute_force(weight, grid, group, search)
    found = [
        error_of(row, ratio, grid, search.norm)
        for row, ratio in zip(weight.reshape(len(ratios), -1), ratios.tolist(), strict=True)
    ]
    assert torch.allclose(torch.stack(found), expected.float(), rtol=2e-2)


def test_ratios_that_are_tried_at_once_are_the_same_and_nothing_is_asked_in_between(monkeypatch):
    weight, asked = torch.randn(6, 64, generator=torch.Generator().manual_seed(1)), []
    one_by_one = search_clip(weight, IntegerFormat(4, True), 16, ClipSearch())
    monkeypatch.setattr(clip, "_TRIED_ELEMENTS", {"cpu": 1 << 22})
    monkeypatch.setattr(clip, "_clipped_error", lambda *arguments: asked.append(arguments))
    assert torch.equal(search_clip(weight, IntegerFormat(4, True), 16, ClipSearch()), one_by_one)
    assert not asked


def error_of(row: torch.Tensor, ratio: float, grid: IntegerFormat, norm: float) -> torch.Tensor:
    """Score one chosen ratio with the package's own quantizer."""
    parameters = grid.parameters(row.min()[None] * ratio, row.max()[None] * ratio)
    rounded = grid.decode(grid.encode(row, parameters, nearest), parameters)
    return (rounded - row).abs().pow(norm).sum()


def test_without_a_search_nothing_is_clipped():
    assert torch.equal(
        search_clip(torch.randn(3, 8), IntegerFormat(4, True), 0, ClipSearch(search=False)),
        torch.ones(3, 1, 1),
    )


def test_candidates_are_the_published_eighty():
    ratios = ClipSearch().ratios()
    assert len(ratios) == 80
    assert ratios[0] == 1.0
    assert abs(ratios[-1] - 0.21) < 1e-12
