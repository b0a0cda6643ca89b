"""Trellis codes: bits shared out, paths, and what they cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqkv.codec import Codec
from vqkv.errors import SchemeError, StateError
from vqkv.quantizers.product import ProductQuantizer
from vqkv.quantizers.shared_bits import SharedBits, growth
from vqkv.quantizers.trellis import SCALE_BITS, Trellis
from vqkv.scheme import StreamConfig, merge
from vqkv.scheme_files import load_scheme, scheme_from_dict
from vqkv.states import States

VARIANCES = st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=12)


def tokens(count: int, dim: int = 16, seed: int = 0) -> torch.Tensor:
    """Vectors `[N, 1, d]` of very different lengths, with channels of falling variance."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.exp(0.7 * torch.randn(count, 1, 1, generator=generator))
    channels = 0.7 ** torch.arange(dim)
    return lengths * channels * torch.randn(count, 1, dim, generator=generator)


def fitted(x: torch.Tensor, **settings: Any) -> Trellis:
    trellis = Trellis(**{"rate": 2.0, "memory": 8, **settings})
    trellis.fit(x)
    return trellis


# -- bits ------------------------------------------------------------------------------------


@given(VARIANCES, st.integers(1, 6))
def test_every_next_bit_goes_where_it_gains_most(variances: list[float], most_bytes: int) -> None:
    ordered = sorted(variances, reverse=True)
    most_bits = 8 * most_bytes
    pairs, gains = growth(ordered, most_bytes, most_bits)
    assert len(pairs) == 8 * len(gains) == 8 * most_bytes
    assert (gains[1:] <= gains[:-1]).all()
    for bits in SharedBits(pairs, gains, len(ordered)).widths:
        assert (bits[1:] <= bits[:-1]).all()  # a weaker pair never has more
    assert int(bits.sum()) == 8 * most_bytes


@settings(deadline=None)
@given(
    VARIANCES,
    st.lists(st.integers(-8, 7), min_size=1, max_size=20),
    st.integers(0, 100),
    st.integers(1, 5),
)
def test_a_run_spends_its_budget_where_it_gains_most(
    variances: list[float], lengths: list[int], budget: int, most_bytes: int
) -> None:
    shared = SharedBits(*growth(variances, most_bytes, 8 * most_bytes), len(variances))
    octaves = 0.5 * torch.tensor(lengths)
    (found,) = shared.bytes_of(octaves.unsqueeze(0), budget)
    assert int(found.sum()) == min(budget, most_bytes * len(lengths))
    gains = torch.cat([shared.gains.long(), torch.tensor([-(10**6)])])
    offsets = (8 * octaves).long()
    last = gains[(found - 1).clamp_min(0)] + offsets  # what each token's last byte gained
    following = gains[found] + offsets
    least, most = last[found > 0], following[found < most_bytes]
    if len(least) and len(most):
        assert least.min() >= most.max()


def test_runs_do_not_touch_each_other() -> None:
    shared = SharedBits(*growth([4.0, 1.0, 0.1], 4, 32), 3)
    octaves = torch.randn(5, 7).mul(2).round()
    together = shared.bytes_of(octaves, 11)
    apart = torch.cat([shared.bytes_of(run.unsqueeze(0), 11) for run in octaves])
    assert torch.equal(together, apart)


# -- codes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [1, 4, 64])
def test_codes_fill_no_more_than_the_rate_says(run: int) -> None:
    x = tokens(256)
    trellis = fitted(x, run=run)
    codes = trellis.encode(x)
    assert codes.shape == (256, 1, 4)  # 2 bits of 16 channels
    assert int(codes.min()) >= 0 and int(codes.max()) <= 255


def test_long_tokens_get_more_bits_and_all_err_about_alike() -> None:
    x = tokens(2048)
    trellis = fitted(x, run=64)
    scale, strings = trellis._read(trellis.encode(x)[:, 0], 0)
    assert int(strings.counts.sum()) == 2048 * 4 - 2048 * SCALE_BITS // 8
    assert torch.corrcoef(torch.stack([scale.float(), strings.counts.float()]))[0, 1] > 0.8


def test_sharing_bits_over_a_run_beats_bits_for_each_token() -> None:
    """Of tokens of very different lengths; and both beat k-means at the same rate."""
    x = tokens(8192, seed=1)
    held_out = tokens(2048, seed=2)

    def error(quantizer: Trellis | ProductQuantizer, given: torch.Tensor) -> float:
        return float((quantizer.decode(quantizer.encode(given)) - given).square().mean())

    product = ProductQuantizer(code_bits=8)
    product.fit(x.view(-1, 4, 4))
    plain = error(product, held_out.view(-1, 4, 4))
    shared = error(fitted(x, run=64, memory=10), held_out)
    apart = error(fitted(x, run=1, rate=2.5, memory=10), held_out)  # half a byte is a length
    assert shared < 0.7 * plain and shared < apart


def test_learning_lowers_the_error() -> None:
    (health,) = fitted(tokens(4096), iterations=6).health_
    assert health.inertia[-1] < health.inertia[0]
    assert 0 < health.entropy <= 8


def test_tokens_of_zeros_and_of_great_length_are_coded() -> None:
    x = tokens(512)
    trellis = fitted(x)
    x[::3] = 0
    x[1::3] *= 1e4
    decoded = trellis.decode(trellis.encode(x))
    assert decoded.isfinite().all()
    assert decoded[::3].square().sum(2).max() < x[2::3].square().sum(2).mean()


def test_one_channel_pair_that_never_moves_gets_no_bits() -> None:
    x = tokens(512)
    x[:, :, 4:6] = 0
    trellis = fitted(x)
    decoded = trellis.decode(trellis.encode(x))
    assert (decoded[:, :, 4:6] == 0).all()


def test_a_channel_that_never_moved_may_move_without_hurting_others() -> None:
    x = tokens(2048)
    x[:, :, 3:] = 0
    trellis = fitted(x, memory=6)
    moved = x.clone()
    moved[:, :, 7] = 3e-4
    errors = [(trellis.decode(trellis.encode(y)) - y)[..., :3].square().mean() for y in (x, moved)]
    assert errors[1] < 2 * errors[0]


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_values_of_any_size_are_learned(scale: float) -> None:
    x = tokens(512)
    relative = []
    for y in (x, scale * x):
        trellis = fitted(y)
        error = (trellis.decode(trellis.encode(y)) - y).double()
        relative.append(float(error.square().mean() / y.double().square().mean()))
    assert relative[1] == pytest.approx(relative[0], rel=0.05)


def test_no_tokens_have_no_codes() -> None:
    trellis = fitted(tokens(256))
    codes = trellis.encode(tokens(0))
    assert codes.shape == (0, 1, 4) and trellis.decode(codes).shape == (0, 1, 16)


def test_subvectors_share_a_table_but_no_bits() -> None:
    x = torch.cat([tokens(512), 3 * tokens(512, seed=1)], 1)
    trellis = fitted(x)
    assert trellis.state()["table"].shape == (256, 2)
    codes = trellis.encode(x)
    alone = trellis.encode(torch.cat([x[:, :1], torch.zeros_like(x[:, :1])], 1))
    assert torch.equal(codes[:, 0], alone[:, 0])


def test_a_codec_fills_up_a_run_that_is_not_whole() -> None:
    config = StreamConfig.model_validate(
        {
            "grouping": {"type": "whole", "scope": "layer"},
            "quantizer": {"type": "trellis", "rate": 2, "memory": 8},
        }
    )
    codec = Codec(config, heads=2, head_dim=8)
    x = tokens(200).view(200, 2, 8)
    codec.fit(States.of(x), samples=200)
    assert codec.layout.token_group == 64 and codec.layout.bits_per_value == 2
    found = codec.there_and_back(x)
    assert found.shape == x.shape
    whole = codec.decode(codec.encode(x[:192]))
    assert torch.equal(found[:192], whole)
    with pytest.raises(StateError, match="whole runs of 64 tokens"):
        codec.encode(x)


# -- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, dim, message",
    [
        ({"rate": 2}, 15, "pairs of channels"),
        ({"rate": 2.03}, 16, "whole bytes"),
        ({"rate": 0.5, "run": 1}, 16, "all for its length"),
        ({"rate": 4, "memory": 8}, 16, "need at least 10, given 8"),
        ({"rate": 2, "run": 48}, 16, "48 tokens do not divide a page of 64"),
    ],
)
def test_rates_that_cannot_be_are_refused(settings: dict[str, Any], dim: int, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        Trellis(**settings).config.stages(dim)


def test_a_run_that_is_not_whole_is_refused() -> None:
    trellis = fitted(tokens(256))
    with pytest.raises(StateError, match="whole runs of 64 tokens"):
        trellis.encode(tokens(63))
    with pytest.raises(StateError, match="decoded whole, given 63 tokens"):
        trellis.decode(trellis.encode(tokens(64))[:63])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"residency": {"window": 0}}, "runs of tokens need a window"),
        ({"keys": {"sharing": "layer"}}, "codes each subvector by itself"),
    ],
)
def test_schemes_that_cannot_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        scheme_from_dict(merge(load_scheme("recommended-2bit").to_dict(), changes))


@pytest.mark.parametrize("name", ["table", "order", "spread", "grown", "gains"])
def test_damaged_state_is_refused(name: str) -> None:
    state = fitted(tokens(256)).state()
    state[name] = state[name][..., :-1]
    with pytest.raises(StateError, match="trellis"):
        Trellis(rate=2.0, memory=8).load_state(state)
