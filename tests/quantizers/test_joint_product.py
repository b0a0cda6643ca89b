"""Codes chosen together: what a coupling of groups changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vqkv.errors import SchemeError, StateError
from vqkv.quantizers.joint_product import JointProductQuantizer
from vqkv.quantizers.product import ProductQuantizer
from vqkv.scheme import merge
from vqkv.scheme_files import load_scheme, scheme_from_dict

UNITS, GROUPS, DIM = 2, 3, 2
SUBSPACES, CHANNELS = UNITS * GROUPS, GROUPS * DIM
SETTINGS: dict[str, Any] = {"code_bits": 3, "learner": {"type": "kmeans", "iterations": 5}}


def samples(count: int = 400, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, SUBSPACES, DIM, generator=torch.Generator().manual_seed(seed))


def metric(strength: float = 0.8) -> torch.Tensor:
    """`[U, n, n]`: unit blocks, and errors of all groups alike in sign add up."""
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(UNITS, GROUPS, DIM, generator=generator)
    direction = (direction / direction.norm(dim=2, keepdim=True)).flatten(1)
    full = strength * direction.unsqueeze(2) * direction.unsqueeze(1)
    group = torch.arange(CHANNELS) // DIM
    own = group.unsqueeze(0) == group.unsqueeze(1)
    return torch.where(own, torch.eye(CHANNELS), full)


def coupling() -> torch.Tensor:
    return metric() - torch.eye(CHANNELS)


def cost(error: torch.Tensor) -> float:
    wide = error.reshape(len(error), UNITS, CHANNELS)
    return float(torch.einsum("nui,uij,nuj->n", wide, metric(), wide).mean())


def joint(**settings: Any) -> JointProductQuantizer:
    quantizer = JointProductQuantizer(**{**SETTINGS, **settings})
    quantizer.couple(coupling())
    quantizer.fit(samples())
    return quantizer


def error(quantizer: Any, x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = quantizer.decode(quantizer.encode(x)) - x
    return found


def test_errors_cost_less_than_those_of_codes_chosen_alone() -> None:
    x = samples(seed=1)
    alone = ProductQuantizer(**SETTINGS).fit(samples())
    assert cost(error(joint(), x)) < 0.9 * cost(error(alone, x))


def test_no_code_can_be_changed_for_the_better() -> None:
    """After enough sweeps each group has the best codeword as the others are."""
    quantizer = joint(sweeps=20)
    x = samples(30, seed=2)
    codes = quantizer.encode(x)
    best = cost(quantizer.decode(codes) - x)
    for subspace in range(SUBSPACES):
        for code in range(8):
            moved = codes.clone()
            moved[:, subspace] = code
            each = quantizer.decode(moved) - x
            kept = quantizer.decode(codes) - x
            wide = [e.reshape(len(x), UNITS, CHANNELS) for e in (each, kept)]
            costs = [torch.einsum("nui,uij,nuj->n", e, metric(), e) for e in wide]
            assert bool((costs[0] >= costs[1] - 1e-2).all()), (subspace, code, best)


@pytest.mark.parametrize("what", ["sweeps", "rounds"])
def test_more_of_them_do_no_harm(what: str) -> None:
    few, many = (cost(error(joint(**{"sweeps": 8, what: count}), samples())) for count in (1, 8))
    assert many <= few * (1 + 1e-3)


def test_without_a_coupling_it_is_a_product_code() -> None:
    x = samples(seed=1)
    alone = JointProductQuantizer(**SETTINGS).fit(samples())
    product = ProductQuantizer(**SETTINGS).fit(samples())
    assert torch.equal(alone.encode(x), product.encode(x))


def test_weights_draw_codewords() -> None:
    x = samples()
    heavy = torch.where(torch.arange(len(x)) < 40, 100.0, 1.0)
    plain, weighted = (JointProductQuantizer(**SETTINGS) for _ in range(2))
    for quantizer, weights in ((plain, None), (weighted, heavy)):
        quantizer.couple(coupling())
        quantizer.fit(x, weights)
    assert cost(error(weighted, x[:40])) < cost(error(plain, x[:40]))


def test_state_carries_the_coupling() -> None:
    quantizer = joint()
    other = JointProductQuantizer(**SETTINGS)
    other.load_state(quantizer.state())
    assert torch.equal(other.encode(samples(seed=1)), quantizer.encode(samples(seed=1)))
    for wrong in (coupling(), coupling()[:, :4].half(), coupling()[0].half()):
        with pytest.raises(StateError, match=r"coupling is float16 \[U, n, n\] of 12 channels"):
            other.load_state({**quantizer.state(), "coupling": wrong})


@pytest.mark.parametrize(
    "changed",
    [
        {"transforms": []},
        {"transforms": [{"type": "spectral", "metric": "fisher"}]},
        {"grouping": {"dim": 8}},
        {"quantizer": {"code_bits": 6}},
        {"grouping": {"type": "strided", "dim": 4}},
        {"sharing": "head"},
    ],
)
def test_schemes_in_which_groups_are_not_apart_are_refused(changed: dict[str, Any]) -> None:
    scheme = load_scheme("fast-2bit").to_dict()
    with pytest.raises(SchemeError, match="'joint_product' needs groups that are apart"):
        scheme_from_dict(merge(scheme, {"keys": changed}))
