from __future__ import annotations

import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqkv.codebooks import assignment
from vqkv.codebooks.assignment import Backend, step_for, torch_step
from vqkv.codebooks.kmeans import KMeans
from vqkv.codebooks.starts import plus_plus, random_samples
from vqkv.errors import KernelError, NotFittedError, StateError
from vqkv.kernels import native

from .data import inertia, mixture

CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(not native.available(), reason="no compiled kernels here")
LLOYD = [pytest.param("native", marks=needs_native), "torch", "faiss"]
BACKENDS = [*LLOYD, "sklearn"]


def start_of(x: torch.Tensor, codewords: int) -> torch.Tensor:
    return x[:codewords].transpose(0, 1).contiguous()


def lloyd_step(x: torch.Tensor, start: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """One update in fp64, by loops; weights `[N, M]`."""
    after = start.double().clone()
    for m in range(x.shape[1]):
        codes = torch.cdist(x[:, m].double(), start[m].double()).argmin(1)
        for k in range(start.shape[1]):
            w = weights[codes == k, m].double()
            if w.sum() > 0:
                after[m, k] = (w[:, None] * x[codes == k, m].double()).sum(0) / w.sum()
    return after


@pytest.mark.parametrize("backend", LLOYD)
@pytest.mark.parametrize("weighted", [False, True])
def test_one_iteration_is_lloyds_update(backend: Backend, weighted: bool) -> None:
    x = mixture(500, 3, 4)
    weights = 2 * torch.rand(500, 3) if weighted else torch.ones(500, 3)
    learner = KMeans(iterations=1, backend=backend, revive=False)
    learner.fit(x, 16, weights if weighted else None, init=start_of(x, 16))
    expected = lloyd_step(x, start_of(x, 16), weights)
    torch.testing.assert_close(learner.codewords_[:, 0].double(), expected, rtol=1e-5, atol=1e-5)
    difference = x.double().unsqueeze(2) - learner.codewords_[:, 0].double()
    error = (difference.square().sum(-1).amin(-1) * weights.double()).sum(0)  # [M]
    torch.testing.assert_close(learner.statistics_.inertia, error, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dim", "codewords"), [(1, 4), (4, 64), (32, 16)])
def test_backends_agree_from_the_same_start(backend: Backend, dim: int, codewords: int) -> None:
    x = mixture(2000, 3, dim)
    start = plus_plus(x, codewords, None, torch.Generator().manual_seed(0))
    reference = KMeans(iterations=10, backend="torch").fit(x, codewords, init=start)
    learner = KMeans(iterations=10, backend=backend).fit(x, codewords, init=start)
    tolerance = 1e-2 if backend == "sklearn" else 1e-3
    expected = inertia(x, reference.codewords_[:, 0])
    assert inertia(x, learner.codewords_[:, 0]) == pytest.approx(expected, rel=tolerance)
    assert learner.health_[0].inertia[-1] == pytest.approx(
        inertia(x, learner.codewords_[:, 0]), rel=1e-5
    )


@pytest.mark.parametrize("backend", LLOYD)
def test_samples_far_from_the_origin(backend: Backend) -> None:
    x = 0.1 * torch.randn(1000, 2, 4, generator=torch.Generator().manual_seed(0))
    near = KMeans(backend=backend).fit(x, 16, init=start_of(x, 16))
    far = KMeans(backend=backend).fit(x + 100, 16, init=start_of(x, 16) + 100)
    assert far.health_[0].inertia[-1] == pytest.approx(near.health_[0].inertia[-1], rel=0.01)


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_the_pass_over_samples_goes_block_by_block(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weights = mixture(300, 3, 4), torch.rand(300, 3)
    step = step_for(backend, CPU)
    whole = step(x, start_of(x, 16), weights)
    monkeypatch.setattr(assignment, "MAX_SCALARS", 3 * 4 * 70)
    parts = step(x, start_of(x, 16), weights)
    torch.testing.assert_close(parts.sums, whole.sums)
    torch.testing.assert_close(parts.counts, whole.counts)
    torch.testing.assert_close(parts.inertia, whole.inertia)


@pytest.mark.parametrize("backend", LLOYD)
def test_statistics_of_parts_add_up(backend: Backend) -> None:
    x = mixture(300, 3, 4)
    step = step_for(backend, CPU)
    whole = step(x, start_of(x, 16), None)
    merged = step(x[:100], start_of(x, 16), None) + step(x[100:], start_of(x, 16), None)
    assert torch.equal(merged.counts, whole.counts)
    assert whole.counts.sum(1).tolist() == [300, 300, 300]
    torch.testing.assert_close(merged.sums, whole.sums, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(merged.inertia, whole.inertia, rtol=1e-5, atol=0)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    dim=st.integers(1, 5),
    codewords=st.integers(1, 20),
    copies=st.integers(1, 10),
    revive=st.booleans(),
)
def test_inertia_never_rises(
    seed: int, dim: int, codewords: int, copies: int, revive: bool
) -> None:
    x = mixture(60, 2, dim, seed=seed)
    x = torch.cat([x, x[:1].expand(6 * copies, -1, -1)])  # many equal samples make dead codewords
    learner = KMeans(iterations=8, backend="torch", revive=revive).fit(x, codewords, seed=seed)
    steps = learner.health_[0].inertia
    assert len(steps) == 9
    slack = 1e-6 * float(x.square().sum(-1).mean())
    assert all(after <= before + slack for before, after in pairwise(steps))
    assert torch.isfinite(learner.codewords_).all()


def test_health_tells_how_far_the_last_iteration_still_came() -> None:
    x = mixture(600, 2, 4)
    gains = []
    for iterations in (2, 40):
        health = KMeans(iterations=iterations, backend="torch").fit(x, 16).health_[0]
        assert health.last_gain == 1 - health.inertia[-1] / health.inertia[-2]
        gains.append(health.last_gain)
    assert gains[1] < gains[0] / 4


@pytest.mark.parametrize("backend", LLOYD)
def test_revival_gives_dead_codewords_a_use(backend: Backend) -> None:
    x = torch.randn(1000, 2, 3, generator=torch.Generator().manual_seed(0))
    start = start_of(x, 16)
    start[:, 8:] = 1e3  # nearest to no sample
    left = KMeans(backend=backend, revive=False).fit(x, 16, init=start)
    revived = KMeans(backend=backend).fit(x, 16, init=start)
    assert left.health_[0].dead_after == 16
    assert left.health_[0].dead_before == 20 * 16
    assert revived.health_[0].dead_after == 0
    assert revived.health_[0].dead_before >= 16
    assert revived.health_[0].inertia[-1] < 0.8 * left.health_[0].inertia[-1]
    assert revived.health_[0].entropy > left.health_[0].entropy


def test_k_means_plus_plus_finds_separate_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    middles = 100 * torch.randn(3, 24, 4, generator=generator)
    of = torch.arange(480) % 24
    x = middles[:, of].transpose(0, 1) + 0.1 * torch.randn(480, 3, 4, generator=generator)
    learner = KMeans(iterations=2, init="kmeans++").fit(x, 24)
    assert learner.health_[0].inertia[-1] < 0.1  # 4 · 0.1² where every cluster has a codeword


@pytest.mark.parametrize("start", [random_samples, plus_plus])
def test_starts_are_distinct_samples_of_positive_weight(start: object) -> None:
    x = torch.arange(200.0).view(100, 2, 1)
    weights = torch.zeros(100, 2)
    weights[::3] = torch.rand(34, 2) + 0.1
    assert callable(start)
    found = start(x, 34, weights, torch.Generator().manual_seed(0))
    for m in range(2):
        assert found[m, :, 0].sort().values.tolist() == x[::3, m, 0].tolist()


def test_random_start_prefers_heavy_samples() -> None:
    x = torch.arange(1000.0).view(1000, 1, 1)
    weights = torch.ones(1000)
    weights[500:] = 9.0
    drawn = random_samples(x, 200, weights[:, None], torch.Generator().manual_seed(0))
    assert 160 < int((drawn >= 500).sum()) < 195  # 180 expected without exhaustion


@pytest.mark.parametrize("init", ["random", "kmeans++"])
def test_same_seed_same_codewords(init: str) -> None:
    x = mixture(400, 2, 4)
    first, again, other = (KMeans(init=init).fit(x, 32, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.codewords_, again.codewords_)
    assert first.health_ == again.health_
    assert not torch.equal(first.codewords_, other.codewords_)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_two_is_the_sample_twice(backend: Backend) -> None:
    x = mixture(400, 2, 4)
    weights = torch.ones(400)
    weights[100:250] = 2
    doubled = torch.cat([x, x[100:250]])
    start = start_of(x, 16)
    learner = KMeans(iterations=5, backend=backend)
    by_weight = learner.fit(x, 16, weights, init=start).codewords_.clone()
    by_copies = learner.fit(doubled, 16, init=start).codewords_
    torch.testing.assert_close(by_weight, by_copies, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", LLOYD)
def test_weight_zero_is_no_sample(backend: Backend) -> None:
    x = mixture(400, 2, 4)
    weights = torch.ones(400, 2)
    weights[300:] = 0
    learner = KMeans(iterations=5, backend=backend)
    weighted = learner.fit(x, 16, weights, init=start_of(x, 16)).codewords_.clone()
    without = learner.fit(x[:300], 16, init=start_of(x, 16)).codewords_
    torch.testing.assert_close(weighted, without, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", ["random", "kmeans++"])
def test_as_many_codewords_as_samples_leave_no_error(init: str) -> None:
    x = torch.randn(32, 2, 4)
    learner = KMeans(init=init, backend="torch").fit(x, 32)
    assert learner.health_[0].inertia[-1] < 1e-10
    assert learner.health_[0].entropy == pytest.approx(5.0)


def test_one_codeword_is_the_weighted_mean() -> None:
    x, weights = mixture(300, 2, 4), torch.rand(300, 2)
    learner = KMeans().fit(x, 1, weights)
    mean = (x * weights.unsqueeze(-1)).sum(0) / weights.sum(0).unsqueeze(-1)
    torch.testing.assert_close(learner.codewords_[:, 0, 0], mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["random", "kmeans++"])
def test_equal_samples(init: str) -> None:
    learner = KMeans(init=init).fit(torch.full((20, 2, 3), 7.0), 8)
    assert inertia(torch.full((1, 2, 3), 7.0), learner.codewords_[:, 0]) == 0
    assert learner.health_[0].dead_after == 2 * 7


def test_a_stream_comes_close_to_a_fit_of_everything() -> None:
    x = torch.randn(3000, 2, 4, generator=torch.Generator().manual_seed(0))
    streamed = KMeans()
    for batch in x.split(500):
        streamed.partial_fit(batch, 32)
    assert streamed.statistics_.counts.sum(1).tolist() == [3000, 3000]
    assert len(streamed.health_[0].inertia) == 21 + 5
    whole = KMeans().fit(x, 32)
    first = KMeans().fit(x[:500], 32)
    streamed_error = inertia(x, streamed.codewords_[:, 0])
    assert streamed_error < inertia(x, first.codewords_[:, 0])
    assert streamed_error < 1.1 * inertia(x, whole.codewords_[:, 0])


def test_a_stream_takes_small_batches_but_no_other_shape() -> None:
    x = mixture(300, 2, 4)
    learner = KMeans().partial_fit(x, 32).partial_fit(x[:3], 32)
    with pytest.raises(StateError, match=r"M, K, d = \[2, 32, 4\], given \[2, 16, 4\]"):
        learner.partial_fit(x, 16)
    with pytest.raises(StateError, match=r"given \[2, 32, 2\]"):
        learner.partial_fit(x[..., :2], 32)


@pytest.mark.parametrize(
    ("samples", "codewords", "weights", "message"),
    [
        (torch.zeros(5, 4), 2, None, r"samples have shape \[N, M, d\], given \[5, 4\]"),
        (torch.zeros(5, 1, 4), 8, None, r"8 codewords need at least as many samples, given 5"),
        (torch.tensor([[[0.0, float("nan")]]]), 1, None, r"hold nan at \[0, 0, 1\]"),
        (torch.tensor([[[float("-inf"), 0.0]]]), 1, None, r"hold -inf at \[0, 0, 0\]"),
        (torch.zeros(5, 2, 4), 2, torch.ones(4), r"\[N\] or \[N, M\] = \[5, 2\], given \[4\]"),
        (torch.zeros(5, 2, 4), 2, -torch.ones(5), "weights are not negative, given -1"),
        (torch.zeros(2, 2, 4), 2, torch.eye(2) * float("inf"), "weights .* hold inf"),
        (torch.zeros(2, 2, 4), 2, torch.tensor([[1.0, 0], [1, 0]]), "subspace 1 are all 0"),
    ],
)
def test_bad_samples(
    samples: torch.Tensor, codewords: int, weights: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(StateError, match=message):
        KMeans().fit(samples, codewords, weights)


def test_bad_start() -> None:
    x = mixture(50, 2, 4)
    with pytest.raises(StateError, match=r"init has shape \[M, K, d\] = \[2, 8, 4\], given"):
        KMeans().fit(x, 8, init=torch.zeros(2, 4, 4))
    with pytest.raises(StateError, match=r"init \[M, K, d\] hold nan at \[0, 0, 0\]"):
        KMeans().fit(x, 8, init=torch.full((2, 8, 4), float("nan")))


def test_a_missing_faiss_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(KernelError, match=r"'faiss' needs faiss.*pip install 'vqkv\[cpu\]'"):
        KMeans(backend="faiss").fit(mixture(50, 2, 4), 8)


def test_native_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelError, match=r"'native' runs on cpu, the samples are on cuda"):
        step_for("native", torch.device("cuda"))
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "unavailable_reason", lambda: "built without a compiler")
    with pytest.raises(KernelError, match="'native': built without a compiler"):
        step_for("native", CPU)
    assert step_for("auto", CPU) is torch_step


def test_before_fit() -> None:
    with pytest.raises(NotFittedError, match="KMeans has no codewords yet: call fit first"):
        KMeans().check_fitted()
