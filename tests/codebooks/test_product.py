from __future__ import annotations

import pytest
import torch

from vqkv.codebooks.ema import EMAConfig
from vqkv.codebooks.kmeans import KMeans, KMeansConfig
from vqkv.codebooks.product import ProductLearner
from vqkv.codebooks.residual import ResidualLearnerConfig
from vqkv.codebooks.uniform import UniformConfig
from vqkv.errors import StateError

from .data import mixture


def test_each_run_has_its_learner() -> None:
    x = mixture(200, 4, 1)
    learner = ProductLearner(learners=(KMeansConfig(), UniformConfig(low=-1, high=1)))
    learner.fit(x, 4, seed=1)
    assert learner.codewords_.shape == (4, 1, 4, 1)
    assert torch.equal(learner.codewords_[:2], KMeans().fit(x[:, :2], 4, seed=1).codewords_)
    assert learner.codewords_[3, 0, :, 0].tolist() == [-0.75, -0.25, 0.25, 0.75]
    assert len(learner.health_) == 2


def test_each_run_has_its_weights() -> None:
    x, weights = mixture(200, 4, 2), torch.rand(200, 4)
    both = ProductLearner(learners=(KMeansConfig(), KMeansConfig())).fit(x, 4, weights)
    last = KMeans().fit(x[:, 2:], 4, weights[:, 2:])
    assert torch.equal(both.codewords_[2:], last.codewords_)


def test_fixed_only_where_every_run_is() -> None:
    grid = UniformConfig(low=0, high=1)
    fixed = ProductLearner(learners=(grid, grid)).fixed(4, 1, 8)
    assert fixed is not None
    assert fixed.shape == (4, 1, 8, 1)
    assert ProductLearner(learners=(grid, EMAConfig())).fixed(4, 1, 8) is None


def test_runs_that_do_not_fit() -> None:
    x = mixture(50, 3, 1)
    with pytest.raises(StateError, match="2 learners share subspaces equally, given 3 subspaces"):
        ProductLearner(learners=(KMeansConfig(), KMeansConfig())).fit(x, 4)
    with pytest.raises(StateError, match=r"equally many stages, given \[1, 2\]"):
        ProductLearner(learners=(KMeansConfig(), ResidualLearnerConfig(stages=2))).fit(x[:, :2], 4)


def test_runs_stream_as_their_learners_do() -> None:
    x = mixture(600, 4, 3)
    streamed = ProductLearner(learners=[{"type": "kmeans"}, {"type": "ema"}])
    for batch in x.split(200):
        streamed.partial_fit(batch, 8)
    alone = KMeans()
    for batch in x.split(200):
        alone.partial_fit(batch[:, :2], 8)
    assert torch.equal(streamed.codewords_[:2], alone.codewords_)
    assert streamed.codewords_.shape == (4, 1, 8, 3)
