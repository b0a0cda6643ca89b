"""Learners beyond k-means: Gaussian grids, gains and shapes, SimVQ, shrunk ranges."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vqkv.codebooks import LEARNERS
from vqkv.codebooks.gain_shape import GainShape
from vqkv.codebooks.gaussian import Gaussian, gaussian_grid, lloyd_max
from vqkv.codebooks.kmeans import KMeans
from vqkv.codebooks.simvq import SimVQ
from vqkv.codebooks.starts import random_samples
from vqkv.codebooks.uniform import Uniform
from vqkv.errors import SchemeError, StateError
from vqkv.scheme_files import scheme_from_dict


def gaussian(count: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


class TestGaussian:
    @pytest.mark.parametrize(
        ("levels", "distortion"), [(2, 0.3634), (4, 0.1175), (8, 0.03454), (16, 0.009497)]
    )
    def test_levels_have_the_distortion_of_max(self, levels: int, distortion: float) -> None:
        """J. Max, Quantizing for minimum distortion (1960), table I."""
        points = lloyd_max(levels).double()
        edges = (points[1:] + points[:-1]) / 2
        grid = torch.linspace(-12, 12, 2_000_001, dtype=torch.float64)
        nearest = points[torch.bucketize(grid, edges)]
        density = torch.exp(-grid.square() / 2) / (2 * torch.pi) ** 0.5
        found = torch.trapezoid((grid - nearest).square() * density, grid)
        assert float(found) == pytest.approx(distortion, rel=1e-3)

    @pytest.mark.parametrize("bits", [8, 10])
    def test_many_levels_come_near_what_a_fine_grid_can_do(self, bits: int) -> None:
        """Panter and Dite (1951): distortion of K levels tends to `√3 π / (2 K²)` from below."""
        points = lloyd_max(2**bits).double()
        grid = torch.linspace(-9, 9, 2_000_001, dtype=torch.float64)
        nearest = points[torch.bucketize(grid, (points[1:] + points[:-1]) / 2)]
        density = torch.exp(-grid.square() / 2) / (2 * torch.pi) ** 0.5
        found = float(torch.trapezoid((grid - nearest).square() * density, grid))
        assert 0.97 < found * 4**bits / (3**0.5 * torch.pi / 2) < 1

    @pytest.mark.parametrize(("dim", "bits"), [(2, 4), (2, 6), (2, 8), (4, 8), (8, 8)])
    def test_grids_beat_levels_and_not_shannon(self, dim: int, bits: int) -> None:
        grid = gaussian_grid(dim, 2**bits)
        x = gaussian(20_000, dim, seed=5)
        error = float(torch.cdist(x, grid).amin(1).square().mean()) / dim
        rate = bits / dim
        assert error > 2 ** (-2 * rate), "below the rate-distortion bound"
        if rate >= 1:
            levels = lloyd_max(round(2**rate))
            scalar = float((x[..., None] - levels).abs().amin(-1).square().mean())
            assert error < scalar

    def test_every_subspace_has_the_same_grid(self) -> None:
        fixed = Gaussian().fixed(3, 2, 16)
        assert fixed is not None and fixed.shape == (3, 1, 16, 2)
        assert torch.equal(fixed[0], fixed[2])

    def test_grids_that_there_are_not(self) -> None:
        with pytest.raises(StateError, match="no Gaussian grid of 32 points for d = 2; there are"):
            gaussian_grid(2, 32)
        stream = {
            "grouping": {"type": "contiguous", "dim": 3},
            "quantizer": {"type": "product", "code_bits": 4, "learner": {"type": "gaussian"}},
        }
        with pytest.raises(SchemeError, match=r"values.*no Gaussian grid of 16 points for d = 3"):
            scheme_from_dict({"name": "x", "keys": {"rope": "post", **stream}, "values": stream})


def inertia(learner: Any) -> float:
    return float(learner.health_[0].inertia[-1])


@pytest.mark.parametrize("name", ["gain_shape", "simvq"])
def test_the_best_codewords_are_kept(name: str) -> None:
    learner = LEARNERS.get(name)().fit(gaussian(2000, 2, 8), 32)
    *before, last = learner.health_[0].inertia
    assert last == pytest.approx(min(before))


def test_gains_are_longer_than_means() -> None:
    """On the sphere a mean is shorter than its samples; a gain is the length along the shape."""
    x = torch.nn.functional.normalize(gaussian(4000, 1, 32), dim=2)
    shaped = GainShape(iterations=10).fit(x, 16).codewords_
    mean = KMeans(iterations=10).fit(x, 16).codewords_
    # All samples are as long, so unit vectors are the vectors and both are the same learner.
    assert shaped.norm(dim=-1).mean() == pytest.approx(float(mean.norm(dim=-1).mean()), rel=0.05)
    uneven = x * torch.rand(4000, 1, 1, generator=torch.Generator().manual_seed(1)).exp()
    by_unit = GainShape(shape="unit").fit(uneven, 16)
    by_vector = GainShape(shape="vector").fit(uneven, 16)
    assert not torch.equal(by_unit.codewords_, by_vector.codewords_)


def test_shapes_of_vectors_are_means() -> None:
    """`s = Σx / ‖Σx‖` and `g = ⟨Σx, s⟩ / n` make `g s = Σx / n`: Lloyd's update."""
    x = gaussian(500, 1, 4)
    learner = GainShape(shape="vector", iterations=40).fit(x, 8)
    codes = torch.cdist(x[:, 0], learner.codewords_[0, 0]).argmin(1)
    means = torch.stack([x[codes == k, 0].mean(0) for k in range(8)])
    torch.testing.assert_close(learner.codewords_[0, 0], means, atol=0.05, rtol=0.05)


def test_a_map_is_better_than_none_and_free_codewords_better_still() -> None:
    mixing = torch.diag(torch.tensor([4.0, 1.0, 0.3, 0.1]))
    x = gaussian(3000, 1, 4) @ mixing
    mapped = SimVQ(iterations=15).fit(x, 32)
    assert inertia(KMeans().fit(x, 32)) < inertia(mapped) < mapped.health_[0].inertia[0]


def test_simvq_s_codewords_are_a_linear_map_of_samples() -> None:
    x = gaussian(500, 1, 4)
    base = random_samples(x, 32, None, torch.Generator().manual_seed(0))[0]
    words = SimVQ().fit(x, 32, seed=0).codewords_[0, 0]
    mapped = base @ torch.linalg.lstsq(base, words).solution
    torch.testing.assert_close(mapped, words, atol=1e-4, rtol=1e-4)


def test_a_shrunk_range_has_finer_levels() -> None:
    x = gaussian(1000, 1, 1)
    wide, narrow = (Uniform(shrink=s).fit(x, 4).codewords_.flatten() for s in (1.0, 0.5))
    assert float(narrow.diff()[0]) == pytest.approx(0.5 * float(wide.diff()[0]), rel=1e-4)
    assert float(narrow.mean()) == pytest.approx(float(wide.mean()), abs=1e-5)
    with pytest.raises(SchemeError, match="`shrink` is for ranges from data"):
        Uniform(low=0.0, high=1.0, shrink=0.5)
