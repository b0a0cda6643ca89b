"""`Center` and `ChannelScale`, and the statistics that they learn from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vqkv.errors import NotFittedError, StateError
from vqkv.states import States
from vqkv.transforms import TRANSFORMS
from vqkv.transforms.base import ChannelTransform
from vqkv.transforms.center import Center
from vqkv.transforms.channel_scale import ChannelScale
from vqkv.transforms.statistics import moments

SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("center", {}),
    *[("channel_scale", {"stat": stat}) for stat in ("std", "rms", "absmax", "sqrt_absmax")],
]
every = pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=str)


def states(tokens: int = 100) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens, 2, 5, generator=generator) * torch.arange(1, 6) + 3


def in_chunks(x: torch.Tensor, *sizes: int) -> States:
    return States(len(x), lambda: iter(x.split(list(sizes))))


def build(name: str, settings: dict[str, Any]) -> ChannelTransform:
    transform: ChannelTransform = TRANSFORMS.get(name)(**settings)  # type: ignore[assignment]
    return transform


@every
def test_inverse_undoes_forward(name: str, settings: dict[str, Any]) -> None:
    x = states()
    transform = build(name, settings).fit(States.of(x))
    z, side = transform.forward(x)
    assert side is None
    torch.testing.assert_close(transform.inverse(z, None), x, rtol=1e-5, atol=1e-5)


@every
def test_chunks_change_nothing(name: str, settings: dict[str, Any]) -> None:
    x = states()
    whole = build(name, settings).fit(States.of(x)).state()["channels"]
    parts = build(name, settings).fit(in_chunks(x, 1, 40, 0, 59)).state()["channels"]
    assert torch.equal(whole, parts)


def test_moments_of_chunks_are_those_of_the_whole() -> None:
    x = states()
    whole, parts = moments(States.of(x)), moments(in_chunks(x, 7, 1, 92))
    assert whole.tokens == parts.tokens == 100
    for found in (whole, parts):
        torch.testing.assert_close(found.mean, x.double().mean(0), rtol=1e-12, atol=0)
        torch.testing.assert_close(found.std, x.double().std(0, correction=0), rtol=1e-12, atol=0)
        torch.testing.assert_close(
            found.rms, x.double().square().mean(0).sqrt(), rtol=1e-12, atol=0
        )
        assert torch.equal(found.absmax, x.double().abs().amax(0))


def learned(name: str, settings: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
    return build(name, settings).fit(States.of(x)).state()["channels"]


def test_what_is_learned() -> None:
    x = torch.tensor([1.0, 1.0, 1.0, 5.0]).view(4, 1, 1)  # mean 2, std sqrt 3
    assert learned("center", {}, x).item() == 2
    expected = {"std": 3**0.5, "rms": 7**0.5, "absmax": 5.0, "sqrt_absmax": 5**0.5}
    for stat, value in expected.items():
        scale = learned("channel_scale", {"stat": stat}, x)
        assert scale.item() == torch.tensor(value).half().item()


@pytest.mark.parametrize("value", [0.0, 0.1, 1000.3])
def test_constant_channels_keep_their_scale(value: float) -> None:
    x = states()
    x[:, 0, 2] = value
    transform = ChannelScale(stat="std").fit(in_chunks(x, 30, 70))
    assert transform.channels()[0, 2] == 1.0
    assert (transform.channels()[1] > 0.5).all()
    z, _ = transform.forward(x)
    assert z.isfinite().all()


def test_channels_beyond_fp16_are_refused() -> None:
    x = states()
    x[:, 1, 1] += 1e6
    with pytest.raises(StateError, match=r"Center learned values up to 1e\+06, beyond fp16's"):
        Center().fit(States.of(x))


def test_nothing_to_learn_from() -> None:
    with pytest.raises(StateError, match="no tokens to learn from"):
        Center().fit(in_chunks(torch.zeros(0, 2, 5), 0))


@every
def test_not_fitted(name: str, settings: dict[str, Any]) -> None:
    transform = build(name, settings)
    for use in (lambda: transform.forward(states()), transform.state):
        with pytest.raises(NotFittedError, match="has not been fitted: call fit first"):
            use()


@every
def test_state_round_trip(name: str, settings: dict[str, Any]) -> None:
    fitted, loaded = build(name, settings).fit(States.of(states())), build(name, settings)
    loaded.load_state(fitted.state())
    assert torch.equal(loaded.forward(states())[0], fitted.forward(states())[0])
    assert fitted.planned_bytes(2, 5) == sum(t.nbytes for t in fitted.state().values())


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"channel": torch.zeros(2, 5, dtype=torch.float16)},
        {"channels": torch.zeros(2, 5)},
        {"channels": torch.zeros(10, dtype=torch.float16)},
    ],
    ids=["none", "name", "type", "rank"],
)
def test_state_of_another_form_is_refused(state: dict[str, torch.Tensor]) -> None:
    with pytest.raises(StateError, match=r"state holds 'channels', float16 \[H, D\]; given"):
        Center().load_state(state)


def test_transforms_without_state_take_none() -> None:
    with pytest.raises(StateError, match=r"Hadamard has no state, given \['channels'\]"):
        TRANSFORMS.get("hadamard")().load_state({"channels": torch.zeros(1)})
