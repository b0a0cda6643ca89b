"""Conformance checks for plugins: one call in a plugin's tests runs the whole contract.

    from vqkv.testing import check_quantizer
    def test_mine():
        check_quantizer(MyQuantizer, code_bits=6)

Each check raises AssertionError naming the clause that does not hold.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from pydantic import ValidationError

from vqkv.cache import attach
from vqkv.codebooks import CodebookLearner
from vqkv.compressor import KVCompressor
from vqkv.errors import NotFittedError, StateError
from vqkv.groupings import ChannelStats, Grouping
from vqkv.layouts import PAGE_TOKENS
from vqkv.predictors import Predictor
from vqkv.quantizers import Quantizer
from vqkv.registry import Config, config_class
from vqkv.rotation import rope_pairs
from vqkv.states import States
from vqkv.transforms import Transform

__all__ = [
    "check_cache",
    "check_grouping",
    "check_learner",
    "check_predictor",
    "check_quantizer",
    "check_transform",
]

SAMPLES, SUBSPACES, DIM = 512, 3, 4


def check_quantizer(cls: type[Quantizer], *, dim: int = DIM, **settings: Any) -> None:
    """Check a quantizer class, built with `settings`, on subvectors of `dim` channels.

    Codes are integers in range and deterministic, reconstruction beats the zero vector, order of
    vectors does not matter, state survives a round trip, `planned_bytes` tells the truth, and
    misuse is refused.
    """
    _check_config(cls, settings)
    x = _samples(dim)
    quantizer = cls(**settings)
    if not quantizer.config.data_free:
        _raises(NotFittedError, lambda: quantizer.encode(x), "encode before fit")
    bad = x.clone()
    bad[7, 1, 0] = float("nan")
    _raises(StateError, lambda: cls(**settings).fit(bad), "fit on NaN")
    _raises(StateError, lambda: cls(**settings).fit(x[0]), "fit on [M, d]")
    assert quantizer.fit(x, seed=1) is quantizer, "fit returns the quantizer"

    codes = quantizer.encode(x)
    stages, bits = quantizer.config.stages(dim), quantizer.config.bits()
    assert codes.shape == (SAMPLES, SUBSPACES, stages), (
        f"codes have shape [N, M, S] = {[SAMPLES, SUBSPACES, stages]}, got {list(codes.shape)}"
    )
    assert not codes.dtype.is_floating_point, f"codes are integers, got {codes.dtype}"
    assert int(codes.min()) >= 0 and int(codes.max()) < 2**bits, (
        f"codes of {bits} bits lie in 0..{2**bits - 1}, got {int(codes.min())}..{int(codes.max())}"
    )
    assert torch.equal(codes, quantizer.encode(x)), "encode is deterministic"
    run = quantizer.config.token_group
    runs = torch.randperm(SAMPLES // run, generator=torch.Generator().manual_seed(2))
    order = (runs.unsqueeze(1) * run + torch.arange(run)).flatten()
    assert torch.equal(quantizer.encode(x[order]), codes[order]), "encode treats vectors alike"

    decoded = quantizer.decode(codes)
    assert decoded.shape == x.shape, f"decode gives {list(x.shape)}, got {list(decoded.shape)}"
    assert decoded.dtype == torch.float32, f"decode gives float32, got {decoded.dtype}"
    assert bool(torch.isfinite(decoded).all()), "decode gives finite values"
    assert (decoded - x).square().mean() < x.square().mean(), "decode beats the zero vector"

    again = cls(**settings).fit(x, seed=1)
    assert torch.equal(again.encode(x), codes), "the same seed and samples give the same codes"
    state = quantizer.state()
    planned = quantizer.planned_bytes(SUBSPACES, dim)
    held = sum(tensor.nbytes for tensor in state.values())
    assert planned == held, f"planned_bytes says {planned}, state has {held}"
    other = cls(**settings)
    other.load_state(state)
    assert torch.equal(other.encode(x), codes), "state carries everything that encode needs"
    assert torch.equal(other.decode(codes), decoded), "state carries everything that decode needs"
    _raises(StateError, lambda: cls(**settings).load_state({"nonsense": x}), "a wrong state name")


def check_learner(cls: type[CodebookLearner], *, dim: int = DIM, **settings: Any) -> None:
    """Check a learner class, built with `settings`, on subvectors of `dim` channels.

    Codewords have the right shape and are deterministic, the mean error beats a single mean,
    only how weights compare matters, health is reported, and misuse is refused.
    """
    _check_config(cls, settings)
    x = _samples(dim)
    _raises(NotFittedError, cls(**settings).check_fitted, "use before fit")
    _raises(StateError, lambda: cls(**settings).fit(x[:3], 8), "fewer samples than codewords")
    learner = cls(**settings).fit(x, 16, seed=1)
    learner.check_fitted()
    books = learner.codewords_
    assert books.ndim == 4 and (books.shape[0], *books.shape[2:]) == (SUBSPACES, 16, dim), (
        f"codewords have shape [M, S, K, d] = [{SUBSPACES}, S, 16, {dim}], got {list(books.shape)}"
    )
    assert bool(torch.isfinite(books).all()), "codewords are finite"
    again = cls(**settings).fit(x, 16, seed=1)
    assert torch.equal(again.codewords_, books), "the same seed and samples give the same codewords"
    light, heavy = (
        cls(**settings).fit(x, 16, torch.full((SAMPLES,), weight), seed=1).codewords_
        for weight in (1.0, 2.0)
    )
    assert torch.allclose(light, heavy, atol=1e-5), "only how weights compare matters"
    assert learner.health_, "health is reported"

    residual = x
    for stage in books.unbind(1):
        nearest = torch.cdist(residual.transpose(0, 1), stage).argmin(-1)  # [M, N]
        chosen = torch.stack([book[code] for book, code in zip(stage, nearest, strict=True)], 1)
        residual = residual - chosen
    spread = (x - x.mean(0)).square().mean()
    assert residual.square().mean() < spread, "16 codewords beat a single mean"


def check_grouping(
    cls: type[Grouping], *, head_dim: int = 16, heads: int = 4, **settings: Any
) -> None:
    """Check a grouping class: orders are permutations, and `keeps_pairs` tells the truth."""
    _check_config(cls, settings)
    grouping = cls(**settings).resolved(heads, head_dim)
    energy = torch.rand(heads, head_dim, generator=torch.Generator().manual_seed(0))
    for pairs in ((), rope_pairs("half", head_dim), rope_pairs("interleaved", head_dim)):
        order = grouping.permutation(head_dim, heads, ChannelStats(energy, pairs))
        units = heads if grouping.head_local else 1
        assert order.shape == (units, heads * head_dim // units), (
            f"permutation has shape [U, C / U], got {list(order.shape)}"
        )
        channels = torch.arange(heads * head_dim)
        assert torch.equal(order.flatten().sort().values, channels), "every channel comes once"
        if grouping.head_local:
            assert bool((order // head_dim == torch.arange(heads)[:, None]).all()), (
                "a head-local grouping keeps channels in their head"
            )
        group = torch.empty(heads * head_dim, dtype=torch.int64)
        group[order.flatten()] = channels // grouping.dim
        whole = all(
            group[h * head_dim + i] == group[h * head_dim + j]
            for h in range(heads)
            for i, j in pairs
        )
        if grouping.keeps_pairs(head_dim, pairs):
            assert whole, f"keeps_pairs says that pairs {pairs} stay whole, but they do not"


def check_transform(
    cls: type[Transform], *, heads: int = 2, head_dim: int = 16, **settings: Any
) -> None:
    """Check a transform class: invertible, side as declared, state survives a round trip."""
    _check_config(cls, settings)
    x = 3 * torch.randn(64, heads, head_dim, generator=torch.Generator().manual_seed(0)) + 1
    transform = cls(**settings)
    if transform.needs_data:
        _raises(NotFittedError, lambda: transform.forward(x), "forward before fit")
    root = torch.randn(heads, head_dim, head_dim, generator=torch.Generator().manual_seed(1))
    transform.fit(States.of(x), root @ root.transpose(1, 2) if transform.metric else None)
    z, side = transform.forward(x)
    assert z.shape == x.shape, f"forward keeps the shape {list(x.shape)}, got {list(z.shape)}"
    declared = transform.side_count(heads, head_dim)
    stored = 0 if side is None else side.shape[1]
    assert stored == declared, f"side_count says {declared} scalars per token, side has {stored}"
    assert side is None or side.dtype == torch.float16, "side is stored in fp16"
    back = transform.inverse(z, side)
    assert torch.allclose(back, x, atol=1e-4, rtol=1e-4), "inverse undoes forward"
    run = transform.token_group
    one, _ = transform.forward(x[run : 2 * run])
    assert torch.allclose(one, z[run : 2 * run], atol=1e-5), "forward treats tokens alike"
    state = transform.state()
    planned = transform.planned_bytes(heads, head_dim)
    held = sum(tensor.nbytes for tensor in state.values())
    assert planned == held, f"planned_bytes says {planned}, state has {held}"
    other = cls(**settings)
    other.load_state(state)
    assert torch.equal(other.forward(x)[0], z), "state carries everything that forward needs"


def check_predictor(
    cls: type[Predictor], *, heads: int = 2, head_dim: int = 16, **settings: Any
) -> None:
    """Check a predictor class: deterministic, no noise, state survives a round trip.

    `settings` name the sources where the class does not take any two.
    """
    sources = settings.pop("sources", ({"stream": "keys", "back": 1},))
    settings = {"sources": sources, **settings}
    _check_config(cls, settings)
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(64, heads, head_dim, generator=generator) for _ in sources]
    x = torch.randn(64, heads, head_dim, generator=generator) + sum(given)
    predictor = cls(**settings)
    if predictor.needs_data:
        _raises(NotFittedError, lambda: predictor.predict(given), "predict before fit")
    assert predictor.fit(States.of(x), [States.of(s) for s in given]) is predictor, (
        "fit returns the predictor"
    )
    predicted = predictor.predict(given)
    assert predicted.shape == x.shape, f"predict gives {list(x.shape)}, got {list(predicted.shape)}"
    assert bool(torch.isfinite(predicted).all()), "predict gives finite values"
    assert (x - predicted).square().mean() < x.square().mean(), "predict beats the zero vector"
    one = predictor.predict([source[5:6] for source in given])
    assert torch.allclose(one, predicted[5:6], atol=1e-5), "predict treats tokens alike"
    if predictor.head_local and heads > 1:
        moved = [torch.cat([s[:, :1], s[:, 1:] + 1], 1) for s in given]
        assert torch.equal(predictor.predict(moved)[:, 0], predicted[:, 0]), (
            "head_local says that heads do not mix, but they do"
        )
    state = predictor.state()
    planned = predictor.planned_bytes(heads, head_dim)
    held = sum(tensor.nbytes for tensor in state.values())
    assert planned == held, f"planned_bytes says {planned}, state has {held}"
    other = cls(**settings)
    other.load_state(state)
    assert torch.equal(other.predict(given), predicted), "state carries everything"
    _raises(StateError, lambda: cls(**settings).load_state({"nonsense": x}), "a wrong state name")


def check_cache(compressor: KVCompressor, model: Any) -> None:
    """Check a fitted compressor in the cache of a model: codes are final and really read.

    A token's code never changes, a copy shares codebooks but not codes, cropping and continuing
    works, and destroying the stored codes changes what the model says.
    """
    window = PAGE_TOKENS + compressor.scheme.residency.window
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, window + 2 * PAGE_TOKENS), generator=generator)
    ids = ids.to(model.device)
    with attach(model, compressor) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(ids[:, :window], past_key_values=cache)
        layer = next(iter(cache.coded_layers.values()))
        before = {name: t.clone() for name, t in layer.tensors().items() if "code" in name}
        assert layer.coded[0] > 0, "tokens that leave the window are coded"
        copied = copy.deepcopy(cache)
        logits = model(ids[:, window:], past_key_values=cache).logits
        for name, tensor in before.items():
            after = layer.tensors()[name]
            kept = tuple(slice(size) for size in tensor.shape)
            assert torch.equal(after[kept], tensor), "a token's code never changes"
        assert torch.equal(
            model(ids[:, window:], past_key_values=copy.deepcopy(copied)).logits, logits
        ), "a copy reads as the original"
        # Where runs of tokens share a scale, only the exact tail can be cut anywhere.
        together = any(codec.layout.token_group > 1 for _, codec in compressor.codecs())
        removed = compressor.scheme.residency.window if together else PAGE_TOKENS
        cache.crop(-removed)
        assert cache.get_seq_length() == ids.shape[1] - removed, "crop shortens the cache"
        model(ids[:, -removed:], past_key_values=cache)

        for coded in copied.coded_layers.values():
            for name, tensor in coded.tensors().items():
                if name.endswith(("_codes", "_side")):
                    tensor.zero_()
        destroyed = model(ids[:, window:], past_key_values=copied).logits
        assert not torch.equal(destroyed, logits), "the stored codes are really read"


def _check_config(cls: Any, settings: dict[str, Any]) -> None:
    config = config_class(cls)
    assert issubclass(config, Config), f"{cls.__name__}.Config derives from vqkv.registry.Config"
    built = config(**settings)
    assert isinstance(built.type, str), "the config has a `type`"  # type: ignore[attr-defined]
    assert config.model_validate(built.model_dump(mode="json")) == built, "the config round-trips"
    _raises(ValidationError, lambda: config(**settings, **{"no_such_field": 1}), "an unknown field")
    if not issubclass(cls, Config):
        fresh = cls(**settings)
        learned = [name for name in vars(fresh) if name.endswith("_")]
        assert not learned, f"the constructor only stores settings, but sets {learned}"
    assert pickle.loads(pickle.dumps(built)) == built, "the config can be pickled"


def _samples(dim: int) -> torch.Tensor:
    return torch.randn(SAMPLES, SUBSPACES, dim, generator=torch.Generator().manual_seed(0))


def _raises(kind: type[Exception], call: Any, what: str) -> None:
    try:
        call()
    except kind:
        return
    except Exception as error:
        raise AssertionError(f"{what} raises {kind.__name__}, not {error!r}") from error
    raise AssertionError(f"{what} raises {kind.__name__}, but nothing was raised")
