"""The metrics of a model."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.calibration.stubs import StubTokenizer, scheme, write_text
from tests.tiny_models import tiny_model
from vqkv.attention import attention_modules, output_projection
from vqkv.cache.rope import RotaryAdapter
from vqkv.calibration import calibrate
from vqkv.calibration.source import SHRINKAGE, CapturedStates
from vqkv.calibration.spool import Spool
from vqkv.codec import Codec
from vqkv.compressor import KVCompressor
from vqkv.errors import ModelError, StateError
from vqkv.geometry import Geometry
from vqkv.scheme_files import load_scheme, scheme_from_dict

CONTEXT, DIM, QUERIES, HEADS = 64, 16, 4, 2
SPECTRAL = {"transforms": [{"type": "spectral", "metric": "query"}]}
GRADIENTS = torch.randn(1, HEADS, 500, DIM, generator=torch.Generator().manual_seed(2))
GRADIENTS = GRADIENTS * torch.linspace(0.1, 3, DIM)


def source(
    folder: Path, family: str = "llama", rope: str = "pre"
) -> tuple[Any, CapturedStates, Any]:
    model = tiny_model(family)
    given = scheme(rope).to_dict()
    from vqkv.scheme_files import scheme_from_dict

    made = scheme_from_dict({**given, "keys": {**given["keys"], **SPECTRAL}})
    compressor = KVCompressor(made, Geometry.from_model(model))
    spool = Spool(folder, 2)
    queries = torch.randn(1, QUERIES, 500, DIM, generator=torch.Generator().manual_seed(0))
    queries = queries * torch.linspace(0.1, 3, DIM)
    spool.append(0, "keys", torch.zeros(1, HEADS, 500, DIM))
    spool.append(0, "grad_pre_keys", GRADIENTS)
    spool.add_queries(0, "pre_queries" if rope == "pre" else "queries", queries)
    spool.finish_window()
    return model, CapturedStates(spool, model, compressor, CONTEXT), queries[:, :, 2:]


def test_the_query_metric_is_the_mean_squared_score_of_an_error(tmp_path: Path) -> None:
    """Post-RoPE: `E[(q·e)²]` over tokens and the query heads that read a KV head."""
    _, captured, queries = source(tmp_path, rope="post")
    metric = captured.metric(0, "keys", "query")
    error = torch.randn(DIM, generator=torch.Generator().manual_seed(1)).double()
    for head in range(HEADS):
        mine = queries[0, 2 * head : 2 * head + 2].double()
        expected = (mine @ error).square().mean()
        torch.testing.assert_close(error @ metric[head] @ error, expected)


@pytest.mark.parametrize("family", ["llama", "glm"])
def test_before_rope_it_is_averaged_over_distances(tmp_path: Path, family: str) -> None:
    model, captured, queries = source(tmp_path, family)
    metric = captured.metric(0, "keys", "query")
    adapter = RotaryAdapter(model, [0])
    error = torch.randn(DIM, generator=torch.Generator().manual_seed(1))
    # Brute force: rotate the error by every distance, weighted as causal attention sees them.
    distances = torch.arange(CONTEXT)
    tables = adapter.tables(0, distances[None])
    turned = adapter.rotate(0, error.expand(1, 1, CONTEXT, DIM), tables)[0, 0].double()
    weight = (CONTEXT - distances).double()
    for head in range(HEADS):
        mine = queries[0, 2 * head : 2 * head + 2].double()
        scores = (mine @ turned.T).square().mean((0, 1))
        expected = (scores * weight).sum() / weight.sum()
        torch.testing.assert_close(
            error.double() @ metric[head] @ error.double(), expected, rtol=0.05, atol=0
        )
    assert torch.equal(metric, metric.transpose(1, 2))


def test_the_output_metric_is_the_squared_error_after_the_projection(tmp_path: Path) -> None:
    model, captured, _ = source(tmp_path)
    metric = captured.metric(0, "values", "output")
    weight = output_projection(attention_modules(model)[0], QUERIES * DIM).double()
    error = torch.randn(DIM, generator=torch.Generator().manual_seed(1)).double()
    for head in range(HEADS):
        expected = torch.zeros((), dtype=torch.float64)
        for query in (2 * head, 2 * head + 1):
            placed = torch.zeros(QUERIES, DIM, dtype=torch.float64)
            placed[query] = error
            expected = expected + (weight @ placed.flatten()).square().sum()
        torch.testing.assert_close(error @ metric[head] @ error, expected.detach())


def test_the_fisher_metric_is_the_mean_squared_slope_of_an_error(tmp_path: Path) -> None:
    _, captured, _ = source(tmp_path)
    metric = captured.metric(0, "keys", "fisher")
    mine = GRADIENTS[0, :, 2:].double()
    products = mine.mT @ mine
    even = products.diagonal(dim1=1, dim2=2).mean(1)
    error = torch.randn(DIM, generator=torch.Generator().manual_seed(1)).double()
    slopes = (mine @ error).square().sum(1)
    expected = (1 - SHRINKAGE) * slopes + SHRINKAGE * even * error.square().sum()
    torch.testing.assert_close(error @ metric @ error, expected)


def test_the_metric_of_all_heads_is_theirs_and_what_they_do_to_each_other(tmp_path: Path) -> None:
    _, captured, _ = source(tmp_path)
    (across,) = captured.across_heads(0, "keys", HEADS)
    mine = GRADIENTS[0, :, 2:].double()
    apart = captured.across_heads(0, "keys", 1)
    torch.testing.assert_close(apart[:, 0, :, 0], captured.metric(0, "keys", "fisher"))
    for one, other in product(range(HEADS), repeat=2):
        expected = (1 - SHRINKAGE) * mine[one].T @ mine[other]
        if one == other:
            expected = captured.metric(0, "keys", "fisher")[one]
        torch.testing.assert_close(across[one, :, other], expected)


def test_models_without_a_known_output_projection() -> None:
    with pytest.raises(ModelError, match="no output projection of 64 channels among o_proj"):
        output_projection(torch.nn.Linear(3, 3), 64)


def test_products_survive_a_kill_and_half_a_window_does_not(tmp_path: Path) -> None:
    x = torch.randn(1, QUERIES, 30, DIM)
    spool = Spool(tmp_path, 0)
    for _ in range(2):
        spool.append(0, "keys", torch.zeros(1, HEADS, 30, DIM))
        spool.add_queries(0, "queries", x)
        spool.finish_window()
    whole = spool.query_moments(0, "queries")
    spool.add_queries(0, "queries", 100 * x)
    spool.add_queries(0, "pre_queries", x)
    assert torch.equal(Spool(tmp_path, 0).query_moments(0, "queries"), whole)
    assert len(list(tmp_path.glob("products-*"))) == 1
    expected = torch.einsum("qtd,qte->qde", x[0].double(), x[0].double()) / 30
    torch.testing.assert_close(whole, expected)


def test_nan_in_queries_names_the_place(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="queries of layer 3 in window 0"):
        Spool(tmp_path, 0).add_queries(3, "queries", torch.full((1, 1, 2, 4), torch.nan))


def test_reconstructions_are_kept_on_disk_until_they_are_forgotten(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 0)
    spool.append(0, "keys", torch.randn(1, HEADS, 30, DIM))
    spool.finish_window()
    doubled = spool.kept(0, "keys", spool.states(0, "keys").map(lambda x: 2 * x))
    expected = 2 * torch.cat(list(spool.states(0, "keys").chunks()))
    assert torch.equal(torch.cat(list(doubled.chunks())), expected)
    spool.forget(0, "keys")
    assert not list(tmp_path.glob("*.decoded"))


def test_a_spectral_scheme_is_calibrated_and_resumed(
    run_spectral: Callable[..., KVCompressor], tmp_path: Path
) -> None:
    once = run_spectral(tmp_path / "once")
    again = run_spectral(tmp_path / "again", interrupt=True)
    for (_, name, a), (_, _, b) in zip(once.tensors(), again.tensors(), strict=True):
        assert torch.equal(a, b), name


@pytest.fixture
def run_spectral(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., KVCompressor]:
    """Calibrates spectral codes on predicted streams; on demand killed while it learns."""
    text = write_text(tmp_path / "text.txt", 600)
    stream = {
        "grouping": {"type": "strided", "dim": 4},
        "quantizer": {"type": "product", "code_bits": 3, "learner": {"type": "kmeans"}},
    }
    keys = {"type": "linear", "sources": [{"stream": "keys", "back": 1}]}
    values = {"type": "linear", "sources": [{"stream": "keys", "back": 0}]}
    made = scheme_from_dict(
        {
            "name": "tiny",
            "keys": {"rope": "pre", **stream, "predictor": keys, **SPECTRAL},
            "values": {
                **stream,
                "predictor": values,
                "transforms": [{"type": "spectral", "metric": "output", "scope": "layer"}],
            },
            "layers": [{"layers": [0], "keys": {"predictor": None}}],
        }
    )
    original = Codec.fit_quantizers

    def run(out: Path, interrupt: bool = False) -> KVCompressor:
        def killed(codec: Codec, *arguments: Any) -> None:
            if codec.where == "values of layer 1":
                raise KeyboardInterrupt
            original(codec, *arguments)

        arguments: tuple[Any, ...] = (tiny_model("llama"), StubTokenizer(), made, [text])
        if interrupt:
            monkeypatch.setattr(Codec, "fit_quantizers", killed)
            with pytest.raises(KeyboardInterrupt):
                calibrate(*arguments, tokens=400, context=100, out=out)
            monkeypatch.setattr(Codec, "fit_quantizers", original)
        return calibrate(*arguments, tokens=400, context=100, out=out).compressor

    return run


def test_a_source_that_learns_nothing_is_captured_all_the_same(tmp_path: Path) -> None:
    """AQUA-KV's first layer takes fixed grids; the next ones are predicted from it."""
    text = write_text(tmp_path / "text.txt", 600)
    tokenizer: Any = StubTokenizer()
    made = load_scheme("aquakv-2")
    compressor = calibrate(
        tiny_model("llama"), tokenizer, made, [text], tokens=400, context=100, out=tmp_path / "out"
    ).compressor
    assert compressor.codec(0, "keys").config.data_free
    assert compressor.codec(1, "keys").state()["predictor.weight"].abs().max() > 0
