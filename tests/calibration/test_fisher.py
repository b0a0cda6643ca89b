"""Fisher weights: gradients of the loss by keys and values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.calibration.stubs import StubTokenizer, scheme, write_text
from tests.tiny_models import tiny_model
from vqkv.attention import attention_modules
from vqkv.cache.rope import RotaryAdapter
from vqkv.calibration import StateCapture, calibrate
from vqkv.compressor import KVCompressor, StateSource
from vqkv.errors import SchemeError, StateError
from vqkv.geometry import Geometry
from vqkv.layouts import Stream
from vqkv.scheme import Scheme
from vqkv.scheme_files import scheme_from_dict
from vqkv.states import States

IDS = torch.randint(3, 97, (1, 24), generator=torch.Generator().manual_seed(0))
KINDS = ("grad_keys", "grad_pre_keys", "grad_values", "values")


def captured(model: Any, layer: int = 0) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    wants: dict[int, list[Any]] = {layer: list(KINDS)}

    def take(layer: int, kind: Any, states: torch.Tensor) -> None:
        found[kind] = states.clone()

    with StateCapture(model, wants, take) as capture:
        capture.run(IDS)
    return found


@pytest.mark.parametrize("projection", ["k_proj", "v_proj"])
def test_gradients_are_those_of_the_loss(projection: str) -> None:
    """A small step along the gradient changes the loss as the gradient says."""
    model: Any = tiny_model("llama", torch.float64)
    found = captured(model)
    gradient = found["grad_pre_keys" if projection == "k_proj" else "grad_values"]
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(1)).double()

    def loss(step: float) -> float:
        def moved(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
            return out + step * direction.transpose(1, 2).flatten(2)

        hook = getattr(model.model.layers[0].self_attn, projection).register_forward_hook(moved)
        with torch.no_grad():
            logits = model(IDS).logits[0, :-1]
        hook.remove()
        return float(torch.nn.functional.cross_entropy(logits, IDS[0, 1:], reduction="sum"))

    slope = (loss(0.05) - loss(-0.05)) / 0.1
    assert slope == pytest.approx(float((gradient.double() * direction).sum()), rel=1e-2)


def test_gradients_before_rope_are_turned_back() -> None:
    model = tiny_model("llama")
    found = captured(model)
    adapter = RotaryAdapter(model, [0])
    tables = adapter.tables(0, torch.arange(24)[None])
    torch.testing.assert_close(
        found["grad_pre_keys"], adapter.unrotate(0, found["grad_keys"], tables)
    )


def test_the_model_is_as_before() -> None:
    model = tiny_model("llama")
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    values = captured(model)["values"]
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not values.requires_grad
    assert len(attention_modules(model)) == 2


class Weighted(StateSource):
    """Two clusters of tokens, of which the first one counts."""

    def states(self, layer: int, stream: Stream) -> States:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(400, 2, 16, generator=generator)
        x[200:] += 10
        return States.of(x)

    def gradients(self, layer: int, stream: Stream) -> States:
        gradient = torch.ones(400, 2, 16)
        gradient[200:] = 1e-3
        return States.of(gradient)


@pytest.mark.parametrize("sharing", ["group", "head", "layer", "subspace", "model"])
def test_codewords_go_where_the_weights_are(sharing: str) -> None:
    geometry = Geometry("llama", 1, (0,), 2, 2, 16, False, None)
    errors = []
    for weighted in (
        {"weights": "none"},
        {"weights": "fisher", "weight_power": 0.25},
        {"weights": "fisher"},
    ):
        made = scheme("post", calibration={"samples": 400, **weighted}).to_dict()
        made["keys"] |= {"transforms": [], "sharing": sharing}
        compressor = KVCompressor(scheme_from_dict(made), geometry).fit(Weighted())
        x = Weighted().states(0, "keys").sample(400, 0)[:200]
        codec = compressor.codec(0, "keys")
        errors.append(float((codec.decode(codec.encode(x)) - x).square().mean()))
    assert errors[2] < errors[1] < 0.98 * errors[0]


def test_a_power_of_no_weights_is_refused() -> None:
    with pytest.raises(SchemeError, match="`weight_power` is of `weights`"):
        scheme(calibration={"weight_power": 0.5})


def test_weights_follow_their_channels(tmp_path: Path) -> None:
    """A subvector's weight is the sum over its own channels, in the grouping's order."""
    geometry = Geometry("llama", 1, (0,), 2, 2, 16, False, None)
    made = scheme("post").to_dict()
    made["keys"] |= {"transforms": [], "grouping": {"type": "strided", "dim": 4}}
    codec = KVCompressor(scheme_from_dict(made), geometry).fit(Weighted()).codec(0, "keys")
    gradients = torch.randn(5, 2, 16, generator=torch.Generator().manual_seed(0))
    states = States.of(torch.randn(5, 2, 16))
    (found,) = codec.training_weights(states, States.of(gradients), 5, 0)
    expected = gradients.square().unflatten(2, (4, 4)).sum(2).flatten(1)  # group i mod 4 of a head
    torch.testing.assert_close(found, expected)


def test_weights_go_through_transforms_that_mix_channels() -> None:
    """A step in what is coded changes the loss as the gradient by the state says."""
    geometry = Geometry("llama", 1, (0,), 2, 2, 16, False, None)
    made = scheme("post").to_dict()
    made["keys"] |= {
        "transforms": [{"type": "spectral"}],
        "grouping": {"type": "contiguous", "dim": 1},
    }
    codec = KVCompressor(scheme_from_dict(made), geometry).fit(Weighted()).codec(0, "keys")
    x, gradients = torch.randn(2, 1, 2, 16, generator=torch.Generator().manual_seed(0)).unbind()
    (found,) = codec.training_weights(States.of(x), States.of(gradients), 1, 0)
    (spectral,) = codec.transforms
    z, _ = spectral.forward(x)
    for channel in (0, 5, 31):
        step = torch.zeros(1, 32).index_fill(1, torch.tensor(channel), 1.0).view(1, 2, 16)
        moved = spectral.inverse(z + step, None) - spectral.inverse(z, None)
        slope = (moved * gradients).sum()
        torch.testing.assert_close(found[0, channel], slope.square(), rtol=1e-3, atol=1e-5)


def test_weights_grow_with_the_square_of_a_token_s_scale() -> None:
    geometry = Geometry("llama", 1, (0,), 2, 2, 16, False, None)
    made = scheme("post").to_dict()
    made["keys"]["transforms"] = [{"type": "token_scale", "stat": "rms"}]
    codec = KVCompressor(scheme_from_dict(made), geometry).fit(Weighted()).codec(0, "keys")
    x = torch.randn(1, 2, 16).repeat(2, 1, 1)
    x[1] *= 100
    (found,) = codec.training_weights(States.of(x), States.of(torch.ones_like(x)), 2, 0)
    torch.testing.assert_close(found[1], 1e4 * found[0], rtol=1e-2, atol=0)


def test_a_weighted_calibration(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt", 600)
    tokenizer: Any = StubTokenizer()

    def run(made: Scheme, name: str) -> KVCompressor:
        options: dict[str, Any] = {"tokens": 400, "context": 100, "out": tmp_path / name}
        return calibrate(tiny_model("llama"), tokenizer, made, [text], **options).compressor

    weighted = scheme(calibration={"samples": 400, "weights": "fisher"})
    first = run(weighted, "a")
    again = run(weighted, "b")
    plain = run(scheme(calibration={"samples": 400}), "c")
    for (_, name, a), (_, _, b) in zip(first.tensors(), again.tensors(), strict=True):
        assert torch.equal(a, b), name
    words = [c.codec(1, "values").state()["segments.0.codewords"] for c in (first, plain)]
    assert not torch.equal(*words)


def test_a_source_without_gradients() -> None:
    class Unweighted(Weighted):
        gradients = StateSource.gradients

    geometry = Geometry("llama", 1, (0,), 2, 2, 16, False, None)
    made = scheme("post", calibration={"samples": 400, "weights": "fisher"})
    with pytest.raises(StateError, match="has no gradients of keys of layer 0"):
        KVCompressor(made, geometry).fit(Unweighted())
