"""Codes of heads chosen together: what a coupling of heads changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vqkv.codec import Codec
from vqkv.errors import SchemeError, StateError
from vqkv.quantizers.joint_heads import JointHeadsConfig, JointHeadsQuantizer
from vqkv.quantizers.product import ProductQuantizer
from vqkv.scheme import merge
from vqkv.scheme_files import load_scheme, scheme_from_dict
from vqkv.states import States

HEADS, GROUPS, DIM = 3, 2, 2
SUBSPACES, WIDTH = HEADS * GROUPS, GROUPS * DIM
SETTINGS: dict[str, Any] = {"code_bits": 3, "learner": {"type": "kmeans", "iterations": 5}}
#: c_h: what errors of each head cost alone.
SCALES = torch.tensor([1.0, 4.0, 0.5])


def samples(count: int = 400, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, SUBSPACES, DIM, generator=torch.Generator().manual_seed(seed))


def metric() -> torch.Tensor:
    """`[H, n, H, n]`: errors of all heads alike in sign add up."""
    eye = torch.eye(WIDTH).view(1, WIDTH, 1, WIDTH)
    same = torch.eye(HEADS).view(HEADS, 1, HEADS, 1)
    root = SCALES.sqrt()
    coupled = (same + 0.7 * (1 - same)) * eye
    return root.view(-1, 1, 1, 1) * coupled * root.view(1, 1, -1, 1)


def coupling() -> torch.Tensor:
    """`[B, h, n, h, n]`, all heads in one set."""
    same = torch.eye(HEADS).view(HEADS, 1, HEADS, 1)
    return (metric() * (1 - same) / SCALES.view(1, 1, -1, 1)).unsqueeze(0)


def costs(error: torch.Tensor) -> torch.Tensor:
    """Of each token, `[N]`."""
    wide = error.reshape(len(error), HEADS, WIDTH)
    return torch.einsum("nhi,higj,ngj->n", wide, metric(), wide)


def joint(weights: torch.Tensor | None = None, **settings: Any) -> JointHeadsQuantizer:
    quantizer = JointHeadsQuantizer(**{**SETTINGS, **settings})
    quantizer.couple(coupling())
    quantizer.fit(samples(), weights)
    return quantizer


def error(quantizer: Any, x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = quantizer.decode(quantizer.encode(x)) - x
    return found


def test_errors_cost_less_than_those_of_codes_chosen_alone() -> None:
    x = samples(seed=1)
    alone = ProductQuantizer(**SETTINGS).fit(samples())
    assert costs(error(joint(), x)).mean() < 0.9 * costs(error(alone, x)).mean()


def test_no_code_can_be_changed_for_the_better() -> None:
    quantizer = joint(sweeps=20)
    x = samples(30, seed=2)
    codes = quantizer.encode(x)
    kept = costs(quantizer.decode(codes) - x)
    for subspace in range(SUBSPACES):
        for code in range(8):
            moved = codes.clone()
            moved[:, subspace] = code
            assert bool((costs(quantizer.decode(moved) - x) >= kept - 1e-2).all())


@pytest.mark.parametrize("what", ["sweeps", "rounds"])
def test_more_of_them_do_no_harm(what: str) -> None:
    few, many = (
        costs(error(joint(None, **{"sweeps": 8, what: count}), samples())).mean()
        for count in (1, 8)
    )
    assert many <= few * (1 + 1e-3)


def test_without_a_coupling_it_is_a_product_code() -> None:
    x = samples(seed=1)
    alone = JointHeadsQuantizer(**SETTINGS).fit(samples())
    product = ProductQuantizer(**SETTINGS).fit(samples())
    assert torch.equal(alone.encode(x), product.encode(x))


def test_weights_draw_codewords() -> None:
    x = samples()
    heavy = torch.where(torch.arange(len(x)) < 40, 100.0, 1.0)
    plain, weighted = joint(), joint(heavy)
    assert costs(error(weighted, x[:40])).mean() < costs(error(plain, x[:40])).mean()


def test_state_carries_the_coupling() -> None:
    quantizer = joint()
    other = JointHeadsQuantizer(**SETTINGS)
    other.load_state(quantizer.state())
    assert torch.equal(other.encode(samples(seed=1)), quantizer.encode(samples(seed=1)))
    half = coupling().half()
    for wrong in (coupling(), half[:, :2], half[:, :, :2], half.flatten(2), half[0]):
        with pytest.raises(StateError, match=r"float16 \[B, h, n, h, n\] of 12 channels"):
            other.load_state({**quantizer.state(), "coupling": wrong})


def test_sets_of_heads_know_nothing_of_each_other() -> None:
    """Six heads in two sets are coded as three heads twice."""
    one = joint()
    both = JointHeadsQuantizer(**SETTINGS)
    books = one.state()["codewords"]
    both.load_state(
        {"codewords": torch.cat([books, books]), "coupling": coupling().half().expand(2, *[-1] * 4)}
    )
    x, y = samples(seed=1), samples(seed=2)
    expected = torch.cat([one.encode(x), one.encode(y)], 1)
    assert torch.equal(both.encode(torch.cat([x, y], 1)), expected)


@pytest.mark.parametrize("heads, together", [(1, 1), (3, 3), (8, 8), (12, 6), (13, 1), (32, 8)])
def test_heads_go_into_sets_of_one_size(heads: int, together: int) -> None:
    assert JointHeadsConfig(code_bits=8).coupled_heads(heads) == together


def test_errors_of_which_some_cost_far_more_are_refused() -> None:
    with pytest.raises(StateError, match="beyond fp16's 65504"):
        JointHeadsQuantizer(**SETTINGS).couple(1e5 * coupling())


def test_a_codec_of_one_head_couples_nothing() -> None:
    config = load_scheme("fast-2bit").values.model_copy(update={"predictor": None})
    config = config.model_copy(
        update={"quantizer": config.all_segments[0].quantizer.model_copy(update={"code_bits": 4})}
    )
    x = torch.randn(300, 1, 8, generator=torch.Generator().manual_seed(0))
    codec = Codec(config, 1, 8).fit(States.of(x), samples=300, metric=torch.eye(8)[None])
    assert set(codec.quantizers[0].state()) == {"codewords"}
    with pytest.raises(StateError, match="stream: the metric across heads"):
        Codec(config, 2, 8).fit(
            States.of(x.expand(-1, 2, -1)), samples=300, metric=torch.eye(8).expand(2, 8, 8)
        )


@pytest.mark.parametrize(
    "changed",
    [
        {"transforms": []},
        {"transforms": [{"type": "token_scale"}, {"type": "spectral", "metric": "fisher"}]},
        {"transforms": [{"type": "spectral"}]},
        {"transforms": [{"type": "spectral", "metric": "fisher", "scope": "layer"}]},
        {"sharing": "head"},
        {"grouping": {"type": "across_heads", "dim": 4}},
    ],
)
def test_schemes_in_which_heads_are_not_apart_are_refused(changed: dict[str, Any]) -> None:
    scheme = load_scheme("fast-2bit").to_dict()
    with pytest.raises(SchemeError, match="'joint_heads' needs heads in which errors cost"):
        scheme_from_dict(merge(scheme, {"values": changed}))


def test_a_codec_couples_what_it_codes() -> None:
    """Errors of coded channels cost as much by the coupling as those of states by the metric."""
    heads, head_dim, tokens = 2, 8, 500
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, heads, head_dim, generator=generator)
    root = torch.randn(heads * head_dim, heads * head_dim, generator=generator).double()
    across = (root @ root.T).view(heads, head_dim, heads, head_dim)
    own = torch.stack([across[head, :, head] for head in range(heads)])
    config = load_scheme("fast-2bit").values.model_copy(update={"predictor": None})
    config = config.model_copy(
        update={"quantizer": config.all_segments[0].quantizer.model_copy(update={"code_bits": 4})}
    )
    codec = Codec(config, heads, head_dim)
    codec.fit_space(States.of(x), own, across.unsqueeze(0))
    (quantizer,) = codec.quantizers
    assert isinstance(quantizer, JointHeadsQuantizer)
    # In coded channels a head's own metric is its mean eigenvalue times the unit matrix.
    scales = own.diagonal(dim1=1, dim2=2).mean(1)
    z = torch.randn(20, heads, head_dim, generator=generator)
    pushes = quantizer.coupling_[0].double()
    by_coupling = torch.einsum("h,nhi->n", scales, z.double().square()) + torch.einsum(
        "nhi,higj,g,ngj->n", z.double(), pushes, scales, z.double()
    )
    back = codec.transforms[-1].inverse(_unordered(codec, z), None)
    error = (back - codec.transforms[-1].inverse(torch.zeros_like(z), None)).double()
    by_metric = torch.einsum("nhi,higj,ngj->n", error, across, error)
    torch.testing.assert_close(by_coupling, by_metric, rtol=2e-2, atol=2e-2 * float(scales.max()))


def _unordered(codec: Codec, coded: torch.Tensor) -> torch.Tensor:
    """Channels `[N, H, n]` in the grouping's order, back in the transform's."""
    order = codec.order_ % codec.head_dim
    return torch.empty_like(coded).scatter_(2, order.expand_as(coded), coded)
